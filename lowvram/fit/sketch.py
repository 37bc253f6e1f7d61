"""What rehearsals found, and what lies between them; plain numbers, never imports torch.

The peak of a step is the greatest of many moments, each affine in the micro-batch: so it is convex in it, and a
straight line between two rehearsals never promises too much room; for the presets it takes 1 % too much at most.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from lowvram.plan import LEDGER_LINES, Ledger, Plan, Recompute


class Work(NamedTuple):
    """What a part of the step costs.

    flops: of matrix products.  moved_bytes: read and written by every op, products too: so narrow layers cost more
    for each FLOP.  ops: launches.  attention_flops: of fused attention, which is slower than a product.
    """

    flops: float
    moved_bytes: float
    ops: float
    attention_flops: float = 0.0


class Rehearsal(NamedTuple):
    """A step on paper.  micro: one micro-batch, forward and backward.  update: the optimizer, once a step."""

    ledger: Ledger
    micro: Work
    update: Work


class Sketch:
    """The rehearsals of one model on one card's path, made when they are asked for and kept.

    rehearse: makes one for a plan.  samples: sequences in a step.
    """

    def __init__(self, samples: int, rehearse: Callable[[Plan], Rehearsal]) -> None:
        self.samples, self._rehearse = samples, rehearse
        self.found: dict[tuple[Recompute, int, bool], Rehearsal] = {}

    def exactly(self, recompute: Recompute, micro_batch: int) -> Rehearsal:
        """Return the rehearsal of one plan."""
        accumulates = micro_batch < self.samples
        key = (recompute, micro_batch, accumulates)
        if key not in self.found:
            accumulate = self.samples // micro_batch if accumulates else 1
            self.found[key] = self._rehearse(Plan(micro_batch=micro_batch, accumulate=accumulate, recompute=recompute))
        return self.found[key]

    def at(self, recompute: Recompute, micro_batch: int) -> Rehearsal:
        """Return the rehearsal of a plan, or the straight line between the two nearest anchors."""
        if micro_batch == self.samples or (recompute, micro_batch, True) in self.found:
            return self.exactly(recompute, micro_batch)
        anchors = self.anchors()
        below = max(n for n in anchors if n <= micro_batch)
        above = min((n for n in anchors if n >= micro_batch), default=below)
        if below == above:
            return self.exactly(recompute, below)
        share = (micro_batch - below) / (above - below)
        return _between(self.exactly(recompute, below), self.exactly(recompute, above), share)

    def anchors(self) -> list[int]:
        """Return the micro-batches that are rehearsed while gradients accumulate: the smallest and the largest."""
        below = [n for n in divisors(self.samples) if n < self.samples]
        return sorted({below[0], below[-1]}) if below else [self.samples]


def divisors(count: int) -> list[int]:
    """Return what divides a number, in order."""
    return [n for n in range(1, count + 1) if count % n == 0]


def _between(low: Rehearsal, high: Rehearsal, share: float) -> Rehearsal:
    def blend(a: float, b: float) -> float:
        return a + (b - a) * share

    # Lines of two different moments do not mix, their sum does: the larger plan's moment, scaled to the sum.
    peak = blend(low.ledger.peak_bytes, high.ledger.peak_bytes)
    mixed = {name: blend(getattr(low.ledger, name), getattr(high.ledger, name)) for name in LEDGER_LINES}
    scale = peak / max(1.0, sum(mixed.values()))
    lines = {name: round(value * scale) for name, value in mixed.items()}
    micro = Work(*(blend(a, b) for a, b in zip(low.micro, high.micro, strict=True)))
    host = max(low.ledger.host_bytes, high.ledger.host_bytes)
    return Rehearsal(Ledger(**lines, moment=high.ledger.moment, host_bytes=host), micro, high.update)
