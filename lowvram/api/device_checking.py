"""The check of a device before a new run: told in one line, or refused with the way out; computes nothing itself."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lowvram.api.tasks import Notice, Progress, Task

if TYPE_CHECKING:
    from lowvram.train.device_check import DeviceCheck
    from lowvram.train.settings import RunSettings


def is_worth_a_check(settings: RunSettings) -> bool:
    """Say whether a device is checked without being asked: before a new run that the processor does not compute."""
    return settings.device.type != "cpu" and not settings.is_kept


def check_device(settings: RunSettings) -> Task[DeviceCheck]:
    """Compare the device with the processor at the run's shapes; raises MachineError where it computes wrongly."""
    from lowvram.train import device_check
    from lowvram.train.device_parts import list_parts

    model, train, plan, device = settings.config.model, settings.config.train, settings.plan, settings.device
    what = "Comparing the device with the processor"
    parts, total = device_check.check_device(model, train, plan, device), len(list_parts(model))
    yield Progress(what, 0, total)
    for done in range(total + 1):
        try:
            part = next(parts)
        except StopIteration as end:
            check: DeviceCheck = end.value
            break
        yield Progress(what, done, total, part.name)
    wrong = [part for part in check.parts if not part.agrees]
    if wrong:
        yield Progress("Looking for a micro-batch that is computed rightly")
        right = device_check.find_right_micro_batch(wrong, model, train, plan, device)
        raise device_check.explain_wrong_device(check, device, right)
    yield Notice(describe_check(check))
    if check.left_out:
        why = "time or memory did not suffice"
        yield Notice(f"Device check: {', '.join(check.left_out)} were left out, since {why}.", "warning")
    return check


def describe_check(check: DeviceCheck) -> str:
    """Return a sentence about a check in which everything that was compared agrees."""
    from lowvram.units import count_of, show_duration

    worst = check.worst
    if worst is None:
        return "Device check: nothing was compared."
    agree = f"{count_of(len(check.parts), 'part')} agree{'s' if len(check.parts) == 1 else ''} with the processor"
    return f"Device check: {agree} (worst {worst.error:.2g} of {worst.tolerance:g}), {show_duration(check.took_s)}."
