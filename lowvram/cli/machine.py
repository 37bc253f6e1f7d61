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
        return _open(next(name for name, present in has.items() if present))
    if not has[asked]:
        why = f"{mismatch}." if mismatch else f"torch {torch.__version__} sees none here."
        raise MachineError(f"--device is {asked}.", why, "Leave --device out to train on what is here.")
    return _open(asked)


def _open(name: str) -> torch.device:
    import torch

    if name != "cuda":
        return torch.device(name)
    # On sm_90 torch prefers cuDNN's attention, whose scratch no ledger knows (sdp_utils.cpp): one kernel on all cards.
    torch.backends.cuda.enable_cudnn_sdp(False)
    return torch.device("cuda", 0)
