"""Muon: a matrix moves along its momentum with all singular values made equal; works on matrices, not on parameters.

    m ← μ·m + (1 − μ)·g        u = (1 − μ)·g + μ·m        o = orthogonalise(u) ≈ U Vᵀ where u = U Σ Vᵀ
    w ← (1 − lr·decay)·w − lr · 0.2·√max(M, N) · o

Orthogonalising is a few steps of x ← a·x + (b·G + c·G²)·x with G = x xᵀ, products alone, in 16 bits; on a processor in
32, since one without instructions for bf16 multiplies it fifty times as slowly.  Each step's odd quintic is the one
that comes nearest to 1 on the interval where the steps before it have brought the singular values; the first interval
is [`least`, 1] of the Frobenius norm.  0.2·√max(M, N) gives a step the size that AdamW's have, so that one learning
rate and one decay serve both.

The momentum is stored in bf16, or in 8 bits as in `adamw8` (signed codes, blocks of 256).
Stored between steps: 2 bytes a parameter, or 1.02.  Alive inside a step: at most 6 bytes for each element of the
matrices at work, or 2 and one chunk's temporaries, if that is more: 14 bytes for each of its elements, for a bf16
weight 16; on a processor 12 and 4 instead of 6 and 2.  At work are at least one matrix and up to `AT_ONCE` elements;
with 8 bits all, where a matrix is no whole blocks.  A card with Triton has no chunks: one launch before the products
reads the gradient, reads and writes the momentum and writes u (bf16 and 8 bits: 2 + 1 + 1 + 2 bytes an element), and
one behind them reads o, and reads and writes the weight (2 + 2 + 2).
Work: a step of the iteration on [M, N], M ≤ N, is 4·M²·N + 2·M³ FLOPs.
Deterministic.  On CPU no matrix depends on which others are at work beside it; a card's batched product may choose
its kernel by their number.

Sources: Jordan et al. 2024 (Muon); Liu et al. 2025, "Muon is scalable for LLM training" (decay, the factor 0.2·√max);
Amsel et al. 2025 (a minimax quintic for each step).  The coefficients here were computed for this file by Remez's
exchange and are held against it by a test.

Shapes: B matrices of M rows and N columns.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lowvram_kernels.dispatch import card_of
from lowvram_kernels.errors import ShapeError
from lowvram_kernels.optim.adamw8 import CodeMap, recall, remember_, rounding_noise, store_weight_, times
from lowvram_kernels.optim.muon_launch import lead, move
from lowvram_kernels.random.counter_rng import Noise, chain_numbers
from lowvram_kernels.random.stochastic_rounding import BLOCK, has_kernels, ranges

# (least singular value, greatest error from 1, coefficients of each step): Remez's exchange, interval by interval.
# The error is that of these digits and of _ROOM together; without either it would be 0.341, 0.199 and 0.114.
QUINTICS: dict[int, tuple[float, float, tuple[tuple[float, float, float], ...]]] = {
    3: (
        0.008,
        0.359,
        ((8.1743, -23.9397, 17.7000), (3.7415, -2.7974, 0.5451), (2.8273, -2.1111, 0.4675)),
    ),
    4: (
        0.003,
        0.224,
        ((8.3837, -24.7659, 18.3571), (4.0434, -3.0114, 0.5695), (3.5056, -2.6267, 0.5257), (2.4901, -1.8343, 0.4368)),
    ),
    5: (
        0.001,
        0.144,
        (
            (8.4703, -25.1081, 18.6293),
            (4.1828, -3.1087, 0.5806),
            (3.9619, -2.9541, 0.5630),
            (3.2866, -2.4647, 0.5074),
            (2.2737, -1.6447, 0.4162),
        ),
    ),
}
# A matrix of a smaller norm counts as if it had this one, and so moves less: squares of its elements vanish in fp32,
# and a norm of zero would make it explode.  An expert that gets no tokens for long comes there.
_LEAST_NORM = 1e-15
# Rounding to 16 bits pushes a singular value past an interval's end, where the next quintic falls steeply: so each
# step sees its matrix a little smaller.
_ROOM = 1.01
RMS_OF_ADAMW = 0.2
# Elements of the matrices that are orthogonalised at once: enough to fill a card with small ones.
AT_ONCE = 2**22
# As in `adamw8`: bytes moved for each element and launches for each chunk, by what the momentum is kept in, and by what
# the weight is.
_LEAD_WORK = {torch.bfloat16: (88, 10), torch.uint8: (162, 24)}
_STORE_WORK = {torch.float32: (42, 5), torch.bfloat16: (205, 26)}


class Momentum(NamedTuple):
    """The optimizer state of a weight: bf16 in its shape and no absmax ([0]), or uint8 codes and one for each block."""

    code: Tensor
    absmax: Tensor

    def part(self, first: int, end: int) -> Momentum:
        """Return views of the flat elements [first, end), whole blocks of 256 where there are codes.

        Raises ShapeError where it would not be.
        """
        count, is_coded = self.code.numel(), self.code.dtype == torch.uint8
        if not 0 <= first < end <= count:
            raise ShapeError(f"Momentum.part: there is no [{first}, {end}) in {count} elements.")
        if is_coded and (first % BLOCK or (end % BLOCK and end != count)):
            raise ShapeError(f"Momentum.part: [{first}, {end}) of {count} elements cuts a block of {BLOCK}.")
        blocks = slice(first // BLOCK, -(-end // BLOCK)) if is_coded else slice(0, 0)
        return Momentum(self.code.view(-1)[first:end], self.absmax[blocks])


def new_momentum(weight: Tensor, bits: int) -> Momentum:
    """Return the momentum of a weight before its first step: zeros in 16 or 8 bits."""
    dtype = torch.uint8 if bits == 8 else torch.bfloat16
    blocks = -(-weight.numel() // BLOCK) if bits == 8 else 0
    code = torch.zeros_like(weight, dtype=dtype, memory_format=torch.contiguous_format)
    return Momentum(code, torch.zeros(blocks, dtype=torch.float32, device=weight.device))


def reference(matrix_MN: Tensor) -> Tensor:
    """Return U Vᵀ by the singular value decomposition, in fp64: what `orthogonalise` comes near to."""
    u, _, vh = torch.linalg.svd(matrix_MN.double(), full_matrices=False)
    return u @ vh


def orthogonalise(u_BMN: Tensor, steps: int = 5, dtype: torch.dtype | None = None) -> Tensor:
    """Bring every singular value near 1 and leave the singular vectors as they are.

    u: [B, M, N] bf16, fp16 or fp32.  steps: 3, 4 or 5.  dtype: of the products, u's own if None.  Returns [B, M, N]
    in it.
    Singular values from `least` of the matrix's Frobenius norm on end within the error that QUINTICS names, smaller
    ones grow by the product of the first coefficients.  bf16 adds 0.02 to the error, in a matrix of some thirty rows
    up to 0.12.  A matrix of zeros stays one.
    Sources: see the module.
    """
    is_tall = u_BMN.shape[1] > u_BMN.shape[2]
    x = u_BMN.mT if is_tall else u_BMN
    del u_BMN  # the caller may have kept none, and then it goes
    norm_B11 = torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True, dtype=torch.float32)
    least = max(_LEAST_NORM, 1.0 / torch.finfo(x.dtype).max)  # whose reciprocal is a number in fp16 too
    share_B11 = torch.reciprocal(norm_B11.clamp_min_(least), out=norm_B11.new_empty(norm_B11.shape, dtype=x.dtype))
    x = torch.mul(x, share_B11, out=torch.empty_like(x, dtype=dtype))
    for a, b, c in QUINTICS[steps][2]:
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=b / _ROOM**3, alpha=c / _ROOM**5)
        del gram
        x = torch.baddbmm(x, polynomial, x, beta=a / _ROOM)
        del polynomial
    return x.mT if is_tall else x


def dtype_of_products(device: torch.device) -> torch.dtype:
    """Return the dtype in which matrices are orthogonalised on a device."""
    card = card_of(device)
    # In meta mode the simulated card counts, elsewhere the device that multiplies, whatever `override_card` says.
    if (card.platform if device.type == "meta" else device.type) == "cpu":
        return torch.float32
    # Cards before 8.0 multiply in fp16; u itself may be smaller than that can say.
    is_before_bf16 = card.platform == "cuda" and card.capability is not None and not card.features.has_bf16
    return torch.float16 if is_before_bf16 else torch.bfloat16


def size_of(rows: int, columns: int) -> float:
    """Return the factor on an orthogonal matrix, beside the learning rate, whose step is as large as AdamW's."""
    return float(RMS_OF_ADAMW * max(rows, columns) ** 0.5)


