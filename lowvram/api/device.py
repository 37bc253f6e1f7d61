"""Which device a model computes on, chosen once, and what torch says of this machine."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Literal, NamedTuple

from lowvram.api.tasks import Notice
from lowvram.errors import MachineError, argument
from lowvram.hardware.detect import explain_mismatch, find_card, find_driver, find_torch, first_line

if TYPE_CHECKING:
    import torch

    from lowvram.hardware.inspect import TorchSays

DeviceType = Literal["cuda", "mps", "cpu"]


class ChosenDevice(NamedTuple):
    """A device that torch can use here, and what the user should know about that choice."""

    device: torch.device
    notices: tuple[Notice, ...] = ()


def choose_device(asked: str = "auto") -> ChosenDevice:
    """Return the device named ("cuda", "mps" or "cpu"), or the best one here for "auto".

    Raises MachineError where the device named cannot be used.
    """
    import torch

    card = find_card()
    mismatch = explain_mismatch(find_driver(), find_torch(), card.capability if card else None)
    has = _find_devices()
    if asked == "auto":
        chosen = _open(next(name for name, present in has.items() if present))
        notes = (Notice(f"Note: {mismatch}.", "warning"),) if mismatch else ()
        return ChosenDevice(chosen.device, notes + chosen.notices)
    known = next((name for name in has if name == asked), None)
    if known is None:
        raise MachineError(f"{argument('device')} is {asked!r}.", fix=f"Known: auto, {', '.join(has)}.")
    if not has[known]:
        why = f"{mismatch}." if mismatch else f"torch {torch.__version__} sees none here."
        raise MachineError(f"{argument('device')} is {asked}.", why, "Leave `device` out to compute on what is here.")
    return _open(known)


def ask_torch() -> TorchSays:
    """Import torch, if it can be, and return what it says of itself and of this machine."""
    from lowvram.hardware.inspect import TorchSays

    try:
        import torch
    except (ImportError, OSError) as error:
        return TorchSays(first_line(error))
    device = next(name for name, present in _find_devices().items() if present)
    capability, problem = None, ""
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


def _find_devices() -> dict[DeviceType, bool]:
    """Return what torch could compute on and whether it is here, the best first."""
    import torch

    return {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}


def _open(name: DeviceType) -> ChosenDevice:
    import torch

    if name != "cuda":
        return ChosenDevice(torch.device(name))
    # On sm_90 torch prefers cuDNN's attention, whose scratch no ledger knows (sdp_utils.cpp): one kernel on all cards.
    torch.backends.cuda.enable_cudnn_sdp(False)
    return ChosenDevice(torch.device("cuda", 0), _new_launch_notices())


def _new_launch_notices() -> tuple[Notice, ...]:
    """Return what will make kernels slower or fail, as `lowvram doctor` says it; empty after the first call."""
    is_first = not _find_launch_notices.cache_info().currsize
    notices = _find_launch_notices()
    return notices if is_first else ()


@functools.cache
def _find_launch_notices() -> tuple[Notice, ...]:
    """Return what will make kernels slower or fail; raises MachineError where the card is too old for torch."""
    from lowvram_kernels.capabilities import FIRST_IN_TORCH_WHEELS

    from lowvram.hardware.doctor import LAUNCH_CHECKS, check_architecture, find_all
    from lowvram.hardware.inspect import gather

    facts = gather(ask_torch())
    too_old = (
        check_architecture(facts) if facts.capability is not None and facts.capability < FIRST_IN_TORCH_WHEELS else None
    )
    if too_old is not None and too_old.is_fatal:
        what, why = (f"{text[0].upper()}{text[1:]}." for text in (too_old.value, too_old.consequence))
        raise MachineError(
            what, why, f"To repair it: {too_old.command}. Or compute on the processor: {argument('device', 'cpu')}."
        )
    return tuple(Notice(f"Note: {finding.sentence}", "warning") for finding in find_all(facts, LAUNCH_CHECKS))
