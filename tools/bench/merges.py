"""Measures the memory and time that learning merges takes, by the size of the text.

python tools/bench/merges.py TEXT… --sizes 5MB 55MB 1GB --vocab 32768

A size that the text has is a part of its documents, chosen by their hash.  A larger one is the text again and again, in
which one word of twenty is a new one: a stem and an ending of two of its words, each as often as it occurs.  So
distinct words go on growing about as they do in Turkish, which the tool prints.  Each size is learnt by the command
itself, in a process of its own.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import os
import platform
import random
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

import tokenizers

from lowvram.data.morphology.marking import WORD, count_words
from lowvram.data.morphology.rules import read_rules
from lowvram.data.morphology.segmenter import learn_segmenter
from lowvram.data.text import documents, find_files
from lowvram.finish import finish
from lowvram.units import parse_bytes, show_bytes

NEW_WORDS = 0.05  # of the words of each reading after the first


def choose(texts: list[str], size: int) -> Iterator[str]:
    """Yield a part of the documents, chosen by their hash."""
    share = size / sum(len(text.encode()) for text in texts)
    for text in texts:
        if int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") < share * 2**64:
            yield text


def enlarge(texts: list[str], size: int) -> Iterator[str]:
    """Yield the documents, and then again with new words, until they have `size` bytes."""
    counts = count_words(texts)
    segmenter = finish(learn_segmenter(counts, read_rules("tr")))
    stems, endings = Counter[str](), Counter[str]()
    for word, count in counts.items():
        stem, *suffixes = segmenter.segment(word)
        stems[stem] += count
        endings["".join(suffixes)] += count
    chance = random.Random(1)
    pools = [(list(table), list(itertools.accumulate(table.values()))) for table in (stems, endings)]

    def new_words() -> Iterator[str]:
        while True:
            drawn = (chance.choices(words, cum_weights=weights, k=10_000) for words, weights in pools)
            yield from map("".join, zip(*drawn, strict=True))

    new, done = new_words(), 0
    for reading in itertools.count():
        for text in texts:
            changed = WORD.sub(lambda w: next(new) if chance.random() < NEW_WORDS else w[0], text) if reading else text
            yield changed
            done += len(changed.encode()) + 2
            if done >= size:
                return


def main() -> None:
    """Write, learn, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", nargs="+", type=Path)
    parser.add_argument("--sizes", nargs="+", type=parse_bytes, default=[5_000_000, 50_000_000, 10**9])
    parser.add_argument("--vocab", type=int, default=32768)
    parser.add_argument("--morphology", default="none")
    options = parser.parse_args()
    texts = [text for file in find_files(options.text) for text in documents(file)]
    whole = sum(len(text.encode()) for text in texts)
    print(f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, ", end="")
    print(f"tokenizers {tokenizers.__version__}; {options.vocab:,} ids, --morphology {options.morphology}\n")
    print("| text | distinct words | said beforehand | peak of the process | CPU s | s |")
    print("| ---: | ---: | ---: | ---: | ---: | ---: |", flush=True)
    for size in options.sizes:
        with tempfile.TemporaryDirectory() as folder:
            file, words, written = Path(folder) / "text.txt", set[str](), 0
            with open(file, "w", encoding="utf-8") as out:
                for text in choose(texts, size) if size <= whole else enlarge(texts, size):
                    written += out.write(f"{text}\n\n") and len(text.encode()) + 2
                    words.update(WORD.findall(text))
            command = ["-m", "lowvram", "tokenizer", "train", file, "--vocab", options.vocab]
            command += ["--morphology", options.morphology, "--out", f"{folder}/tok", "--sample", "100GB"]
            began = time.monotonic()
            environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path[:2])}
            child = subprocess.Popen(
                [sys.executable, *map(str, command)],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                env=environment,
            )
            assert child.stderr is not None
            told = re.search(r"with about (.*) of memory", " ".join(child.stderr.read().split()))
            _, status, usage = os.wait4(child.pid, 0)
            if status:
                sys.exit(f"The command ended with {status}.")
            said, peak = told[1] if told else "–", show_bytes(usage.ru_maxrss * 1024)
            cpu_s, wall_s = usage.ru_utime + usage.ru_stime, time.monotonic() - began
            print(
                f"| {written / 1e6:,.1f} MB | {len(words):,} | {said} | {peak} | {cpu_s:,.0f} | {wall_s:,.0f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
