"""What electricity costs at each hour of the week, as a TOML file tells it; knows no run.

currency = "TL"
[[price]]
hours = "06:00-22:00"             # written as in run.guard.schedule
per_kwh = 4.2
[[price]]
hours = "22:00-06:00"
per_kwh = 1.9
[[price]]
hours = "sat,sun 00:00-24:00"     # where several name an hour, the last one counts
per_kwh = 1.6
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, Field, ValidationError, model_validator

from lowvram.config.allowed import describe_allowed
from lowvram.config.base import FrozenConfig
from lowvram.config.guard import check_window
from lowvram.config.hours import DAYS, MINUTES_OF_DAY, parse_window
from lowvram.errors import ConfigError, name_nearest

MINUTES_OF_WEEK = 7 * MINUTES_OF_DAY
_FORM = 'Write currency = "TL", and for each price [[price]] with hours = "22:00-06:00" and per_kwh = 1.9.'


class Price(FrozenConfig):
    """What a kilowatt-hour costs in some hours."""

    hours: Annotated[str, AfterValidator(check_window)]
    """The hours, as in `run.guard.schedule`."""
    per_kwh: Annotated[float, Field(ge=0.0, allow_inf_nan=False)]
    """The price in them."""


class Tariff(FrozenConfig):
    """The prices of a week; where several name an hour, the last one counts."""

    currency: str = ""
    """The currency, such as `"TL"`."""
    price: Annotated[tuple[Price, ...], Field(min_length=1)]
    """The prices; together they name every hour of the week."""

    @model_validator(mode="after")
    def _check(self) -> Tariff:
        gap = next((minute for minute, price in enumerate(self._fill()) if price is None), None)
        if gap is not None:
            day, minute = divmod(gap, MINUTES_OF_DAY)
            when = f"{DAYS[day]} {minute // 60:02d}:{minute % 60:02d}"
            raise ValueError(f"no price names {when}; every hour of the week needs one")
        return self

    def minutes(self) -> list[float]:
        """Return the price per kilowatt-hour of each minute of the week, from Monday 00:00 on."""
        return [price for price in self._fill() if price is not None]

    def _fill(self) -> list[float | None]:
        found: list[float | None] = [None] * MINUTES_OF_WEEK
        for price in self.price:
            window = parse_window(price.hours)
            length = (window.end - window.start) % MINUTES_OF_DAY or MINUTES_OF_DAY
            for day in window.days:
                for minute in range(length):
                    found[(day * MINUTES_OF_DAY + window.start + minute) % MINUTES_OF_WEEK] = price.per_kwh
        return found


def read_tariff(path: Path) -> Tariff:
    """Return the tariff in a file; raises ConfigError that names the file, the key and the value."""
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError as error:
        raise ConfigError(f"There is no tariff file {path}.", fix=_FORM) from error
    except IsADirectoryError as error:
        raise ConfigError(f"{path} is a directory.", "A tariff stands in a TOML file.", _FORM) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not TOML:", f"{error}.", _FORM) from error
    try:
        return Tariff.model_validate(tables)
    except ValidationError as error:
        raise ConfigError(f"{path}: {' '.join(map(_explain, error.errors()))}", fix=_FORM) from error


def _explain(problem: Any) -> str:
    *above, key = [str(part) for part in problem["loc"]] or [""]
    if problem["type"] == "extra_forbidden":
        known = Price.model_fields if above else Tariff.model_fields
        return f"there is no key {key}. {name_nearest(key, known)}"
    if problem["type"] == "missing":
        return f"{' '.join([*above, key])} is missing."
    if not problem["loc"]:
        return f"{describe_allowed(problem)}."
    return f"{' '.join([*above, key])} is {problem['input']!r}; {describe_allowed(problem)}."
