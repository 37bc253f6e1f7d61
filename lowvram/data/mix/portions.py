"""Chooses how much of each source merges are learnt from, and takes it piece by piece; opens no file."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from lowvram.data.holdout import hash_position
from lowvram.data.mix.shares import Wish, find_shares
from lowvram.data.nfc import nfc
from lowvram.data.tokenizer import count_bytes
from lowvram.errors import DataError

# Its own purpose: pieces that are taken are not those that a cap or a held-out share takes first.
_PURPOSE = b"merges"
# Characters.  In larger pieces a few of them would be all of a small sample, or nothing of it.
_PIECE = 1 << 11


@dataclass
class TextSize:
    """How much text a source has, in Unicode's composed form."""

    characters: int = 0
    text_bytes: int = 0

    def add(self, text: str) -> None:
        """Count a document."""
        composed = nfc(text)
        self.characters += len(composed)
        self.text_bytes += count_bytes(composed)


@dataclass(frozen=True)
class Portion:
    """How much of a source merges are learnt from.

    share: of the characters of all sources that are learnt from.  copies: how often each of its pieces is read, on
    average; below 1, some are not.  text_bytes: of the whole source.
    """

    share: float
    copies: float
    text_bytes: int

    @property
    def learnt_bytes(self) -> int:
        """The bytes that are read, a piece that is read twice counted twice."""
        return round(self.copies * self.text_bytes)

    @property
    def distinct_bytes(self) -> int:
        """The bytes that are read at least once."""
        return round(min(1.0, self.copies) * self.text_bytes)

    def take(self, text: str) -> Iterator[str]:
        """Yield a document or its pieces, each as often as it is learnt from; which ones, a hash of the words decides.

        Pieces of a document have about 2 Ki characters, and end with a line or at a blank.
        """
        whole, rest = divmod(self.copies, 1.0)
        if not rest:
            yield from itertools.repeat(text, int(whole))
            return
        for piece in _cut(text):
            yield from itertools.repeat(piece, int(whole) + (hash_position(nfc(piece), _PURPOSE) < rest))


def _cut(text: str) -> Iterator[str]:
    if len(text) <= _PIECE:
        yield text
        return
    lines: list[str] = []
    size = 0
    for line in itertools.chain.from_iterable(map(_cut_line, text.splitlines(keepends=True))):
        lines.append(line)
        size += len(line)
        if size >= _PIECE:
            yield "".join(lines)
            lines, size = [], 0
    if lines:
        yield "".join(lines)


def _cut_line(line: str) -> Iterator[str]:
    """Yield the parts of a line that is too long for a piece, cut before a blank where there is one."""
    start = 0
    while len(line) - start > _PIECE:
        blank = line.rfind(" ", start + 1, start + _PIECE)
        end = blank if blank > 0 else start + _PIECE
        yield line[start:end]
        start = end
    yield line[start:]


def choose_portions(
    sizes: Mapping[str, TextSize], most_bytes: int, temperature: float, wishes: Mapping[str, Wish]
) -> dict[str, Portion]:
    """Return how much of each source is learnt from, about `most_bytes` of text at most.

    Shares are of characters, since a letter takes one byte in one script and two in another; `find_shares` computes
    them.  Below `most_bytes` every source is read to its end, and one whose share is larger than it is, several times.
    Raises what `find_shares` raises, and DataError for a source without text.
    """
    for name, size in sizes.items():
        if not size.characters:
            what = f"{name} holds no text to learn from." if name else "There is no text to learn a tokenizer from."
            raise DataError(what, "", "Name files that hold text.")
    characters = {name: size.characters for name, size in sizes.items()}
    shares = find_shares(characters, temperature, wishes).by_name
    whole = max(characters[name] / share for name, share in shares.items())
    copies = {name: share * whole / characters[name] for name, share in shares.items()}
    wanted_bytes = sum(copies[name] * size.text_bytes for name, size in sizes.items())
    scale = min(1.0, most_bytes / wanted_bytes)
    # In three digits, so that what is read once is not cut into pieces for the sake of a rounded share.
    return {
        name: Portion(shares[name], float(f"{copies[name] * scale:.3g}"), size.text_bytes)
        for name, size in sizes.items()
    }
