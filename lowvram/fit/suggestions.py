"""Proposes changes of a run that does not fit, or that could be faster; changes nothing itself."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeGuard

from lowvram.config.model import ModelConfig
from lowvram.config.train import LOW_PRECISIONS, Muon, Rotation, TrainConfig, check_rotation

# Shorter contexts than this teach a model little about texts.
_SHORTEST = 256
# A step that updates during backward is one micro-batch; this many tokens are enough to keep a card busy.
_DURING_TOKENS = 8_192
_INTERVAL: int = Rotation.model_fields["interval"].default
# How a recipe changes the loss, as measured by tools/ab.py (the runs are in docs/ab).
QUALITY = {
    "8-bit": "learns as well",
    "muon": "learns more from each token",
    "bf16": "learns as well",
    "rotation": "learns as well, within 1 %",
    "during": "learns as well at the same batch",
    "fp8": "learns as well, within 1 %",
    "int8": "0.6 % more loss",
}
# A smaller speed-up is no reason to change the precision: estimates from published figures are off by as much.
LEAST_GAIN = 1.15


class Weighed(NamedTuple):
    """Memory and speed of the smallest plan of a model and a recipe.  fits_host: it fits into host memory."""

    peak_bytes: int
    tokens_per_second: float | None
    fits_host: bool = True


Weigh = Callable[[ModelConfig, TrainConfig], Weighed]


class Change(NamedTuple):
    """A change of the model or of the training with which the plan fits.

    sets: the values, as `--set` takes them.  says: the change in words.  peak_bytes: the plan's peak after the change.
    costs: a phrase about time and about what the model learns.
    """

    sets: tuple[str, ...]
    says: str
    peak_bytes: int
    costs: str


class _Recipe(NamedTuple):
    """A recipe that takes less memory: the values that make it from the run's own, in words, and their quality."""

    sets: tuple[str, ...]
    says: str
    quality: str
    train: TrainConfig

    def then(self, make: _Make, model: ModelConfig) -> _Recipe:
        """Return this recipe with one more change, or unchanged if that changes nothing or is not allowed."""
        more = _try(make, model, self.train)
        if more is None:
            return self
        says, quality = (", ".join(part for part in pair if part) for pair in zip(self[1:3], more[1:3], strict=True))
        return _Recipe(tuple(dict.fromkeys((*self.sets, *more.sets))), says, quality, more.train)


_Make = Callable[[ModelConfig, TrainConfig], _Recipe | None]


def _try(make: _Make, model: ModelConfig, train: TrainConfig) -> _Recipe | None:
    """Return the changed recipe, None if there is nothing to change or a run file with it would be refused."""
    recipe = make(model, train)
    if recipe is None:
        return None
    try:
        check_rotation(model, recipe.train)
    except ValueError:
        return None  # the run is too short for every expert's turn, or blocks of 8-bit states do not divide the experts
    return recipe


def propose(
    model: ModelConfig, train: TrainConfig, limit_bytes: int, weigh: Weigh, can_move: bool = True
) -> Iterator[Change]:
    """Yield the changes that make the smallest plan fit, the mildest first.

    weigh: rehearses the plan that needs the least memory for a model and a recipe.  can_move: card and host have
    separate memories, so that frozen experts can be kept in host memory.
    """
    before = weigh(model, train)
    makes = [_eight_bits, _muon, _bf16_weights, *([_rotation] if can_move else []), _during_backward]
    makes += [] if before.fits_host else [_no_rotation]
    found = False
    for recipe in filter(None, (_try(make, model, train) for make in makes)):
        weighed = weigh(model, recipe.train)
        if _fits(weighed, limit_bytes):
            found = True
            yield _change(recipe, weighed, before)
    together = _Recipe((), "", "", train)
    for make in () if found else makes:
        more = together.then(make, model)
        is_new, together = len(more.sets) > len(together.sets) > 0, more
        if is_new and _fits(weighed := weigh(model, together.train), limit_bytes):
            yield _change(together, weighed, before)
            break
    # A smaller model or a shorter context comes with the changes that cost almost nothing.
    mild = _Recipe((), "", "", train).then(_eight_bits, model).then(_bf16_weights, model)
    for base in (_Recipe((), "", "", train), mild) if mild.sets else (mild,):
        shorter = list(_shorter_context(model, base, limit_bytes, weigh, before))
        fewer = list(_fewer_layers(model, base, limit_bytes, weigh, before))
        yield from (*shorter, *fewer)
        if shorter or fewer:
            return


