"""A model's peak memory over the micro-batch: rehearsals and interpolation between them; never imports torch.

A step's peak is the maximum over many moments, and at each moment memory is affine in the micro-batch.  So the peak is
convex in the micro-batch, and linear interpolation between two rehearsals never gives less than the true peak.  The
chunks of the loss are an exception: from the second chunk on gradients accumulate in fp32, and all chunks have the same
length, so odd lengths are off by a part of a chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from lowvram.config.plan import LEDGER_LINES, Ledger, Offload, Plan, Recompute

# The most rows of one chunk of the loss (lowvram_kernels/loss/linear_cross_entropy.py).
_ONE_CHUNK_TOKENS = 1_024
# Near these sizes another moment becomes the peak; rehearsals there keep interpolation within some percent.
_MIDDLE_TOKENS = (8_192, 16_384)


# The ledger's fields that do not describe the card's memory.
_BESIDE_THE_CARD = ("host_bytes", "kept_on_host", "checkpoint_bytes")


class Work(NamedTuple):
    """The work of a part of a step.

    flops: of matrix products.  moved_bytes: read and written by all ops, matrix products included, so that narrow
    layers cost more per FLOP.  ops: kernel launches.  attention_flops: of fused attention, which is slower than a
    matrix product.  host_bytes: copied between the card and host memory.  low_flops: of matrix products in 8 bits.
    operand_bytes: of moved_bytes, those that matrix products read of their operands.  grouped_flops: of the products
    of a card's experts that are one launch of ours for all, which are slower than one product and not in flops.
    """

    flops: float
    moved_bytes: float
    ops: float
    attention_flops: float = 0.0
    host_bytes: float = 0.0
    low_flops: float = 0.0
    operand_bytes: float = 0.0
    grouped_flops: float = 0.0


class Rehearsal(NamedTuple):
    """The memory and the work of a step, counted on meta tensors.

    micro: one micro-batch, forward and backward.  update: the optimizer's update, once per step.  recorded_bytes: what
    the card must have where passes and update are replayed from CUDA graphs, 0 where that is impossible or not known.
    """

    ledger: Ledger
    micro: Work
    update: Work
    recorded_bytes: int = 0


class MemoryCurve:
    """The rehearsals of one model on one card's path, made on demand and cached.

    rehearse: makes one for a plan, and is kept as `of`.  sizes: the micro-batches that a step can have, in order; the
    last is the whole step.  seq_len: tokens per sequence.  offload: what these plans keep in host memory.
    can_offload: whether plans with the optimizer's states in host memory may be tried too.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        rehearse: Callable[[Plan], Rehearsal],
        seq_len: int,
        offload: Offload = "none",
        can_offload: bool = True,
    ) -> None:
        self.sizes, self.samples, self.of, self.seq_len = sizes, sizes[-1], rehearse, seq_len
        self.offload: Offload = offload
        self.can_offload = can_offload
        self._rehearsals: dict[tuple[Recompute, int], Rehearsal] = {}

    def offloaded(self) -> MemoryCurve:
        """Return the same model's curve with the optimizer's states in host memory."""
        return MemoryCurve(self.sizes, self.of, self.seq_len, "optimizer")

    def exactly(self, recompute: Recompute, micro_batch: int) -> Rehearsal:
        """Return the rehearsal of one plan, never an interpolation."""
        key = (recompute, micro_batch)
        if key not in self._rehearsals:
            self._rehearsals[key] = self.of(self.plan(recompute, micro_batch))
        return self._rehearsals[key]

    def has(self, recompute: Recompute, micro_batch: int) -> bool:
        """Say whether a plan has been rehearsed, so that `at` need not interpolate."""
        return (recompute, micro_batch) in self._rehearsals

    def plan(self, recompute: Recompute, micro_batch: int) -> Plan:
        """Return the plan of a step that takes `micro_batch` sequences at a time."""
        accumulate = self.samples // micro_batch
        return Plan(micro_batch=micro_batch, accumulate=accumulate, recompute=recompute, offload=self.offload)

    def at(self, recompute: Recompute, micro_batch: int) -> Rehearsal:
        """Return the rehearsal of a plan, or a linear interpolation between the two nearest anchors."""
        if micro_batch == self.samples or self.has(recompute, micro_batch):
            return self.exactly(recompute, micro_batch)
        anchors = self.anchors()
        below = max(n for n in anchors if n <= micro_batch)
        above = min((n for n in anchors if n >= micro_batch), default=below)
        if below == above:
            return self.exactly(recompute, below)
        share = (micro_batch - below) / (above - below)
        return _interpolate(self.exactly(recompute, below), self.exactly(recompute, above), share)

    def anchors(self) -> list[int]:
        """Return the micro-batches, smaller than the whole step, that are rehearsed; others are interpolated.

        These are all whose loss fits into one chunk, the next larger one, two in the middle, and the largest.
        """
        below = [n for n in self.sizes if n < self.samples]
        small = [n for n in below if n * self.seq_len <= _ONE_CHUNK_TOKENS]
        next_ones = [n for n in below if n not in small]
        middle = [n for tokens in _MIDDLE_TOKENS for n in [m for m in below if m * self.seq_len >= tokens][:1]]
        return sorted({*small, *next_ones[:1], *middle, below[-1]}) if below else [self.samples]


def _interpolate(low: Rehearsal, high: Rehearsal, share: float) -> Rehearsal:
    def blend(a: float, b: float) -> float:
        return a + (b - a) * share

    # The two plans may peak at different moments, so only the sum of the lines is interpolated; the lines are scaled
    # to that sum, and the moment is the larger plan's.
    peak = blend(low.ledger.peak_bytes, high.ledger.peak_bytes)
    mixed = {name: blend(getattr(low.ledger, name), getattr(high.ledger, name)) for name in LEDGER_LINES}
    scale = peak / max(1.0, sum(mixed.values()))
    lines = {name: round(value * scale) for name, value in mixed.items()}
    micro = Work(*(blend(a, b) for a, b in zip(low.micro, high.micro, strict=True)))
    rest = {name: max(getattr(one.ledger, name) for one in (low, high)) for name in _BESIDE_THE_CARD}
    recorded = round(blend(low.recorded_bytes, high.recorded_bytes)) if low.recorded_bytes else 0
    return Rehearsal(Ledger(**lines, moment=high.ledger.moment, **rest), micro, high.update, recorded)
