"""What a user types and sees: a command line run in this process, and a directory in which a run can begin."""

from __future__ import annotations

import io
import os
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

from lowvram.cli.app import main
from tests.tiny import write_texts

RUN_FILE = """\
[model]
layers = 2
dim = 32
attention = { kind = "gqa", heads = 4, kv_heads = 2, head_dim = 8 }
ffn = { kind = "swiglu", hidden = 64 }
[data]
train = "shards/train"
valid = "shards/valid"
tokenizer = "tok"
[train]
tokens = 1536
seq_len = 32
batch_tokens = 256
precision = "fp32"
[run]
dir = "run"
validate_every = 4
sample_every = 100
sample_tokens = 5
prompts = ["Kış"]
guard = { battery = "ignore" }
"""


@dataclass(frozen=True)
class Output:
    """How a command ended, and what stood on its two outputs."""

    code: int
    out: str
    err: str


def typed(*words: object) -> Output:
    """Type `lowvram` and these words; neither output is a terminal."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        try:
            code = main([str(word) for word in words])
        except SystemExit as end:
            code = int(end.code or 0)
    return Output(code, out.getvalue(), err.getvalue())


def write_home(home: Path) -> None:
    """Write the text of `tests/tiny.py` and a run file."""
    write_texts(home)
    (home / "run.toml").write_text(RUN_FILE, encoding="utf-8")


def fill_home(home: Path) -> None:
    """Do what comes before `lowvram train`, by commands."""
    write_home(home)
    assert typed("tokenizer", "train", home / "train.txt", "--vocab", 400, "--out", home / "tok").code == 0
    for name in ("train", "valid"):
        words = ("--tokenizer", home / "tok", "--out", home / "shards" / name)
        assert typed("data", "pack", home / f"{name}.txt", *words).code == 0


def environment(**variables: str) -> dict[str, str]:
    """Return what a child process needs to find the packages that this one found."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), **variables}
