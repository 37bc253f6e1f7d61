"""Finds tensors with numbers that are not finite, and writes the errors of a run that diverged; knows no loop."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lowvram.errors import TrainingError

# After this many consecutive steps without a finite gradient the run is stopped, since it will not recover.
MOST_SKIPPED = 25


@torch.no_grad()
def find_not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """Return the name of the first tensor that holds NaN or an infinity, None where all numbers are finite.

    The greatest magnitude of each is computed on the tensor's own device, without a copy of it; the host reads one
    vector per device.
    """
    names: dict[torch.device, list[str]] = {}
    greatest: dict[torch.device, list[Tensor]] = {}
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and tensor.numel():
            names.setdefault(tensor.device, []).append(name)
            greatest.setdefault(tensor.device, []).append(torch.linalg.vector_norm(tensor, torch.inf).float())
    for device, maxima in greatest.items():
        are_finite = torch.stack(maxima).isfinite().tolist()
        if not all(are_finite):
            return names[device][are_finite.index(False)]
    return None


def may_go_back(policy: str, healthy_step: int | None, went_back_at: int, went_back_to: int) -> bool:
    """Say whether a run that diverged goes back to its newest healthy checkpoint instead of ending.

    policy: `run.on_divergence`.  healthy_step: of that checkpoint, None if there is none.  went_back_at: the step at
    which the run went back last, 0 where it never did; went_back_to: the step of the checkpoint that it then loaded.
    It does not go back to the same checkpoint twice in a row, since it would do so for ever.
    """
    if policy != "go back" or healthy_step is None:
        return False
    return went_back_at == 0 or healthy_step != went_back_to


def explain_divergence(
    skipped: int, step: int, healthy_step: int | None, rate: float, went_back_at: int = 0, policy: str = "stop"
) -> TrainingError:
    """Return the error of a run that skipped `skipped` steps in a row, the last of them `step`.

    healthy_step: the step of the newest checkpoint from before these steps, if any.  rate: the run's optimizer.lr.
    went_back_at, policy: see `may_go_back`.
    """
    again = f" It went back to it after step {went_back_at}, which did not help." if went_back_at else ""
    other = "" if policy == "go back" else ', or set run.on_divergence = "go back" to pass over these steps'
    return TrainingError(
        f"{skipped} steps in a row had no finite gradient or a loss that is a spike; stopped at step {step}.",
        _describe_checkpoint(healthy_step, "from before that, unless it diverged slowly") + again,
        f"Lower optimizer.lr (now {rate:g}) in a new run.dir, with start_from an older checkpoint if you like{other}.",
    )


def explain_broken_weights(name: str, step: int, healthy_step: int | None, rate: float) -> TrainingError:
    """Return the error of a state that is not saved, because its tensor `name` is not finite.

    The other parameters are those of `explain_divergence`.
    """
    return TrainingError(
        f"{name} holds numbers that are not finite after step {step}, so this state was not saved.",
        _describe_checkpoint(healthy_step, "the newest that can be used"),
        f"Lower optimizer.lr (now {rate:g}) in a new run.dir, with start_from an older checkpoint if you like.",
    )


def _describe_checkpoint(healthy_step: int | None, which: str) -> str:
    if healthy_step is None:
        return "There is no checkpoint from before that."
    return f"The checkpoint of step {healthy_step} is {which}."
