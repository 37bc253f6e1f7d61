"""The files for GitHub, which run nowhere else, are what their schemas ask for."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FORMS = ROOT / ".github/ISSUE_TEMPLATE"


@pytest.mark.nightly
@pytest.mark.parametrize(
    "schema, files",
    [
        ("github-workflows", sorted((ROOT / ".github/workflows").glob("*.yml"))),
        ("github-issue-forms", sorted(path for path in FORMS.glob("*.yml") if path.name != "config.yml")),
        ("github-issue-config", [FORMS / "config.yml"]),
    ],
)
def test_a_file_for_github_follows_its_schema(schema: str, files: list[Path]) -> None:
    if importlib.util.find_spec("check_jsonschema") is None:
        pytest.skip("needs check-jsonschema: pip install -e '.[test]'")
    assert files
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", f"vendor.{schema}", *map(str, files)]
    done = subprocess.run(command, check=False, capture_output=True, encoding="utf-8", timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_form_asks_for_the_doctors_report() -> None:
    for form in FORMS.glob("*.yml"):
        if form.name != "config.yml":
            assert "lowvram doctor --json" in form.read_text(encoding="utf-8"), form.name


def test_the_workflow_covers_three_systems_and_the_oldest_and_newest_python() -> None:
    text = (ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8")
    assert re.search(r"os: \[ubuntu-latest, windows-latest, macos-latest\]", text)
    least = re.search(r'requires-python = ">=([\d.]+)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert least
    assert f'python: ["{least[1]}", "3.13"]' in text
    for command in ("lowvram --help", "lowvram fit", "lowvram demo --device cpu"):
        assert f"- run: {command}" in text
