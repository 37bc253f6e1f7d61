"""Measures packing's encoder against `tokenizers`, and the loader against memmap batches; knows no model.

python tools/bench/data.py --text FILE [--tokenizer DIR] [--shards DIR]
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

# Both sides of a comparison get one thread; the libraries read these when they are imported.
os.environ.update(TOKENIZERS_PARALLELISM="false", RAYON_NUM_THREADS="1", OMP_NUM_THREADS="1")

import numpy as np
import tiktoken
import tokenizers
import torch

from lowvram.data.loader import Loader
from lowvram.data.nfc import nfc
from lowvram.data.shards import ShardSet, pack
from lowvram.data.text import documents, find_files
from lowvram.data.tokenizer import Tokenizer, train_tokenizer

REPEATS = 5
SAMPLE_BYTES = 4 << 20
BATCHES = 200


def alternate(*works: Callable[[], object]) -> list[float]:
    """Return the median CPU seconds of each of `works`; they alternate, so that a busy machine slows all alike."""
    taken: list[list[float]] = [[] for _ in works]
    for _ in range(REPEATS):
        for work, times in zip(works, taken, strict=True):
            start = time.process_time()
            work()
            times.append(time.process_time() - start)
    return [statistics.median(times) for times in taken]


def compare_encoders(texts: list[str], tokenizer: Tokenizer) -> None:
    """Print the rates of packing's encoder and of `tokenizers`' two batch encoders on the same documents."""
    other = tokenizers.Tokenizer.from_file(str(tokenizer.directory / "tokenizer.json"))
    assert all(tokenizer.encode(text) == other.encode(text).ids for text in texts[:200])

    def ours() -> list[np.ndarray]:
        return [tokenizer.encode_array(nfc(text)) for text in texts]

    def theirs() -> list[list[int]]:
        return [encoding.ids for encoding in other.encode_batch(texts)]

    def theirs_fast() -> list[list[int]]:
        return [encoding.ids for encoding in other.encode_batch_fast(texts)]

    ours_s, theirs_s, fast_s = alternate(ours, theirs, theirs_fast)
    size = sum(len(text.encode("utf-8")) for text in texts)
    print(f"encoding {len(texts)} documents, {size} bytes, {tokenizer.size} ids, one process, CPU seconds")
    print(f"  lowvram                       {ours_s:8.3f} s  {size / ours_s / 1e6:6.2f} MB/s")
    for name, taken_s in (("encode_batch", theirs_s), ("encode_batch_fast", fast_s)):
        rate = size / taken_s / 1e6
        print(f"  tokenizers {name:18s} {taken_s:8.3f} s  {rate:6.2f} MB/s  lowvram is {taken_s / ours_s:.1f} x")


def draw_as_nanogpt(path: Path, dtype: np.dtype, rows: int, seq_len: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return inputs and targets as nanoGPT does: the file is mapped again, each row is drawn and cast separately."""
    tokens = np.memmap(path, dtype=dtype, mode="r")
    starts = torch.randint(len(tokens) - seq_len, (rows,))

    def stack(shift: int) -> torch.Tensor:
        pieces = [tokens[start + shift : start + shift + seq_len].astype(np.int64) for start in starts]
        return torch.stack([torch.from_numpy(piece) for piece in pieces])

    return stack(0), stack(1)


def compare_loaders(shards: ShardSet, scratch: Path) -> None:
    """Print the time of a batch from the loader and from the same tokens drawn as nanoGPT does."""
    whole = scratch / "whole.bin"
    with open(whole, "wb") as file:
        for start in range(0, shards.tokens, 1 << 20):
            file.write(shards.read(start, min(1 << 20, shards.tokens - start)).tobytes())
    print(f"loading from {shards.tokens} tokens of {shards.dtype}, CPU microseconds a batch")
    for rows, seq_len in ((12, 1024), (32, 512), (8, 256), (4, 2048)):
        loader, sample = Loader([(shards, 1.0)], seq_len, seed=0), 0

        def ours(loader: Loader = loader, rows: int = rows) -> None:
            nonlocal sample
            for _ in range(BATCHES):
                batch = loader.batch(sample, rows)
                _ = batch[:, :-1], batch[:, 1:]
                sample += rows

        def theirs(rows: int = rows, seq_len: int = seq_len) -> None:
            for _ in range(BATCHES):
                draw_as_nanogpt(whole, shards.dtype, rows, seq_len)

        ours_s, theirs_s = alternate(ours, theirs)
        ours_us, theirs_us = (taken_s / BATCHES * 1e6 for taken_s in (ours_s, theirs_s))
        ratio = theirs_us / ours_us
        print(f"  {rows:3d} x {seq_len:4d}  lowvram {ours_us:7.1f}  nanoGPT's way {theirs_us:7.1f}  {ratio:.1f} x")


def main() -> None:
    """Read the command line, make the tokenizer and shards if not given, print both comparisons."""
    parser = argparse.ArgumentParser(description="Measure the data layer against the usual ways.")
    parser.add_argument("--text", type=Path, required=True, help="text to encode: .txt, .jsonl, .parquet (.gz, .zst)")
    parser.add_argument("--tokenizer", type=Path, help="a trained tokenizer; else 16,384 ids are learnt from the text")
    parser.add_argument("--shards", type=Path, help="packed shards; else the text is packed")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(
        f"{platform.machine()}, {os.cpu_count()} cores, {platform.system()}, python {sys.version.split()[0]}",
        end="",
    )
    for module in (np, torch, tokenizers, tiktoken):
        print(f", {module.__name__} {module.__version__}", end="")
    print(f"; median of {REPEATS} alternating runs, one thread")
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        texts = [text for file in find_files([options.text]) for text in documents(file)]
        if options.tokenizer:
            tokenizer = Tokenizer.load(options.tokenizer)
        else:
            tokenizer = train_tokenizer(iter(texts), 16384, scratch / "tokenizer")
        sizes = np.cumsum([len(text.encode("utf-8")) for text in texts])
        compare_encoders(texts[: 1 + int(np.searchsorted(sizes, SAMPLE_BYTES))], tokenizer)
        if options.shards:
            compare_loaders(ShardSet.open(options.shards), scratch)
        else:
            compare_loaders(pack([options.text], tokenizer, scratch / "shards", processes=1), scratch)


if __name__ == "__main__":
    main()
