"""The product of two quantised matrices; no autograd.

    y = deq(a) · deq(b)ᵀ        deq(c) = code · scale, by 1×128 or 128×128 blocks (E4M3) or by row (INT8)

    E4M3    y[m, n] = Σ_block scale_a[m, block] · scale_b[n, block] · Σ_{k in block} code_a[m, k] · code_b[n, k]
    INT8    y[m, n] = scale_a[m] · scale_b[n] · Σ_k code_a[m, k] · code_b[n, k]

All three products of a layer have this form, with codes that lie contiguous along what is summed: y = x Wᵀ, dX = dY W
(b is the transposed weight), dW = dYᵀ X (both are columns, transposed).  Sums are fp32, INT8's int32.

    mxfp8     scales enter the instruction, as exponents of 1×32 groups: they must be powers of two
    tensor    each block's product is scaled in fp32 and added; so is the error of tensor cores that add in fewer bits
    storage   as tensor, with bytes that become fp16 in registers
    decode    operands become fp16 in memory, each row in units of its largest scale, so that any scale fits; INT8's
              codes are exact in fp16.  E4M3 below 2⁻²⁴ of a row's unit is lost, and scales that are no powers of two
              cost a rounding of 2⁻¹¹
    reference decoded to bf16, where that is exact and y is bf16, else to fp32; INT8's codes multiplied as they are

NaN must be in a scale, where quantisation puts it: fp16 has no room for E4M3's NaN byte beside its other numbers.
Alive inside: y; copies of both codes where K is no multiple of 16.  decode and reference hold both operands decoded
instead, and y in fp32.
Operations: 2·M·N·K.  Bytes moved, at least: M·K + N·K of codes, their scales, y; y twice where it is added to a sum.

Sources: DeepSeek-AI 2024 (DeepSeek-V3), section 3.3 (scales by block, promotion to fp32); Open Compute Project 2023,
"Microscaling Formats (MX)", section 5 (E8M0).

Shapes: M rows, N columns of y, K summed; R = 1 or 128 rows of one scale.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from lowvram_kernels.dispatch import Card, Launch, Tile, bytes_of, card_of, choose, launch
from lowvram_kernels.errors import ShapeError
from lowvram_kernels.opaque import opaque
from lowvram_kernels.quant.quantise import BLOCK, FLOATING, MOST_INT8, QuantTensor, dequantise, fill_lines
from lowvram_kernels.remembered import remembered

# Tiles of rows that run before the next tile of columns begins, so that operands come from the L2 cache.
_GROUP = 8


def _sums_int8_exactly() -> bool:
    """Return whether this processor's INT8 product is fast and exact.

    Without VNNI oneDNN adds pairs of products in 16 bits, which saturate.  A processor that has VNNI is no proof:
    oneDNN does the same where `ONEDNN_MAX_CPU_ISA` forbids it these instructions.  So one product is computed.
    """
    if not torch.cpu._is_vnni_supported():
        return False
    largest = torch.full((4, 64), 127, dtype=torch.int8, device="cpu")  # whatever the default device is
    return bool((torch._int_mm(largest, largest.mT) == 64 * 127**2).all())


# Found once, at import: Dynamo cannot trace the question, and a rehearsal would count its tensors.
INT8_IS_EXACT: bool = _sums_int8_exactly()


# Largest first.  Eight warps, because a tile has two accumulators: the sum and the block's product.
_TILES = {
    "mxfp8": (Tile(128, 128, 128, 8, 3), Tile(128, 64, 128, 8, 3), Tile(64, 64, 128, 8, 3)),
    "tensor": (Tile(128, 128, 128, 8, 4), Tile(128, 64, 128, 8, 3), Tile(64, 64, 128, 4, 3)),
    "storage": (Tile(128, 128, 128, 8, 3), Tile(128, 64, 128, 8, 3), Tile(64, 64, 128, 4, 3)),
    "int8": (Tile(128, 128, 128, 8, 4), Tile(128, 64, 128, 8, 3), Tile(64, 64, 128, 4, 3)),
}
_KERNELS = {
    "mxfp8": ("mxfp8_kernel", "mxf8"),
    "tensor": ("e4m3_kernel", "e4m3"),
    "storage": ("e4m3_kernel", "f16"),
    "int8": ("int8_kernel", "s8"),
}


def reference(a: QuantTensor, b: QuantTensor, dtype: torch.dtype) -> Tensor:
    """Decode both to fp32 and multiply."""
    return F.linear(dequantise(a, torch.float32), dequantise(b, torch.float32)).to(dtype)


def rows_of_scale(scaled: QuantTensor, what: str) -> int:
    """Return how many rows share a scale: 1 or 128.

    Raises ShapeError, naming `what`, unless code and scale are those of one format, the code contiguous.
    """
    code, scale = scaled
    if code.dim() != 2 or code.dtype not in (torch.uint8, torch.int8) or not code.is_contiguous() or not code.shape[1]:
        found = f"{list(code.shape)} {code.dtype}, strides {list(code.stride())}"
        raise ShapeError(f"{what}: code is {found}; needs [N, K] uint8 or int8, contiguous, K ≥ 1.")
    found_rows = _rows_of_scale(code.dtype, code.shape, scale.shape)
    if not found_rows or scale.dtype != torch.float32 or scale.device != code.device:
        found = f"{list(scale.shape)} {scale.dtype} on {scale.device}"
        needed = " or ".join(str(list(shape)) for shape in _fitting_scales(code.dtype, *code.shape))
        raise ShapeError(f"{what}: scale is {found}; this code needs {needed}, fp32 on {code.device}.")
    return found_rows


def _fitting_scales(dtype: torch.dtype, rows: int, columns: int) -> dict[tuple[int, ...], int]:
    """Return the shapes that a code's scale may have, each with the rows that share one."""
    if dtype == torch.int8:
        return {(rows, 1): 1}
    blocks = -(-columns // BLOCK)
    return {(-(-rows // BLOCK), blocks): BLOCK, (rows, blocks): 1}


@remembered
def _rows_of_scale(dtype: torch.dtype, code: torch.Size, scale: torch.Size) -> int:
    """Return how many rows share a scale; 0 where the two shapes do not fit together."""
    return _fitting_scales(dtype, *code).get(tuple(scale), 0)


def backend_of(code_dtype: torch.dtype, card: Card, has_fp32_scales: bool = False) -> str:
    """Return how codes of a dtype are multiplied: a key of the tables here, "decode" or "reference"."""
    if code_dtype == torch.int8:
        backend = choose("int8_matmul", card).backend
        return "int8" if backend == "tensor" else backend
    backend = choose("fp8_matmul", card).backend
    return "tensor" if backend == "mxfp8" and has_fp32_scales else backend


def matmul_tiles(card: Card, backend: str) -> list[Tile]:
    """Return every tile that may be chosen, largest first."""
    return [tile for tile in _TILES[backend] if _shared_bytes(tile, card) <= card.shared_bytes]


@remembered
def choose_matmul_tile(card: Card, backend: str, rows: int, columns: int) -> Tile:
    """Choose the largest tile that gives every multiprocessor one, else the smallest."""
    fitting = matmul_tiles(card, backend)
    for tile in fitting:
        if _count(tile, rows, columns) >= card.multiprocessors:
            return tile
    return fitting[-1]


def _shared_bytes(tile: Tile, card: Card) -> int:
    """Return what the stages of both operands take, with a scale a row; one stage lies in registers, save on 9.0."""
    held = tile.stages if card.capability == (9, 0) else tile.stages - 1
    return held * (tile.rows + tile.columns) * (tile.depth + 4)


def _count(tile: Tile, rows: int, columns: int) -> int:
    return -(-rows // tile.rows) * -(-columns // tile.columns)


def scaled_matmul(
    a: QuantTensor, b: QuantTensor, dtype: torch.dtype, has_fp32_scales: bool = False, total: Tensor | None = None
) -> Tensor:
    """Multiply a by b transposed: [M, N] in dtype.

    a: code [M, K], scale [M, ⌈K/128⌉] for E4M3, [M, 1] for INT8; E4M3 may also have [⌈M/128⌉, ⌈K/128⌉].  b: the same
    of [N, K].  dtype: bf16|fp16|fp32.  has_fp32_scales: E4M3's scales may be other than powers of two.
    total: [M, N] of that dtype, contiguous, to which the product is added in place, and which is returned.
    Sums are fp32 (INT8: int32) and rounded once.  Nothing is saved: this is no node of autograd.
    Raises ShapeError if the two do not fit together, a code is not contiguous, or K is over 133,144 for INT8.
    Source: DeepSeek-AI 2024 (DeepSeek-V3), section 3.3.
    """
    rows_of_scale(a, "scaled_matmul: a")
    rows_of_scale(b, "scaled_matmul: b")
    if a.code.dtype != b.code.dtype or a.code.shape[1] != b.code.shape[1] or a.code.device != b.code.device:
        found = [f"{list(s.code.shape)} {s.code.dtype} on {s.code.device}" for s in (a, b)]
        raise ShapeError(f"scaled_matmul: codes are {found[0]} and {found[1]}; need one K, dtype and device.")
    if dtype not in FLOATING:
        raise ShapeError(f"scaled_matmul: dtype is {dtype}; needs bf16, fp16 or fp32.")
    if a.code.dtype == torch.int8 and a.code.shape[1] > MOST_INT8:
        raise ShapeError(f"scaled_matmul: K is {a.code.shape[1]}; int32 holds INT8 sums over {MOST_INT8} at most.")
    shape = (a.code.shape[0], b.code.shape[0])
    if total is not None and (total.shape != shape or total.dtype != dtype or not total.is_contiguous()):
        wrong = f"{list(total.shape)} {total.dtype}, strides {list(total.stride())}"
        raise ShapeError(f"scaled_matmul: total is {wrong}; needs {list(shape)} {dtype}, contiguous.")
    card = card_of(a.code.device)
    if not (a.code.numel() and b.code.numel()):
        return torch.empty(shape, dtype=dtype, device=a.code.device) if total is None else total
    a, b = (QuantTensor(operand.code, operand.scale.contiguous()) for operand in (a, b))
    backend = backend_of(a.code.dtype, card, has_fp32_scales)
    if backend not in _TILES:
        product = _multiply_decoded(a, b, dtype, card, has_fp32_scales)
        return product if total is None else total.add_(product)
    return multiply_tiles(a, b, dtype, backend, choose_matmul_tile(card, backend, *shape), total)


def multiply_tiles(
    a: QuantTensor, b: QuantTensor, dtype: torch.dtype, backend: str, tile: Tile, total: Tensor | None = None
) -> Tensor:
    """Multiply by a kernel, tile by tile; `scaled_matmul` has checked the arguments.

    backend: a key of `matmul_tiles`, for the gate and the tests, which force each one.
    """
    adds = total is not None
    if total is None:
        total = torch.empty(a.code.shape[0], b.code.shape[0], dtype=dtype, device=a.code.device)
    _launch_tiles(fill_lines(a.code), a.scale, fill_lines(b.code), b.scale, total, backend, list(tile), adds)
    return total


def _launch_kernel(
    a_code: Tensor,
    a_scale: Tensor,
    b_code: Tensor,
    b_scale: Tensor,
    y_MN: Tensor,
    backend: str,
    tile: list[int],
    adds: bool,
) -> None:
    (M, K), N, chosen = a_code.shape, b_code.shape[0], Tile(*tile)
    kernel, expected_mma = _KERNELS[backend]
    constants = {
        "BLOCK_M": chosen.rows,
        "BLOCK_N": chosen.columns,
        "BLOCK_K": chosen.depth,
        "GROUP": _GROUP,
        "ADDS": adds,
    }
    if backend != "int8":
        constants["A_ROWS"] = _rows_of_scale(a_code.dtype, a_code.shape, a_scale.shape)
        constants["B_ROWS"] = _rows_of_scale(b_code.dtype, b_code.shape, b_scale.shape)
    if kernel == "e4m3_kernel":
        constants["DECODES"] = backend == "storage"
    operands = (a_code, b_code)
    if backend == "tensor":
        # Bytes that become E4M3 after they were loaded pass registers on their way to Hopper's tensor cores.
        operands = (a_code.view(torch.float8_e4m3fn), b_code.view(torch.float8_e4m3fn))
    arguments = (operands[0], a_scale, operands[1], b_scale, y_MN, M, N, K)
    grid = (_count(chosen, M, N),)
    read = bytes_of(a_code, a_scale, b_code, b_scale)
    what = Launch(
        "matmul.scaled_matmul_triton", kernel, grid, arguments, constants, chosen.warps, chosen.stages, expected_mma
    )
    launch(what, flops=2.0 * M * N * K, moved_bytes=read + (2 if adds else 1) * bytes_of(y_MN), operand_bytes=read)


_launch_tiles = opaque("scaled_matmul", _launch_kernel, ("y_MN",))


def _multiply_decoded(a: QuantTensor, b: QuantTensor, dtype: torch.dtype, card: Card, has_fp32_scales: bool) -> Tensor:
    """Multiply by the device's library: exact operands, sums in fp32."""
    has_bf16 = card.platform != "cuda" or card.features.has_bf16
    if card.platform == "cuda" and (dtype != torch.bfloat16 or not has_bf16 or a.code.dtype == torch.int8):
        return _multiply_halves(a, b, dtype)
    if a.code.dtype == torch.int8:
        if card.platform == "cpu" and INT8_IS_EXACT:
            total_MN = torch._int_mm(a.code, b.code.mT).float()
        else:
            total_MN = F.linear(a.code.float(), b.code.float())
        return total_MN.mul_(a.scale).mul_(b.scale.mT).to(dtype)
    if dtype == torch.bfloat16 and not has_fp32_scales:
        return F.linear(dequantise(a, dtype), dequantise(b, dtype))
    return reference(a, b, dtype)


def _multiply_halves(a: QuantTensor, b: QuantTensor, dtype: torch.dtype) -> Tensor:
    """Multiply in fp16 with sums and result in fp32, then scale: cards before 8.0 have no other tensor cores."""
    (a_MK, a_unit_M1), (b_NK, b_unit_N1) = _to_halves(a), _to_halves(b)
    if a_MK.device.type == "cpu":
        y_MN = F.linear(a_MK.float(), b_NK.float())  # torch widens a 16-bit product's result on CUDA only
    else:
        y_MN = torch.mm(a_MK, b_NK.mT, out_dtype=torch.float32)
    return y_MN.mul_(a_unit_M1).mul_(b_unit_N1.mT).to(dtype)


def _to_halves(scaled: QuantTensor) -> tuple[Tensor, Tensor]:
    """Return fp16 [N, K] and fp32 [N, 1] whose product is the matrix; |fp16| ≤ 448."""
    code, scale = scaled
    if code.dtype == torch.int8:
        return code.half(), scale
    unit_A1 = scale.amax(1, keepdim=True)
    share = QuantTensor(code, scale / unit_A1)
    unit_N1 = unit_A1 if len(scale) == len(code) else unit_A1.repeat_interleave(BLOCK, 0)[: len(code)]
    return dequantise(share, torch.float16), unit_N1
