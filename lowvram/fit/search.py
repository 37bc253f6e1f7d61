"""Searches the fastest plan of a training step that fits on a card; plain numbers, never imports torch.

Only choices that do not change the result of training are searched: the micro-batch, what backward recomputes, and
whether the optimizer's states are in host memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from lowvram.config.plan import TECHNIQUES, Ledger, Plan, Recompute
from lowvram.fit.memory_curve import MemoryCurve, Rehearsal
from lowvram.units import count_of

# A step that recomputes takes at least this share longer: attention's projections are a tenth or more of its products.
RECOMPUTING_COSTS = 0.05
# Plans whose times differ by a smaller share count as equally fast; the one that takes less memory is chosen.
EQUALLY_FAST = 0.02
# Rows of logits that exist at a time, in the order in which they are tried; a micro-batch of fewer is one chunk.
LOSS_CHUNKS = (512, 1024, 2048, 4096, 8192)
# By what share a step must be faster for memory that is left over to be spent on it.
WORTH_ITS_MEMORY = 0.003
_SMALLEST = "this is the smallest plan: one sequence at a time, every block computed again in backward"
_NONE_ASKED_FOR = "no plan of the kind that you asked for fits; this one comes nearest"


class PlanConstraints(NamedTuple):
    """The parts of a plan that the user fixed: a micro-batch, a recompute technique, neither or both."""

    micro_batch: int | None = None
    recompute: Recompute | None = None


ANY = PlanConstraints()


class SearchResult(NamedTuple):
    """The chosen plan or, if none fits, the one that needs the least memory.

    reason: why this plan was chosen.  is_rehearsed: its ledger is a rehearsal, not an interpolation between two.
    """

    plan: Plan
    rehearsal: Rehearsal
    fits: bool
    reason: str
    is_rehearsed: bool = True

    @property
    def peak_bytes(self) -> int:
        """The step's peak memory in bytes of tensors."""
        return self.rehearsal.ledger.peak_bytes


def search(
    curve: MemoryCurve,
    limit_bytes: int,
    step_seconds: Callable[[Rehearsal, Plan], float],
    exact: bool = False,
    constraints: PlanConstraints = ANY,
    may_offload: Callable[[Ledger], bool] | None = None,
) -> SearchResult:
    """Return the fastest plan within limit_bytes; more bytes never make it slower.

    step_seconds: predicts the time of a whole step; only the order of these times matters.  exact: rehearse the chosen
    plan itself, and choose another one if that is above the limit; without it an interpolation decides, which is close
    and mostly above the true peak.  constraints: search only plans that meet them.  may_offload: says whether host
    memory has room for what a plan keeps there; then plans with the optimizer's states in host memory are tried too,
    unless a plan without them fits that more room could not make faster.  None: nothing is offloaded.
    """
    result, seconds, is_enough = _search(curve, limit_bytes, step_seconds, exact, constraints)
    is_allowed = curve.can_offload and constraints.recompute in (None, TECHNIQUES[-1])
    is_fastest = result.fits and is_enough and result.plan.recompute != TECHNIQUES[-1]
    if may_offload is None or not is_allowed or is_fastest:
        return result
    # Offloading is tried only with full recomputation: states are smaller than the activations that this saves.
    strictest = constraints._replace(recompute=TECHNIQUES[-1])
    moved, moved_seconds, _ = _search(curve.offloaded(), limit_bytes, step_seconds, exact, strictest)
    sequences = f"{count_of(moved.plan.micro_batch, 'sequence')} at a time"
    states = "the optimizer's states lie in the computer's memory"
    if not result.fits:
        if not moved.fits:
            smaller = moved if moved.peak_bytes < result.peak_bytes else result
            reason = f"{_SMALLEST}, and {states}" if smaller is moved else _SMALLEST
            return smaller._replace(reason=reason if constraints == ANY else _NONE_ASKED_FOR)
        return moved._replace(reason=f"{states}, since nothing fits with them on the card: {sequences}")
    if moved.fits and moved_seconds < seconds and may_offload(moved.rehearsal.ledger):
        slower = seconds / moved_seconds
        times = f"a step would take {slower:.2f} times as long" if slower > 1.005 else "a step would be no faster"
        return moved._replace(reason=f"{states}, which makes room for {sequences}; with them on the card {times}")
    return result


def spend_the_rest(
    result: SearchResult, curve: MemoryCurve, limit_bytes: int, step_seconds: Callable[[Rehearsal, Plan], float]
) -> SearchResult:
    """Return the plan with what else makes its step faster and fits beside it, each try rehearsed.

    Each chunk of the loss adds a whole gradient of the output matrix to its sum, so longer chunks are faster, each
    doubling by less; by default bytes bound them, which for large vocabularies means few rows.  Kept casts save two
    casts of each weight and micro-batch, or two times of quantising it.
    """
    tokens, seconds = result.plan.micro_batch * curve.seq_len, step_seconds(result.rehearsal, result.plan)
    counts = dict.fromkeys(min(count, tokens) for count in LOSS_CHUNKS)
    for changes in ([{"loss_chunk": count} for count in counts], [{"keep_casts": True}]):
        was_faster = False
        for change in changes:
            plan = result.plan.model_copy(update=change)
            rehearsal = curve.of(plan)
            if rehearsal.ledger.peak_bytes > limit_bytes:
                break
            took = step_seconds(rehearsal, plan)
            is_faster = took * (1 + WORTH_ITS_MEMORY) < seconds
            if is_faster:
                result, seconds = result._replace(plan=plan, rehearsal=rehearsal), took
            elif was_faster:
                break
            was_faster = is_faster
    return result


