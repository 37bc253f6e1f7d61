"""Predicts how fast a rehearsed step is on a card, from published figures or a measurement; never imports torch.

The times of matrix products, fused attention and memory traffic are added up; on an NVIDIA card products read their
operands while they compute.  A GPU runs kernels asynchronously, so launches cost nothing until they take longer than
all of the work; on a CPU the launch time is added to the work.
"""

from __future__ import annotations

from typing import Annotated, Literal, NamedTuple

from pydantic import Field, PositiveInt

from lowvram.config.base import FrozenConfig
from lowvram.config.plan import Plan
from lowvram.config.train import LOW_PRECISIONS, TrainConfig
from lowvram.fit.memory_curve import Rehearsal, Work
from lowvram.hardware.profile import Number, Profile

Rate = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]

# What computer, screen and power supply draw in addition to the graphics card.
REST_OF_MACHINE_WATTS = 60.0

# By what factor the real speed may differ from an estimate, up or down.
# For published figures, on top of the card's own uncertainty.  profiles/measured/promised.md compares them with what
# others measured.
SPREAD_UNMEASURED = 1.4
# The same in 8 bits: of a card's figure for these products, kernels have reached 0.34 to 0.63 (ours, on an H200), 0.47
# and 0.57 (others', on an RTX 5090), and at least 0.57 (LLMQ with cuBLAS on an RTX 4090: 20,300 tokens/s of 1.5 B).
SPREAD_UNMEASURED_LOW = 1.7
# After a measurement, for another model: with tr-25m measured, the steps of tr-60m, tiny-llm-v1 and tr-130m-moe were
# predicted at 0.78 to 1.16 of their real seconds (EPYC, one thread, bf16 and fp32, torch 2.13, 2026).
SPREAD_MEASURED = 1.3
# For the same step that was timed: heat and other programs change its time from one minute to the next.
SPREAD_REPEATED = 1.05


class Efficiency(NamedTuple):
    """The shares of a profile's figures that a training step reaches.

    product: of the figure for matrix products.  attention: what fused kernels reach, of the product's rate.  memory: of
    the bandwidth.  launch_s: host seconds per op.  compiled: the share of bytes and of launches that remain with
    torch.compile.  low: of the figure for 8 bits.  hides_operands: whether products read their operands while they
    compute, so that only the slower of the two takes time.  grouped: what experts' products reach, of the product's
    rate.
    """

    product: float
    attention: float
    memory: float
    launch_s: float
    compiled: float
    low: float = 1.0
    hides_operands: bool = False
    grouped: float = 1.0


_EFFICIENCIES = {
    # profiles/measured/promised.md holds all but two against each kernel timed on an H200.  Product: of
    # what the best shape reaches in cuBLAS, which a profile states; what a product writes takes its time after that.
    # Attention: FlashAttention 2 reaches at most 0.73 forward and 0.63 backward (Dao 2023, section 4), on longer
    # sequences and wider heads than here.  Launch: 5 to 10 µs from Python with autograd.  Compiled: what it fuses, our
    # kernels have fused already.  Low: products of 8 bits on an RTX 5090, of 419 (FP8) and 838 (INT8, MXFP8) TFLOP/s in
    # theory, reached 190 to 207 and 480.
    "cuda": Efficiency(0.97, 0.5, 0.85, 8e-6, 1.0, 0.5, True, 0.65),
    # Metal writes out every score, so there is no fused attention; its command buffers cost more to fill.
    "mps": Efficiency(0.9, 0.5, 0.7, 15e-6, 0.5),
    # The profile's figures are those of training already.  Attention: 0.45 of a product in bf16, 0.8 in fp32 (EPYC
    # with AVX-512, torch 2.13).
    "cpu": Efficiency(1.0, 0.6, 1.0, 10e-6, 0.7),
}
# From one kernel of a CUDA graph to the next: about a microsecond on the card, and none on the host.
_REPLAY_S = 1e-6
# From capability 8.9 on a GeForce has 12 to 96 MiB of L2 cache, up to 8.6 two to six.  The larger caches hold an
# activation of a micro-batch, so an op reads from L2 what the op before it wrote.
_LARGE_CACHE = ((8, 9), (12, 0))
_LARGE_CACHE_MEMORY = 1.2
# Copies of pageable memory over PCI Express 4.0 with 8 lanes, which mid-range cards have: less than half of its
# 15.8 GB/s, since they go through a page-locked buffer.
LINK_BYTES_PER_S = 6e9


