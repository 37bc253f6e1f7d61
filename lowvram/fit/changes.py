"""What a person could change about a run that does not fit; proposes, and never changes anything itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

from lowvram.config import ModelConfig, TrainConfig
from lowvram.plan import Ledger, Plan

# Shorter contexts than this teach a model little about texts.
_SHORTEST = 256


class Change(NamedTuple):
    """One change of WHAT that makes the smallest plan fit.  sets: as `--set` takes them.  peak_bytes: what is left."""

    sets: tuple[str, ...]
    says: str
    peak_bytes: int


def propose(
    model: ModelConfig, train: TrainConfig, limit_bytes: int, smallest: Callable[[ModelConfig, TrainConfig], Ledger]
) -> Iterator[Change]:
    """Yield the changes that make one sequence with recomputed blocks fit, the mildest first.

    smallest: rehearses the plan that needs least for a model and a recipe.
    """
    eight = train.model_copy(update={"optimizer": train.optimizer.model_copy(update={"bits": 8})})
    recipes = [((), train)]
    if train.optimizer.bits == 32:
        recipes.append((("optimizer.bits=8",), eight))
        peak = smallest(model, eight).peak_bytes
        if peak <= limit_bytes:
            yield Change(("optimizer.bits=8",), "both moments in 8 bits", peak)
    for sets, recipe in recipes:
        length = recipe.seq_len
        while length // 2 >= _SHORTEST:
            length //= 2
            peak = smallest(model, recipe.model_copy(update={"seq_len": length})).peak_bytes
            if peak <= limit_bytes:
                yield Change((*sets, f"train.seq_len={length}"), "a shorter context", peak)
                break
    sets, recipe = recipes[-1]
    yield from _fewer_layers(model, recipe, sets, limit_bytes, smallest)


def _fewer_layers(
    model: ModelConfig,
    train: TrainConfig,
    sets: tuple[str, ...],
    limit_bytes: int,
    smallest: Callable[[ModelConfig, TrainConfig], Ledger],
) -> Iterator[Change]:
    """Find the most layers that fit: every layer adds the same bytes, so two rehearsals say where to look."""
    least = 1 + (model.ffn.dense_layers if model.ffn.kind == "moe" else 0)
    if model.layers <= least:
        return

    def peak_of(layers: int) -> int:
        return smallest(model.model_copy(update={"layers": layers}), train).peak_bytes

    full, half = peak_of(model.layers), peak_of(max(least, model.layers // 2))
    each = (full - half) / (model.layers - max(least, model.layers // 2))
    layers = min(model.layers - 1, int(model.layers - (full - limit_bytes) / each))
    if layers >= least and (peak := peak_of(layers)) <= limit_bytes:
        yield Change((*sets, f"model.layers={layers}"), "fewer layers", peak)


def smallest_plan(train: TrainConfig) -> Plan:
    """Return the plan that needs least: one sequence at a time, blocks recomputed."""
    return Plan(micro_batch=1, accumulate=train.batch_samples, recompute="block")
