"""Which card an op works for, and which backend it takes there; knows no tensor's values and no run.

On paper (inside `on_paper(card)`) tensors are meta tensors, but every op takes the card's own path and makes the card's
own allocations: so what is counted there is what the card will hold.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor


class Card(NamedTuple):
    """What ops ask of a device and its torch.

    platform: "cuda", "mps" or "cpu".  capability: CUDA's, (major, minor).  has_flash: torch was built with
    FlashAttention, which its wheels for Windows are not.
    """

    platform: str
    capability: tuple[int, int] | None = None
    has_flash: bool = True


class Choice(NamedTuple):
    """A backend, and one sentence why."""

    backend: str
    reason: str


class HiddenWork(NamedTuple):
    """What a part of a step costs that does not run on paper, where no dispatcher can see it.  flops: of attention."""

    flops: float = 0.0
    moved_bytes: float = 0.0
    ops: float = 0.0


def _forget(work: HiddenWork | Tensor) -> None:
    """Off paper nobody asks."""


# A fact of the build, asked once: Dynamo cannot trace the question.
_HAS_FLASH: bool = torch.backends.cuda.is_flash_attention_available()
# Plain names, since Dynamo cannot trace a ContextVar; a rehearsal has one thread.
_paper: Card | None = None
_note: Callable[[HiddenWork], None] = _forget
_note_host: Callable[[Tensor], None] = _forget
# How often what happens on paper now really happens.
_times = 1


@contextmanager
def on_paper(
    card: Card, note: Callable[[HiddenWork], None] = _forget, note_host: Callable[[Tensor], None] = _forget
) -> Iterator[None]:
    """Let ops take `card`'s path on whatever device their tensors lie; for meta tensors.

    note: is told of the work that paper replaces by its allocations.  note_host: of each tensor that lies in the
    computer's memory and not on the card.
    """
    global _paper, _note, _note_host
    before = _paper, _note, _note_host
    _paper, _note, _note_host = card, note, note_host
    try:
        yield
    finally:
        _paper, _note, _note_host = before


def empty_on_host(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return memory of the computer for what belongs to a card; with `to_host` the only way off one.

    Not page-locked: torch rounds each block of such memory up to a power of two, half as much again for large stacks,
    and Windows lends little of it.  device: the card, "cpu" where there is none.
    """
    if is_on_paper():
        tensor = torch.empty(shape, dtype=dtype, device=device)
        _note_host(tensor)
        return tensor
    return torch.empty(shape, dtype=dtype, device="cpu")


def to_host(tensor: Tensor) -> Tensor:
    """Return a copy in the computer's memory, of the same shape and dtype."""
    return empty_on_host(tensor.shape, tensor.dtype, tensor.device).copy_(tensor)


def note_work(flops: float = 0.0, moved_bytes: float = 0.0, ops: float = 1.0) -> None:
    """Tell of work that paper replaces by its allocations."""
    _note(HiddenWork(flops, moved_bytes, ops))


def shown(count: int) -> Iterator[int]:
    """Yield 0 … count − 1; on paper 0 alone, whose work counts for all: for turns that allocate the same.

    The caller must use each number before it asks for the next, and the last one too.
    """
    global _times
    if not is_on_paper():
        yield from range(count)
        return
    before, _times = _times, _times * count
    try:
        if count:
            yield 0
    finally:
        _times = before


def times_now() -> int:
    """Return for how many turns the work counts that is done on paper now."""
    return _times


def is_on_paper() -> bool:
    """Say whether this runs inside `on_paper`."""
    return _paper is not None


def card_of(device: torch.device) -> Card:
    """Return the card that a tensor on `device` is computed by: the imagined one on paper."""
    if _paper is not None:
        return _paper
    if device.type != "cuda":
        return Card(device.type)
    return Card("cuda", torch.cuda.get_device_capability(device), _HAS_FLASH)


def choose_attention(card: Card, dtype: torch.dtype, is_masked: bool) -> Choice:
    """Choose the attention kernel: "flash", "efficient" or "math", which writes out every score.

    Source: torch, aten/native/transformers/cuda/sdp_utils.cpp and aten/native/mps.
    """
    if card.platform == "cpu":
        return Choice("flash", "torch's CPU kernel is fused")
    if card.platform != "cuda":
        return Choice("math", "torch's attention on MPS writes out every score while it learns")
    if not card.has_flash:
        return Choice("efficient", "this torch was built without FlashAttention, as those for Windows are")
    if card.capability is None or card.capability < (8, 0):
        return Choice("efficient", "FlashAttention 2 needs compute capability 8.0")
    if dtype == torch.float32:
        return Choice("efficient", "FlashAttention 2 takes 16-bit numbers only")
    if is_masked:
        return Choice("efficient", "FlashAttention 2 takes no mask")
    return Choice("flash", "16-bit numbers, no mask, compute capability 8.0 or more")
