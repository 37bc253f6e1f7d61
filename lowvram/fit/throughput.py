"""How fast a rehearsed step is on a card, by published figures or by a measurement; never imports torch.

A card does one thing after the other: matrix products, fused attention, bytes moved through memory.  It works behind
the program's back, so launches cost nothing there until they take longer than all of the work; a processor launches
with the hands that work.
"""

from __future__ import annotations

from typing import Annotated, Literal, NamedTuple

from pydantic import Field, PositiveInt

from lowvram.config.base import FrozenConfig
from lowvram.config.plan import Plan
from lowvram.config.train import TrainConfig
from lowvram.fit.memory_curve import Rehearsal, Work
from lowvram.hardware.profile import Number, Profile

Rate = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]

# What computer, screen and power supply draw beside a card that is not part of them.
REST_OF_MACHINE_WATTS = 60.0

# How far the truth may lie from an estimate, up or down, as a factor.
# From published figures, on top of the card's own uncertainty.  Held against an RTX 4090 training Llama-shaped models
# eagerly (30 M parameters 251,153 tokens/s, 113 M 84,554; yandesbiens.com/blog/forgelm-4090-cost, 2026): tr-25m comes
# out at 0.92 of the one and tr-125m at 0.76 of the other.
SPREAD_UNMEASURED = 1.4
# After a measurement, for another model: with tr-25m measured, the steps of tr-60m, tiny-llm-v1 and tr-130m-moe were
# predicted at 0.78 to 1.16 of their real seconds (EPYC, one thread, bf16 and fp32, torch 2.13, 2026).
SPREAD_MEASURED = 1.3
# For the very step that was timed: what heat and other programs change from one minute to the next.
SPREAD_REPEATED = 1.05


class Efficiency(NamedTuple):
    """Which share of a profile's figures a training step reaches.  attention: of the product's rate, by fused kernels.

    launch_s: host seconds for an op.  compiled: the share of bytes and of launches that torch.compile leaves.
    low: of the figure for 8 bits.
    """

    product: float
    attention: float
    memory: float
    launch_s: float
    compiled: float
    low: float = 1.0


_EFFICIENCIES = {
    # Products: a 1 B model on an RTX 4070 Ti SUPER, 9.2 k tokens/s, is 0.7 of its best product with all else in it;
    # their own bytes are counted apart.  Attention: FlashAttention 2 reaches at most 0.73 forward and 0.63 backward
    # (Dao 2023, section 4), on longer sequences and wider heads than here.  Memory: streaming kernels.  Launch: 5 to
    # 10 µs from Python with autograd.  Compiled: 126,078 tokens/s for 84,554 eagerly, from the RTX 4090 above.
    # Low: products of 8 bits on an RTX 5090, of 419 (FP8) and 838 (INT8, MXFP8) in theory, reached 190 to 207 and 480.
    "cuda": Efficiency(0.9, 0.5, 0.85, 8e-6, 0.5, 0.5),
    # Metal writes out every score, so there is no fused attention; its command buffers cost more to fill.
    "mps": Efficiency(0.9, 0.5, 0.7, 15e-6, 0.5),
    # The profile's figures are those of training already.  Attention: 0.45 of a product in bf16, 0.8 in fp32 (EPYC
    # with AVX-512, torch 2.13).
    "cpu": Efficiency(1.0, 0.6, 1.0, 10e-6, 0.7),
}
# From capability 8.9 on a GeForce has 12 to 96 MiB of L2, up to 8.6 two to six: as much as an activation of a
# micro-batch, so an op finds there what the one before it wrote.
_LARGE_CACHE = ((8, 9), (12, 0))
_LARGE_CACHE_MEMORY = 1.2
# Copies of ordinary memory over PCI Express 4.0 with 8 lanes, which cards of the middle have: less than half of its
# 15.8 GB/s, since they go through a page-locked buffer.
LINK_BYTES_PER_S = 6e9


class Rates(NamedTuple):
    """What a machine does in a second, and the seconds of a launch.  low_flops_per_s: in 8 bits, None if unknown."""

    product_flops_per_s: float
    attention_flops_per_s: float
    bytes_per_s: float
    launch_s: float
    low_flops_per_s: float | None = None


# An RTX 3060: it only orders the plans of a card whose figures nobody knows.
_STAND_IN = Rates(26.8e12 * 0.9, 26.8e12 * 0.9 * 0.5, 360e9 * 0.85, 8e-6)


class Calibration(FrozenConfig):
    """What a measurement found on this machine.

    timed: which configuration, in words.  micro, update: its rehearsal's work.  *_ratio: seconds measured by seconds
    predicted from the rates, for a micro-batch and for an update; compiled_ratio: compiled by eager, None where it was
    not tried or failed.  ledger_bytes: what the rehearsal promised; peak_bytes: what the allocator gave out, None
    where it does not say.  date: ISO 8601.
    """

    version: Literal[1] = 1
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
    """Tokens a second, and the range in which the truth is expected."""

    tokens_per_second: float
    low: float
    high: float
    is_measured: bool


