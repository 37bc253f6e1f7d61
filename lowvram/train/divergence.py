"""What to make of numbers that are not finite: which tensors hold them, and what a run that diverged is told."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lowvram.errors import TrainingError

# Consecutive steps without a finite gradient after which going on only burns electricity.
MOST_SKIPPED = 25


@torch.no_grad()
def find_not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """Return the name of the first tensor that holds NaN or an infinity, None where all numbers are finite.

    The greatest magnitude of each is found where the tensor lies, which allocates nothing of its size; the host reads
    one number per device.
    """
    names: dict[torch.device, list[str]] = {}
    greatest: dict[torch.device, list[Tensor]] = {}
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and tensor.numel():
            names.setdefault(tensor.device, []).append(name)
            greatest.setdefault(tensor.device, []).append(torch.linalg.vector_norm(tensor, torch.inf).float())
    for device, found in greatest.items():
        are_finite = torch.stack(found).isfinite().tolist()
        if not all(are_finite):
            return names[device][are_finite.index(False)]
    return None


def explain_divergence(skipped: int, step: int, healthy_step: int | None, rate: float) -> TrainingError:
    """Return the error of a run whose gradients were not finite in so many steps in a row, the last of them `step`.

    healthy_step: of the newest checkpoint from before these steps, if any.  rate: the run's optimizer.lr.
    """
    return TrainingError(
        f"{skipped} steps in a row had no finite gradient; stopped at step {step}.",
        _say_what_stands(healthy_step, "from before that, unless it diverged slowly"),
        f"Lower optimizer.lr (now {rate:g}) in a new run.dir, with start_from an older checkpoint if you like.",
    )


def explain_broken_weights(name: str, step: int, healthy_step: int | None, rate: float) -> TrainingError:
    """Return the error of a state that is not saved, since the tensor `name` of it is not finite.

    The others are as for `explain_divergence`.
    """
    return TrainingError(
        f"{name} holds numbers that are not finite after step {step}, so this state was not saved.",
        _say_what_stands(healthy_step, "the newest that can be used"),
        f"Lower optimizer.lr (now {rate:g}) in a new run.dir, with start_from an older checkpoint if you like.",
    )


def _say_what_stands(healthy_step: int | None, which: str) -> str:
    if healthy_step is None:
        return "There is no checkpoint from before that."
    return f"The checkpoint of step {healthy_step} is {which}."
