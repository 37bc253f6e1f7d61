"""Reads the presets' rehearsals from a file, so that `fit` answers without torch; knows no limit and no speed.

`tools/write_ledgers.py` writes `presets/ledgers.json`.  For each preset and card path it holds one rehearsal per
recompute technique and anchor, beside the hash of the configuration that was rehearsed.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable
from typing import Any, NamedTuple

import lowvram
from lowvram.config.model import ModelConfig
from lowvram.config.plan import LEDGER_LINES, TECHNIQUES, Ledger, Plan
from lowvram.config.run_file import PRESETS
from lowvram.config.train import TrainConfig
from lowvram.fit.memory_curve import MemoryCurve, Rehearsal, Work
from lowvram.hardware.profile import Profile
from lowvram.storage.json_files import JsonError, read_object

PATH = PRESETS / "ledgers.json"
# The keys of TrainConfig that decide a step's memory, beside model, optimizer and path; the rest changes only numbers.
_DECIDING = ("seq_len", "batch_tokens", "dropout", "weights", "update_during_backward")


# Parameters from which on a preset's plans are also rehearsed with the optimizer's states in the computer's memory.
_LARGE = 500_000_000


class CardPath(NamedTuple):
    """The properties of a card that decide the ledger.  capability: that of one card which takes this path."""

    platform: str
    capability: tuple[int, int] | None
    attention: str
    precision: str

    @property
    def key(self) -> str:
        """Return `cuda-flash-bf16`."""
        return f"{self.platform}-{self.attention}-{self.precision}"


# Every path that a card of the catalogue takes with a preset.
PATHS = (
    CardPath("cuda", (8, 6), "flash", "bf16"),
    CardPath("cuda", (8, 6), "efficient", "bf16"),  # on Windows
    CardPath("cuda", (7, 5), "efficient", "fp16"),
    CardPath("mps", None, "math", "bf16"),
    CardPath("cpu", None, "flash", "bf16"),
)


def path_of(profile: Profile, train: TrainConfig) -> CardPath:
    """Return the path that a run takes on a card."""
    return CardPath(profile.platform, profile.capability, profile.attention, train.precision)


def hash_of(model: ModelConfig, train: TrainConfig) -> str:
    """Return a SHA-256 over everything that decides the ledger; precision is the path's."""
    deciding = {name: getattr(train, name) for name in _DECIDING}
    hashed = {"model": model.model_dump(mode="json"), "train": deciding, "optimizer": train.optimizer.model_dump()}
    hashed["rotation"] = train.rotation.model_dump() if train.rotation is not None else {}
    del hashed["optimizer"]["lr"]
    return hashlib.sha256(json.dumps(hashed, sort_keys=True).encode()).hexdigest()


@functools.cache
def read_ledgers() -> dict[str, Any]:
    """Return the file's tables; empty where it is missing, damaged, or was written by another version of lowvram."""
    try:
        tables = read_object(PATH)
    except (OSError, JsonError):
        return {}
    versions = tables.get("versions")
    is_ours = isinstance(versions, dict) and versions.get("lowvram") == lowvram.__version__
    return tables if is_ours else {}


def find_memory_curve(name: str, model: ModelConfig, train: TrainConfig, path: CardPath) -> MemoryCurve | None:
    """Return a preset's memory curve from the file, or None if the file lacks this configuration on this path."""
    entry = read_ledgers().get("presets", {}).get(name)
    if entry is None or entry["hash"] != hash_of(model, train) or path.key not in entry["paths"]:
        return None
    rows = entry["paths"][path.key]

    def look_up(plan: Plan) -> Rehearsal:
        return unpack(rows[name_plan(plan)])

    curve = memory_curve_of(model, train, look_up)
    return curve if {name_plan(plan) for plan in plans_of(curve, path)} <= set(rows) else None


def memory_curve_of(model: ModelConfig, train: TrainConfig, rehearse: Callable[[Plan], Rehearsal]) -> MemoryCurve:
    """Return a preset's memory curve; small presets are not offloaded, since every card has room for their states."""
    return MemoryCurve(train.micro_batches, rehearse, train.seq_len, can_offload=_is_large(model))


def _is_large(model: ModelConfig) -> bool:
    return model.num_parameters() >= _LARGE


def plans_of(curve: MemoryCurve, path: CardPath) -> list[Plan]:
    """Return the plans of a preset whose rehearsals the file holds."""
    sizes = dict.fromkeys((*curve.anchors(), curve.samples))
    plans = [curve.plan(recompute, size) for recompute in TECHNIQUES for size in sizes]
    offloads = curve.can_offload and path.platform == "cuda"
    return [*plans, *(curve.offloaded().plan(TECHNIQUES[-1], size) for size in sizes if offloads)]


def name_plan(plan: Plan) -> str:
    """Return the key of a plan's rehearsal in the file.

    `block 8`, `block 64 at once` without accumulation, `block 8 offloaded` with the optimizer's states on the host.
    """
    once, offloaded = "" if plan.accumulate > 1 else " at once", "" if plan.offload == "none" else " offloaded"
    return f"{plan.recompute} {plan.micro_batch}{once}{offloaded}"


def pack(rehearsal: Rehearsal) -> list[Any]:
    """Return a rehearsal as one flat row: the ledger, the work of micro-batch and update, and what graphs take."""
    ledger = rehearsal.ledger
    lines = [getattr(ledger, name) for name in LEDGER_LINES]
    works = [round(value) for work in (rehearsal.micro, rehearsal.update) for value in work]
    graphs = [rehearsal.recorded_bytes] if rehearsal.recorded_bytes else []
    return [*lines, *ledger[len(lines) :], *works, *graphs]


def unpack(row: list[Any]) -> Rehearsal:
    """Return the rehearsal that `pack` made a row of."""
    fields = len(Work._fields)
    works = row[len(Ledger._fields) :]
    ledger = Ledger(*row[: len(Ledger._fields)])
    # A row without graphs ends with the works.
    return Rehearsal(ledger, Work(*works[:fields]), Work(*works[fields : 2 * fields]), *works[2 * fields :])
