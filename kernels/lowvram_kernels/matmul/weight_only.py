"""A linear layer whose 8-bit weight is decoded at its use; no autograd.

    y[n, o] = Σᵢ x[n, i] · code[o, i] · scale[o, i]        what `quantise.py` makes of a weight

x keeps its 16 bits, so that many rows and few compute the same function.  Few rows on a card go to `gemv`; else the
weight is decoded to x's dtype for one product of the library and freed after it.

On processors and Macs torch's own kernel multiplies up to `PACKED_ROWS` rows of bf16 by INT8 codes, which it decodes in
registers; the row's scale is rounded to bf16 there, which errs by at most 2⁻⁹.

A processor whose INT8 product is fast and exact takes up to `SPLIT_ROWS` rows of bf16 as two rows of INT8 each:
x = unit · (256 · high + low), the unit being the row's greatest number over 32,512.  Sums are exact, codes are read
once and never decoded, and x errs by at most 2⁻¹⁶ of its row's greatest number.

Otherwise a processor decodes as many of the weight's rows as its cache holds and multiplies them before the next:
torch's own cast from E4M3 alone would take thirty times as long as the product of one row in fp32, this decoding three
times.

Alive inside: on a processor 6 to 10 bytes for each of the `CHUNK` numbers at work, 16 for each number of y where rows
are split; on a card the decoded weight, unless
rows are few and Triton is there.
Source: the definition.

Shapes: N rows, O outputs, I inputs, P outputs of a part.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from lowvram_kernels.dispatch import card_of, choose
from lowvram_kernels.errors import ShapeError
from lowvram_kernels.matmul.gemv import MOST_ROWS, gemv
from lowvram_kernels.matmul.scaled_matmul import INT8_IS_EXACT, rows_of_scale
from lowvram_kernels.quant import e4m3
from lowvram_kernels.quant.quantise import BLOCK, QuantTensor, dequantise

# Numbers of a weight at work on a processor at once; fewer cost more calls than they spare memory (AVX2, one thread).
CHUNK = 2**20
# From more rows on, decoding the weight for a product of many rows is as fast.  Measured: EPYC (AVX-512 with bf16),
# torch 2.13, one thread, 2816×512: 0.31 ms against 0.38 at 8 rows, 0.62 and 0.49 at 16.
PACKED_ROWS = 8
# Rows that are split where that is possible.  Measured: Xeon (AMX), torch 2.13, one thread, 2816×512, milliseconds
# packed and split: 0.24 and 0.39 at 4 rows, 0.48 and 0.41 at 8, 0.95 and 0.55 at 16 (without AMX 0.74 and 0.41);
# decoded for a product in bf16 and split: 0.79 and 0.83 at 32, 0.77 and 1.51 at 64.
_FEWEST_SPLIT_ROWS, SPLIT_ROWS = 5, 32
_MOST_SPLIT = 127 * 256
# torch's kernel reads whole vectors of so many inputs: with AVX-512 it reads past the end of a row of another length.
_PACKED_INPUTS = 16


def reference(x: Tensor, weight: QuantTensor) -> Tensor:
    """Decode the weight to x's dtype and multiply."""
    return F.linear(x, dequantise(weight, x.dtype))


def weight_only_linear(x: Tensor, weight: QuantTensor) -> Tensor:
    """Multiply x by the transposed weight; the result comes in x's dtype.

    x: [..., I] fp32|bf16|fp16.  weight: code [O, I]; scale [⌈O/128⌉, ⌈I/128⌉] or [O, ⌈I/128⌉] for E4M3, [O, 1] for
    INT8; codes of E4M3 are not NaN.  Returns [..., O].  No node of autograd.
    Raises ShapeError if shapes, dtypes or devices do not fit.
    Source: the definition.
    """
    if x.dim() < 1 or x.shape[-1] != weight.code.shape[-1] or not x.dtype.is_floating_point:
        found = f"x is {list(x.shape)} {x.dtype}, weight {list(weight.code.shape)}"
        raise ShapeError(f"weight_only_linear: {found}; needs floating [..., I] and [O, I].")
    x_NI = x.detach().reshape(-1, x.shape[-1])
    if x_NI.shape[0] <= MOST_ROWS and choose("small_matmul", card_of(x.device)).backend == "triton":
        y_NO = gemv(x_NI, weight)
    elif _FEWEST_SPLIT_ROWS <= x_NI.shape[0] <= SPLIT_ROWS and _takes_split(x_NI, weight.code):
        y_NO = _multiply_split(x_NI, weight)
    elif x_NI.shape[0] <= PACKED_ROWS and takes_packed(x_NI, weight.code):
        y_NO = multiply_packed(x_NI, weight)
    elif card_of(x.device).platform == "cpu":
        y_NO = _multiply_parts(x_NI, weight)
    else:
        y_NO = reference(x_NI, weight)
    return y_NO.view(*x.shape[:-1], weight.code.shape[0])


