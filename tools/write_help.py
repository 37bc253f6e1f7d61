"""Writes what commands print between the markers of the documents that show it, or checks that it stands there.

python tools/write_help.py [--check]
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ["COLUMNS"] = "100"
os.environ["NO_COLOR"] = "1"  # argparse colours its help from Python 3.14 on

ROOT = Path(__file__).parents[1]
COMMANDS = (
    "demo",
    "doctor",
    "fit",
    "tokenizer train",
    "data pack",
    "train",
    "evaluate",
    "chat",
    "serve",
    "export",
    "import",
)
CARD = "lowvram fit --gpu rtx5070"


def printed_by(*words: str) -> str:
    """Return what a command prints, on Linux and without this machine's own measurements."""
    script = "from lowvram.cli.app import main; raise SystemExit(main())"
    with tempfile.TemporaryDirectory() as home:
        places = dict.fromkeys(("XDG_DATA_HOME", "LOCALAPPDATA", "HOME"), home)
        paths = os.pathsep.join((str(ROOT), str(ROOT / "kernels")))
        environment = os.environ | places | {"PYTHONPATH": paths, "PYTHONUTF8": "1"}
        run = subprocess.run(
            [sys.executable, "-c", script, *words], env=environment, check=True, capture_output=True, encoding="utf-8"
        )
    return "\n".join(line.rstrip() for line in run.stdout.splitlines()).rstrip()


def blocks() -> dict[tuple[str, str], str]:
    """Return what stands between each pair of markers, by document and name."""
    helps = [
        f"```\n$ lowvram {command} --help\n{printed_by(*command.split(), '--help')}\n```\n" for command in COMMANDS
    ]
    card = printed_by(*CARD.split()[1:], "--desktop", "linux")
    fit = f"```\n$ {CARD}\n{card}\n```\n"
    return {("docs/commands.md", "help"): "\n".join(helps), ("README.md", "fit"): fit}


def main() -> None:
    """Write or check."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="exit 1 where a document differs; write nothing")
    check = parser.parse_args().check
    for (document, name), block in blocks().items():
        text = (ROOT / document).read_text(encoding="utf-8")
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        if not pattern.search(text):
            sys.exit(f"{document} has no markers for {name}")
        written = pattern.sub(lambda match, block=block: f"{match[1]}{block}{match[2]}", text)
        if not check:
            (ROOT / document).write_text(written, encoding="utf-8")
        elif written != text:
            sys.exit(f"{document} shows something else than the commands print; run: python tools/write_help.py")


if __name__ == "__main__":
    main()