def check(weight: Tensor, gradient: Tensor, momentum: Momentum, rows: int | None) -> tuple[int, int, int]:
    """Return the rows of one matrix, the number of matrices, and their columns."""
    if weight.dim() < 2 or not weight.numel():
        raise ShapeError(f"muon_: weight is {list(weight.shape)}, which is no matrix.")
    rows, columns = weight.shape[-2] if rows is None else rows, weight.shape[-1]
    blocks = -(-weight.numel() // BLOCK) if momentum.code.dtype == torch.uint8 else 0
    if rows < 1 or weight.shape[-2] % rows:
        raise ShapeError(f"muon_: weight is {list(weight.shape)}; matrices of {rows} rows do not make it up.")
    sizes = [gradient.numel(), momentum.code.numel(), momentum.absmax.numel()]
    if sizes != [weight.numel(), weight.numel(), blocks]:
        raise ShapeError(f"muon_: {weight.numel()} weights with {sizes} gradients, momenta and absmax.")
    if weight.dtype not in (torch.float32, torch.bfloat16) or not gradient.dtype.is_floating_point:
        raise ShapeError(f"muon_: weight is {weight.dtype}, gradient {gradient.dtype}; weight needs fp32 or bf16.")
    if not all(tensor.is_contiguous() for tensor in (weight, gradient, *momentum)):
        raise ShapeError("muon_: weight, gradient and momentum need contiguous memory.")
    return rows, weight.numel() // (rows * columns), columns


def _lead(
    gradient_N: Tensor,
    kept: Momentum,
    codes: CodeMap,
    beta: float,
    gradient_scale: Tensor | float,
    skip: Tensor | None,
) -> Tensor:
    """Update the momentum and return u, bf16 [N]: the momentum after one more such gradient (Nesterov)."""
    u_N = torch.empty(gradient_N.shape, dtype=torch.bfloat16, device=gradient_N.device)
    if has_kernels(u_N.device):
        lead(gradient_N, *kept, u_N, codes.value, codes.midpoint, gradient_scale, skip, beta)
        return u_N
    skip = None if skip is None else skip.reshape(()) != 0
    for low, high in ranges(u_N, *_LEAD_WORK[kept.code.dtype], masked=(9, 3)):
        g_N = times(gradient_N[low:high], gradient_scale)
        code_N, absmax_B = kept.code[low:high], kept.absmax[low // BLOCK : -(-high // BLOCK)]
        m_BK = recall(code_N, absmax_B, codes)
        m_BK.mul_(beta).add_(g_N.view(m_BK.shape), alpha=1.0 - beta)
        u_N[low:high] = g_N.mul_(1.0 - beta).add_(m_BK.view(-1), alpha=beta)
        del g_N
        remember_(m_BK, codes, code_N, absmax_B, skip)
        del m_BK
    return u_N


@torch.no_grad()
def muon_(
    weight: Tensor,
    gradient: Tensor,
    momentum: Momentum,
    codes: CodeMap,
    step: Tensor,
    learning_rate: Tensor | float,
    rows: int | None = None,
    beta: float = 0.95,
    decay: float = 0.0,
    steps: int = 5,
    gradient_scale: Tensor | float = 1.0,
    skip: Tensor | None = None,
    seed: int = 0,
    purpose: int = 0,
    first: int = 0,
) -> None:
    """Make one step in place: weight and momentum change, and the host reads nothing back.

    weight: [..., M, N], fp32|bf16, contiguous.  gradient: as many elements, floating.  rows: of one matrix, where the
    weight holds several above each other (gate and up); None takes M.  codes: `build_maps(...).first`.  step, skip,
    gradient_scale, seed, purpose, first: as for `adamw8_`.  steps: of the iteration.
    Raises ShapeError if the tensors do not fit together.
    Sources: see the module.
    """
    rows, count, columns = check(weight, gradient, momentum, rows)
    on_card = has_kernels(weight.device)
    noise = None if on_card else rounding_noise(weight, seed, purpose, step)
    size, dtype = rows * columns, dtype_of_products(weight.device)
    # A slice that codes can be cut at: several matrices whose elements are whole blocks, or all of them.
    together = max(1, AT_ONCE // size) if size % BLOCK == 0 or momentum.code.dtype != torch.uint8 else count
    flat_w, flat_g = weight.view(-1), gradient.view(-1)
    for start in range(0, count * size, together * size):
        end = min(start + together * size, count * size)
        w_N, part = flat_w[start:end], momentum.part(start, end)
        # Nobody but the callee holds u: it goes as soon as it is scaled.
        o_BMN = orthogonalise(
            _lead(flat_g[start:end], part, codes, beta, gradient_scale, skip).view(-1, rows, columns), steps, dtype
        )
        o_N = o_BMN.reshape(-1)
        del o_BMN
        if on_card:
            named = chain_numbers(seed, purpose)
            move(w_N, o_N, step, learning_rate, size_of(rows, columns), decay, skip, first + start, named)
        else:
            rate, left = learning_rate * size_of(rows, columns), 1.0 - learning_rate * decay
            _move_in_chunks(w_N, o_N, rate, left, noise, skip, first + start)
        del o_N


def _move_in_chunks(
    weight_N: Tensor,
    o_N: Tensor,
    rate: Tensor | float,
    kept: Tensor | float,
    noise: Noise | None,
    skip: Tensor | None,
    first: int,
) -> None:
    skip = None if skip is None else skip.reshape(()) != 0
    for low, high in ranges(weight_N, *_STORE_WORK[weight_N.dtype], masked=(9, 2)):
        new_N = times(weight_N[low:high], kept)
        new_N.sub_(o_N[low:high].float().mul_(rate))
        store_weight_(weight_N[low:high], new_N, skip, noise, first + low)
        del new_N
