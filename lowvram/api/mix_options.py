"""What `mix` is asked for: how much of each source, and which share; reads the words of a caller, and no text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from lowvram.api.arguments import refuse_missing, refuse_type
from lowvram.api.packing import DEFAULT_TOKENIZER
from lowvram.errors import ConfigError, argument

if TYPE_CHECKING:
    from lowvram.data.mix.shares import Wish

Value = TypeVar("Value")
DEFAULT_MIX = Path("mix")
MOST_LEVELS = 2


@dataclass(frozen=True)
class MixOptions:
    """How sources are mixed and where to; see `lowvram.api.mix`.

    weights: a wish by the name of a source or of a folder of sources.  caps: bytes of text by such a name.  demo: the
    share of generated text, None for none.  tokens: how many a run is to read, None: as many as there are.
    exclude: a list of documents that are left out of every source.
    """

    tokenizer: Path = DEFAULT_TOKENIZER
    out: Path = DEFAULT_MIX
    weights: Mapping[str, Wish] = field(default_factory=dict)
    temperature: float = 1.0
    caps: Mapping[str, int] = field(default_factory=dict)
    demo: float | None = None
    tokens: int | None = None
    levels: int = 1
    replace: bool = False
    exclude: Path | None = None

    def wishes(self) -> dict[str, Wish]:
        """Return the weights, and the share of generated text among them."""
        from lowvram.data.mix.shares import Wish
        from lowvram.data.mix.sources import DEMO

        return {**self.weights, **({} if self.demo is None else {DEMO: Wish(share=self.demo)})}


def name_once(given: str, pairs: Iterable[tuple[str, Value]]) -> dict[str, Value]:
    """Return values by names of sources in NFC; raises ConfigError where one is named twice.

    given: the argument.  A file system may keep a name decomposed, as macOS does, where a person types it composed.
    """
    from lowvram.data.nfc import nfc

    found: dict[str, Value] = {}
    for written, value in pairs:
        refuse_missing(given, written, str)
        name = nfc(written)
        if name in found:
            what = f"{argument(given, f'{name}={found[name]}')} and {argument(given, f'{name}={value}')} are given."
            raise ConfigError(what, f"{name} can have one of them.", "Leave the other out.")
        found[name] = value
    return found


def read_weights(weights: Mapping[str, float | str]) -> dict[str, Wish]:
    """Return wishes from `{"law": 2}`, a factor, or `{"law": "20%"}`, a share; raises ConfigError."""
    refuse_missing("weights", weights, dict)
    return {name: _read_wish(name, value) for name, value in name_once("weights", weights.items()).items()}


def _read_wish(name: str, value: float | str) -> Wish:
    from lowvram.data.mix.shares import Wish
    from lowvram.units import parse_share

    refuse_missing("weights", value, int, float, str)
    text = str(value).strip()
    try:
        if text.endswith("%"):
            return Wish(share=parse_share(text))
        factor = float(text)
    except ValueError:
        factor = 0.0
    if not 0.0 < factor < 1e6:
        what = f"{argument('weights', f'{name}={value}')} is no weight."
        why = "It is a number above 0, by which the source is read more often, or a share of the whole below 100%."
        raise ConfigError(
            what, why, f"Write {argument('weights', f'{name}=2')} or {argument('weights', f'{name}=20%')}."
        )
    return Wish(factor)


def read_caps(caps: Mapping[str, int | str]) -> dict[str, int]:
    """Return bytes from `{"law": "200MB"}`; raises ConfigError."""
    from lowvram.units import parse_bytes

    refuse_missing("caps", caps, dict)
    found = {}
    for name, value in name_once("caps", caps.items()).items():
        refuse_missing("caps", value, int, str)
        try:
            found[name] = parse_bytes(value)
        except ValueError:
            found[name] = 0
        if found[name] < 1:
            what = f"{argument('caps', f'{name}={value}')} is no size."
            fix = f"Write {argument('caps', f'{name}=200MB')}."
            raise ConfigError(what, "A cap is a number of bytes of text, above 0.", fix)
    return found


def refuse_temperature(temperature: float) -> None:
    """Raise ConfigError for an exponent that is not from 0 to 1."""
    refuse_missing("temperature", temperature, int, float)
    if not 0.0 <= temperature <= 1.0:
        what = f"{argument('temperature', temperature)} is not from 0 to 1."
        why = "It is the exponent of the sources' sizes: 1 reads each as often, 0 gives each the same share."
        other = f", such as {argument('temperature', round(1 / temperature, 3))}" if temperature > 1 else ""
        raise ConfigError(what, why, f"Where sizes are raised to 1/T, write that number here{other}.")


def refuse_levels(levels: int) -> None:
    """Raise ConfigError for another number of levels than 1 or 2."""
    refuse_type("levels", levels, int)
    if levels not in range(1, MOST_LEVELS + 1):
        why = "Sources are in the folder that is named, or in its folders."
        raise ConfigError(f"{argument('levels', levels)} is neither 1 nor 2.", why, "Write 1 or 2.")
