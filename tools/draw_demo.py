"""Runs `lowvram demo` and draws its output as docs/demo.svg, the README's picture.

python tools/draw_demo.py [--transcript FILE]      draws a saved output instead of running the demo
"""

from __future__ import annotations

import argparse
import io
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.text import Text

ROOT = Path(__file__).parents[1]
WIDTH = 118
STYLES = (
    (r"^\d/8 .*$", "bold"),
    (r"^    \$ .*$", "green"),
    (r"^step .*$", "dim"),
    (r"^step +\d+  valid .*$", "cyan"),
    (r"^Stopped after .*$", "yellow"),
)


def run_demo() -> str:
    """Return everything that the demo prints, results and progress in order."""
    with tempfile.TemporaryDirectory() as home:
        command = [sys.executable, "-m", "lowvram", "demo", "--dir", "lowvram-demo"]
        done = subprocess.run(
            command, cwd=home, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8", check=True
        )
        return done.stdout


def draw(transcript: str) -> str:
    """Return the SVG of a terminal that shows the transcript."""
    console = Console(record=True, width=WIDTH, file=io.StringIO())
    # The picture must not show anybody's home directory.
    transcript = re.sub(r"\S*/(?=lowvram-demo)", "", transcript)
    for line in ["$ lowvram demo", *transcript.splitlines()]:
        text = Text(line)
        for pattern, style in STYLES:
            text.highlight_regex(pattern, style)
        console.print(text)
    svg = console.export_svg(title="lowvram demo")
    # The template loads a web font; the reader's own fonts are enough.
    return re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.DOTALL)


def main() -> None:
    """Run or read, then draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--transcript", type=Path)
    options = parser.parse_args()
    transcript = options.transcript.read_text(encoding="utf-8") if options.transcript else run_demo()
    (ROOT / "docs").mkdir(exist_ok=True)
    (ROOT / "docs/demo.svg").write_text(draw(transcript), encoding="utf-8")


if __name__ == "__main__":
    main()
