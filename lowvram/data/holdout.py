"""Which documents are held out for validation, chosen by their own hash; knows no file, tokenizer or shard."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator

from lowvram.data.nfc import nfc
from lowvram.errors import DataError
from lowvram.units import count_of

_HASH_BYTES = 8
_PIECE_CHARACTERS = 1 << 16


class Holdout:
    """A share of all documents, and how many were asked about and held out so far.

    The same words are always on the same side, whatever the file, its format, line ends, Unicode form, place in the
    order or number of processes, so copies of a document never part.  A larger share holds out all of a smaller one.
    """

    def __init__(self, share: float) -> None:
        assert 0.0 < share < 1.0
        self.share = share
        self.documents = self.held_out = 0
        self._lowest, self._highest = 1.0, 0.0

    def takes(self, text: str) -> bool:
        """Return whether this document is held out, and count it."""
        place = _place(nfc(text))
        is_held_out = place < self.share
        self.documents += 1
        self.held_out += is_held_out
        self._lowest, self._highest = min(self._lowest, place), max(self._highest, place)
        return is_held_out

    def leave(self, texts: Iterable[str]) -> Iterator[str]:
        """Yield the documents that are not held out; at their end raises DataError as `check`."""
        for text in texts:
            if not self.takes(text):
                yield text
        self.check()

    def check(self) -> None:
        """Raise DataError if none of the documents is held out, or all are; it names a share that would do."""
        if 0 < self.held_out < self.documents:
            return
        named, counted = show_share(self.share), count_of(self.documents, "document")
        if not self.documents:
            raise DataError("There is no document to hold out.", "The files have none.", "Name files that hold text.")
        if self.documents == 1:
            why = "Text files separate documents by blank lines; .jsonl and .parquet have one in a row."
            fix = "Separate the documents, or leave --holdout out and pack other files for validation."
            raise DataError("Nothing can be held out of one document.", why, fix)
        if not self.held_out:
            why = "Documents are chosen by their hash, each with that probability."
            fix = f"The smallest share that holds one out is {_show_above(self._lowest)}; or leave --holdout out."
            raise DataError(f"--holdout {named} holds out none of {counted}.", why, fix)
        raise DataError(f"--holdout {named} holds out all {counted}.", "Nothing is left to learn.", "Ask for less.")


def _place(text: str) -> float:
    """Return the hash of a document's words, each parted from the next by one blank, as a number from 0 to 1."""
    hash, is_begun, is_parted = hashlib.blake2b(digest_size=_HASH_BYTES), False, False
    # In pieces, because a list of all words takes many times the document's own bytes.
    for start in range(0, len(text), _PIECE_CHARACTERS):
        piece = text[start : start + _PIECE_CHARACTERS]
        words = " ".join(piece.split())
        if words:
            # A word may go on from the last piece into this one.
            if is_begun and (is_parted or piece[0].isspace()):
                hash.update(b" ")
            hash.update(words.encode("utf-8"))
            is_begun = True
        is_parted = piece[-1].isspace()
    return int.from_bytes(hash.digest(), "big") / 256**_HASH_BYTES


def show_share(share: float) -> str:
    """Return a share as it is typed: `0.5%`."""
    return f"{share * 100:.10g}%"


def _show_above(place: float) -> str:
    """Return a share a little above `place`, in three digits."""
    return f"{place * 100 * 1.01:.3g}%"
