"""Sorts more pairs of numbers than memory holds: on disk, in buckets by their key; knows no document."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

_PAIR = np.dtype([("key", "<u8"), ("value", "<u8")])
# About so many pairs are read at once, where their keys are random.
_BUCKET_PAIRS = 1 << 16
_MOST_BITS = 12
# So many pairs (4 MiB) are collected before they are written: opening a file takes as long as writing some kilobytes.
_WAITING_PAIRS = 1 << 18


class PairBuckets:
    """Pairs of a key and a value, to be read back sorted.  pairs: how many there will be at most, about."""

    def __init__(self, folder: Path, pairs: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._bits = min(_MOST_BITS, max(0, (pairs // _BUCKET_PAIRS).bit_length()))
        self._waiting: list[NDArray[np.void]] = []
        self._waiting_pairs = 0

    def add(self, keys: NDArray[np.uint64], values: NDArray[np.uint64]) -> None:
        """Add pairs."""
        pairs = np.empty(len(keys), _PAIR)
        pairs["key"], pairs["value"] = keys, values
        self._waiting.append(pairs)
        self._waiting_pairs += len(pairs)
        if self._waiting_pairs >= _WAITING_PAIRS:
            self._write_waiting()

    def _write_waiting(self) -> None:
        if not self._waiting_pairs:
            return
        pairs = np.concatenate(self._waiting)
        self._waiting, self._waiting_pairs = [], 0
        if not self._bits:
            self._append(0, pairs)
            return
        buckets = (pairs["key"] >> np.uint64(64 - self._bits)).astype(np.int16)
        pairs = pairs[np.argsort(buckets, kind="stable")]
        ends = np.cumsum(np.bincount(buckets, minlength=1 << self._bits)).tolist()
        for number, (start, end) in enumerate(zip([0, *ends[:-1]], ends, strict=True)):
            if end > start:
                self._append(number, pairs[start:end])

    def _append(self, number: int, pairs: NDArray[np.void]) -> None:
        # Opened each time: thousands of files at once are more than systems allow.
        with open(self._path(number), "ab") as file:
            file.write(pairs.tobytes())

    def _path(self, number: int) -> Path:
        return self._folder / f"{number:05d}.pairs"

    def take(self) -> Iterator[tuple[NDArray[np.uint64], NDArray[np.uint64]]]:
        """Yield keys and values of one bucket after the other, sorted by both, and delete what was read."""
        self._write_waiting()
        for number in range(1 << self._bits):
            path = self._path(number)
            if path.exists():
                pairs = np.fromfile(path, _PAIR)
                path.unlink()
                order = np.lexsort((pairs["value"], pairs["key"]))
                yield pairs["key"][order], pairs["value"][order]
        self._folder.rmdir()


class Flags:
    """One byte for each of many things, in a file; all are 0 at first."""

    def __init__(self, path: Path, count: int) -> None:
        self._file = open(path, "w+b", buffering=0)  # noqa: SIM115 (open as long as the object)
        self._file.truncate(count)

    def set(self, places: NDArray[np.uint64], value: int = 1) -> None:
        """Set some of them."""
        byte = bytes([value])
        for place in places.tolist():
            self._file.seek(place)
            self._file.write(byte)

    def read(self, start: int, count: int) -> NDArray[np.uint8]:
        """Return `count` of them."""
        self._file.seek(start)
        return np.frombuffer(self._file.read(count), np.uint8)

    def pick(self, places: NDArray[np.uint64]) -> NDArray[np.uint8]:
        """Return some of them."""
        data = bytearray()
        for place in places.tolist():
            self._file.seek(place)
            data += self._file.read(1)
        return np.frombuffer(data, np.uint8)

    def close(self) -> None:
        """Close the file."""
        self._file.close()
