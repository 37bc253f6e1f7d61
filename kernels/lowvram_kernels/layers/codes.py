"""RMSNorm and SwiGLU that write 8-bit codes where 16-bit numbers would only be read again to be rounded; on a card.

    normalise_to_codes      along_rows(rms_norm(x + added))
    normed_columns          along_columns(rms_norm(x))                                         E4M3
    gate_to_codes           along_rows(silu(gate) · up)
    gate_to_codes_backward  both ways of d[gate | up], and along_columns(silu(gate) · up)      E4M3

Each number is rounded to x's type before it becomes a code, so that codes are those of two launches, bit for bit.
Bytes moved: what is read, once, and 1 for each code, 4 for each scale.  INT8 needs the largest magnitude of a whole
row, which a program must hold, or of a whole column, which none can.
Nothing is saved: these are parts of other ops.

Shapes: N rows, D width, I inner width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from lowvram_kernels.dispatch import Launch, Tile, as_read, converts_e4m3, launch, runs_kernels
from lowvram_kernels.layers import rms_norm as norm
from lowvram_kernels.matmul.quant_linear import MatmulFormat
from lowvram_kernels.quant.both_ways import reference as both_ways_reference
from lowvram_kernels.quant.quantise import (
    BLOCK,
    ROUNDED_PRODUCTS,
    QuantTensor,
    new_codes,
    quantise_columns,
    quantise_rows,
)

# 16 numbers of each half a thread, two reads of 16 bytes, as where numbers are written.
_GATE = Tile(4, 512, 512)
# Warps of programs that hold a block of 128 × 128.
_WARPS = 16
# The widest row of a product that a program of INT8 holds, which reads twice as much.
WIDEST_INT8 = 8192


class CodedNorm(NamedTuple):
    """operand: the codes of the normalised rows.  rstd_N1: their scales, fp32.  stream: what was normalised."""

    operand: QuantTensor
    rstd_N1: Tensor
    stream: Tensor


def reference(
    x: Tensor, weight: Tensor, eps: float, matmul_format: MatmulFormat, added: Tensor | None = None
) -> CodedNorm:
    """Normalise, then quantise the rows: two passes."""
    y, rstd_N1, stream = norm.normalise(x, weight, eps, added=added)
    return CodedNorm(quantise_rows(y.reshape(-1, x.shape[-1]), matmul_format), rstd_N1, stream)


def reference_of_gate(gate_up_N2I: Tensor, d_product_NI: Tensor) -> tuple[QuantTensor, QuantTensor, QuantTensor]:
    """Return what `gate_to_codes_backward` does, in three passes."""
    gate, up = gate_up_N2I.float().chunk(2, dim=-1)
    silu, slope = F.silu(gate), torch.sigmoid(gate)
    d_gate = d_product_NI * up * (slope + silu * (1.0 - slope))
    d_gate_up = torch.cat([d_gate, d_product_NI * silu], dim=-1).to(gate_up_N2I.dtype)
    return *both_ways_reference(d_gate_up, "e4m3"), quantise_columns((silu * up).to(gate_up_N2I.dtype), "e4m3")


def norms_to_codes(x: Tensor, matmul_format: MatmulFormat) -> bool:
    """Say whether a kernel normalises x [..., D] to codes."""
    return matmul_format != "plain" and norm.has_kernels(x)


def normalise_to_codes(
    x: Tensor, weight: Tensor, eps: float, matmul_format: MatmulFormat, added: Tensor | None = None
) -> CodedNorm:
    """Normalise the rows of x, or of x + added rounded to x's dtype, and round them to codes.

    x, added: [..., D] fp32|bf16|fp16, where `norms_to_codes`.  weight: [D].  Returns codes of [N, D].
    Source: Zhang & Sennrich 2019, eq. 4; DeepSeek-AI 2024 (DeepSeek-V3), section 3.3.
    """
    x_ND, added_ND = norm.rows_of(x), None if added is None else norm.rows_of(added)
    count, width = x_ND.shape
    stream = None if added is None else torch.empty_like(x, memory_format=torch.contiguous_format)
    operand = new_codes((count, width), matmul_format, (1, BLOCK if matmul_format == "e4m3" else width), x.device)
    rstd_N1 = x.new_empty(count, 1, dtype=torch.float32)
    tile = norm.norm_tile(max(width, BLOCK), is_backward=False)
    sums = [None if part is None else as_read(part) for part in (added_ND, stream)]
    tensors = (as_read(x_ND), sums[0], as_read(weight.contiguous()), rstd_N1, sums[1], *operand)
    strides = (x_ND.stride(0), 0 if added_ND is None else added_ND.stride(0))
    constants = _constants(tile, matmul_format, x.device)
    arguments = (*tensors, count, width, *strides, eps)
    grid = (-(-count // tile.rows),)
    what = Launch("layers.codes_triton", "rms_norm_codes_kernel", grid, arguments, constants, tile.warps)
    launch(what, moved=(x, added, weight, rstd_N1, stream, *operand))
    return CodedNorm(operand, rstd_N1, x if stream is None else stream)


def normed_columns(x: Tensor, weight: Tensor, rstd_N1: Tensor) -> QuantTensor:
    """Return the E4M3 codes along the columns of the normalised rows of x, [D, N].  rstd: their scales, [N, 1] fp32."""
    x_ND = norm.rows_of(x)
    count, width = x_ND.shape
    columns = new_codes((width, count), "e4m3", (1, BLOCK), x.device)
    arguments = (as_read(x_ND), as_read(weight.contiguous()), rstd_N1, *columns, count, width, x_ND.stride(0))
    grid = (-(-count // BLOCK), -(-width // BLOCK))
    constants = {"NATIVE": converts_e4m3(x.device)}
    what = Launch("layers.codes_triton", "normed_columns_kernel", grid, arguments, constants, _WARPS)
    launch(what, moved=(x, weight, rstd_N1, *columns))
    return columns


def gates_to_codes(gate_up: Tensor, matmul_format: MatmulFormat) -> bool:
    """Say whether a kernel gates gate_up [..., 2I] to codes."""
    holds_rows = matmul_format == "e4m3" or gate_up.shape[-1] // 2 <= WIDEST_INT8
    is_coded = matmul_format != "plain" and holds_rows and gate_up.numel() > 0
    return is_coded and runs_kernels("swiglu", gate_up.device)


def gate_to_codes(gate_up_N2I: Tensor, matmul_format: MatmulFormat) -> QuantTensor:
    """Multiply silu of the first half by the second half and round the rows to codes [N, I].

    gate_up: [N, 2I] fp32|bf16|fp16, where `gates_to_codes`.
    Source: Shazeer 2020, eq. 6; DeepSeek-AI 2024 (DeepSeek-V3), section 3.3.
    """
    gate_up_N2I = gate_up_N2I.contiguous()
    count, width = gate_up_N2I.shape[0], gate_up_N2I.shape[1] // 2
    operand = new_codes(
        (count, width), matmul_format, (1, BLOCK if matmul_format == "e4m3" else width), gate_up_N2I.device
    )
    tile = _GATE
    if matmul_format == "int8":
        columns = max(BLOCK, 1 << (width - 1).bit_length())
        tile = Tile(max(1, 2048 // columns), columns, columns, warps=max(4, columns // 512))
    arguments = (as_read(gate_up_N2I), *operand, count, width)
    grid = (-(-count // tile.rows), -(-width // tile.columns))
    constants = _constants(tile, matmul_format, gate_up_N2I.device)
    what = Launch("layers.codes_triton", "swiglu_codes_kernel", grid, arguments, constants, tile.warps)
    launch(what, moved=(gate_up_N2I, *operand))
    return operand


def gate_to_codes_backward(gate_up_N2I: Tensor, d_product_NI: Tensor) -> tuple[QuantTensor, QuantTensor, QuantTensor]:
    """Return the E4M3 codes of gate_up's gradient along rows [N, 2I] and columns [2I, N], and of the product's columns.

    gate_up: [N, 2I], d_product: [N, I], contiguous, both bf16 or fp16 (fp32 would spill registers); I is a multiple of
    128.
    Source: Shazeer 2020, eq. 6, its derivative; DeepSeek-AI 2024 (DeepSeek-V3), section 3.3.
    """
    (count, width), device = d_product_NI.shape, d_product_NI.device
    sizes = (count, 2 * width), (2 * width, count), (width, count)
    results = [new_codes(size, "e4m3", (1, BLOCK), device) for size in sizes]
    tensors = (as_read(d_product_NI), as_read(gate_up_N2I), *(part for each in results for part in each))
    grid, constants = (3, -(-count // BLOCK), width // BLOCK), {"NATIVE": converts_e4m3(device)}
    arguments = (*tensors, count, width)
    what = Launch("layers.codes_triton", "swiglu_backward_codes_kernel", grid, arguments, constants, _WARPS)
    launch(what, moved=tensors)
    return results[0], results[1], results[2]


def _constants(tile: Tile, matmul_format: MatmulFormat, device: torch.device) -> dict[str, int | bool]:
    constants = {"ROWS": tile.rows, "COLUMNS": tile.columns, "NATIVE": converts_e4m3(device)}
    return constants | (ROUNDED_PRODUCTS if matmul_format == "int8" else {})
