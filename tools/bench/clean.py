"""Measures `lowvram data clean`: speed, memory by the size of the text, near duplicates, what good text loses.

python tools/bench/clean.py --text FOLDER [--sizes 1,10] [--only speed,rules,memory,large,pairs,near,loss]

FOLDER has the files of real text; those whose names end in .valid.txt.gz are the good text of the last figure.  `large`
cleans a gigabyte in which some documents are copies, `rules` compares the speed with more and more rules on, and
`pairs` sorts the pairs of a band as a text of 100 GB would have them, on a tenth of its parts.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import re
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil

from lowvram.data.clean.pair_buckets import PairBuckets
from lowvram.data.clean.signature import FUNCTIONS
from lowvram.data.text import documents, find_files

UNIT_BYTES = 20_000_000
LEAST_WORDS = 50
CHANGED = (0.05, 0.10, 0.20)
PLANTED = 1_000
WITHOUT_NEAR = ("--set", "near_duplicates.on=false")


@dataclass(frozen=True)
class Run:
    """One cleaning: seconds by the clock and of all its processors, and the most memory of all processes at once.

    disk_bytes: the most that its work took on disk; signature_bytes: what of it were signatures.
    """

    wall_s: float
    cpu_s: float
    peak_bytes: int
    disk_bytes: int
    signature_bytes: int


def clean(texts: Path | list[Path], out: Path, *options: str, processes: int = 2) -> Run:
    """Clean in a process of its own, and measure it."""
    inputs = [str(each) for each in (texts if isinstance(texts, list) else [texts])]
    words = [sys.executable, "-m", "lowvram", "data", "clean", *inputs, "--out", str(out), *options]
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    child = subprocess.Popen(
        [*words, "--processes", str(processes)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    most = {"memory": 0, "disk": 0, "signatures": 0}
    watcher = threading.Thread(target=_watch, args=(child, out / ".cleaning", most))
    watcher.start()
    _, said = child.communicate()
    watcher.join()
    if child.returncode:
        raise SystemExit(said)
    wall_s, after = time.monotonic() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Run(wall_s, cpu_s, most["memory"], most["disk"], most["signatures"])


def _watch(child: subprocess.Popen[str], work: Path, most: dict[str, int]) -> None:
    root = psutil.Process(child.pid)
    looks = 0
    while child.poll() is None:
        total = 0
        try:
            family = [root, *root.children(recursive=True)]
        except psutil.NoSuchProcess:
            return
        for process in family:
            try:
                total += process.memory_info().rss
            except psutil.NoSuchProcess:
                continue
        most["memory"] = max(most["memory"], total)
        if looks % 40 == 0:
            most["disk"] = max(most["disk"], _size_of(work))
        if not most["signatures"] and (work / "pairs").is_dir():
            most["signatures"] = _count_signatures(work) * FUNCTIONS * 2
        looks += 1
        time.sleep(0.05)


def _size_of(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size
        except FileNotFoundError:  # read and deleted meanwhile
            continue
    return total


def _count_signatures(work: Path) -> int:
    sidecars = [path for path in work.glob("*.json") if path.stem.isdecimal()]
    return sum(json.loads(path.read_text(encoding="utf-8"))["arrays"]["signatures"][1] for path in sidecars)


def write_corpus(sources: list[Path], target: Path, size: int, copies: float = 0.0, near: float = 0.0) -> int:
    """Write about `size` bytes of documents to a .txt; return how many bytes.

    When all documents were written once, they follow again with their words in another order: a share of `copies` as
    they are, and a share of `near` with each twentieth word replaced, so that as many are duplicates.
    """
    written = copy = 0
    with open(target, "w", encoding="utf-8") as file:
        while written < size:
            for number, text in enumerate(text for source in sources for text in documents(source)):
                if copy:
                    text = _vary(text, random.Random(f"{copy} {number}"), copies, near)
                text = re.sub(r"\n\s*\n", "\n", text)
                written += len(text.encode("utf-8")) + 2
                file.write(text + "\n\n")
                if written >= size:
                    break
            copy += 1
    return written


def _vary(text: str, generator: random.Random, copies: float, near: float) -> str:
    words, fate = text.split(" "), generator.random()
    if fate < copies:
        return text
    if fate < copies + near:
        return _change(text, 0.05, words, generator)
    generator.shuffle(words)
    return " ".join(words)


def measure_speed(sources: list[Path], scratch: Path) -> None:
    """Print the speed with and without near duplicates; the text is long enough for starting to cost little."""
    corpus = scratch / "speed.txt"
    size = write_corpus(sources, corpus, 3 * UNIT_BYTES)
    print(f"speed: {size / 1e6:.1f} MB of raw text, 2 processes")
    for name, options in (("without near duplicates", WITHOUT_NEAR), ("with near duplicates", ())):
        _show_speed(name, size, clean(corpus, scratch / f"speed-{len(options)}", *options))


def _show_speed(name: str, size: int, run: Run) -> None:
    rate = size / run.cpu_s / 1e6
    load = os.getloadavg()[0]
    print(
        f"  {name:24s} {run.cpu_s:7.1f} CPU-s = {rate:5.2f} MB per CPU-s, {2 * rate:5.1f} MB/s on two free cores; "
        f"by the clock {run.wall_s:.1f} s, {size / run.wall_s / 1e6:.1f} MB/s at load {load:.1f}",
        flush=True,
    )


def measure_rules(sources: list[Path], folder: Path, scratch: Path) -> None:
    """Print the speed of the defaults, with languages, with evaluation sets, and with both."""
    corpus = scratch / "rules.txt"
    size = write_corpus(sources, corpus, UNIT_BYTES)
    sets = [file for file in find_files([folder.parent / "eval"]) if not file.name.startswith("sib200")]
    language = ("--set", "language.keep=tr")
    against = tuple(word for file in sets for word in ("--against", str(file)))
    print(f"rules: {size / 1e6:.1f} MB of raw text, 2 processes, {len(sets)} evaluation sets")
    for name, options in (
        ("defaults", ()),
        ("and languages", language),
        ("and evaluation sets", against),
        ("everything", (*language, *against)),
    ):
        _show_speed(name, size, clean(corpus, scratch / f"rules-{name.replace(' ', '-')}", *options))


def measure_large(sources: list[Path], scratch: Path) -> None:
    """Print what a gigabyte takes in which a twentieth of the documents are copies and a tenth near copies."""
    corpus, out = scratch / "large.txt", scratch / "large"
    size = write_corpus(sources, corpus, 50 * UNIT_BYTES, copies=0.05, near=0.10)
    run = clean(corpus, out)
    report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    counts = {row["rule"]: row["documents_removed"] for row in report["rules"] if row["documents_removed"]}
    print(f"large: {size / 1e6:.0f} MB, {report['documents_read']:,} documents, {report['documents']:,} left; {counts}")
    _show_speed("defaults", size, run)
    print(
        f"  peak {run.peak_bytes / 1e6:.0f} MB of all processes; on disk at most {run.disk_bytes / 1e6:.0f} MB for its "
        f"work, of it signatures {run.signature_bytes / 1e6:.0f} MB, and {report['bytes'] / 1e6:.0f} MB of result"
    )


# A part of 2 MiB of text holds about as many documents.
_DOCUMENTS_OF_A_PART = 1_000


def measure_pairs(scratch: Path, parts: int = 5_000, all_parts: int = 50_000) -> None:
    """Print what sorting one band's pairs takes: files opened and CPU time, for some parts of so many."""
    opened = 0

    def count(event: str, details: tuple[object, ...]) -> None:
        nonlocal opened
        opened += event == "open" and str(details[0]).endswith(".pairs")

    sys.addaudithook(count)
    generator = np.random.default_rng(3)
    buckets = PairBuckets(scratch / "pairs", all_parts * _DOCUMENTS_OF_A_PART)
    start = time.process_time()
    for part in range(parts):
        keys = generator.integers(0, 1 << 64, _DOCUMENTS_OF_A_PART, np.uint64)
        buckets.add(keys, np.arange(_DOCUMENTS_OF_A_PART, dtype=np.uint64) + np.uint64(part * _DOCUMENTS_OF_A_PART))
    written_s = time.process_time() - start
    read = sum(len(keys) for keys, _ in buckets.take())
    assert read == parts * _DOCUMENTS_OF_A_PART
    print(
        f"pairs: {parts:,} of {all_parts:,} parts, one band: {opened:,} files opened; {written_s:.1f} CPU-s to write, "
        f"{time.process_time() - start - written_s:.1f} to read them sorted"
    )


