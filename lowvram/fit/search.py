"""Which plan carries a step out on a card: the fastest of those that fit; plain numbers, never imports torch.

Only what leaves the mathematics alone is searched: the micro-batch and what backward computes again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from lowvram.config.plan import TECHNIQUES, Ledger, Plan, Recompute
from lowvram.fit.memory_curve import MemoryCurve, Rehearsal
from lowvram.units import count_of

# A step that recomputes takes at least so much longer: attention's projections are a tenth of its products or more.
RECOMPUTING_COSTS = 0.05
# Plans whose times differ by less are equally fast: the smaller one leaves room.
EQUALLY_FAST = 0.02
_SMALLEST = "this is the smallest plan: one sequence at a time, every block computed again in backward"
_NONE_ASKED_FOR = "no plan of the kind that you asked for fits; this one comes nearest"


class PlanConstraints(NamedTuple):
    """What a person insists on: a micro-batch, a technique, neither or both."""

    micro_batch: int | None = None
    recompute: Recompute | None = None


ANY = PlanConstraints()


class SearchResult(NamedTuple):
    """The plan that was chosen, or, where none fits, the one that needs least.

    reason: why this one, a sentence.  is_rehearsed: its ledger is a rehearsal, not a line between two.
    """

    plan: Plan
    rehearsal: Rehearsal
    fits: bool
    reason: str
    is_rehearsed: bool = True

    @property
    def peak_bytes(self) -> int:
        """What the step's tensors take at their peak."""
        return self.rehearsal.ledger.peak_bytes


def search(
    sketch: MemoryCurve,
    limit_bytes: int,
    step_seconds: Callable[[Rehearsal, Plan], float],
    exact: bool = False,
    wish: PlanConstraints = ANY,
    may_move: Callable[[Ledger], bool] | None = None,
) -> SearchResult:
    """Return the fastest plan within limit_bytes; more bytes never make it slower.

    step_seconds: predicts a whole step; only the order that it gives matters.  exact: rehearse the chosen plan itself,
    and another one if that is above the limit; a line between two is near, and mostly above the truth.
    wish: search only such plans.  may_move: says whether the computer's memory has room for what a plan keeps there;
    then plans with the optimizer's states in it are tried too, unless the card has room for all that is faster.  None:
    nothing is moved.
    """
    found, seconds, is_enough = _search(sketch, limit_bytes, step_seconds, exact, wish)
    is_allowed = sketch.can_offload and wish.recompute in (None, TECHNIQUES[-1])
    is_fastest = found.fits and is_enough and found.plan.recompute != TECHNIQUES[-1]
    if may_move is None or not is_allowed or is_fastest:
        return found
    # A plan that recomputes less would have room on the card, since states are smaller than activations.
    lighter = wish._replace(recompute=TECHNIQUES[-1])
    moved, moved_seconds, _ = _search(sketch.offloaded(), limit_bytes, step_seconds, exact, lighter)
    many = f"{count_of(moved.plan.micro_batch, 'sequence')} at a time"
    lies = "the optimizer's states lie in the computer's memory"
    if not found.fits:
        if not moved.fits:
            smaller = moved if moved.peak_bytes < found.peak_bytes else found
            where = f"{_SMALLEST}, and {lies}" if smaller is moved else _SMALLEST
            return smaller._replace(reason=where if wish == ANY else _NONE_ASKED_FOR)
        return moved._replace(reason=f"{lies}, since nothing fits with them on the card: {many}")
    if moved.fits and moved_seconds < seconds and may_move(moved.rehearsal.ledger):
        slower = seconds / moved_seconds
        times = f"a step would take {slower:.2f} times as long" if slower > 1.005 else "a step would be no faster"
        return moved._replace(reason=f"{lies}, which makes room for {many}; with them on the card {times}")
    return found


