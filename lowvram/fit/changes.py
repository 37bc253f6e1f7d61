"""What a person could change about a run that does not fit; proposes, and never changes anything itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

from lowvram.config import ModelConfig, TrainConfig
from lowvram.plan import Ledger

# Shorter contexts than this teach a model little about texts.
_SHORTEST = 256
_EIGHT = ("optimizer.bits=8",)


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
    recipes: list[tuple[tuple[str, ...], TrainConfig]] = [((), train)]
    if train.optimizer.bits == 32:
        eight = train.model_copy(update={"optimizer": train.optimizer.model_copy(update={"bits": 8})})
        peak = smallest(model, eight).peak_bytes
        if peak <= limit_bytes:
            yield Change(_EIGHT, "the optimizer's memory in 8 bits", peak)
        else:  # where 8 bits do it alone, nobody needs them with something else
            recipes.append((_EIGHT, eight))
    for sets, recipe in recipes:
        lengths = _shorter(recipe)
        if lengths and smallest(model, recipe.model_copy(update={"seq_len": lengths[-1]})).peak_bytes > limit_bytes:
            continue  # not even the shortest
        for length in lengths:
            peak = smallest(model, recipe.model_copy(update={"seq_len": length})).peak_bytes
            if peak <= limit_bytes:
                yield Change((*sets, f"train.seq_len={length}"), _say("a shorter context", sets), peak)
                break
    sets, recipe = recipes[-1]
    yield from _fewer_layers(model, recipe, sets, limit_bytes, smallest)


def _say(what: str, sets: tuple[str, ...]) -> str:
    return f"{what}, and the optimizer's memory in 8 bits" if sets else what


def _shorter(train: TrainConfig) -> list[int]:
    """Return half the context, a quarter, and so on, as long as a step still has whole sequences."""
    lengths = [train.seq_len]
    while lengths[-1] % 2 == 0 and lengths[-1] // 2 >= _SHORTEST:
        lengths.append(lengths[-1] // 2)
    return lengths[1:]


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

    few, peak = max(least, model.layers // 2), peak_of(model.layers)
    if peak <= limit_bytes:
        return
    each = max(1.0, (peak - peak_of(few)) / (model.layers - few))
    layers = model.layers
    while peak > limit_bytes:
        # Of a smaller model another moment may be the greatest: then the line says too little, and leads on.
        layers = min(layers - 1, int(layers - (peak - limit_bytes) / each))
        if layers < least:
            return
        peak = peak_of(layers)
    yield Change((*sets, f"model.layers={layers}"), _say("fewer layers", sets), peak)
