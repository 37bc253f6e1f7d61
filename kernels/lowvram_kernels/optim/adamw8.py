"""AdamW with 8-bit moments, for fp32 or bf16 weights; works on flat ranges of elements, not on parameters or groups.

    m ← β₁·m + (1 − β₁)·g          v ← β₂·v + (1 − β₂)·g²          g = gradient · gradient_scale
    w ← (1 − lr·decay)·w − lr · [m / (1 − β₁ᵗ)] / [√v / √(1 − β₂ᵗ) + eps]

Between steps a moment is stored as value[code] · absmax: an 8-bit code per element, one fp32 absmax per 256 elements.
The values are those of dynamic tree quantisation.  Seven decades, 10⁻⁶·[0.1, 1] to 10⁰·[0.1, 1], are each cut into
equal parts whose centres are the values, 2ⁱ parts in decade i of a signed map and 2ⁱ⁺¹ in an unsigned one, i = 0 … 6;
a signed map has them negative too, and both have 0 and 1.  m takes the signed map, v the unsigned one.  The weight
is updated from the moments in fp32, before they are rounded to codes.

A bf16 weight is rounded stochastically, by 16 bits that are a function of (seed, purpose, step, element's index): there
is no generator state.  Its moments may also be stored exactly, in fp32: torch's own AdamW rounds the weight to nearest,
which loses most steps, since they are smaller than half of its last bit.

Stored between steps: 2 + 2·4/256 = 2.03 bytes a parameter.
On a card with Triton a step is one launch.  It reads and writes the weight (2 + 2 bytes an element in bf16, 4 + 4 in
fp32) and the moments (2 + 2 and 16/256; exact ones 8 + 8), and reads the gradient (2 or 4): 10.06 bytes in all where
weight and gradient are bf16.  Nothing else is alive inside it.
Elsewhere plain PyTorch works in chunks.  Alive inside a step: 19 bytes for each of the `CHUNK` elements at work,
for a bf16 weight 27; never a tensor of the weight's size.
Deterministic: the same arguments give the same bits on the same device.  No sum runs over several elements, so
neither chunks nor slices change a bit.  Both forms make the same moments, bit for bit where products and sums are fused
alike; the last bits of 1 − βᵗ and of roots may differ, and so a weight's change by some 10⁻⁷ of itself.

Sources: Dettmers et al. 2022, "8-bit Optimizers via Block-wise Quantization", sections 2 and 3 (blocks there are of
2,048 elements, here of 256 as in its library today); Dettmers 2016 (dynamic trees); Loshchilov & Hutter 2019.

Shapes: N elements, K = 256 elements of a block, B blocks.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lowvram_kernels.dispatch import Launch, card_of, is_interpreted, launch
from lowvram_kernels.errors import ShapeError
from lowvram_kernels.opaque import opaque
from lowvram_kernels.random.counter_rng import Noise, chain, chain_numbers, draw_bits, name_noise
from lowvram_kernels.random.stochastic_rounding import (
    BLOCK,
    ROWS,
    bits_of,
    has_kernels,
    programs,
    ranges,
    round_drawn,
    split,
)

# Bytes that a chunk's ops read and write for each of its elements, and their launches, as a rehearsal counts them.
_MOVED_BYTES = {torch.float32: 330, torch.bfloat16: 490}
_LAUNCHES = {torch.float32: 50, torch.bfloat16: 70}
_DTYPES = (torch.float32, torch.bfloat16)
_BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16}


class CodeMap(NamedTuple):
    """value: [256] fp32, rising.  midpoint: [256] fp32, between a value and the next; the last is infinity.

    A number's upper 16 bits find in low (uint8) and bound (fp32), [2¹⁶] both, its cell: its code is low, or low + 1
    above the bound, because no cell is wide enough to hold two midpoints.
    """

    value: Tensor
    midpoint: Tensor
    low: Tensor
    bound: Tensor


class Maps(NamedTuple):
    """The maps of the first moment (signed) and of the second (unsigned), on one device."""

    first: CodeMap
    second: CodeMap


class Moments(NamedTuple):
    """The optimizer state of a weight: codes in its shape (uint8) and one fp32 absmax for each block of 256.

    Exact moments are fp32 in place of codes, and have no absmax ([0]).
    """

    code_m: Tensor
    code_v: Tensor
    absmax_m: Tensor
    absmax_v: Tensor

    @property
    def is_exact(self) -> bool:
        """Say whether the moments are stored in fp32."""
        return self.code_m.dtype == torch.float32

    def part(self, first: int, end: int) -> Moments:
        """Return views of the flat elements [first, end), for example of one expert.

        Raises ShapeError if a block would straddle: first must be a multiple of 256, and end too unless it is the last.
        """
        count = self.code_m.numel()
        if first % BLOCK or (end % BLOCK and end != count) or not 0 <= first < end <= count:
            raise ShapeError(f"Moments.part: [{first}, {end}) of {count} elements cuts a block of {BLOCK}.")
        blocks = slice(first // BLOCK, -(-end // BLOCK))
        code_m, code_v = (code.view(-1)[first:end] for code in (self.code_m, self.code_v))
        if self.is_exact:
            return Moments(code_m, code_v, self.absmax_m, self.absmax_v)
        return Moments(code_m, code_v, self.absmax_m[blocks], self.absmax_v[blocks])


class Rule(NamedTuple):
    """The hyperparameters of a step: see `adamw8_`."""

    learning_rate: Tensor | float
    betas: tuple[float, float]
    eps: float
    decay: float
    gradient_scale: Tensor | float

    def numbers(self) -> list[float]:
        """Return the numbers in the kernel's order; of rate and scale 0 where they are scalars on the device."""
        (_, rate), (_, scale) = split(self.learning_rate), split(self.gradient_scale)
        shares = [1.0 - beta for beta in self.betas]
        return [rate, scale, 1.0 - rate * self.decay, self.decay, *self.betas, *shares, *self.logs(), self.eps]

    def logs(self) -> list[float]:
        """Return the logarithms of both βs."""
        return [math.log(beta) if beta else -math.inf for beta in self.betas]


