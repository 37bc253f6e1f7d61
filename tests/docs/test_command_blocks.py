"""Every command of README and docs works as it stands there: `tests/docs/blocks.py` says how and what is shortened."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.docs.blocks import PAGES, ROOT, Reader, lines_of, read_blocks, shorten, write_texts
from tests.flows.typed import typed

QUICKSTART = ROOT / "README.md"
RUN_FILE = """\
[model]
preset = "tr-25m"
[data]
train = "shards/train"
valid = "shards/valid"
tokenizer = "tok"
[train]
tokens = "1M"
[run]
dir = "runs/first"
"""
TYPED = [page for page in PAGES if any(block.language == "bash" and not block.reason for block in read_blocks(page))]


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a home with texts, tokenizer, shards and two runs, which the pages between them make and use."""
    home = tmp_path_factory.mktemp("reader")
    write_texts(home)
    (home / "run.toml").write_text(RUN_FILE, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        for line in (
            "tokenizer train texts --vocab 4096 --holdout 0.5% --out tok",
            "data pack texts --holdout 0.5% --tokenizer tok --out shards",
        ):
            assert typed(*line.split()).code == 0
        answer = typed(*shorten(["lowvram", "train", "run.toml"])[1:])
        assert answer.code == 0, answer.err
    shutil.copytree(home / "runs/first", home / "runs/tr-25m")
    return home


def follow(page: Path, home: Path, patch: pytest.MonkeyPatch, serves: bool = True) -> list[str]:
    """Type a page's commands in a home."""
    patch.chdir(home)
    return Reader(home, serves).follow(read_blocks(page))


def test_the_quickstart_of_the_readme_works_but_for_its_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_texts(tmp_path)
    done = follow(QUICKSTART, tmp_path, monkeypatch, serves=False)
    own = [line for line in done if line.startswith("lowvram")]
    assert len(own) == 8
    assert (tmp_path / "tr-25m.gguf").stat().st_size > 10_000


@pytest.mark.nightly
@pytest.mark.parametrize("page", TYPED, ids=lambda page: page.stem)
def test_the_commands_of_a_page_work(
    page: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "home"
    begins = any("lowvram tokenizer train" in block.text for block in read_blocks(page))
    shutil.copytree(finished, home, ignore=shutil.ignore_patterns("tok", "shards", "runs") if begins else None)
    assert follow(page, home, monkeypatch)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_block_is_typed_or_says_what_it_is(page: Path) -> None:
    for block in read_blocks(page):
        where = f"{page.name}:{block.line}"
        assert block.language in ("bash", "python", "toml", "powershell", "text"), f"{where} names no language"
        is_typed = block.language in ("bash", "python") and not block.reason
        if not is_typed and block.language != "text":
            assert block.file or len(block.reason) > 20, f"{where} is neither typed, nor a file, nor says why not"
        for line in lines_of(block) if is_typed and block.language == "bash" else []:
            assert line.split()[0] in ("lowvram", "pip", "echo"), f"{where}: {line}"
    assert page.read_text(encoding="utf-8").count("\n```") == 2 * len(read_blocks(page))


def test_a_command_that_fails_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "page.md"
    for command in ("lowvram fit nothing.toml", "lowvram fit --gpu rtx9999", "pip install -e '.[nothing]'"):
        page.write_text(f"```bash\n{command}\n```\n", encoding="utf-8")
        with pytest.raises(AssertionError):
            follow(page, tmp_path, monkeypatch)
