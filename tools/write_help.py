"""Writes the help of every command into the README between its markers, or checks that it stands there.

python tools/write_help.py [--check]
"""

from __future__ import annotations

import argparse
import io
import os
import re
import sys
from contextlib import redirect_stdout, suppress
from pathlib import Path

os.environ["COLUMNS"] = "100"
os.environ["NO_COLOR"] = "1"  # argparse colours its help from Python 3.14 on

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from lowvram.cli.app import main as lowvram

COMMANDS = ("demo", "fit", "tokenizer train", "data pack", "train", "evaluate", "chat")
BLOCK = re.compile(r"(<!-- help -->\n).*?(<!-- /help -->)", re.DOTALL)


def help_of(command: str) -> str:
    """Return what `lowvram COMMAND --help` prints."""
    printed = io.StringIO()
    with redirect_stdout(printed), suppress(SystemExit):
        lowvram([*command.split(), "--help"])
    return printed.getvalue().rstrip()


def main() -> None:
    """Write or check."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="exit 1 where the README differs; write nothing")
    check = parser.parse_args().check
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    whole = "\n".join(f"```\n$ lowvram {command} --help\n{help_of(command)}\n```\n" for command in COMMANDS)
    written = BLOCK.sub(lambda match: f"{match[1]}{whole}{match[2]}", text)
    if check:
        if written != text or not BLOCK.search(text):
            sys.exit("README.md shows another help than the commands print; run: python tools/write_help.py")
        return
    readme.write_text(written, encoding="utf-8")


if __name__ == "__main__":
    main()