class Rates(NamedTuple):
    """A machine's rates, and the seconds of a launch.  low_flops_per_s: matrix products in 8 bits, None if unknown."""

    product_flops_per_s: float
    attention_flops_per_s: float
    bytes_per_s: float
    launch_s: float
    low_flops_per_s: float | None = None


# An RTX 3060: it only orders the plans of a card whose figures are not known.
_STAND_IN = Rates(26.8e12 * 0.9, 26.8e12 * 0.9 * 0.5, 360e9 * 0.85, 8e-6)


class Calibration(FrozenConfig):
    """The result of a measurement on this machine.

    timed: which configuration, in words.  micro, update: the work of its rehearsal.  micro_ratio, update_ratio:
    measured seconds divided by those predicted from the rates.  compiled_ratio: seconds of a compiled micro-batch
    divided by those of an eager one, None if it was not tried or failed.  ledger_bytes: the rehearsal's peak.
    peak_bytes: the allocator's peak, None where it reports none.  date: ISO 8601.
    """

    version: Literal[2] = 2
    profile_id: str
    precision: Number
    timed: str
    micro: Work
    update: Work
    product_flops_per_s: Rate
    attention_flops_per_s: Rate
    bytes_per_s: Rate
    launch_s: Rate
    low_flops_per_s: Rate | None = None
    micro_ratio: Rate
    update_ratio: Rate
    compiled_ratio: Rate | None = None
    ledger_bytes: PositiveInt
    peak_bytes: PositiveInt | None = None
    torch: str
    threads: PositiveInt
    date: str

    @property
    def rates(self) -> Rates:
        """The five rates."""
        return Rates(*(getattr(self, name) for name in Rates._fields))


class Speed(NamedTuple):
    """Tokens per second, and the range in which the real speed is expected."""

    tokens_per_second: float
    low: float
    high: float
    is_measured: bool

    def times(self, ratio: float) -> Speed:
        """Return an estimate that is corrected by a factor; a measurement stays as it is."""
        return self if self.is_measured else Speed(self[0] * ratio, self[1] * ratio, self[2] * ratio, False)


def estimate(
    rehearsal: Rehearsal,
    plan: Plan,
    train: TrainConfig,
    profile: Profile,
    measured: Calibration | None = None,
    limit_bytes: int = 0,
) -> Speed | None:
    """Return the speed of a plan, None if neither a measurement nor the profile has figures.

    measured: a measurement; it is used only if it belongs to this card and precision.  limit_bytes: see `step_seconds`.
    """
    is_measured = measured is not None and _belongs(measured, train, profile)
    if not is_measured and published_rates(profile, train.precision) is None:
        return None
    speed = train.batch_tokens / step_seconds(rehearsal, plan, train, profile, measured, limit_bytes)
    spread = SPREAD_UNMEASURED_LOW if train.precision in LOW_PRECISIONS else SPREAD_UNMEASURED
    spread *= 1.0 + profile.uncertainty
    if measured is not None and is_measured:
        is_same = (rehearsal.micro, rehearsal.update) == (measured.micro, measured.update)
        is_known = not plan.compile or measured.compiled_ratio is not None
        spread = SPREAD_REPEATED if is_same and is_known else SPREAD_MEASURED
    return Speed(speed, speed / spread, speed * spread, is_measured)


def step_seconds(
    rehearsal: Rehearsal,
    plan: Plan,
    train: TrainConfig,
    profile: Profile,
    measured: Calibration | None = None,
    limit_bytes: int = 0,
) -> float:
    """Return the seconds of an optimizer step: its micro-batches one after the other, then the update.

    limit_bytes: of the card; where passes and update fit in it as CUDA graphs, no launch waits for the host.  A
    measurement has timed launches as they are.
    For a card without figures the rates of another card are used: then only the order of the plans has a meaning.
    """
    platform = profile.platform
    if measured is not None and _belongs(measured, train, profile):
        micro_s = work_seconds(rehearsal.micro, measured.rates, platform) * measured.micro_ratio
        update_s = work_seconds(rehearsal.update, measured.rates, platform) * measured.update_ratio
        if plan.compile and measured.compiled_ratio is not None:
            return plan.accumulate * micro_s * measured.compiled_ratio + update_s
        return plan.accumulate * micro_s + update_s
    rates = published_rates(profile, train.precision) or _STAND_IN
    if is_replayed(rehearsal, limit_bytes):
        rates = rates._replace(launch_s=_REPLAY_S)
    micro = rehearsal.micro
    if plan.compile:
        remaining = _EFFICIENCIES[platform].compiled
        micro = micro._replace(moved_bytes=micro.moved_bytes * remaining, ops=micro.ops * remaining)
    return plan.accumulate * work_seconds(micro, rates, platform) + work_seconds(rehearsal.update, rates, platform)


