"""Chooses the documents that are held out for validation, by their own hash; knows no file, tokenizer or shard."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator

from lowvram.data.nfc import nfc
from lowvram.errors import DataError, argument
from lowvram.units import count_of

_HASH_BYTES = 8
_PIECE_CHARACTERS = 1 << 16


class NothingHeldOutError(DataError):
    """None of the documents is held out: they are too few for the share."""


class Holdout:
    """Holds out a share of all documents, and counts all documents and those held out.

    The same words are always on the same side, whatever the file, its format, line ends, Unicode form, position or the
    number of processes, so all copies of a document are on one side.  A larger share holds out all of a smaller one.
    """

    def __init__(self, share: float) -> None:
        assert 0.0 < share < 1.0
        self.share = share
        self.documents = self.held_out = 0
        self._lowest, self._highest = 1.0, 0.0

    def takes(self, text: str) -> bool:
        """Return whether this document is held out, and count it."""
        position = hash_position(nfc(text))
        is_held_out = position < self.share
        self.documents += 1
        self.held_out += is_held_out
        self._lowest, self._highest = min(self._lowest, position), max(self._highest, position)
        return is_held_out

    def leave(self, texts: Iterable[str]) -> Iterator[str]:
        """Yield the documents that are not held out; after the last one calls `check`, which may raise DataError."""
        for text in texts:
            if not self.takes(text):
                yield text
        self.check()

    def check(self) -> None:
        """Raise DataError if none of the documents is held out, or all are; it suggests a share that works."""
        if 0 < self.held_out < self.documents:
            return
        share, count = show_share(self.share), count_of(self.documents, "document")
        if not self.documents:
            raise DataError("There is no document to hold out.", "The files have none.", "Name files that hold text.")
        if self.documents == 1:
            why = "Text files separate documents by blank lines; .jsonl and .parquet have one in a row."
            fix = "Separate the documents, or leave `holdout` out and pack other files for validation."
            raise NothingHeldOutError("Nothing can be held out of one document.", why, fix)
        if not self.held_out:
            why = "Documents are chosen by their hash, each with that probability."
            fix = f"The smallest share that holds one out is {_show_above(self._lowest)}; or leave `holdout` out."
            raise NothingHeldOutError(f"{argument('holdout', share)} holds out none of {count}.", why, fix)
        raise DataError(
            f"{argument('holdout', share)} holds out all {count}.", "Nothing is left to learn.", "Ask for less."
        )


def hash_position(text: str, purpose: bytes = b"") -> float:
    """Return the hash of a document's words, joined by single spaces, as a number from 0 to 1.

    purpose: at most 16 bytes; positions of different purposes are independent.
    """
    hash, has_words, ends_in_space = hashlib.blake2b(digest_size=_HASH_BYTES, person=purpose), False, False
    # The text is split in pieces, because a list of all words takes many times the memory of the document.
    for start in range(0, len(text), _PIECE_CHARACTERS):
        piece = text[start : start + _PIECE_CHARACTERS]
        words = " ".join(piece.split())
        if words:
            # A word may continue from the last piece into this one.
            if has_words and (ends_in_space or piece[0].isspace()):
                hash.update(b" ")
            hash.update(words.encode("utf-8"))
            has_words = True
        ends_in_space = piece[-1].isspace()
    return int.from_bytes(hash.digest(), "big") / 256**_HASH_BYTES


def show_share(share: float) -> str:
    """Return a share as a user types it: `0.5%`."""
    return f"{share * 100:.10g}%"


def _show_above(share: float) -> str:
    """Return a share a little above `share`, in three digits."""
    return f"{share * 100 * 1.01:.3g}%"