def propose_faster(model: ModelConfig, train: TrainConfig, limit_bytes: int, weigh: Weigh) -> Iterator[Change]:
    """Yield the 8-bit precisions in which the same plan still fits and is faster, as far as speeds are known.

    weigh: rehearses the chosen plan in another precision.
    """
    if train.precision not in ("bf16", "fp16"):
        return
    before = weigh(model, train).tokens_per_second
    for precision in LOW_PRECISIONS:
        weighed = weigh(model, _with(train, precision=precision))
        if before is None or weighed.tokens_per_second is None or not _fits(weighed, limit_bytes):
            continue
        if (times := weighed.tokens_per_second / before) >= LEAST_GAIN:
            costs = f"about {times:.1f} times as fast; {QUALITY[precision]}"
            yield Change((f"train.precision={precision}",), f"{precision.upper()} products", weighed.peak_bytes, costs)


def propose_fp32(
    model: ModelConfig, train: TrainConfig, limit_bytes: int, weigh: Weigh, times: float | None
) -> Iterator[Change]:
    """Yield fp32 for a bf16 run on a processor that was measured to be slower in bf16, if the run's plan still fits.

    times: by what factor a micro-batch takes longer in bf16, None if that was not measured.
    """
    if train.precision != "bf16" or not is_slower(times):
        return
    weighed = weigh(model, _with(train, precision="fp32"))
    if _fits(weighed, limit_bytes):
        costs = f"{describe_slower(times)}; rounds less"
        yield Change(("train.precision=fp32",), "FP32 products", weighed.peak_bytes, costs)


def is_slower(times: float | None) -> TypeGuard[float]:
    """Say whether bf16 takes so much longer than fp32 that fp32 is worth its memory.  times: the factor, if known."""
    return times is not None and times >= LEAST_GAIN


def describe_slower(times: float) -> str:
    """Return a clause that states the measurement in favour of fp32."""
    return f"bf16 takes {times:.2f} times as long as fp32, as measured on this processor"


def _fits(weighed: Weighed, limit_bytes: int) -> bool:
    return weighed.peak_bytes <= limit_bytes and weighed.fits_host


def _change(recipe: _Recipe, weighed: Weighed, before: Weighed) -> Change:
    return Change(recipe.sets, recipe.says, weighed.peak_bytes, f"{_time(weighed, before)}; {recipe.quality}")


def _time(weighed: Weighed, before: Weighed) -> str:
    if weighed.tokens_per_second is None or before.tokens_per_second is None:
        return "time not known"
    times = before.tokens_per_second / weighed.tokens_per_second
    return "no slower" if times < 1.02 else f"{times:.2f} times as long"


def _with(train: TrainConfig, **values: Any) -> TrainConfig:
    return train.model_copy(update=values)


def _eight_bits(_: ModelConfig, train: TrainConfig) -> _Recipe | None:
    if train.optimizer.bits == 8:
        return None
    less = _with(train, optimizer=train.optimizer.model_copy(update={"bits": 8}))
    return _Recipe(("optimizer.bits=8",), "the optimizer's memory in 8 bits", QUALITY["8-bit"], less)


def _muon(_: ModelConfig, train: TrainConfig) -> _Recipe | None:
    if train.optimizer.name == "muon":
        return None
    shared = train.optimizer.model_dump(exclude={"name", "bits"})
    less = _with(train, optimizer=Muon(**shared, bits=8))
    return _Recipe(
        ("optimizer.name=muon", "optimizer.bits=8"), "Muon, with one moment for AdamW's two", QUALITY["muon"], less
    )


def _bf16_weights(_: ModelConfig, train: TrainConfig) -> _Recipe | None:
    if train.weights == "bf16":
        return None
    return _Recipe(
        ("train.weights=bf16",), "weights and gradients in bf16", QUALITY["bf16"], _with(train, weights="bf16")
    )