def is_replayed(rehearsal: Rehearsal, limit_bytes: int) -> bool:
    """Say whether a step is expected to be replayed from CUDA graphs: that they fit."""
    return 0 < rehearsal.recorded_bytes <= limit_bytes


def work_seconds(work: Work, rates: Rates, platform: str) -> float:
    """Return the seconds that a part of the step takes."""
    hidden = hidden_bytes(work, platform)
    busy_s = max(product_seconds(work, rates, platform), hidden / rates.bytes_per_s)
    busy_s += work.attention_flops / rates.attention_flops_per_s
    busy_s += (work.moved_bytes - hidden) / rates.bytes_per_s
    busy_s += work.host_bytes / (LINK_BYTES_PER_S if platform == "cuda" else rates.bytes_per_s)
    launching_s = work.ops * rates.launch_s
    return busy_s + launching_s if platform == "cpu" else max(busy_s, launching_s)


def product_seconds(work: Work, rates: Rates, platform: str) -> float:
    """Return the seconds that matrix products compute, attention's left out."""
    wide_flops = work.flops + work.grouped_flops / _EFFICIENCIES[platform].grouped
    low_flops_per_s = rates.low_flops_per_s or rates.product_flops_per_s
    return wide_flops / rates.product_flops_per_s + work.low_flops / low_flops_per_s


def hidden_bytes(work: Work, platform: str) -> float:
    """Return the bytes that are read while matrix products compute."""
    return work.operand_bytes if _EFFICIENCIES[platform].hides_operands else 0.0


def published_rates(profile: Profile, precision: Number) -> Rates | None:
    """Return the rates that a training step is expected to reach by the card's published figures; None without any.

    In the 8-bit precisions everything except the layers' matrix products is computed in bf16.  Only NVIDIA cards have
    kernels for these products; elsewhere plain PyTorch is slower than 16 bits, by a factor that is not known.
    """
    if precision in LOW_PRECISIONS and profile.platform != "cuda":
        return None
    low_tflops = _low_tflops(profile, precision)
    tflops = profile.tflops.get("bf16" if precision in LOW_PRECISIONS else precision)
    if tflops is None or profile.bandwidth_bytes_per_s is None:
        return None
    efficiency = _EFFICIENCIES[profile.platform]
    has_large_cache = profile.capability in _LARGE_CACHE
    memory = _LARGE_CACHE_MEMORY if has_large_cache else efficiency.memory
    product = tflops * 1e12 * efficiency.product
    bytes_per_s = profile.bandwidth_bytes_per_s * memory
    low = low_tflops * 1e12 * efficiency.low if low_tflops is not None else None
    return Rates(product, product * efficiency.attention, bytes_per_s, efficiency.launch_s, low)


def _low_tflops(profile: Profile, precision: Number) -> float | None:
    """Return the figure for products in 8 bits; FP8 is as fast as INT8 if the instruction takes block scales."""
    if precision == "fp8" and profile.fp8 == "mxfp8":
        return profile.tflops.get("int8")
    return profile.tflops.get(precision) if precision in LOW_PRECISIONS else None


def launch_seconds(platform: str) -> float:
    """Return the assumed host seconds per op."""
    return _EFFICIENCIES[platform].launch_s


def days(tokens: int, speed: Speed) -> float:
    """Return the days that a run takes for its tokens."""
    return tokens / speed.tokens_per_second / 86_400


def kwh(days: float, profile: Profile) -> float | None:
    """Return the electricity of so many days in kWh, None if the card's power is not known.

    It is that of the card at its power limit, which training comes near, and of the rest of the computer; an Apple
    chip's watts include the computer.
    """
    if profile.watts is None:
        return None
    rest_watts = 0.0 if profile.platform == "mps" else REST_OF_MACHINE_WATTS
    return (profile.watts + rest_watts) * days * 24 / 1000


def _belongs(measured: Calibration, train: TrainConfig, profile: Profile) -> bool:
    return (measured.profile_id, measured.precision) == (profile.id, train.precision)
