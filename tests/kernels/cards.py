"""Where tests run Triton kernels: on a CUDA card if there is one, else in Triton's interpreter on the processor.

The interpreter computes as if on the card that a test imagines; tests/conftest.py turns it on before anything imports
Triton.  Unwritten memory is NaN or 0xA5 in what `unwritten` makes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from lowvram_kernels.dispatch import Card, is_interpreted, override_card
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed")
DEVICE = "cpu" if is_interpreted() else "cuda"
CARDS = {
    "sm75": Card("cuda", (7, 5)),
    "sm80": Card("cuda", (8, 0)),
    "sm86": Card("cuda", (8, 6)),
    "sm89": Card("cuda", (8, 9)),
    "sm90": Card("cuda", (9, 0)),
    "sm120": Card("cuda", (12, 0)),
}


@contextmanager
def running_on(name: str) -> Iterator[str]:
    """Take the path of a card; yields the device for its tensors.  On a real card only its own path can run."""
    card = CARDS[name]
    if DEVICE == "cuda" and torch.cuda.get_device_capability() < (card.capability or (0, 0)):
        pytest.skip(f"this card is not {name}")
    with override_card(card):
        yield DEVICE


def unwritten(*shape: int, dtype: torch.dtype) -> Tensor:
    """Return memory whose values no test should ever see again: NaN, or 0xA5 in integers."""
    fill = torch.nan if dtype.is_floating_point else -91 if dtype.is_signed else 165
    return torch.full(shape, fill, dtype=dtype, device=DEVICE)
