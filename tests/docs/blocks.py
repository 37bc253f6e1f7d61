"""The fenced blocks of the documents, and a home in which their commands run as a reader would type them.

Convention: a ```bash block is typed, line by line.  A comment `<!-- not run: REASON -->` above it says why it is not.
`<!-- file: NAME -->` above another block is a file that the lines below it use.  ```text is output.

What differs from a reader's machine: `texts/` holds generated Turkish, and training is made short (`SMALL`) and stays
on the CPU; text is packed by one process.  `pip install` is not run; the extras that it names are looked up.  A server
is started on a free port, and Python blocks are sent there.
"""

from __future__ import annotations

import re
import shlex
import signal
import subprocess
import sys
import time
import tomllib
import urllib.error
import urllib.request
from pathlib import Path
from typing import NamedTuple

from lowvram.data.sample import sample_documents
from tests.flows.typed import environment, typed

ROOT = Path(__file__).parents[2]
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
CHARACTERS = 600_000
# A model of one layer and four steps, whatever the preset; each line is a `--set` of `lowvram train`.
SMALL = (
    *("model.layers=1", "model.dim=64", "attention.heads=2", "attention.kv_heads=1", "attention.head_dim=32"),
    *("ffn.hidden=64", "train.seq_len=128", "train.batch_tokens=256", "train.tokens=1024", "train.precision=fp32"),
)
_BLOCK = re.compile(r"(?:^<!-- (?P<note>(?:(?!-->).)+) -->\n)?^```(?P<language>\w*)\n(?P<text>.*?)^```$", re.M | re.S)
_SHELL = re.compile(r"[|<>;]")


class Block(NamedTuple):
    """A fenced block.  note: the comment above it, "" where there is none.  line: where it stands in its page."""

    language: str
    text: str
    note: str
    line: int

    @property
    def file(self) -> str:
        """The name of the file that it is, "" where it is none."""
        return self.note.removeprefix("file: ") if self.note.startswith("file: ") else ""

    @property
    def reason(self) -> str:
        """Why it is not run, "" where it is."""
        return self.note.removeprefix("not run: ") if self.note.startswith("not run: ") else ""


def read_blocks(page: Path) -> list[Block]:
    """Return the fenced blocks of a page, in order."""
    text = page.read_text(encoding="utf-8")
    return [
        Block(found["language"], found["text"], found["note"] or "", text.count("\n", 0, found.start("language")) + 1)
        for found in _BLOCK.finditer(text)
    ]


def lines_of(block: Block) -> list[str]:
    """Return the commands of a block, without blank lines."""
    return [line for line in block.text.splitlines() if line.strip()]


def write_texts(home: Path) -> None:
    """Write a reader's folder of text."""
    (home / "texts").mkdir()
    documents = list(sample_documents(1, CHARACTERS))
    for name, part in (("a", documents[::2]), ("b", documents[1::2])):
        (home / "texts" / f"{name}.txt").write_text("\n\n".join(part), encoding="utf-8")


class Reader:
    """Types the blocks of a page in a home, which is the working directory."""

    def __init__(self, home: Path, serves: bool = True) -> None:
        """serves: start the servers of the page, which are processes of their own."""
        self.home, self._serves = home, serves
        self._server: subprocess.Popen[str] | None = None
        self._url = ""

    def follow(self, blocks: list[Block]) -> list[str]:
        """Do what a page says, and return the lines that were typed; raises AssertionError where a command fails."""
        done = []
        try:
            for block in blocks:
                if block.reason:
                    continue
                if block.file:
                    (self.home / block.file).write_text(block.text, encoding="utf-8")
                elif block.language == "bash":
                    for line in lines_of(block):
                        self.type_line(line)
                        done.append(line)
                elif block.language == "python":
                    self._run_python(block.text)
                    done.append(block.text)
        finally:
            self._stop()
        return done

    def type_line(self, line: str) -> None:
        """Run one line; lines without pipes run in this process, which has loaded torch already."""
        words = shlex.split(line, comments=True)
        if words[:2] == ["pip", "install"]:
            refuse_unknown_extras(words)
        elif words[:2] == ["lowvram", "serve"]:
            if self._serves:
                self._serve(words)
        elif words[0] == "lowvram" and not _SHELL.search(line.split("#")[0]):
            answer = typed(*shorten(words)[1:])
            assert answer.code == 0, f"{line}: {answer.err or answer.out}"
        else:
            shell = line.replace("lowvram ", f"{shlex.quote(sys.executable)} -m lowvram ")
            done = subprocess.run(
                ["bash", "-euo", "pipefail", "-c", shell],
                env=environment(),
                cwd=self.home,
                check=False,
                capture_output=True,
                encoding="utf-8",
                timeout=120,
            )
            assert done.returncode == 0, f"{line}: {done.stderr}"

    def _serve(self, words: list[str]) -> None:
        """Start a server beside the page and wait until it answers."""
        self._stop()
        command = [sys.executable, "-m", *words, "--port", "0", "--device", "cpu"]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        self._server = subprocess.Popen(command, env=environment(), cwd=self.home, encoding="utf-8", **pipes)
        assert self._server.stdout is not None
        said = ""
        for line in self._server.stdout:
            said += line
            if found := re.search(r"http://[\d.]+:\d+", line):
                self._url = found[0]
                break
        assert self._url, said
        deadline = time.monotonic() + 60
        while True:
            try:
                with urllib.request.urlopen(f"{self._url}/health", timeout=10) as answer:
                    assert answer.status == 200
                return
            except urllib.error.URLError:
                assert time.monotonic() < deadline, said
                time.sleep(0.1)

    def _run_python(self, text: str) -> None:
        """Run a program against the page's server."""
        program = re.sub(r"http://127\.0\.0\.1:8000", self._url, text)
        exec(compile(program, "the page's program", "exec"), {})

    def _stop(self) -> None:
        if self._server is not None:
            self._server.send_signal(signal.SIGINT)
            try:
                self._server.wait(timeout=30)
            except subprocess.TimeoutExpired:
                self._server.kill()
            assert self._server.stdout is not None
            self._server.stdout.close()
            self._server = None


def shorten(words: list[str]) -> list[str]:
    """Return a command with what makes it quick; all but training and packing stay as they stand."""
    if words[1:3] == ["data", "pack"]:
        return [*words, "--processes", "1"]
    if words[1] != "train":
        return words
    return [
        *words[:3],
        *(word for assignment in SMALL for word in ("--set", assignment)),
        *words[3:],
        "--device",
        "cpu",
    ]


def refuse_unknown_extras(words: list[str]) -> None:
    """Raise AssertionError where a `pip install` names an extra that does not exist."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for extras in re.findall(r"\[([\w,]+)\]", " ".join(words)):
        assert set(extras.split(",")) <= set(project["optional-dependencies"]), words
