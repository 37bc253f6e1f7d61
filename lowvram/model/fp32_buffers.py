"""Buffers whose numbers a cast of the model must not touch; knows nothing of what they mean."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn


class Fp32Buffers(nn.Module):
    """A module whose own buffers follow it to a device but keep their dtype through `.to(bfloat16)` or `.half()`.

    Casting rotation frequencies to bfloat16, or a complex table to real, silently stops RoPE being a rotation.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Fp32Buffers:
        exact = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, buffer in exact.items():
            moved = self._buffers[name]
            if buffer is not None and moved is not None:
                self._buffers[name] = buffer.to(moved.device)
        return self
