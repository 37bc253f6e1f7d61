"""When a run slows or waits for the people and programs around it, and what its energy costs; reads no sensor."""

from __future__ import annotations

from functools import cached_property
from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field, PositiveFloat

from lowvram.config.base import FrozenConfig, Size, as_list
from lowvram.config.hours import Window, parse_window


def check_window(text: str) -> str:
    """Return a text that names hours, as it is; raises ValueError that says how to write one."""
    parse_window(text)
    return text


class GuardConfig(FrozenConfig):
    """When a run slows or waits, and what its energy costs; none of it changes what is learnt."""

    max_temperature: Annotated[float, Field(ge=30.0, le=110.0)] | None = None
    """Degrees Celsius from which on a run pauses between steps; without it 10 below the temperature at which an NVIDIA
    card slows itself, or 83 where the driver does not tell it.  A processor has a limit only where this names one."""
    share_card: bool = True
    """Slow down while other programs hold 1 GiB more of the card's memory than before, or keep a fifth of it busy."""
    battery: Literal["pause", "ignore"] = "pause"
    """What a run does while the computer runs on its battery."""
    least_free_disk: Size | None = None
    """Wait while less is free on the disk of `run.dir`, such as `"20GB"`."""
    schedule: Annotated[tuple[Annotated[str, AfterValidator(check_window)], ...], BeforeValidator(as_list)] = ()
    """Hours in which a run trains, by the clock on the wall: `"23:00-07:00"`, or several, with days:
    `["mon-fri 23:00-07:00", "sat,sun 00:00-24:00"]`.  Outside of them it waits."""
    power_watts: PositiveFloat | None = None
    """What the computer takes while it trains, for the energy where no sensor tells it."""
    price_per_kwh: Annotated[float, Field(ge=0.0)] | None = None
    """What a kilowatt-hour costs."""
    currency: str = ""
    """The currency of that price, such as `"TL"`."""

    @cached_property
    def windows(self) -> tuple[Window, ...]:
        """The hours of `schedule`."""
        return tuple(map(parse_window, self.schedule))
