"""The documentation as a site: links are right, and no page asks another server for anything."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tools.docs_site import PAGES, ROOT, rewrite_links

# What a browser fetches without being asked; a link that a reader clicks is not among them.
_FETCHED = (
    r"<(?:script|img|iframe|audio|video|source|embed)\b[^>]*\bsrc\s*=\s*[\"']?(?:https?:)?//",
    r"<link\b(?=[^>]*\brel\s*=\s*[\"']?(?:stylesheet|preload|preconnect|dns-prefetch|icon|modulepreload))"
    r"[^>]*\bhref\s*=\s*[\"']?(?:https?:)?//",
    r"@import\s+(?:url\()?[\"']?(?:https?:)?//",
    r"url\(\s*[\"']?(?:https?:)?//",
)
FETCHED = re.compile("|".join(_FETCHED), re.IGNORECASE)


@pytest.mark.parametrize(
    "text",
    [
        '<script src="https://a.example/x.js"></script>',
        "<script async src=//a.example/x.js></script>",
        '<link rel="stylesheet" href="https://fonts.example/css?family=Roboto">',
        '<link href="https://fonts.example" crossorigin rel="preconnect">',
        "@import 'https://a.example/x.css';",
        "src: url(https://fonts.example/x.woff2)",
        '<img alt="" src="http://a.example/x.svg">',
    ],
)
def test_what_a_page_would_fetch_is_found(text: str) -> None:
    assert FETCHED.search(text)


@pytest.mark.parametrize(
    "text", ['<a href="https://pytorch.org">', '<script src="assets/x.js">', "url(data:image/svg)"]
)
def test_what_a_reader_clicks_and_what_lies_beside_the_page_is_no_fetch(text: str) -> None:
    assert not FETCHED.search(text)


def test_links_between_documents_are_those_of_the_site() -> None:
    assert rewrite_links("[a](docs/fit.md#x) ![](docs/demo.svg)", "index.md") == "[a](fit.md#x) ![](demo.svg)"
    assert rewrite_links("[a](../profiles/README.md)", "fit.md") == "[a](cards.md)"
    assert rewrite_links("[a](measured/h200.md)", "cards.md") == "[a](measured-h200.md)"
    same = "[a](https://example.org/b.md) [b](#here) [c](mailto:a@example.org)"
    assert rewrite_links(same, "fit.md") == same


def test_every_relative_link_of_a_document_leads_to_a_file() -> None:
    pages = [*(ROOT / "docs").glob("*.md"), *(ROOT / name for name in PAGES if name.endswith(".md"))]
    wrong = [
        f"{page.relative_to(ROOT)}: {target}"
        for page in pages
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8"))
        if not re.match(r"[a-z]+:", target) and not (page.parent / target).exists()
    ]
    assert wrong == []


@pytest.mark.nightly
def test_the_site_builds_without_a_warning_and_fetches_nothing(tmp_path: Path) -> None:
    if importlib.util.find_spec("mkdocs") is None or importlib.util.find_spec("material") is None:
        pytest.skip("needs MkDocs: pip install -e '.[docs]'")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    paths = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | paths, check=False, capture_output=True, encoding="utf-8", timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    built = [path for path in (tmp_path / "site").rglob("*") if path.suffix in (".html", ".css")]
    assert len([path for path in built if path.suffix == ".html"]) > len(PAGES)
    found = {
        str(path.relative_to(tmp_path)): match[0]
        for path in built
        if (match := FETCHED.search(path.read_text(encoding="utf-8")))
    }
    assert found == {}
    # The theme loads a program from elsewhere for a diagram, and only then.
    assert [path for path in built if path.suffix == ".html" and "mermaid" in path.read_text(encoding="utf-8")] == []