def _rotation(model: ModelConfig, train: TrainConfig) -> _Recipe | None:
    if train.rotation is not None or model.ffn.kind != "moe":
        return None
    turns = 4  # until every expert has learnt
    window = max(1, model.ffn.experts // turns)
    rotation = Rotation(window=window, interval=min(_INTERVAL, max(1, train.steps // (2 * turns))), idle="int8")
    sets = (f"rotation.window={window}", f"rotation.interval={rotation.interval}", "rotation.idle=int8")
    says = "rotation of experts, with the frozen ones in the computer's memory"
    return _Recipe(sets, says, QUALITY["rotation"], _with(train, rotation=rotation))


def _no_rotation(_: ModelConfig, train: TrainConfig) -> _Recipe | None:
    if train.rotation is None:
        return None
    less = _with(train, rotation=None)
    return _Recipe(("train.rotation=none",), "all experts on the card, all learning", "learns as well", less)


def _during_backward(_: ModelConfig, train: TrainConfig) -> _Recipe | None:
    if train.update_during_backward:
        return None
    tokens = min(train.batch_tokens, max(1, _DURING_TOKENS // train.seq_len) * train.seq_len)
    sets: tuple[str, ...] = ("train.update_during_backward=true",)
    sets += (f"train.batch_tokens={tokens}",) if tokens != train.batch_tokens else ()
    less = _with(train, update_during_backward=True, batch_tokens=tokens)
    says, quality = "weights that move during backward, without accumulation", QUALITY["during"]
    if tokens != train.batch_tokens:
        quality += f", in steps of {tokens:,} tokens instead of {train.batch_tokens:,}: give it a lower rate"
    return _Recipe(sets, says, quality, less)


def _shorter_context(
    model: ModelConfig, base: _Recipe, limit_bytes: int, weigh: Weigh, before: Weighed
) -> Iterator[Change]:
    """Yield the longest context that fits, of a half of the run's, a quarter and so on; each divides batch_tokens."""
    lengths = [base.train.seq_len]
    while lengths[-1] % 2 == 0 and lengths[-1] // 2 >= _SHORTEST:
        lengths.append(lengths[-1] // 2)
    recipes = [
        _Recipe(
            (*base.sets, f"train.seq_len={length}"),
            ", ".join(filter(None, ("a shorter context", base.says))),
            "learns nothing of longer texts",
            _with(base.train, seq_len=length),
        )
        for length in lengths[1:]
    ]
    if not recipes or not _fits(weigh(model, recipes[-1].train), limit_bytes):
        return  # not even the shortest
    for recipe in recipes:
        weighed = weigh(model, recipe.train)
        if _fits(weighed, limit_bytes):
            yield _change(recipe, weighed, before)
            return


def _fewer_layers(
    model: ModelConfig, base: _Recipe, limit_bytes: int, weigh: Weigh, before: Weighed
) -> Iterator[Change]:
    """Yield the most layers that fit: every layer adds the same bytes, so two rehearsals predict their number."""
    least = 1 + (model.ffn.dense_layers if model.ffn.kind == "moe" else 0)
    if model.layers <= least:
        return

    def weigh_layers(layers: int) -> Weighed:
        return weigh(model.model_copy(update={"layers": layers}), base.train)

    few, weighed = max(least, model.layers // 2), weigh_layers(model.layers)
    if weighed.peak_bytes <= limit_bytes:
        return
    each = max(1.0, (weighed.peak_bytes - weigh_layers(few).peak_bytes) / (model.layers - few))
    layers = model.layers
    while weighed.peak_bytes > limit_bytes:
        # A smaller model may peak at another moment; then too many layers were predicted, and the loop goes on.
        layers = min(layers - 1, math.floor(layers - (weighed.peak_bytes - limit_bytes) / each))
        if layers < least:
            return
        weighed = weigh_layers(layers)
    if weighed.fits_host:
        says = ", ".join(filter(None, ("fewer layers", base.says)))
        recipe = _Recipe((*base.sets, f"model.layers={layers}"), says, "a smaller model", base.train)
        yield _change(recipe, weighed, before)
