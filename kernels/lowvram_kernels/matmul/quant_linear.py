"""The three matrix products of a linear layer, plain or of quantised operands; no autograd.

    y = x @ Wᵀ        dx = dy @ W        dW = dyᵀ @ x

    format      operands                                             sums
    "plain"     x's dtype; the master is cast at its use             by the library, in fp32
    "e4m3"      E4M3, scales for 1×128 of x and dy, 128×128 of W     fp32, scaled every 128 terms
    "int8"      INT8, one scale for each row or column               int32, scaled once

What is summed over lies along a row's 128 blocks in all three products: x and dy are quantised along their rows for y
and dx, along their columns for dW, always from the numbers themselves and never from codes; W's blocks are square, so
that one set of codes serves both its uses in E4M3.  The operands of several products of the same rows are made once.

Where dy is needed both ways one pass makes both (`both_ways.py`); a plan may keep the weights' codes for all
micro-batches of a step (`kept_codes.py`); products are added to sums that exist in the pass that makes them.

Saved for backward by the ops that multiply: the same as in the plain format, so low precision saves no activation
memory; codes live for one product.  Alive in a product: 1 byte for each number of both operands, and their scales.

Sources: DeepSeek-AI 2024 (DeepSeek-V3), section 3.3.2 (tiles, blocks, and backward in FP8); for INT8 with one scale a
row, Dettmers et al. 2022 (LLM.int8()), section 2.2.

Shapes: N rows, O outputs, I inputs.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from lowvram_kernels.errors import ShapeError
from lowvram_kernels.matmul.fp32_sums import product_for, sum_of
from lowvram_kernels.matmul.kept_casts import cast
from lowvram_kernels.matmul.kept_codes import codes_of
from lowvram_kernels.matmul.scaled_matmul import scaled_matmul
from lowvram_kernels.quant.both_ways import quantise_both_ways
from lowvram_kernels.quant.quantise import QuantTensor, quantise_columns, quantise_rows

MatmulFormat = Literal["plain", "e4m3", "int8"]
MATMUL_FORMATS = ("plain", "e4m3", "int8")
Operand = Tensor | QuantTensor


def reference(x: Tensor, weight: Tensor, dy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return y, dx and dW by the textbook; what every format should stay close to."""
    return x @ weight.mT, dy @ weight, dy.mT @ x


def along_rows(x_NI: Tensor, matmul_format: MatmulFormat) -> Operand:
    """Return x as an operand whose rows are multiplied: of y's x, of dx's dy.  x_NI: [N, I] floating."""
    return x_NI if matmul_format == "plain" else quantise_rows(x_NI, matmul_format)


def along_columns(x_NI: Tensor, matmul_format: MatmulFormat) -> Operand:
    """Return x as an operand whose columns are multiplied: dW's dy and x.  x_NI: [N, I] floating."""
    return x_NI if matmul_format == "plain" else quantise_columns(x_NI, matmul_format)


def gradient_operands(
    dy_NO: Tensor, matmul_format: MatmulFormat, needs_rows: bool = True, needs_columns: bool = True
) -> tuple[Operand, Operand]:
    """Return dy as an operand of dx and as one of dW, from one read where both are needed.  dy: [N, O] floating.

    What is not needed is dy itself.
    """
    if matmul_format != "plain" and needs_rows and needs_columns:
        return quantise_both_ways(dy_NO, matmul_format)
    rows = along_rows(dy_NO, matmul_format) if needs_rows else dy_NO
    return rows, along_columns(dy_NO, matmul_format) if needs_columns else dy_NO


def forward(x: Operand, weight_OI: Tensor, matmul_format: MatmulFormat, dtype: torch.dtype) -> Tensor:
    """Return y = x @ Wᵀ: [N, O] in dtype.  x: what `along_rows` made.  weight_OI: a master of any floating dtype."""
    if isinstance(x, QuantTensor):
        return scaled_matmul(x, codes_of(weight_OI, matmul_format), dtype)
    return F.linear(x, cast(weight_OI, dtype))


def backward_input(
    dy: Operand, weight_OI: Tensor, matmul_format: MatmulFormat, dtype: torch.dtype, total: Tensor | None = None
) -> Tensor:
    """Return dx = dy @ W: [N, I] in dtype.  dy: what `along_rows` made.

    total: dx of other projections of the same x, to which this one is added; codes add to it in place.
    """
    if isinstance(dy, QuantTensor):
        return scaled_matmul(dy, codes_of(weight_OI, matmul_format, transposed=True), dtype, total=total)
    weight_OI = cast(weight_OI, dtype)
    return dy @ weight_OI if total is None else torch.addmm(total, dy, weight_OI)


def backward_weight(dy: Operand, x: Operand, weight_OI: Tensor) -> Tensor | None:
    """Return dW = dyᵀ @ x: [O, I] in the master's dtype, which in low forms the sums are rounded to once.

    None where it has been added to the master's `.grad`: see `fp32_sums.py`.  dy, x: what `along_columns` made.
    """
    if isinstance(dy, QuantTensor) and isinstance(x, QuantTensor):
        total = sum_of(weight_OI)
        product = scaled_matmul(dy, x, weight_OI.dtype if total is None else total.dtype, total=total)
        return product if total is None else None
    assert not isinstance(dy, QuantTensor), "both of one format"
    assert not isinstance(x, QuantTensor), "both of one format"
    return product_for(weight_OI, dy.mT, x)


def check_matmul_format(matmul_format: str, what: str) -> None:
    """Raise ShapeError, naming `what`, unless it is one of `MATMUL_FORMATS`."""
    if matmul_format not in MATMUL_FORMATS:
        raise ShapeError(f"{what}: matmul_format is {matmul_format!r}; needs one of {', '.join(MATMUL_FORMATS)}.")
