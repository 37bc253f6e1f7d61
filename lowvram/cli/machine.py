"""Which device a command runs on, chosen once and said aloud, and what torch says of this machine."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from lowvram.errors import MachineError
from lowvram.hardware.detect import explain_mismatch, find_card, find_driver, find_torch, first_line

if TYPE_CHECKING:
    import torch

    from lowvram.hardware.inspect import TorchSays


def choose_device(asked: str) -> torch.device:
    """Return the device named, or the best one here for "auto"; raises MachineError where it cannot be used."""
    import torch

    from lowvram.cli.console import notice

    card = find_card()
    mismatch = explain_mismatch(find_driver(), find_torch(), card.capability if card else None)
    has = _find_devices()
    if asked == "auto":
        if mismatch:
            notice(f"Note: {mismatch}.", "yellow")
        return _open(next(name for name, present in has.items() if present))
    if not has[asked]:
        why = f"{mismatch}." if mismatch else f"torch {torch.__version__} sees none here."
        raise MachineError(f"--device is {asked}.", why, "Leave --device out to train on what is here.")
    return _open(asked)


def ask_torch() -> TorchSays:
    """Import torch, if it can be, and return what it says of itself and of this machine."""
    from lowvram.hardware.inspect import TorchSays

    try:
        import torch
    except (ImportError, OSError) as error:
        return TorchSays(first_line(error))
    device, capability, problem = next(name for name, present in _find_devices().items() if present), None, ""
    if device == "cuda":
        try:
            capability = torch.cuda.get_device_capability(0)
        except RuntimeError as error:  # of which torch's errors of a card are
            problem = first_line(error)
    return TorchSays(
        device=device,
        card_problem=problem,
        capability=capability,
        architectures=tuple(torch.cuda.get_arch_list()),
        has_metal=torch.backends.mps.is_built(),
    )


def _find_devices() -> dict[str, bool]:
    """Return what torch could compute on and whether it is here, the best first."""
    import torch

    return {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}


def _open(name: str) -> torch.device:
    import torch

    if name != "cuda":
        return torch.device(name)
    _warn_of_launches()
    # On sm_90 torch prefers cuDNN's attention, whose scratch no ledger knows (sdp_utils.cpp): one kernel on all cards.
    torch.backends.cuda.enable_cudnn_sdp(False)
    return torch.device("cuda", 0)


@functools.cache
def _warn_of_launches() -> None:
    """Say once what will make kernels slower or fail, as `lowvram doctor` does: better now than at the first launch.

    Raises MachineError where the card is too old for torch, whose first launch on it would fail.
    """
    from lowvram.cli.console import notice
    from lowvram.hardware.doctor import LAUNCH_CHECKS, check_architecture, find_all
    from lowvram.hardware.inspect import gather

    facts = gather(ask_torch())
    too_old = check_architecture(facts) if facts.capability is not None and facts.capability < (7, 5) else None
    if too_old is not None and too_old.is_fatal:
        what, why = (f"{text[0].upper()}{text[1:]}." for text in (too_old.value, too_old.consequence))
        raise MachineError(what, why, f"To mend it: {too_old.command}. Or compute on the processor: --device cpu.")
    for finding in find_all(facts, LAUNCH_CHECKS):
        notice(f"Note: {finding.sentence}", "yellow")
