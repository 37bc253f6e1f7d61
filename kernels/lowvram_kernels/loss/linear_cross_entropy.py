"""The output projection and its cross-entropy as one op that never holds all logits.

    l = x @ Wᵀ        loss = Σ_n [log Σ_v exp(l_nv) − l_n,target]        dl = softmax(l) − onehot(target)
    dx = dl @ W       dW = dlᵀ @ x

Rows are processed in chunks.  A chunk's gradients are made in the forward pass while its logits exist: three products
in all instead of four, and no tensor of [N, V] is ever allocated.
Saved for backward: dx [N, D] in x.dtype and dW [V, D] (fp32; x.dtype where one chunk is all), which backward
multiplies in place by the upstream scalar, so it runs once.  Without a gradient only the loss is computed.

How it stays exact in 16 bits without an fp32 copy of the logits: p = softmax of the rounded logits, taken in
fp32 inside torch.softmax.  With m the row's greatest logit, log Σ exp = m − log max p never underflows.  The
target's logit is taken again in fp32 as z = x·W[target], and with r = Σ_{v≠target} p_v
    loss = softplus(o),        o = log r + (m − log max p) − z, the log odds against the target:
a confident row (r ≪ 1) keeps its relative precision, if max p = p_target is read as 1 − r there and not from
16 bits.  Replacing the target's rounded logit by z changes a row's softmax only by its normaliser, so the
row's true gradient is
    dl = s·(p with −r at the target),        s = sigmoid(o) / r,
and s multiplies rows of [N, D] instead of [N, V]; it is 0 where the target is ignored.
fp16 cannot hold small p: there p is computed in fp32 and cast for the products.

On a card one kernel takes a chunk's logits to dl in their own memory: it reads them once where a program's registers
hold a row (16 bits, V a multiple of 32 up to 65,536), else twice, and writes them once.  It sums over all but the
target, so r = 1, and multiplies by s itself (in fp16, where s may be small, s multiplies rows as above).  The library
adds a chunk's dW to the fp32 sum in the product.  Four launches a chunk: the logits, the kernel, dx, dW.  A target
outside [0, V) makes the loss NaN there, where elsewhere it raises.

Source: the gradient is textbook; making it in the forward pass follows Hsu et al. 2024 (Liger Kernel).

Shapes: N rows, D width, V vocabulary, C rows of a chunk.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from lowvram_kernels.dispatch import (
    Card,
    Launch,
    Tile,
    as_read,
    bytes_of,
    card_of,
    is_interpreted,
    launch,
    runs_kernels,
)
from lowvram_kernels.errors import ShapeError
from lowvram_kernels.layers.row_parts import row_parts, works_in_parts
from lowvram_kernels.matmul.fp32_sums import add_product_
from lowvram_kernels.matmul.kept_casts import cast

# Each chunk adds a whole dW to its accumulator, some 10·V·D bytes of traffic: from about 1,024 rows on that
# is small beside the chunk's 6·C·V·D operations; more rows gained nothing (CPU, bf16, V = 16,384 and 32,768).
_MOST_ROWS = 1024
_LEAST_ROWS = 128
_CHUNK_BYTES = 32 * 2**20
# Logits that a processor takes from its products to their gradient at once: several passes over 16 bits in its cache.
_LOGITS_AT_ONCE = 2**19
_BYTES_PER_LOGIT = {torch.float32: 4, torch.bfloat16: 2, torch.float16: 6}


def reference(x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int = -100) -> Tensor:
    """Compute the textbook form with all logits; autograd of it is the gradient's truth."""
    return F.cross_entropy(x @ weight.to(x.dtype).mT, targets, ignore_index=ignore_index, reduction="sum")


