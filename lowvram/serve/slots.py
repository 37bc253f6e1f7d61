"""Chooses the decoder's slot for a new text: the one that has already read the most of it; knows no jobs."""

from __future__ import annotations

from collections.abc import Sequence

from lowvram.generate.decoder import Decoder


class Slots:
    """The free slots of a decoder, and the ids that each of them still holds."""

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        # In the order in which they are taken: first those that were never used, then the longest unused.
        self._free: dict[int, list[int]] = {slot: [] for slot in range(decoder.slots)}

    def find(self, id_T: Sequence[int]) -> int | None:
        """Return a free slot for a text, None where all are taken.

        A slot that shares a prefix with the text is taken only if that prefix is at least half of what it holds;
        otherwise the longest unused slot is taken, so that somebody's long conversation stays cached.
        """
        if not self._free:
            return None
        shared = {slot: count_shared(held, id_T) for slot, held in self._free.items()}
        best = max(self._free, key=lambda slot: shared[slot])
        is_worth_it = shared[best] > 0 and 2 * shared[best] >= len(self._free[best])
        return best if is_worth_it else next(iter(self._free))

    def take(self, slot: int, id_T: Sequence[int]) -> int:
        """Take a free slot and cut it to the prefix that it shares with the text; returns its length, never all."""
        shared = count_shared(self._free.pop(slot), id_T)
        # The last token is read again where all were read before: its logits were not kept.
        return self._decoder.rewind(slot, min(shared, len(id_T) - 1))

    def release(self, slot: int, id_T: Sequence[int]) -> None:
        """Free a slot.  id_T: its text, of which the decoder may have read only a part."""
        self._free[slot] = list(id_T[: self._decoder.length(slot)])

    def forget(self, slot: int) -> None:
        """Free a slot whose contents are unknown."""
        self._decoder.rewind(slot, 0)
        self._free[slot] = []


def count_shared(first: Sequence[int], second: Sequence[int]) -> int:
    """Return the length of the longest common prefix of two texts, in ids."""
    pairs = zip(first, second, strict=False)
    return next((index for index, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))