def estimate(
    rehearsal: Rehearsal, plan: Plan, train: TrainConfig, profile: Profile, measured: Calibration | None = None
) -> Speed | None:
    """Return the speed of a plan, None where neither a measurement nor the profile has figures.

    measured: of this card and precision; one of another is not used.
    """
    is_measured = measured is not None and _belongs(measured, train, profile)
    if not is_measured and published_rates(profile, train.precision) is None:
        return None
    speed = train.batch_tokens / step_seconds(rehearsal, plan, train, profile, measured)
    spread = SPREAD_UNMEASURED * (1.0 + profile.uncertainty)
    if measured is not None and is_measured:
        is_same = (rehearsal.micro, rehearsal.update) == (measured.micro, measured.update)
        is_known = not plan.compile or measured.compiled_ratio is not None
        spread = SPREAD_REPEATED if is_same and is_known else SPREAD_MEASURED
    return Speed(speed, speed / spread, speed * spread, is_measured)


def step_seconds(
    rehearsal: Rehearsal, plan: Plan, train: TrainConfig, profile: Profile, measured: Calibration | None = None
) -> float:
    """Return the seconds of an optimizer step: its micro-batches one after the other, then the update.

    For a card without figures the number is that of a stand-in, so that only its order among plans means something.
    """
    platform = profile.platform
    if measured is not None and _belongs(measured, train, profile):
        micro_s = work_seconds(rehearsal.micro, measured.rates, platform) * measured.micro_ratio
        update_s = work_seconds(rehearsal.update, measured.rates, platform) * measured.update_ratio
        if plan.compile and measured.compiled_ratio is not None:
            return plan.accumulate * micro_s * measured.compiled_ratio + update_s
        return plan.accumulate * micro_s + update_s
    rates = published_rates(profile, train.precision) or _STAND_IN
    micro = rehearsal.micro
    if plan.compile:
        left = _EFFICIENCIES[platform].compiled
        micro = micro._replace(moved_bytes=micro.moved_bytes * left, ops=micro.ops * left)
    return plan.accumulate * work_seconds(micro, rates, platform) + work_seconds(rehearsal.update, rates, platform)


def work_seconds(work: Work, rates: Rates, platform: str) -> float:
    """Return the seconds that a part of the step takes."""
    busy_s = work.flops / rates.product_flops_per_s + work.attention_flops / rates.attention_flops_per_s
    busy_s += work.low_flops / (rates.low_flops_per_s or rates.product_flops_per_s)
    busy_s += work.moved_bytes / rates.bytes_per_s
    busy_s += work.host_bytes / (LINK_BYTES_PER_S if platform == "cuda" else rates.bytes_per_s)
    launching_s = work.ops * rates.launch_s
    return busy_s + launching_s if platform == "cpu" else max(busy_s, launching_s)


def published_rates(profile: Profile, precision: Number) -> Rates | None:
    """Return what a training step is expected to reach by the card's published figures; None where it has none.

    In 8 bits all but the layers' products is computed in bf16.  Only NVIDIA cards have kernels for these products, and
    nobody knows beforehand how much slower plain PyTorch is than 16 bits elsewhere.
    """
    if precision in ("fp8", "int8") and profile.platform != "cuda":
        return None
    low_tflops = _low_tflops(profile, precision)
    tflops = profile.tflops.get("bf16" if precision in ("fp8", "int8") else precision)
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
    """Return the figure for products in 8 bits; with block scales in the instruction FP8 is as fast as INT8."""
    if precision == "fp8" and profile.fp8 == "mxfp8":
        return profile.tflops.get("int8")
    return profile.tflops.get(precision) if precision in ("fp8", "int8") else None


def launch_seconds(platform: str) -> float:
    """Return the stated host seconds of an op."""
    return _EFFICIENCIES[platform].launch_s


def days(tokens: int, speed: Speed) -> float:
    """Return the days in which a run sees its tokens."""
    return tokens / speed.tokens_per_second / 86_400


def kwh(days: float, profile: Profile) -> float | None:
    """Return the electricity of so many days, None where the card's power is not known.

    A card at its power limit, which training comes near, and the rest of the computer; an Apple chip's watts are those
    of the whole.
    """
    if profile.watts is None:
        return None
    rest_watts = 0.0 if profile.platform == "mps" else REST_OF_MACHINE_WATTS
    return (profile.watts + rest_watts) * days * 24 / 1000


def _belongs(measured: Calibration, train: TrainConfig, profile: Profile) -> bool:
    return (measured.profile_id, measured.precision) == (profile.id, train.precision)
