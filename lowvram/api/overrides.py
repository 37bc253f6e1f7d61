"""Values laid over a run file or a preset, as `--set` takes them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from lowvram.api.arguments import refuse_missing


def assignments(overrides: Mapping[str, object] | Sequence[str]) -> list[str]:
    """Return overrides as `key=value`, the value as TOML; {"optimizer.lr": 3e-4} is ["optimizer.lr=0.0003"]."""
    refuse_missing("overrides", overrides, Mapping, list, tuple)
    if not isinstance(overrides, Mapping):
        for assignment in overrides:
            refuse_missing("overrides", assignment, str)
        return list(overrides)
    return [f"{key}={_as_toml(value)}" for key, value in overrides.items()]


def _as_toml(value: object) -> str:
    """Return a value as TOML, which spells numbers, texts, truth values and lists as JSON does, but no tables."""
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{key} = {_as_toml(inner)}" for key, inner in value.items()) + " }"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_as_toml, value)) + "]"
    return json.dumps(str(value) if isinstance(value, Path) else value, ensure_ascii=False)
