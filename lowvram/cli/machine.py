"""Which device a command runs on, chosen once and said aloud."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lowvram.errors import MachineError
from lowvram.machine import explain_mismatch, find_driver, find_torch

if TYPE_CHECKING:
    import torch


def choose_device(asked: str) -> torch.device:
    """Return the device named, or the best one here for "auto"; raises MachineError where it cannot be used."""
    import torch

    from lowvram.cli.show import notice

    mismatch = explain_mismatch(find_driver(), find_torch())
    has = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if asked == "auto":
        if mismatch:
            notice(f"Note: {mismatch}.", "yellow")
        return torch.device(next(name for name, present in has.items() if present))
    if not has[asked]:
        why = f"{mismatch}." if mismatch else f"torch {torch.__version__} sees none here."
        raise MachineError(f"--device is {asked}.", why, "Leave --device out to train on what is here.")
    return torch.device(asked)
