"""What changes the last bits of a run (versions, threads, device, plan, ...), saved with each checkpoint."""

from __future__ import annotations

from typing import Any

import torch

import lowvram
from lowvram.config.plan import Plan

_OPTIMIZER, _OWN = "optimizer", "own"


def current_environment(device: torch.device, backend: str = _OWN, plan: Plan | None = None) -> dict[str, Any]:
    """Return the environment of this process as plain values.  backend: the optimizer's.  plan: the run's.

    CUDA graphs are not part of it: they replay the same kernels.
    """
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    found = {"lowvram": lowvram.__version__, "torch": str(torch.__version__), "threads": torch.get_num_threads()}
    found |= {"device": name, _OPTIMIZER: backend}
    if plan is not None:
        found |= {"micro-batch": plan.micro_batch, "compiled": plan.compile}
    return found


def compare_environments(saved: object, here: dict[str, Any]) -> str | None:
    """Return a sentence where a checkpoint was saved in another environment; None where it is equal or unknown.

    The parameters are those of `list_changed_conditions`.
    """
    changed = list_changed_conditions(saved, here)
    if not changed:
        return None
    return f"Changed since the last save: {'; '.join(changed)}. The run goes on; from here its last bits may differ."


def list_changed_conditions(saved: object, here: dict[str, Any]) -> list[str]:
    """Return, in half a sentence each, what of a checkpoint's environment is another one here.

    saved: what `current_environment` returned then.  The thread count is compared only where the CPU trains the model.
    """
    if not isinstance(saved, dict):
        return []
    saved = {_OPTIMIZER: _OWN, **saved}  # which older versions did not write
    compared = [name for name in here if name != "threads" or here["device"] == "cpu"]
    return [
        f"{name} {str(saved[name])[:60]} then, {here[name]} now"
        for name in compared
        if name in saved and saved[name] != here[name]
    ]
