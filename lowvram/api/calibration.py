"""The speed of this machine: real steps, timed and kept for every later `fit`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lowvram.api.tasks import Notice, Task

if TYPE_CHECKING:
    import torch

    from lowvram.api.target import Target
    from lowvram.config.model import ModelConfig
    from lowvram.config.train import TrainConfig

# The numbers between which a processor has to be asked which are faster: its name does not say.
_COMPARED = ("bf16", "fp32")


def calibrate(name: str, model: ModelConfig, train: TrainConfig, target: Target) -> Task[None]:
    """Time steps of a configuration on this machine, and keep what they say about its speed.

    On a processor a run in bf16 or fp32 is timed in both, and on an NVIDIA card one in 16 bits in FP8 and INT8 too, so
    that `fit` can say which are faster: half a minute each.
    """
    from lowvram.api.device import choose_device
    from lowvram.config.train import LOW_PRECISIONS
    from lowvram.errors import ConfigError, MachineError
    from lowvram.fit.calibration_store import compare_precisions

    device, notices = choose_device("auto")
    yield from notices
    if device.type != target.profile.platform:
        fix = "Install a torch for it, or leave `measure` out."
        raise MachineError(f"{target.profile.name} cannot be timed.", f"torch trains on {device} here.", fix)
    if train.update_during_backward:
        fix = "Measure a preset of about that size: what is found holds for the card, whatever is trained on it."
        raise ConfigError(f"{name} updates during backward.", "`measure` times gradients and updates apart.", fix)
    if not (yield from _calibrate(name, model, train, target, device)):
        raise MachineError(
            f"{name} does not fit here, so it cannot be timed.", fix="Measure a smaller one, with `preset`."
        )
    if device.type == "cuda" and train.precision in ("bf16", "fp16"):
        for precision in LOW_PRECISIONS:
            low = train.model_copy(update={"precision": precision})
            if not (yield from _calibrate(name, model, low, target, device)):
                yield Notice(f"{name} does not fit here in {precision}, so that was not timed.", "warning")
    if device.type != "cpu" or train.precision not in _COMPARED:
        return
    [other] = set(_COMPARED) - {train.precision}
    compared = train.model_copy(update={"precision": other})
    if not (yield from _calibrate(name, model, compared, target, device)):
        yield Notice(f"{name} does not fit here in {other}, so bf16 and fp32 were not compared.", "warning")
        return
    times = compare_precisions(target.profile)
    if times is not None:
        yield Notice(f"A micro-batch takes {times:.2f} times as long in bf16 as in fp32.")


def _calibrate(name: str, model: ModelConfig, train: TrainConfig, target: Target, device: torch.device) -> Task[bool]:
    """Time and keep one precision; return False where it does not fit."""
    from lowvram.api.rehearsals import rehearse_fit
    from lowvram.api.target import notices_of
    from lowvram.fit.calibrate import measure
    from lowvram.fit.calibration_store import store_calibration
    from lowvram.train.oom import cap_memory

    budget = target.budget(train.precision)
    yield from notices_of(budget)
    report = rehearse_fit(name, model, train, budget)
    if not report.search_result.fits:
        return False
    yield Notice(f"Timing {name} in {train.precision} on {device}: half a minute or so …")
    # A plan near the limit must raise here, and not spill into host memory and be remembered as slow.
    cap_memory(device, target.profile.allocator_bytes(budget.limit_bytes))
    measured = measure(name, model, train, report.search_result.plan, device, target.profile)
    path = store_calibration(measured)
    yield Notice(f"Measured: {measured.product_flops_per_s / 1e12:.2f} TFLOP/s in products, kept in {path}.")
    return True
