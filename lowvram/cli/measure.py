"""What `lowvram fit --measure` does: real steps on this machine, timed and kept."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from lowvram.cli.place import Card
    from lowvram.config.model import ModelConfig
    from lowvram.config.train import TrainConfig

# The numbers between which a processor has to be asked which are faster: its name does not say.
_COMPARED = ("bf16", "fp32")


def measure_here(name: str, model: ModelConfig, train: TrainConfig, card: Card) -> None:
    """Time steps of a configuration on this machine, and keep what they say about its speed.

    On a processor a run in bf16 or fp32 is timed in both, so that `fit` can say which are faster.
    """
    from lowvram.cli.console import notice
    from lowvram.cli.machine import choose_device
    from lowvram.errors import ConfigError, MachineError
    from lowvram.fit.calibration_store import compare_precisions

    device = choose_device("auto")
    if device.type != card.profile.platform:
        fix = "Install a torch for it, or leave --measure out."
        raise MachineError(f"{card.profile.name} cannot be timed.", f"torch trains on {device} here.", fix)
    if train.update_during_backward:
        fix = "Measure a preset of about that size: what is found holds for the card, whatever is trained on it."
        raise ConfigError(f"{name} updates during backward.", "--measure times gradients and updates apart.", fix)
    if not _measure(name, model, train, card, device):
        raise MachineError(
            f"{name} does not fit here, so it cannot be timed.", fix="Measure a smaller preset: --model."
        )
    if device.type != "cpu" or train.precision not in _COMPARED:
        return
    [other] = set(_COMPARED) - {train.precision}
    if not _measure(name, model, train.model_copy(update={"precision": other}), card, device):
        notice(f"{name} does not fit here in {other}, so bf16 and fp32 were not compared.", "yellow")
        return
    times = compare_precisions(card.profile)
    if times is not None:
        notice(f"A micro-batch takes {times:.2f} times as long in bf16 as in fp32.")


def _measure(name: str, model: ModelConfig, train: TrainConfig, card: Card, device: torch.device) -> bool:
    """Time and keep one precision; return False where it does not fit."""
    from lowvram.cli.console import notice
    from lowvram.cli.place import evaluate_fit_here
    from lowvram.fit.calibrate import measure
    from lowvram.fit.calibration_store import store_calibration
    from lowvram.train.oom import cap_memory

    place = card.place(train.precision)
    answer = evaluate_fit_here(name, model, train, place)
    if not answer.found.fits:
        return False
    notice(f"Timing {name} in {train.precision} on {device}: half a minute or so …")
    # A plan near the limit must raise here, and not spill into host memory and be remembered as slow.
    cap_memory(device, card.profile.allocator_bytes(place.limit_bytes))
    measured = measure(name, model, train, answer.found.plan, device, card.profile)
    path = store_calibration(measured)
    notice(f"Measured: {measured.product_flops_per_s / 1e12:.2f} TFLOP/s in products, kept in {path}.")
    return True