def takes_packed(x: Tensor, code: Tensor) -> bool:
    """Say whether `multiply_packed` takes rows of x and this code, [O, I] or a stack of them."""
    fits = x.dtype == torch.bfloat16 and code.dtype == torch.int8 and code.shape[-1] % _PACKED_INPUTS == 0
    return fits and code.is_contiguous() and card_of(x.device).platform != "cuda"


def multiply_packed(x_NI: Tensor, weight: QuantTensor) -> Tensor:
    """Multiply rows of bf16 by an INT8 weight with torch's kernel, which checks little: `takes_packed` must be true."""
    return torch._weight_int8pack_mm(x_NI, weight.code, weight.scale.view(-1).to(torch.bfloat16))


def _takes_split(x: Tensor, code: Tensor) -> bool:
    """Say whether `_multiply_split` takes rows of x and this code, and is fast."""
    fits = x.dtype == torch.bfloat16 and code.dtype == torch.int8
    return fits and INT8_IS_EXACT and card_of(x.device).platform == "cpu"


def _multiply_split(x_NI: Tensor, weight: QuantTensor) -> Tensor:
    """Multiply both halves of each row by the codes, in one product, and add them in fp32.

    A row that is not finite has a unit that is not, so its products are not either; no other row notices.
    """
    rows_of_scale(weight, "weight_only_linear: weight")  # refuses what does not fit
    rows = x_NI.shape[0]
    unit_N1 = x_NI.abs().amax(-1, keepdim=True).float().clamp_min_(torch.finfo(torch.float32).tiny).div_(_MOST_SPLIT)
    whole_NI = (x_NI / unit_N1).round_().to(torch.int16)
    half_MI = torch.empty(2 * rows, x_NI.shape[1], dtype=torch.int8, device=x_NI.device)
    half_MI[:rows] = (whole_NI + 128) >> 8
    half_MI[rows:] = whole_NI  # its lower byte, as a signed one: the upper is one more where that is below zero
    sum_MO = torch._int_mm(half_MI, weight.code.mT)
    y_NO = sum_MO[:rows].float().mul_(256.0).add_(sum_MO[rows:])
    return y_NO.mul_(unit_N1).mul_(weight.scale[:, 0]).to(x_NI.dtype)


def _multiply_parts(x_NI: Tensor, weight: QuantTensor) -> Tensor:
    """Multiply band by band of the weight's outputs."""
    (code_OI, scale), height = weight, rows_of_scale(weight, "weight_only_linear: weight")
    outputs, inputs = code_OI.shape
    y_NO = x_NI.new_empty(x_NI.shape[0], outputs)
    # Few rows wait for the weight alone: they take it as it is decoded.
    x_NI = x_NI.float() if x_NI.shape[0] <= MOST_ROWS else x_NI
    band = max(CHUNK // inputs // BLOCK, 1) * BLOCK
    for start in range(0, outputs, band):
        place = slice(start, min(start + band, outputs))
        if code_OI.dtype == torch.int8:
            y_NO[:, place] = (x_NI @ code_OI[place].to(x_NI.dtype).mT).mul_(scale[place, 0])
        else:
            part_PI = _decode_e4m3(code_OI[place], scale[start // height : -(-place.stop // height)], height)
            y_NO[:, place] = x_NI @ part_PI.to(x_NI.dtype).mT
    return y_NO


def _decode_e4m3(code_PI: Tensor, scale: Tensor, height: int) -> Tensor:
    """Return the numbers of a band in fp32; its codes are not NaN.  height: of the blocks that share a scale."""
    (rows, inputs), part_PI = code_PI.shape, e4m3.decode_finite(code_PI).float()
    scale_AI = (scale * 256.0).repeat_interleave(BLOCK, 1)[:, :inputs]
    whole = rows // height * height
    part_PI[:whole].view(-1, height, inputs).mul_(scale_AI[: whole // height, None])
    if whole < rows:
        part_PI[whole:].mul_(scale_AI[-1])
    return part_PI


def look_up(ids: Tensor, table: QuantTensor, dtype: torch.dtype) -> Tensor:
    """Look up and decode rows.

    ids: int64, any shape.  table: code [V, D], scales as of a weight.  Returns ids' shape and D, in dtype.
    Raises ShapeError if table or ids are another.
    """
    if ids.dtype != torch.int64:
        raise ShapeError(f"look_up: ids is {ids.dtype}; needs int64.")
    height = rows_of_scale(table, "look_up: table")
    id_N = ids.flatten()
    # Rows of blocks are rows with scales of their own.
    scale = table.scale[id_N // BLOCK if height == BLOCK else id_N]
    return dequantise(QuantTensor(table.code[id_N], scale), dtype).view(*ids.shape, table.code.shape[1])


def decoded(weight: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return a weight or a stack of them in dtype: itself where it is plain and of that dtype, else a copy."""
    return weight.to(dtype) if scale is None else dequantise(QuantTensor(weight, scale), dtype)