def _search(
    sketch: MemoryCurve,
    limit_bytes: int,
    step_seconds: Callable[[Rehearsal, Plan], float],
    exact: bool,
    wish: PlanConstraints,
) -> tuple[SearchResult, float, bool]:
    """Return what was found, the seconds of its step, and whether more room could make it no faster."""
    techniques = TECHNIQUES if wish.recompute is None else (wish.recompute,)
    sizes = sketch.sizes if wish.micro_batch is None else [wish.micro_batch]
    timed: list[tuple[float, SearchResult]] = []
    is_enough = False
    for technique in techniques:
        here = []
        for micro_batch, rehearsal in _fitting(sketch, technique, sizes, limit_bytes):
            plan = sketch.plan(technique, micro_batch)
            found = SearchResult(plan, rehearsal, True, "", sketch.has(technique, micro_batch))
            here.append((step_seconds(rehearsal, plan), found))
        timed += here
        is_enough = bool(here) and (len(sizes) == 1 or _is_enough(here, sketch.samples))
        if is_enough:
            break  # more recomputation would make room for nothing that is faster, and itself costs time
    while timed:
        seconds, chosen = _choose(timed, wish, sketch.samples)
        if not exact:
            return chosen, seconds, is_enough
        rehearsal = sketch.exactly(chosen.plan.recompute, chosen.plan.micro_batch)
        if rehearsal.ledger.peak_bytes <= limit_bytes:
            return chosen._replace(rehearsal=rehearsal, is_rehearsed=True), seconds, is_enough
        timed = [(took, found) for took, found in timed if found.plan != chosen.plan]
        is_enough = False
    plan = sketch.plan(techniques[-1], sizes[0])
    reason = _SMALLEST if wish == ANY else _NONE_ASKED_FOR
    return SearchResult(plan, sketch.exactly(plan.recompute, plan.micro_batch), False, reason), math.inf, False


def _choose(
    timed: Sequence[tuple[float, SearchResult]], wish: PlanConstraints, samples: int
) -> tuple[float, SearchResult]:
    """Return the smallest of the plans that are as good as the fastest.

    Of more plans this choice is never slower: whatever is both smaller and faster than it would have been chosen.
    """
    fastest = min(seconds for seconds, _ in timed)
    level = [(seconds, found) for seconds, found in timed if seconds <= fastest * (1 + EQUALLY_FAST)]
    seconds, chosen = min(level, key=lambda one: one[1].peak_bytes)
    reason = "you asked for it" if wish != ANY else _explain(chosen.plan, seconds, timed, samples)
    return seconds, chosen._replace(reason=reason)


def _is_enough(timed: Sequence[tuple[float, SearchResult]], samples: int) -> bool:
    """Say whether the whole step fits at once, or larger micro-batches could not gain what recomputation costs.

    A step is work and a cost for each micro-batch, so what the last enlargement gained says what is left to gain.
    """
    seconds, largest = timed[-1][0], timed[-1][1].plan.micro_batch
    if largest == samples or len(timed) == 1:
        return largest == samples
    smaller = timed[-2][1].plan.micro_batch
    left = (timed[-2][0] - seconds) * smaller / (largest - smaller)
    return left <= RECOMPUTING_COSTS * seconds


def _fitting(
    sketch: MemoryCurve, technique: Recompute, sizes: Sequence[int], limit_bytes: int
) -> Iterator[tuple[int, Rehearsal]]:
    """Yield the micro-batches that fit, smallest first; after one that does not, most larger ones are not rehearsed.

    The whole step at once needs no gradients to add to, and may take less: it is tried where the size before it was,
    and where every block is recomputed.
    """
    for micro_batch in sizes:
        is_far = micro_batch not in sizes[-2:]
        rehearsal = sketch.at(technique, micro_batch)
        if rehearsal.ledger.peak_bytes <= limit_bytes:
            yield micro_batch, rehearsal
        elif is_far and technique == TECHNIQUES[-1]:
            whole = sketch.at(technique, sizes[-1])
            if whole.ledger.peak_bytes <= limit_bytes:
                yield sizes[-1], whole
            return
        elif is_far:
            return


def _explain(plan: Plan, seconds: float, timed: Sequence[tuple[float, SearchResult]], samples: int) -> str:
    largest = max(found.plan.micro_batch for _, found in timed if found.plan.recompute == plan.recompute)
    is_one = plan.micro_batch == 1
    sequences = f"{count_of(plan.micro_batch, 'sequence')} at a time"
    if plan.micro_batch == samples:
        size = "the whole step fits at once"
    elif plan.micro_batch == largest:
        size = f"{sequences} is the most that fits" if is_one else f"{sequences} are the most that fit"
    else:
        size = f"more than {sequences} would be no faster"
    if plan.recompute == "none":
        return f"{size}, and nothing is computed twice"
    kept = [(took, found.plan.micro_batch) for took, found in timed if found.plan.recompute == "none"]
    if not kept:
        return f"{size}; without recomputation not even one would"
    slower = min(took for took, _ in kept) / seconds
    times = f"and a step would take {slower:.2f} times as long" if slower > 1.005 else "and be no faster"
    return f"{size}; without recomputation at most {max(most for _, most in kept)} would, {times}"