def measure_memory(sources: list[Path], scratch: Path, sizes: list[int]) -> None:
    """Print the peak memory by the size of the text."""
    first = 0
    for multiple in sizes:
        corpus = scratch / "memory.txt"
        size = write_corpus(sources, corpus, UNIT_BYTES * multiple)
        run = clean(corpus, scratch / f"memory-{multiple}")
        first = first or run.peak_bytes
        print(
            f"memory: {multiple} x 20 MB ({size / 1e6:.0f} MB): peak {run.peak_bytes / 1e6:.0f} MB of all processes, "
            f"{run.peak_bytes / first - 1:+.1%}; {run.cpu_s:.0f} CPU-s, {size / run.cpu_s / 1e6:.2f} MB per CPU-s"
        )


def measure_near(sources: list[Path], scratch: Path) -> None:
    """Print which share of planted near duplicates is found, and how many other documents are removed."""
    generator = random.Random(5)
    originals = [text for text in _texts(sources) if len(text.split()) >= LEAST_WORDS]
    plain = scratch / "originals.jsonl"
    _write_rows(plain, originals)
    clean(plain, scratch / "near-first", *_ONLY_NEAR)
    # Real text has near duplicates of its own: what is planted goes among documents that have none.
    unlike = [row["text"] for row in _read_rows(scratch / "near-first/originals.jsonl")]
    vocabulary = [word for text in unlike[:2_000] for word in text.split()]
    for share in CHANGED:
        chosen = generator.sample(range(len(unlike)), min(PLANTED, len(unlike) // 2))
        planted = [_change(unlike[index], share, vocabulary, generator) for index in chosen]
        _write_rows(scratch / "planted.jsonl", [*unlike, *planted])
        out = scratch / f"near-{share}"
        clean(scratch / "planted.jsonl", out, *_ONLY_NEAR)
        left = np.array([row["document"] for row in _read_rows(out / "planted.jsonl")])
        kept = int((left > len(unlike)).sum())
        wrong = len(unlike) - int((left <= len(unlike)).sum())
        print(
            f"near duplicates: {share:.0%} of words changed: {1 - kept / len(planted):.1%} of {len(planted)} found; "
            f"{wrong} of {len(unlike)} other documents removed ({wrong / len(unlike):.3%})"
        )


_RULES = (
    "mojibake composed invisible spaces private boilerplate length symbols repetition toxicity duplicate_documents "
    "duplicate_lines"
)
_ONLY_NEAR = [word for rule in _RULES.split() for word in ("--set", f"{rule}.on=false")]


def _change(text: str, share: float, vocabulary: list[str], generator: random.Random) -> str:
    """Replace a share of the words by others of the corpus."""
    words = text.split(" ")
    for place in generator.sample(range(len(words)), round(share * len(words))):
        words[place] = generator.choice(vocabulary)
    return " ".join(words)


def measure_loss(folder: Path, scratch: Path) -> None:
    """Print how many documents of good text are removed, and by which rules; each file is cleaned alone."""
    read = removed = 0
    by_rule: dict[str, int] = {}
    for file in sorted(folder.glob("*.valid.txt.gz")):
        out = scratch / f"loss-{file.name}"
        clean(file, out, processes=1)
        report = json.loads((out / "report.json").read_text(encoding="utf-8"))
        read += report["documents_read"]
        removed += report["documents_read"] - report["documents"]
        for row in report["rules"]:
            by_rule[row["rule"]] = by_rule.get(row["rule"], 0) + row["documents_removed"]
    found = ", ".join(f"{rule} {count}" for rule, count in by_rule.items() if count)
    print(f"loss: {removed} of {read} documents of *.valid ({removed / read:.2%}): {found or 'none'}")


def _texts(sources: list[Path]) -> Iterator[str]:
    return (text for source in sources for text in documents(source))


def _write_rows(path: Path, texts: list[str]) -> None:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")


def _read_rows(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def main() -> None:
    """Read the command line and print the figures."""
    parser = argparse.ArgumentParser(description="Measure `lowvram data clean`.")
    parser.add_argument("--text", type=Path, required=True, help="a folder of real text")
    parser.add_argument("--sizes", default="1,10", help="multiples of 20 MB, for the memory")
    parser.add_argument("--only", default="speed,rules,memory,large,pairs,near,loss")
    options = parser.parse_args()
    train = [file for file in find_files([options.text]) if ".valid." not in file.name and file.name.startswith("tr_")]
    mixed = [file for file in train if "mix" in file.name] or train
    print(
        f"{platform.machine()}, {os.cpu_count()} cores, {platform.system()}, python {platform.python_version()}, "
        f"numpy {np.__version__}, load {os.getloadavg()[0]:.1f}"
    )
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        wanted = options.only.split(",")
        if "speed" in wanted:
            measure_speed(mixed, scratch)
        if "rules" in wanted:
            measure_rules(mixed, options.text, scratch)
        if "memory" in wanted:
            measure_memory(mixed, scratch, [int(size) for size in options.sizes.split(",")])
        if "large" in wanted:
            measure_large(mixed, scratch)
        if "pairs" in wanted:
            measure_pairs(scratch)
        if "near" in wanted:
            measure_near(mixed, scratch)
        if "loss" in wanted:
            measure_loss(options.text, scratch)


if __name__ == "__main__":
    main()
