"""Receipts of training runs on a card: what was predicted and what was measured, read, written and compared.

A receipt holds nothing that identifies a person: no names of hosts, users, runs, data or paths.  Its digest shows
where a file was edited by hand; it is no signature.
"""

from __future__ import annotations

import hashlib
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Field, NonNegativeInt, PositiveInt, ValidationError

from lowvram.config.allowed import describe_allowed
from lowvram.config.base import FrozenConfig
from lowvram.config.plan import Plan
from lowvram.errors import DataError
from lowvram.fit.throughput import Rate
from lowvram.hardware.profile import Number, find_receipts
from lowvram.storage.disk import DISK, Disk, explain_full_disk
from lowvram.storage.json_files import JsonError, read_object

RECEIPT_FILE = "receipt.json"
VERSION = 1
_HOUR_S = 3600.0
_MOST_BYTES = 1 << 20
# Names and versions have no slash, backslash or @, so that no path and no address fits in one.
Word = Annotated[str, Field(max_length=80, pattern=r"^[A-Za-z0-9 ._+()-]*$")]


class Hour(FrozenConfig):
    """An hour of training, or the part of one that there is.  seconds: of steps only, not of validation or saving."""

    tokens: NonNegativeInt
    seconds: Annotated[float, Field(ge=0.0, allow_inf_nan=False)]


class Receipt(FrozenConfig):
    """What one run took on one card.

    predicted_peak_bytes: of the ledger.  measured_peak_bytes: of the allocator.  predicted_tokens_per_s: from published
    figures alone, without a measurement or other receipts; None where the catalogue has none for the card.  compiled:
    whether blocks were compiled.  recorded: whether passes were replayed from CUDA graphs.  system: Linux, Windows or
    Darwin.
    """

    version: Literal[1] = 1
    profile_id: Word
    card: Word
    card_bytes: PositiveInt
    driver: Word
    lowvram: Word
    torch: Word
    triton: Word
    python: Word
    system: Literal["Linux", "Windows", "Darwin"]
    parameters: PositiveInt
    seq_len: PositiveInt
    batch_tokens: PositiveInt
    precision: Number
    plan: Plan
    compiled: bool
    recorded: bool
    predicted_peak_bytes: PositiveInt
    measured_peak_bytes: NonNegativeInt = 0
    predicted_tokens_per_s: Rate | None = None
    hours: tuple[Hour, ...] = ()

    @property
    def measured_tokens_per_s(self) -> float | None:
        """Tokens per second over all hours; None before the first measured step."""
        seconds = sum(hour.seconds for hour in self.hours)
        return sum(hour.tokens for hour in self.hours) / seconds if seconds else None

    @property
    def speed_ratio(self) -> float | None:
        """Measured divided by predicted tokens per second; None where one of them is not known."""
        measured, predicted = self.measured_tokens_per_s, self.predicted_tokens_per_s
        return measured / predicted if measured and predicted else None

    def add(self, tokens: int, seconds: float, peak_bytes: int) -> Receipt:
        """Return the receipt with one more measured step, in the hour that it belongs to."""
        hours = list(self.hours)
        if not hours or hours[-1].seconds >= _HOUR_S:
            hours.append(Hour(tokens=0, seconds=0.0))
        last = hours.pop()
        hours.append(Hour(tokens=last.tokens + tokens, seconds=last.seconds + seconds))
        peak = max(self.measured_peak_bytes, peak_bytes)
        return self.model_copy(update={"hours": tuple(hours), "measured_peak_bytes": peak})

    def is_of_same_conditions(self, other: Receipt) -> bool:
        """Say whether both are of one card, model, plan and software, so that their hours may be added up."""
        measured = {"hours", "measured_peak_bytes"}
        return self.model_dump(exclude=measured) == other.model_dump(exclude=measured)


class ReceiptSummary(NamedTuple):
    """The receipts of one card that have both speeds.

    ratio: the median of measured / predicted.  error: the median of |predicted / measured - 1|.  ratios: the medians of
    the receipts whose blocks were compiled or not, and whose passes were recorded or not, by both.
    """

    receipts: int
    ratio: float
    error: float
    ratios: Mapping[tuple[bool, bool], float] = MappingProxyType({})

    def ratio_of(self, compiled: bool, recorded: bool) -> float:
        """Return the median of receipts of such runs; that of all where there is none."""
        return self.ratios.get((compiled, recorded), self.ratio)


def write_receipt(receipt: Receipt, path: Path, disk: Disk = DISK) -> None:
    """Write a receipt with its digest, durably."""
    contents = receipt.model_dump(mode="json")
    contents["digest"] = _digest(contents)
    with explain_full_disk(path.parent):
        disk.write(path, (json.dumps(contents, indent=1) + "\n").encode())


def read_receipt(path: Path) -> Receipt:
    """Return the receipt in a file; raises DataError where there is none, or it was edited, or another version's."""
    refused = f"The receipt {path} is refused"
    again = "Use the receipt.json that the run itself wrote."
    try:
        contents = read_object(path, _MOST_BYTES)
    except FileNotFoundError as error:
        raise DataError(
            f"There is no receipt at {path}.",
            "Only runs on an NVIDIA card write one, after their first steps.",
            "Name the directory of such a run.",
        ) from error
    except JsonError as error:
        raise DataError(f"{refused}: {error}.", fix=again) from error
    if contents.get("version") != VERSION:
        version = json.dumps(contents.get("version"))[:20]
        why = f"This lowvram reads version {VERSION}."
        raise DataError(f"{refused}: its version is {version}.", why, "Read it with the lowvram that wrote it.")
    if contents.pop("digest", None) != _digest(contents):
        raise DataError(f"{refused}: its digest does not fit its contents.", "It was edited or is damaged.", again)
    try:
        return Receipt.model_validate_json(json.dumps(contents))
    except ValidationError as error:
        problem = error.errors()[0]
        key, why = ".".join(map(str, problem["loc"])), describe_allowed(problem)
        what = f"{refused}: {key} is not a value that a run writes."
        raise DataError(what, f"{why[0].upper()}{why[1:]}.", again) from error


def receipts_of(profile_id: str, precision: str, paths: Sequence[Path] | None = None) -> list[Receipt]:
    """Return the receipts of a card in a precision.  paths: the files; by default those that ship."""
    found = (read_receipt(path) for path in (find_receipts() if paths is None else paths))
    return [receipt for receipt in found if (receipt.profile_id, receipt.precision) == (profile_id, precision)]


def summarize(receipts: Sequence[Receipt]) -> ReceiptSummary | None:
    """Return how many receipts have both speeds, and their median; None where none has."""
    by_way: dict[tuple[bool, bool], list[float]] = {}
    for receipt in receipts:
        if receipt.speed_ratio is not None:
            by_way.setdefault((receipt.compiled, receipt.recorded), []).append(receipt.speed_ratio)
    ratios = [ratio for found in by_way.values() for ratio in found]
    if not ratios:
        return None
    error = statistics.median(abs(1.0 / ratio - 1.0) for ratio in ratios)
    medians = {way: statistics.median(found) for way, found in by_way.items()}
    return ReceiptSummary(len(ratios), statistics.median(ratios), error, medians)


def _digest(contents: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(contents, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
