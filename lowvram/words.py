"""What every configuration is made of: frozen, closed tables, and numbers that people may write as "1.2e9" or "8GB"."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PositiveInt

from lowvram.units import parse_bytes, parse_count

# A hundred times the largest training run there was: what is larger is a slip, and overflows where tokens are counted.
MOST_TOKENS = 10**15
Count = Annotated[PositiveInt, Field(le=MOST_TOKENS), BeforeValidator(parse_count)]
Size = Annotated[PositiveInt, BeforeValidator(parse_bytes)]
Share = Annotated[float, Field(ge=0.0, lt=1.0)]


class Words(BaseModel):
    """The base of every configuration: frozen, and closed to unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid")
