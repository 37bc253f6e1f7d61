"""The factor on an fp16 run's loss, on the device: it grows and falls without the host; knows no step.

Source: Micikevicius et al. 2018, "Mixed Precision Training": start high, halve on overflow, double after many steps
without one.
"""

from __future__ import annotations

import torch
from torch import Tensor

FIRST_LOSS_SCALE = 2.0**16
QUIET_STEPS = 2_000


class LossScale:
    """value: the factor, an fp32 scalar.  quiet: finite steps since it last changed, an fp32 scalar."""

    def __init__(self, device: torch.device) -> None:
        self.value = torch.ones((), device=device)
        self.quiet = torch.zeros((), device=device)

    def set_(self, value: float, quiet: int) -> None:
        """Write the numbers that a checkpoint holds, or those of a new run."""
        self.value.fill_(value)
        self.quiet.fill_(quiet)

    def count_(self, skip: Tensor) -> None:
        """Count a step.  skip: a scalar, 1 where its gradients were not finite."""
        is_skipped, quiet = skip != 0, (self.quiet + 1.0) * (1.0 - skip)
        grows = quiet >= QUIET_STEPS
        finite = torch.where(grows, self.value * 2.0, self.value)
        self.value.copy_(torch.where(is_skipped, (self.value / 2.0).clamp_min(1.0), finite))
        self.quiet.copy_(torch.where(grows, 0.0, quiet))


def next_loss_scale(value: float, quiet: int, is_finite: bool) -> tuple[float, int]:
    """Return the factor and the quiet steps after a step, as `LossScale.count_` computes them on the device."""
    if not is_finite:
        return max(1.0, value / 2), 0
    return (value * 2, 0) if quiet + 1 >= QUIET_STEPS else (value, quiet + 1)
