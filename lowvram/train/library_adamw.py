"""AdamW with 8-bit moments by the library bitsandbytes, in place of our kernel; codes and blocks are the same.

The library takes rate, step and scale of the gradient as numbers of the host, so each update waits once for the card,
and cannot be recorded as a CUDA graph.  Its last bits differ from ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from lowvram_kernels.optim.adamw8 import Maps, Moments
from torch import Tensor

from lowvram.config.train import AdamW, Muon
from lowvram.errors import MachineError

# Why an update by it is launched and never recorded.
UNRECORDED = "bitsandbytes takes its numbers from the host"


class Part(NamedTuple):
    """A weight (fp32, contiguous) with its gradient, moments, and the number of this step, a scalar on the device."""

    weight: Tensor
    gradient: Tensor
    moments: Moments
    step: Tensor


def require_library(device: torch.device) -> None:
    """Raise MachineError where bitsandbytes cannot be imported, or does not run on the device."""
    if device.type not in ("cuda", "cpu", "meta"):
        raise MachineError(
            f"bitsandbytes has no optimizer for {device.type}.",
            'optimizer.backend is "bitsandbytes".',
            'Set it to "own".',
        )
    try:
        import bitsandbytes  # noqa: F401  # only where it is asked for
    except ImportError as error:
        raise MachineError(
            'optimizer.backend is "bitsandbytes", which cannot be imported.',
            str(error),
            "Run pip install 'bitsandbytes>=0.50', or set optimizer.backend to \"own\"; a run may change over.",
        ) from error


@torch.no_grad()
def step_by_library(
    parts: Sequence[Part],
    maps: Maps,
    config: AdamW | Muon,
    learning_rate: Tensor,
    decay: float,
    gradient_scale: Tensor | float,
    skip: Tensor | None,
) -> None:
    """Make one step of each weight in place; where skip is not zero, nothing changes.  Waits once for the device.

    learning_rate: fp32 scalar on the device.  gradient_scale: a number or such a scalar.  Moments are those of
    `adamw8.new_moments`, of 8 bits.
    """
    from bitsandbytes.functional import optimizer_update_8bit_blockwise  # only where it is asked for

    scalars = [torch.as_tensor(gradient_scale, dtype=torch.float32, device=learning_rate.device), learning_rate]
    scalars.append(torch.zeros_like(learning_rate) if skip is None else skip.float())
    numbers = torch.stack([scalar.reshape(()) for scalar in (*scalars, *(part.step for part in parts))]).tolist()
    (scale, rate, is_skipped), steps = numbers[:3], numbers[3:]
    if is_skipped:
        return
    for part, step in zip(parts, steps, strict=True):
        code_m, code_v, absmax_m, absmax_v = part.moments
        optimizer_update_8bit_blockwise(
            "adam",
            part.gradient,
            part.weight,
            code_m,
            code_v,
            config.beta1,
            config.beta2,
            0.0,
            0.0,
            config.eps,
            int(step),
            rate,
            maps.first.value,
            maps.second.value,
            absmax_m,
            absmax_v,
            decay,
            scale,
        )