def chunk_rows(rows: int, vocabulary: int, dtype: torch.dtype) -> int:
    """Choose the rows of a chunk: at most 1,024 and 32 MiB of logits, at least 128, chunks of equal size."""
    fitting = _CHUNK_BYTES // (vocabulary * _BYTES_PER_LOGIT[dtype])
    chunks = -(-rows // min(_MOST_ROWS, max(_LEAST_ROWS, fitting)))
    return -(-rows // max(1, chunks)) or 1


def _probabilities(logits_CV: Tensor) -> Tensor:
    """Softmax in the logits' own memory where one pass may read and write it; fp16's in an fp32 copy."""
    logits_CV = logits_CV.float() if logits_CV.dtype == torch.float16 else logits_CV
    if card_of(logits_CV.device).platform == "mps":  # its graphs do not promise that output may be input
        return torch.softmax(logits_CV, -1)
    return torch.softmax(logits_CV, -1, out=logits_CV)


def _sum_rows(p_CV: Tensor) -> Tensor:
    # On CPU dtype= would copy the chunk to fp32 first; its own sum adds bf16 in fp32 anyway.
    return p_CV.sum(-1).float() if card_of(p_CV.device).platform == "cpu" else p_CV.sum(-1, dtype=torch.float32)


def _loss_and_slope_(logits_CV: Tensor, z_C: Tensor, target_C: Tensor, keep_C: Tensor) -> tuple[Tensor, Tensor]:
    """Return the losses [C] and the factors s [C]; the logits become p with −r at the target."""
    row_C = torch.arange(target_C.shape[0], device=target_C.device)
    greatest_C = logits_CV.amax(-1).float()
    p_CV = _probabilities(logits_CV)
    top_C, p_target_C = p_CV.amax(-1).float(), p_CV[row_C, target_C]
    # index_put_ and not scatter_, which on CPU copies the whole bf16 chunk to fp32.
    p_CV.index_put_((row_C, target_C), p_CV.new_zeros(()))
    rest_C = _sum_rows(p_CV).clamp_min(torch.finfo(torch.float32).tiny)
    p_CV.index_put_((row_C, target_C), rest_C.neg().to(p_CV.dtype))
    if p_CV is not logits_CV:
        logits_CV.copy_(p_CV)
    if p_CV.dtype == torch.bfloat16:
        top_C = torch.where(p_target_C > 0.5, 1.0 - rest_C, top_C)
    odds_C = rest_C.log() + greatest_C - top_C.log() - z_C
    loss_C = torch.where(keep_C, F.softplus(odds_C), 0.0)
    return loss_C, torch.where(keep_C, torch.sigmoid(odds_C) / rest_C, 0.0)


def _loss_and_slope_in_parts_(
    logits_CV: Tensor, z_C: Tensor, target_C: Tensor, keep_C: Tensor
) -> tuple[Tensor, Tensor]:
    """Do as `_loss_and_slope_` does, on a processor with some rows at a time."""
    if not works_in_parts(logits_CV.device):
        return _loss_and_slope_(logits_CV, z_C, target_C, keep_C)
    loss_C, slope_C = torch.empty_like(z_C), torch.empty_like(z_C)
    for some in row_parts(logits_CV.shape[0], logits_CV.shape[1], logits_CV.device, _LOGITS_AT_ONCE):
        loss_C[some], slope_C[some] = _loss_and_slope_(logits_CV[some], z_C[some], target_C[some], keep_C[some])
    return loss_C, slope_C


def _forward(
    x_ND: Tensor, master_VD: Tensor, target_N: Tensor, rows: int, ignore: int, needs: tuple[bool, bool]
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return the summed loss, dx and dW for an upstream gradient of one; what `needs` denies is None."""
    needs_dx, needs_dweight = needs
    weight_VD = cast(master_VD, x_ND.dtype)
    one_chunk, in_fp32 = rows >= x_ND.shape[0], x_ND.dtype == torch.float32
    loss = torch.zeros((), dtype=torch.float32, device=x_ND.device)
    logits = x_ND.new_empty(min(rows, x_ND.shape[0]), weight_VD.shape[0])
    dx = torch.empty_like(x_ND, memory_format=torch.contiguous_format) if needs_dx else None
    dweight = part = None
    if needs_dweight:
        dweight = torch.empty_like(weight_VD, dtype=x_ND.dtype if one_chunk else torch.float32)
        part = dweight if one_chunk or in_fp32 else torch.empty_like(weight_VD)
    for start in range(0, max(1, x_ND.shape[0]), rows):  # no rows: one empty chunk, which zeroes dW
        x_CD, target_C = x_ND[start : start + rows], target_N[start : start + rows]
        keep_C = target_C != ignore
        target_C = torch.where(keep_C, target_C, 0)
        z_C = (x_CD.float() * weight_VD.index_select(0, target_C).float()).sum(-1)  # refuses −1, [] wraps it
        logits_CV = torch.mm(x_CD, weight_VD.mT, out=logits[: x_CD.shape[0]])
        loss_C, slope_C = _loss_and_slope_in_parts_(logits_CV, z_C, target_C, keep_C)
        loss += loss_C.sum()
        slope_C1, p_CV = slope_C[:, None], logits_CV
        if dx is not None:
            torch.mm(p_CV, weight_VD, out=dx[start : start + rows]).mul_(slope_C1)
        if dweight is not None and part is not None:
            scaled_CD = (x_CD * slope_C1).to(x_ND.dtype)
            if part is dweight:
                dweight.addmm_(p_CV.mT, scaled_CD, beta=float(start > 0))  # 0 ignores what was in memory
            else:
                torch.mm(p_CV.mT, scaled_CD, out=part)
                for of_vocabulary in row_parts(part.shape[0], part.shape[1], part.device):
                    total, term = dweight[of_vocabulary], part[of_vocabulary]
                    total.add_(term) if start else total.copy_(term)
    return loss, dx, dweight


# Logits, and numbers of x and W, that a program has at work; its warps.
_COLUMNS, _DEPTH, _WARPS = 4096, 1024, 8
# Pairs of logits that a thread holds, in parts of four (16 bytes): more only in the longest rows, whose programs have
# no more threads.  With more, or for the longest rows before capability 8.0, registers would spill.
_HELD_PAIRS, _MOST_PAIRS, _PART_PAIRS, _WARP, _MOST_WARPS = 16, 32, 4, 32, 32
# Logits of a row are a multiple of this: else Triton does not know that a thread may read 16 bytes at once.
_ALIGNED = 32


def held_tile(vocabulary: int, dtype: torch.dtype, card: Card) -> Tile | None:
    """Return how a program holds a row of logits in registers; None where it cannot.

    rows: the parts of the row.  columns: the pairs of logits in a part.
    """
    pairs = vocabulary // 2
    most = _MOST_PAIRS if (card.capability or (0, 0)) >= (8, 0) else _HELD_PAIRS
    if dtype == torch.float32 or vocabulary % _ALIGNED or pairs > most * _WARP * _MOST_WARPS:
        return None
    warps = min(_MOST_WARPS, max(4, 1 << (-(-pairs // (_HELD_PAIRS * _WARP)) - 1).bit_length()))
    columns = warps * _WARP * _PART_PAIRS
    return Tile(-(-pairs // columns), columns, columns, warps=warps)


def _launch_loss(
    logits_CV: Tensor,
    x_CD: Tensor,
    weight_VD: Tensor,
    by_row: tuple[Tensor, Tensor, Tensor | None],
    ignore: int,
    writes: bool,
) -> None:
    """Launch the kernel over a chunk.

    by_row: targets, where losses go, and where factors go, if anywhere.  writes: the logits become their gradient.
    """
    vocabulary, (count, width) = weight_VD.shape[0], x_CD.shape
    target_C, loss_C, slope_C = by_row
    beside = (as_read(x_CD), as_read(weight_VD), target_C, loss_C, slope_C)
    sizes = (width, x_CD.stride(0), ignore)
    module, tile = "loss.linear_cross_entropy_triton", held_tile(vocabulary, logits_CV.dtype, card_of(x_CD.device))
    if tile is None:
        arguments = (as_read(logits_CV), *beside, vocabulary, *sizes)
        constants = {"DEPTH": _DEPTH, "COLUMNS": _COLUMNS, "WRITES": writes}
        what = Launch(module, "loss_kernel", (count,), arguments, constants, _WARPS)
    else:
        arguments = (logits_CV.view(torch.int32), *beside, vocabulary // 2, *sizes)
        constants = {"DEPTH": _DEPTH, "COLUMNS": tile.columns, "PARTS": tile.rows, "WRITES": writes}
        constants |= {"IS_FP16": logits_CV.dtype == torch.float16, "IS_NATIVE": not is_interpreted()}
        what = Launch(module, "held_loss_kernel", (count,), arguments, constants, tile.warps)
    reads = 2 if tile is None and writes else 1
    moved = bytes_of(logits_CV) * (reads + writes) + 2 * bytes_of(x_CD) + bytes_of(target_C, loss_C, slope_C)
    launch(what, moved_bytes=moved)


def _forward_on_card(
    x_ND: Tensor, master_VD: Tensor, target_N: Tensor, rows: int, ignore: int, needs: tuple[bool, bool]
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Do as `_forward` does, by the kernel."""
    (needs_dx, needs_dweight), count = needs, x_ND.shape[0]
    x_ND, target_N, weight_VD = x_ND.contiguous(), target_N.contiguous(), cast(master_VD, x_ND.dtype).contiguous()
    loss_N = x_ND.new_empty(count, dtype=torch.float32)
    slope_N = torch.empty_like(loss_N) if x_ND.dtype == torch.float16 and any(needs) else None
    logits = x_ND.new_empty(min(rows, count), weight_VD.shape[0])
    dx = torch.empty_like(x_ND) if needs_dx else None
    is_single = rows >= count
    dweight = torch.empty_like(weight_VD, dtype=x_ND.dtype if is_single else torch.float32) if needs_dweight else None
    for start in range(0, count, rows):
        part = slice(start, start + rows)
        x_CD, slope_C = x_ND[part], None if slope_N is None else slope_N[part]
        logits_CV = torch.mm(x_CD, weight_VD.mT, out=logits[: x_CD.shape[0]])
        _launch_loss(logits_CV, x_CD, weight_VD, (target_N[part], loss_N[part], slope_C), ignore, any(needs))
        if dx is not None:
            dx_CD = torch.mm(logits_CV, weight_VD, out=dx[part])
            if slope_C is not None:
                dx_CD.mul_(slope_C[:, None])
        if dweight is not None:
            scaled_CD = x_CD if slope_C is None else (x_CD * slope_C[:, None]).to(x_CD.dtype)
            add_product_(dweight, logits_CV.mT, scaled_CD, is_first=start == 0)
    return loss_N.sum(), dx, dweight


def _scaled_(dweight_VD: Tensor, upstream: Tensor, dtype: torch.dtype) -> Tensor:
    """Return dweight · upstream in dtype; in place where that is dweight's own."""
    if dweight_VD.dtype == dtype or not works_in_parts(dweight_VD.device):
        return dweight_VD.mul_(upstream).to(dtype)
    scaled_VD = torch.empty_like(dweight_VD, dtype=dtype)
    for rows in row_parts(dweight_VD.shape[0], dweight_VD.shape[1], dweight_VD.device):
        scaled_VD[rows] = dweight_VD[rows].float() * upstream
    return scaled_VD


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, targets: Tensor, rows: int, ignore: int, needs: tuple[bool, bool]
    ) -> Tensor:
        is_on_card = x.shape[0] > 0 and runs_kernels("linear_cross_entropy", x.device)
        loss, dx, dweight = (_forward_on_card if is_on_card else _forward)(x, weight, targets, rows, ignore, needs)
        ctx.weight_dtype = weight.dtype
        ctx.save_for_backward(dx, dweight)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        dx, dweight = ctx.saved_tensors
        # In place: a second [V, D] would stand at the step's peak.  Autograd refuses a second backward.
        dx = dx.mul_(upstream) if dx is not None else None
        dweight = _scaled_(dweight, upstream, ctx.weight_dtype) if dweight is not None else None
        return dx, dweight, None, None, None, None


def linear_cross_entropy(
    x: Tensor, weight: Tensor, targets: Tensor, chunk: int | None = None, ignore_index: int = -100
) -> Tensor:
    """Sum the cross-entropy of softmax(x @ weightᵀ) over the targets that are not ignored.

    x: [N, D] fp32|bf16|fp16.  weight: [V, D], a master of any floating dtype, cast at use.  targets: [N]
    int64.  chunk: rows whose logits exist at once; None chooses up to 1,024 and 32 MiB.  Returns an fp32
    scalar, the sum: the caller divides.  Gradients come in x's and weight's dtype; backward runs once.
    Saved for backward: dx [N, D] in x's dtype, dW [V, D] in fp32 (x's dtype where one chunk is all).
    Raises ShapeError if the three do not fit together or chunk is not positive; IndexError for a target outside
    [0, V) that is not ignored: on CUDA the loss is NaN where the kernel runs, else the device fails.
    """
    if x.dim() != 2 or weight.dim() != 2 or x.shape[1] != weight.shape[1] or targets.shape != x.shape[:1]:
        shapes = f"x is {list(x.shape)}, weight {list(weight.shape)}, targets {list(targets.shape)}"
        raise ShapeError(f"linear_cross_entropy: {shapes}; they need [N, D], [V, D] and [N].")
    if x.dtype not in _BYTES_PER_LOGIT or not weight.dtype.is_floating_point or targets.dtype != torch.int64:
        dtypes = f"x is {x.dtype}, weight {weight.dtype}, targets {targets.dtype}"
        raise ShapeError(f"linear_cross_entropy: {dtypes}; x needs fp32, bf16 or fp16, targets int64.")
    if chunk is not None and chunk < 1:
        raise ShapeError(f"linear_cross_entropy: chunk is {chunk}; it needs at least one row.")
    rows = chunk or chunk_rows(x.shape[0], weight.shape[0], x.dtype)
    learns = torch.is_grad_enabled()
    needs = (learns and x.requires_grad, learns and weight.requires_grad)
    return _LinearCrossEntropy.apply(  # type: ignore[no-untyped-call]
        x, weight, targets, rows, ignore_index, needs
    )