def reference(
    weight: Tensor,
    gradient: Tensor,
    m: Tensor,
    v: Tensor,
    step: int,
    learning_rate: float,
    betas: tuple[float, float] = (0.9, 0.95),
    eps: float = 1e-8,
    decay: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return weight, m and v after textbook AdamW with exact moments: what the 8-bit form should stay close to."""
    m = betas[0] * m + (1 - betas[0]) * gradient
    v = betas[1] * v + (1 - betas[1]) * gradient**2
    m_hat, v_hat = m / (1 - betas[0] ** step), v / (1 - betas[1] ** step)
    return (1 - learning_rate * decay) * weight - learning_rate * m_hat / (v_hat.sqrt() + eps), m, v


def map_values(is_signed: bool) -> list[float]:
    """Return the 256 values of dynamic tree quantisation, rising."""
    values = [0.0, 1.0]
    for decade in range(7):
        parts = 2**decade if is_signed else 2 ** (decade + 1)
        centres = [10.0 ** (decade - 6) * (0.1 + 0.9 * (part + 0.5) / parts) for part in range(parts)]
        values += centres + ([-centre for centre in centres] if is_signed else [])
    return sorted(values)


def _code_map(values: list[float], device: torch.device | str | None) -> CodeMap:
    midpoints = [(low + high) / 2 for low, high in itertools.pairwise(values)]
    midpoint = torch.tensor([*midpoints, math.inf], device=device)
    cell = torch.arange(2**16, dtype=torch.int32, device=device) << 16
    # Of a cell's numbers the least: for negative ones that with all lower bits set.
    least = torch.where(cell < 0, cell | 0xFFFF, cell).view(torch.float32).nan_to_num()
    low = torch.bucketize(least, midpoint, out_int32=True)
    return CodeMap(torch.tensor(values, device=device), midpoint, low.to(torch.uint8), midpoint[low])


def build_maps(device: torch.device | str | None = None) -> Maps:
    """Make both maps once for all weights on a device; 0.6 MiB."""
    return Maps(*(_code_map(map_values(is_signed), device) for is_signed in (True, False)))


def new_moments(weight: Tensor, exact: bool = False) -> Moments:
    """Return the moments of a weight before its first step: zeros.  exact: in fp32."""
    dtype = torch.float32 if exact else torch.uint8
    codes = [torch.zeros_like(weight, dtype=dtype, memory_format=torch.contiguous_format) for _ in range(2)]
    blocks = 0 if exact else -(-weight.numel() // BLOCK)
    scales = [torch.zeros(blocks, dtype=torch.float32, device=weight.device) for _ in range(2)]
    return Moments(*codes, *scales)


def decode(code: Tensor, absmax_B: Tensor, codes: CodeMap) -> Tensor:
    """Return a moment of whole blocks, or of one shorter block: fp32 [B, K]."""
    value_BK = codes.value.index_select(0, code.int()).view(absmax_B.shape[0], -1)
    return value_BK.mul_(absmax_B[:, None])


def encode(x_BK: Tensor, codes: CodeMap) -> tuple[Tensor, Tensor]:
    """Return the nearest codes of x / absmax, flat uint8, and absmax [B]; x is scaled in place.

    A block of zeros has absmax 0, and so decodes to zeros.
    """
    absmax_B = x_BK.abs().amax(-1)
    # A table and not torch.bucketize, which takes 18 times as long on CPU.
    x = x_BK.div_(absmax_B.clamp_min(torch.finfo(torch.float32).tiny)[:, None]).view(-1)
    cell = (x.view(torch.int32) >> 16).bitwise_and_(0xFFFF)
    return codes.low.index_select(0, cell).add_(x > codes.bound.index_select(0, cell)), absmax_B


def _check(weight: Tensor, gradient: Tensor, moments: Moments) -> None:
    count = weight.numel()
    blocks = 0 if moments.is_exact else -(-count // BLOCK)
    sizes = [gradient.numel(), *(tensor.numel() for tensor in moments)]
    if sizes != [count, count, count, blocks, blocks]:
        raise ShapeError(f"adamw8_: {count} weights with {sizes}; need as many gradients and codes, {blocks} absmax.")
    if weight.dtype not in _DTYPES or not gradient.dtype.is_floating_point:
        raise ShapeError(f"adamw8_: weight is {weight.dtype}, gradient {gradient.dtype}; weight needs fp32 or bf16.")
    if not all(tensor.is_contiguous() for tensor in (weight, gradient, *moments)):
        raise ShapeError("adamw8_: weight, gradient and moments need contiguous memory.")


def store_(target: Tensor, new: Tensor, skip: Tensor | None) -> None:
    """Copy new into target, unless skip (a scalar bool on the device) is true.  What new held may be lost."""
    if skip is None or card_of(target.device).platform != "cpu":
        target.copy_(new if skip is None else torch.where(skip, target, new))
    else:  # on CPU masked bits take a third of the time of torch.where, which is not vectorised there
        old, change = (t.view(_BITS.get(t.dtype, t.dtype)) for t in (target, new.to(target.dtype)))
        old.bitwise_xor_(change.bitwise_xor_(old).mul_(~skip))


def recall(code_N: Tensor, absmax_B: Tensor, codes: CodeMap) -> Tensor:
    """Return a copy of a moment that is stored in codes, or in 16 or 32 bits: fp32 [B, K], [1, N] without codes."""
    if code_N.dtype == torch.uint8:
        return decode(code_N, absmax_B, codes)
    return code_N.to(torch.float32, copy=True).view(1, -1)


def remember_(x_BK: Tensor, codes: CodeMap, code_N: Tensor, absmax_B: Tensor, skip: Tensor | None) -> None:
    """Store a moment in the form that its state has; x is overwritten."""
    if code_N.dtype != torch.uint8:
        store_(code_N, x_BK.view(-1), skip)
        return
    new_code_N, new_absmax_B = encode(x_BK, codes)
    store_(code_N, new_code_N, skip)
    store_(absmax_B, new_absmax_B, skip)


def store_weight_(weight_N: Tensor, new_N: Tensor, skip: Tensor | None, noise: Noise | None, first: int) -> None:
    """Store new weights, rounded stochastically if there is a key (int64 scalar); first: the first element's index."""
    if noise is not None:
        new_N = round_drawn(new_N, draw_bits(noise, first, new_N.numel()))
    store_(weight_N, new_N, skip)


def times(x_N: Tensor, factor: Tensor | float) -> Tensor:
    """Return x · factor, a new tensor in fp32."""
    return x_N * factor if x_N.dtype == torch.float32 else x_N.float().mul_(factor)


def rounding_noise(weight: Tensor, seed: int, purpose: int, step: Tensor) -> Noise | None:
    """Return the key of a bf16 weight's stochastic rounding in a step, an int64 scalar; None for other dtypes."""
    if weight.dtype != torch.bfloat16:
        return None
    return name_noise(chain(torch.zeros_like(step, dtype=torch.int64), seed, purpose, step.long()), weight.numel())


@torch.no_grad()
def adamw8_(
    weight: Tensor,
    gradient: Tensor,
    moments: Moments,
    maps: Maps,
    step: Tensor,
    learning_rate: Tensor | float,
    betas: tuple[float, float] = (0.9, 0.95),
    eps: float = 1e-8,
    decay: float = 0.0,
    gradient_scale: Tensor | float = 1.0,
    skip: Tensor | None = None,
    seed: int = 0,
    purpose: int = 0,
    first: int = 0,
) -> None:
    """Make one step in place: weight and moments change, and the host reads nothing back.

    weight: any shape, fp32|bf16, contiguous.  gradient: as many elements, floating.  moments: see `new_moments`; for
    a slice of a weight `Moments.part`.  maps: see `build_maps`.  step: scalar on the device, this update's number from
    1.  learning_rate, gradient_scale: numbers, or fp32 scalars on the device.  skip: scalar; where it is not zero,
    nothing changes.  seed, purpose (which weight), first (the slice's first element in it): the key of a bf16 weight's
    stochastic rounding.
    Raises ShapeError if the tensors do not fit together.
    Sources: see the module.
    """
    _check(weight, gradient, moments)
    rule = Rule(learning_rate, betas, eps, decay, gradient_scale)
    if has_kernels(weight.device):
        _step_on_card(weight, gradient, moments, maps, step, rule, skip, chain_numbers(seed, purpose), first)
        return
    _step_in_chunks(
        weight, gradient, moments, maps, step, rule, skip, rounding_noise(weight, seed, purpose, step), first
    )


def _step_in_chunks(
    weight: Tensor,
    gradient: Tensor,
    moments: Moments,
    maps: Maps,
    step: Tensor,
    rule: Rule,
    skip: Tensor | None,
    noise: Noise | None,
    first: int,
) -> None:
    learning_rate, betas, eps, decay, gradient_scale = rule
    skip = None if skip is None else skip.reshape(()) != 0
    # 1 − βᵗ without cancellation: for β = 0.999 and t = 1 the plain form errs by 3e-5 in fp32.
    left_m, left_v = (-torch.expm1(step * log) for log in rule.logs())
    rate, kept, root = learning_rate / left_m, 1.0 - learning_rate * decay, left_v.sqrt()
    flat = [tensor.view(-1) for tensor in (weight, gradient, moments.code_m, moments.code_v)]
    in_place = moments.is_exact and skip is None
    for start, end in ranges(weight, _MOVED_BYTES[weight.dtype], _LAUNCHES[weight.dtype], masked=(16, 8)):
        w_N, g_N, code_m_N, code_v_N = (tensor[start:end] for tensor in flat)
        absmax_m_B, absmax_v_B = (a[start // BLOCK : -(-end // BLOCK)] for a in (moments.absmax_m, moments.absmax_v))
        m_BK = code_m_N.view(1, -1) if in_place else recall(code_m_N, absmax_m_B, maps.first)
        v_BK = code_v_N.view(1, -1) if in_place else recall(code_v_N, absmax_v_B, maps.second)
        g_BK = times(g_N, gradient_scale).view(m_BK.shape)
        m_BK.mul_(betas[0]).add_(g_BK, alpha=1.0 - betas[0])
        v_BK.mul_(betas[1]).addcmul_(g_BK, g_BK, value=1.0 - betas[1])
        change_BK = torch.sqrt(v_BK, out=g_BK).div_(root).add_(eps)
        change_N = torch.div(m_BK, change_BK, out=change_BK).mul_(rate).view(-1)
        new_N = torch.sub(times(w_N, kept), change_N, out=change_N)
        del g_BK, change_BK, change_N
        store_weight_(w_N, new_N, skip, noise, first + start)
        del new_N
        if not in_place:
            remember_(m_BK, maps.first, code_m_N, absmax_m_B, skip)
            remember_(v_BK, maps.second, code_v_N, absmax_v_B, skip)
        del m_BK, v_BK


def _step_on_card(
    weight: Tensor,
    gradient: Tensor,
    moments: Moments,
    maps: Maps,
    step: Tensor,
    rule: Rule,
    skip: Tensor | None,
    named: int,
    first: int,
) -> None:
    """Make the step in one launch.  named: the hash of seed and purpose."""
    (rate, _), (scale, _) = split(rule.learning_rate), split(rule.gradient_scale)
    if any(scalar is not None and scalar.device != weight.device for scalar in (step, rate, scale, skip)):
        raise ShapeError(f"adamw8_: step, learning_rate, gradient_scale and skip need to lie on {weight.device}.")
    tables = [maps.first.value, maps.second.value, maps.first.midpoint, maps.second.midpoint]
    _step_kernel(weight, gradient, *moments, tables, step, rate, scale, skip, rule.numbers(), first, named)


def _launch_step(
    weight_N: Tensor,
    gradient_N: Tensor,
    code_m_N: Tensor,
    code_v_N: Tensor,
    absmax_m_B: Tensor,
    absmax_v_B: Tensor,
    tables: Sequence[Tensor],
    step: Tensor,
    rate: Tensor | None,
    scale: Tensor | None,
    skip: Tensor | None,
    numbers: Sequence[float],
    first: int,
    named: int,
) -> None:
    """Launch the kernel; scalars are tensors of one element, or None where they are plain numbers.

    Weight, gradient and moments are contiguous, of any shape.
    """
    changing = (weight_N, code_m_N, code_v_N, absmax_m_B, absmax_v_B)
    tensors = (
        bits_of(weight_N),
        gradient_N,
        *changing[1:],
        *tables,
        step,
        rate,
        scale,
        None if skip is None else bits_of(skip),
    )
    constants = {
        "ROWS": ROWS,
        "ROUNDED": weight_N.dtype == torch.bfloat16,
        "EXACT": code_m_N.dtype == torch.float32,
        "FUSED": not is_interpreted(),
        "enable_fp_fusion": False,  # the kernel names what is fused: what the plain form fuses
    }
    arguments = (*tensors, weight_N.numel(), first, named, *numbers)
    what = Launch("optim.adamw8_triton", "adamw8_kernel", programs(weight_N.numel()), arguments, constants)
    launch(what, moved=(gradient_N, *changing, *changing))


_step_kernel = opaque("adamw8", _launch_step, ("weight_N", "code_m_N", "code_v_N", "absmax_m_B", "absmax_v_B"))
