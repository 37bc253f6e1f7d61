"""The page of all keys is current, complete, and says what each key means."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from lowvram.config.run_file import full_names, load_run
from tests.flows.typed import typed
from tools.write_run_file_page import PAGE, page

ROOT = Path(__file__).parents[2]


def test_the_page_is_as_the_configuration_is() -> None:
    script = ROOT / "tools/write_run_file_page.py"
    found = subprocess.run([sys.executable, script, "--check"], cwd=ROOT, check=False, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr


def test_the_page_lists_every_key_with_a_sentence() -> None:
    text = page()
    rows = re.findall(r"^\| `(\w+)` \| (.+) \| (.+) \| (.+) \|$", text, re.MULTILINE)
    keys = {key for key, *_ in rows}
    homes = {"model", "data", "train", "run"}
    assert set(full_names()) - homes <= keys
    assert {"dim", "heads", "prompts", "validate_every", "sample_every", "save_every_minutes", "keep", "log"} <= keys
    for key, kind, default, meaning in rows:
        assert len(meaning) > 4, key
        assert meaning.endswith("."), key
        assert kind
        assert default
    for section in (
        'model.attention (kind = "mla")',
        'train.optimizer (name = "muon")',
        "train.rotation",
        "data.train",
    ):
        assert f"## {section}\n" in text


def test_types_and_defaults_are_those_that_a_person_writes() -> None:
    text = page()
    for row in (
        "| `keep` | whole number | `2` |",
        "| `tokens` | count | *required* |",
        "| `disk_budget` | size | none |",
        '| `weights` | `"fp32"` or `"bf16"` | `"fp32"` |',
        "| `dropout` | number | `0.0` |",
        "| `valid` | path or list of table | none |",
        "| `vocabulary` | whole number | the tokenizer's |",
        '| `positions` | table | `{ kind = "rope" }` |',
        '| `optimizer` | table | `{ name = "adamw" }` |',
        '| `schedule` | table | `{ kind = "cosine" }` |',
        '| `log` | list of `"tensorboard"` or `"wandb"` | `[]` |',
    ):
        assert row in text


def test_every_default_is_taken_where_it_is_written(tmp_path: Path) -> None:
    """A run file that writes each default of the page out is the one that leaves them all out."""
    tables: dict[str, list[str]] = {}
    for section, body in re.findall(r"^## (\S+)$(.+?)(?=^## |\Z)", page(), re.MULTILINE | re.DOTALL):
        rows = re.findall(r"^\| `(\w+)` \| .+? \| `(.+?)` \| ", body, re.MULTILINE)
        tables[section] = [f"{key} = {default}" for key, default in rows]
    least = {
        "model": """layers = 2\ndim = 64\nattention = { kind = "gqa", heads = 2, kv_heads = 1, head_dim = 32 }
ffn = { kind = "swiglu", hidden = 128 }""",
        "data": 'train = "a"\ntokenizer = "tok"',
        "train": 'tokens = "1M"',
        "run": 'dir = "r"',
    }
    both = []
    for written in ({}, tables):
        lines = [f"[{home}]\n{keys}\n" + "\n".join(written.get(home, [])) for home, keys in least.items()]
        (tmp_path / "run.toml").write_text("\n".join(lines), encoding="utf-8")
        both.append(load_run(tmp_path / "run.toml", [], lambda _: 300))
    assert both[0] == both[1]
    assert len(tables["model"]) >= 3
    assert len(tables["train"]) >= 10


def test_help_and_readme_point_to_the_page() -> None:
    name = PAGE.relative_to(ROOT).as_posix()
    for command in ("fit", "train"):
        assert name in " ".join(typed(command, "--help").out.split())
    assert f"({name})" in (ROOT / "README.md").read_text(encoding="utf-8")
