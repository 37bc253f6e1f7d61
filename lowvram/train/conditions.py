"""The record of what a checkpoint was trained on, as it is read back from its numbers; never imports torch.

`environment` makes the record and compares two of them.
"""

from __future__ import annotations

# The name of the record among the numbers of a checkpoint.
KEY = "conditions"


def device_kind(conditions: object) -> str | None:
    """Return the kind of device of a record, "cpu", "mps" or "cuda" (which names its cards); None if not known."""
    name = conditions.get("device") if isinstance(conditions, dict) else None
    if not isinstance(name, str):
        return None
    return name if name in ("cpu", "mps") else "cuda"
