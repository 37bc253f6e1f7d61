"""Parses and prints bytes, token counts and durations as people write them; no other module does."""

from __future__ import annotations

import math
import re
from decimal import Decimal

_DECIMAL = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "b": 10**9, "t": 10**12}
_BYTES = {
    "": 1,
    "b": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
    "tib": 2**40,
}
# The memory of cards and memory modules is sold in powers of two, whether the label says GB or GiB.
_MEMORY = {"": 2**30} | {
    unit: 2**power for power, m in ((20, "m"), (30, "g"), (40, "t")) for unit in (m, f"{m}b", f"{m}ib")
}
_COUNT = ("a count", '"1.2e9", "1.2B" or 1200000000')
_NUMBER = re.compile(r"\s*([0-9][0-9_]*\.?[0-9]*(?:[eE][+-]?[0-9]+)?)\s*([a-zA-Z]*)\s*")


def _parse(text: str | int | float, suffixes: dict[str, int], what: str, example: str) -> int:
    return round(_read(text, suffixes, what, example))


def _read(text: str | int | float, suffixes: dict[str, int], what: str, example: str) -> Decimal:
    """Return the exact value: in floating point `1.1B` would not be a whole number."""
    match = _NUMBER.fullmatch(str(text))
    factor = suffixes.get(match[2].lower()) if match else None
    number = match[1].replace("_", "") if match else ""
    if match is None or factor is None or math.isinf(float(number) * factor):
        raise ValueError(f"{text!r} is not {what}; write it like {example}")
    return Decimal(number) * factor


def parse_count(text: str | int | float) -> int:
    """Return a whole number from `1200000`, `"1.2e9"`, `"1.2B"` or `"300M"` (decimal multiples)."""
    value = _read(text, _DECIMAL, *_COUNT)
    if value != int(value):
        raise ValueError(f"{text!r} is not {_COUNT[0]}, because it is no whole number; write it like {_COUNT[1]}")
    return int(value)


def round_count(text: str | int | float) -> int:
    """Return the whole number nearest to a count: run files may hold a quotient such as `42857142.857`."""
    return _parse(text, _DECIMAL, *_COUNT)


def parse_bytes(text: str | int | float) -> int:
    """Return bytes from `"12GB"` (10⁹), `"8 GiB"` (2³⁰) or a plain number."""
    return _parse(text, _BYTES, "a size", '"12GB" or "8GiB"')


def parse_memory(text: str | int | float) -> int:
    """Return the bytes of a card or of RAM: `"8GB"`, `"8 GiB"`, `"8192MiB"` and `8` are all 2³³."""
    example = '"8GB", "8 GiB" or "8192MiB"'
    size = _parse(text, _MEMORY, "a card's memory", example)
    if size == 0:
        raise ValueError(f"{text!r} is not a card's memory; write it like {example}")
    return size


def parse_share(text: str) -> float:
    """Return a share as a fraction, from `"0.5%"`; the sign is required, since 0.5 could mean either."""
    digits = text.strip().removesuffix("%").replace(",", ".")
    share = float(digits) / 100 if text.strip().endswith("%") and _NUMBER.fullmatch(digits) else math.nan
    if not 0.0 < share < 1.0:
        raise ValueError(f"{text!r} is not a share between 0% and 100%; write it like 0.5%")
    return share


def show_bytes(count: int | float) -> str:
    """Return bytes in binary multiples: `1.5 GiB`."""
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(value) < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.2f} TiB"


def show_count(count: int | float) -> str:
    """Return a count with a decimal multiple: `24.7M`, `1.2B`, `512`."""
    value = float(count)
    for unit in ("", "k", "M"):
        if abs(value) < 999.95:
            return f"{value:.0f}" if unit == "" else f"{value:.1f}{unit}"
        value /= 1000
    return f"{value:.2f}B"


def count_of(count: int, noun: str, plural: str = "") -> str:
    """Return a count with its noun: `1 row`, `12,345 rows`.  plural: given where it is not the noun with an s."""
    return f"{count:,} {noun if count == 1 else plural or f'{noun}s'}"


def show_duration(seconds: float) -> str:
    """Return a duration in its two largest units: `3 d 04 h`, `2 h 05 min`, `45 s`."""
    whole = max(0, round(seconds))
    days, hours, minutes = whole // 86400, whole // 3600 % 24, whole // 60 % 60
    if days:
        return f"{days} d {hours:02d} h"
    if hours:
        return f"{hours} h {minutes:02d} min"
    if minutes:
        return f"{minutes} min {whole % 60:02d} s"
    return f"{whole} s"


# For each unit of time: its seconds, its name, and below how many seconds a range is shown in it.
_TIMES = ((1, "s", 100), (60, "min", 100 * 60), (3600, "h", 48 * 3600), (86_400, "days", 730 * 86_400))


def show_duration_range(low_s: float, high_s: float) -> str:
    """Return a range of time in one unit, two digits each: `41–96 min`, `0.7–1.7 h`, `4.1–9.8 days`, `2–12 years`."""
    seconds, unit = next(((each, name) for each, name, most in _TIMES if high_s < most), (365.25 * 86_400, "years"))
    return f"{_show_range(low_s / seconds, high_s / seconds)} {unit}"


def show_energy_range(low_kwh: float, high_kwh: float) -> str:
    """Return a range of energy in one unit: `200–400 Wh`, `1.1–2.6 kWh`, `< 1 Wh`."""
    if high_kwh < 0.001:
        return "< 1 Wh"
    if high_kwh < 1:
        return f"{_show_range(low_kwh * 1000, high_kwh * 1000)} Wh"
    return f"{_show_range(low_kwh, high_kwh)} kWh"


def _show_range(low: float, high: float) -> str:
    ends = [f"{value:.{1 if high < 9.95 else 0}f}" for value in (low, high)]
    return ends[0] if ends[0] == ends[1] else "–".join(ends)
