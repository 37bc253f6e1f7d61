"""A module whose buffers keep their dtype when the model is cast; knows nothing of what the buffers mean."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn


class Fp32Buffers(nn.Module):
    """A module whose own buffers follow it to a device but keep their dtype through `.to(bfloat16)` or `.half()`.

    If rotation frequencies are cast to bfloat16, or a complex table to real, RoPE silently stops being a rotation.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Fp32Buffers:
        original = dict(self._buffers)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # untyped in torch
        for name, buffer in original.items():
            moved = self._buffers[name]
            if buffer is not None and moved is not None:
                self._buffers[name] = buffer.to(moved.device)
        return self
