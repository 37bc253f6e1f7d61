"""What decides a run's last bits beside its run file and plan: torch, the threads, the device; kept with each save."""

from __future__ import annotations

from typing import Any

import torch

# Under this name among the numbers of a checkpoint.
KEY = "conditions"


def current_environment(device: torch.device) -> dict[str, Any]:
    """Return the conditions of this process as plain values."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return {"torch": str(torch.__version__), "threads": torch.get_num_threads(), "device": name}


def compare_environments(saved: object, here: dict[str, Any]) -> str | None:
    """Return a sentence where a checkpoint was saved under other conditions; None where they are equal or unknown.

    saved: what `conditions_here` returned then.  Threads of the processor count only where it does the computing.
    """
    if not isinstance(saved, dict):
        return None
    counts = [name for name in here if name != "threads" or here["device"] == "cpu"]
    changed = [
        f"{name} {str(saved[name])[:60]} then, {here[name]} now"
        for name in counts
        if name in saved and saved[name] != here[name]
    ]
    if not changed:
        return None
    return f"Not as at the last save: {'; '.join(changed)}.  The run goes on, and may differ from then on in last bits."
