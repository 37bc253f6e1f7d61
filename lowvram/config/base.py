"""What every configuration is made of: frozen, closed tables, and numbers that people may write as "1.2e9" or "8GB"."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PositiveInt

from lowvram.units import parse_bytes, round_count

# A hundred times the largest training run there was: what is larger is a slip, and overflows where tokens are counted.
MOST_TOKENS = 10**15
Count = Annotated[PositiveInt, Field(le=MOST_TOKENS), BeforeValidator(round_count)]
Size = Annotated[PositiveInt, BeforeValidator(parse_bytes)]
Share = Annotated[float, Field(ge=0.0, lt=1.0)]


class FrozenConfig(BaseModel):
    """The base of every configuration: frozen, and closed to unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid")


def as_list(value: Any) -> Any:
    """Take one text or path for a list of one: people write `log = "wandb"`."""
    return [value] if isinstance(value, str | Path) else value


def unless_named(**tag: str) -> BeforeValidator:
    """Return what takes a table that does not name its kind for one of this kind: `positions = { theta = 5e5 }`."""
    return BeforeValidator(lambda value: {**tag, **value} if isinstance(value, dict) else value)


def differences(was: FrozenConfig, now: FrozenConfig) -> list[tuple[str, Any, Any]]:
    """List `(dotted key, value before, value now)` for every value in which two configurations differ."""
    before, after = flatten(was.model_dump(mode="json")), flatten(now.model_dump(mode="json"))
    keys = dict.fromkeys([*before, *after])
    return [(key, before.get(key), after.get(key)) for key in keys if before.get(key) != after.get(key)]


def flatten(table: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested tables as one table of dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in table.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
