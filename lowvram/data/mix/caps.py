"""Takes a part of a source's documents, by a hash of their words, so that its text stays below a cap."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from lowvram.data.holdout import hash_position
from lowvram.data.mix.sources import match
from lowvram.data.nfc import nfc
from lowvram.data.tokenizer import count_bytes
from lowvram.errors import DataError, argument
from lowvram.units import show_bytes

# Documents are taken by so many ranges of their hash; a range of 10 GB is 150 kB.
RANGES = 1 << 16
# Its own purpose: documents that are held out are not those that a cap takes first.
_PURPOSE = b"cap"


def find_range(text: str) -> int:
    """Return the range of a document's hash, from 0 on; the same for the same words in any file and form."""
    return min(RANGES - 1, int(hash_position(text, _PURPOSE) * RANGES))


class Sizes:
    """The bytes of a source's documents in UTF-8 and NFC, by the range of their hash."""

    def __init__(self) -> None:
        self.bytes_R = np.zeros(RANGES, np.int64)

    def add(self, text: str) -> None:
        """Count a document."""
        text = nfc(text)
        self.bytes_R[find_range(text)] += count_bytes(text)


class Taken:
    """The documents of a source that are packed: those whose hash lies below a border.

    left_out_bytes: text that is not packed.
    """

    def __init__(self, border: int, left_out_bytes: int) -> None:
        self._border, self.left_out_bytes = border, left_out_bytes

    def __call__(self, text: str) -> bool:
        """Return whether this document is packed."""
        return find_range(nfc(text)) < self._border


def apply_caps(sizes: Mapping[str, Sizes], caps: Mapping[str, int]) -> dict[str, Taken]:
    """Return what is taken of each source that a cap makes smaller.

    sizes: of every source that a cap is about.  caps: most bytes by the name of a source, or of all whose names begin
    so.  A cap of several sources takes the same share of each, after their own caps.  Ranges are taken whole and in
    order, as long as the sum is not above the cap.  Raises DataError where a cap leaves nothing of a source.
    """
    borders = dict.fromkeys(sizes, RANGES)
    for name in sorted(caps, key=lambda name: -name.count("/")):
        members = match(name, list(sizes), argument("caps", name))
        bytes_R = np.zeros(RANGES, np.int64)
        for member in members:
            bytes_R[: borders[member]] += sizes[member].bytes_R[: borders[member]]
        sum_R = np.cumsum(bytes_R)
        if sum_R[-1] <= caps[name]:
            continue
        border = int(np.searchsorted(sum_R, caps[name], side="right"))
        if border == 0 or not sum_R[border - 1]:
            what = f"A cap of {show_bytes(caps[name])} leaves nothing of {name}."
            why = f"Its first document, in the order of hashes, has {show_bytes(int(sum_R[sum_R > 0][0]))}."
            raise DataError(what, why, "Give it more, or leave the source out.")
        for member in members:
            borders[member] = min(borders[member], border)
            _refuse_nothing_left(member, sizes[member].bytes_R, borders[member], f"{show_bytes(caps[name])} of {name}")
    return {
        name: Taken(border, int(sizes[name].bytes_R[border:].sum()))
        for name, border in borders.items()
        if border < RANGES
    }


def _refuse_nothing_left(source: str, bytes_R: np.ndarray, border: int, cap: str) -> None:
    """Raise DataError where a source has documents, and a cap on several takes none of them.  cap: in words."""
    if bytes_R.any() and not bytes_R[:border].any():
        what = f"A cap of {cap} leaves nothing of {source}."
        why = "Documents are taken in the order of their hashes, and the first one of that source comes too late."
        raise DataError(what, why, "Give it more, or put that source into another.")