def _search(
    curve: MemoryCurve,
    limit_bytes: int,
    step_seconds: Callable[[Rehearsal, Plan], float],
    exact: bool,
    constraints: PlanConstraints,
) -> tuple[SearchResult, float, bool]:
    """Return the result, the seconds of its step, and whether more memory could not make it faster."""
    techniques = TECHNIQUES if constraints.recompute is None else (constraints.recompute,)
    sizes = curve.sizes if constraints.micro_batch is None else [constraints.micro_batch]
    timed: list[tuple[float, SearchResult]] = []
    is_enough = False
    for technique in techniques:
        fitting: list[tuple[float, SearchResult]] = []
        for micro_batch, rehearsal in _fitting(curve, technique, sizes, limit_bytes):
            plan = curve.plan(technique, micro_batch)
            result = SearchResult(plan, rehearsal, True, "", curve.has(technique, micro_batch))
            fitting.append((step_seconds(rehearsal, plan), result))
        timed += fitting
        is_enough = bool(fitting) and (len(sizes) == 1 or _is_enough(fitting, curve.samples))
        if is_enough:
            break  # more recomputation takes time, and the memory that it saves allows no faster plan
    while timed:
        seconds, chosen = _choose(timed, constraints, curve.samples)
        if not exact:
            return chosen, seconds, is_enough
        rehearsal = curve.exactly(chosen.plan.recompute, chosen.plan.micro_batch)
        if rehearsal.ledger.peak_bytes <= limit_bytes:
            return chosen._replace(rehearsal=rehearsal, is_rehearsed=True), seconds, is_enough
        timed = [(took, other) for took, other in timed if other.plan != chosen.plan]
        is_enough = False
    plan = curve.plan(techniques[-1], sizes[0])
    reason = _SMALLEST if constraints == ANY else _NONE_ASKED_FOR
    return SearchResult(plan, curve.exactly(plan.recompute, plan.micro_batch), False, reason), math.inf, False


def _choose(
    timed: Sequence[tuple[float, SearchResult]], constraints: PlanConstraints, samples: int
) -> tuple[float, SearchResult]:
    """Return, of the plans that are about as fast as the fastest, the one that takes the least memory.

    With more plans to choose from the choice is never slower: a plan that is both smaller and faster would be chosen.
    """
    fastest = min(seconds for seconds, _ in timed)
    equally_fast = [(seconds, result) for seconds, result in timed if seconds <= fastest * (1 + EQUALLY_FAST)]
    seconds, chosen = min(equally_fast, key=lambda pair: pair[1].peak_bytes)
    reason = "you asked for it" if constraints != ANY else _explain(chosen.plan, seconds, timed, samples)
    return seconds, chosen._replace(reason=reason)


def _is_enough(timed: Sequence[tuple[float, SearchResult]], samples: int) -> bool:
    """Say whether the whole step fits at once, or larger micro-batches would gain less than recomputation costs.

    A step's time is its work plus a cost per micro-batch, so the gain of the last enlargement bounds what is left to
    gain.
    """
    seconds, largest = timed[-1][0], timed[-1][1].plan.micro_batch
    if largest == samples or len(timed) == 1:
        return largest == samples
    smaller = timed[-2][1].plan.micro_batch
    left = (timed[-2][0] - seconds) * smaller / (largest - smaller)
    return left <= RECOMPUTING_COSTS * seconds


def _fitting(
    curve: MemoryCurve, technique: Recompute, sizes: Sequence[int], limit_bytes: int
) -> Iterator[tuple[int, Rehearsal]]:
    """Yield the micro-batches that fit, smallest first; after one that does not, most larger ones are not rehearsed.

    The whole step at once does not accumulate gradients, and may take less memory: it is tried if the next smaller size
    was tried, and if every block is recomputed.
    """
    for micro_batch in sizes:
        is_far = micro_batch not in sizes[-2:]
        rehearsal = curve.at(technique, micro_batch)
        if rehearsal.ledger.peak_bytes <= limit_bytes:
            yield micro_batch, rehearsal
        elif is_far and technique == TECHNIQUES[-1]:
            whole = curve.at(technique, sizes[-1])
            if whole.ledger.peak_bytes <= limit_bytes:
                yield sizes[-1], whole
            return
        elif is_far:
            return


def _explain(plan: Plan, seconds: float, timed: Sequence[tuple[float, SearchResult]], samples: int) -> str:
    largest = max(result.plan.micro_batch for _, result in timed if result.plan.recompute == plan.recompute)
    is_single = plan.micro_batch == 1
    sequences = f"{count_of(plan.micro_batch, 'sequence')} at a time"
    if plan.micro_batch == samples:
        size = "the whole step fits at once"
    elif plan.micro_batch == largest:
        size = f"{sequences} is the most that fits" if is_single else f"{sequences} are the most that fit"
    else:
        size = f"more than {sequences} would be no faster"
    if plan.recompute == "none":
        return f"{size}, and nothing is computed twice"
    kept = [(took, result.plan.micro_batch) for took, result in timed if result.plan.recompute == "none"]
    if not kept:
        return f"{size}; without recomputation not even one would"
    slower = min(took for took, _ in kept) / seconds
    times = f"and a step would take {slower:.2f} times as long" if slower > 1.005 else "and be no faster"
    return f"{size}; without recomputation at most {max(most for _, most in kept)} would, {times}"
