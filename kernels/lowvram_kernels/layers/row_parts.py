"""Rows cut into parts whose temporaries stay in a processor's cache; knows no op.

An op that makes fp32 copies of 16-bit rows, or passes over them several times, takes half the time part by part: its
copies are read back from the cache.  On other devices, and in compiled blocks, all rows are one part.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from lowvram_kernels.dispatch import card_of, representative

# Elements of a part.  Measured on a Xeon with 2 MiB of cache a core, torch 2.13: from 2¹⁶ to 2¹⁷ fastest, where several
# fp32 copies are alive; fewer cost calls.
AT_ONCE = 2**17


def works_in_parts(device: torch.device) -> bool:
    """Say whether ops on this device should cut their rows."""
    return not torch.compiler.is_compiling() and card_of(device).platform == "cpu"


def row_parts(rows: int, width: int, device: torch.device, at_once: int = AT_ONCE) -> Iterator[slice]:
    """Cut rows of `width` numbers into parts of about `at_once` numbers, or single rows: slices of equal length.

    The last one may be shorter.  In meta mode the first one stands for all.
    """
    if not works_in_parts(device):
        yield slice(0, rows)
        return
    parts = -(-rows * width // at_once)
    step = max(1, -(-rows // max(1, parts)))
    for index in representative(-(-rows // step)):
        yield slice(index * step, min((index + 1) * step, rows))
