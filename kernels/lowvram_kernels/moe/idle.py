"""Low-precision copies of a stack of matrices, read and written one matrix at a time; knows no layer and no gradient.

    bf16    w ≈ code             rounded to the nearest
    int8    w ≈ code · scale     scale = absmax / 127 of each row
    e4m3    w ≈ code · scale     scale = 2^⌈log₂(absmax / 448)⌉ of each block of 128×128; 448 is E4M3's largest number

One round trip errs by at most 2⁻⁹·|w| (bf16), absmax / 254 (int8), 2⁻⁴·|w| (e4m3; 2⁻¹⁰·scale below its normal
numbers, |w| < 2⁻⁶·scale).  A decoded number is rounded once, to the dtype asked for.
E4M3 lies in uint8, because float8 raises on MPS.  Blocks of 128×128 may be read transposed, as dx needs them.

Bytes of an element: 2 (bf16); 1 and 4 a row (int8); 1 and 4 a block (e4m3).
Alive inside: write_copy_ 13 bytes for each of the `CHUNK` elements at work.  read_copy makes its result; besides, where
the device casts by a copy (all but CUDA), up to 12 bytes for each of `CHUNK` elements.

Sources: DeepSeek-AI 2024 (DeepSeek-V3), section 3.3 (blocks of 128×128); Open Compute Project 2023, "Microscaling
Formats (MX)", section 5 (E4M3 and E8M0, scales that are powers of two).

Shapes: I matrices, O outputs (rows), N inputs (columns), R rows of a chunk, A × B blocks.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from lowvram_kernels.dispatch import card_of
from lowvram_kernels.errors import ShapeError
from lowvram_kernels.quant import blocks, e4m3, quantise
from lowvram_kernels.quant.quantise import BLOCK, QuantTensor, parts_of

COPY_FORMATS = ("bf16", "int8", "e4m3")
# Elements at work at once, in whole blocks of rows: temporaries are then some 13 MiB and not several matrices.
CHUNK = 2**20
_DTYPES = {"bf16": torch.bfloat16, "int8": torch.int8, "e4m3": torch.uint8}


# Copies [I, O, N]: a plain tensor in bf16 (or fp32, where masters are read in place of their copies); in 8 bits, codes
# and scales, [I, O, 1] for int8 and [I, ⌈O/128⌉, ⌈N/128⌉], powers of two, for E4M3.
Stack = Tensor | QuantTensor


def reference(master: Tensor, format: str) -> Tensor:
    """Return what a matrix is after its round trip, by the formulas above and without any 8-bit dtype: fp64 [O, N]."""
    if format == "bf16":
        return master.to(torch.bfloat16).double()
    return quantise.reference(master, format, (BLOCK, BLOCK))


def new_idle(count: int, outputs: int, inputs: int, format: str, device: torch.device | str | None = None) -> Stack:
    """Return `count` copies [outputs, inputs] that decode to zeros.

    format: one of `COPY_FORMATS`.
    Raises ShapeError if it is another.
    """
    if format not in COPY_FORMATS:
        raise ShapeError(f"new_idle: format is {format!r}; needs one of {', '.join(COPY_FORMATS)}.")
    code = torch.zeros(count, outputs, inputs, dtype=_DTYPES[format], device=device)
    if format == "bf16":
        return code
    return QuantTensor(code, torch.zeros(count, *_scale_shape(code), dtype=torch.float32, device=device))


def check_stack(stack: Stack, what: str) -> None:
    """Raise ShapeError, naming `what`, unless code and scale are those of one format."""
    code, scale = parts_of(stack)
    if code.dim() != 3 or code.dtype not in (*_DTYPES.values(), torch.float32):
        raise ShapeError(f"{what}: code is {list(code.shape)} {code.dtype}; needs [I, O, N] bf16, int8 or uint8.")
    needed = None if code.dtype.is_floating_point else [code.shape[0], *_scale_shape(code)]
    found = None if scale is None else list(scale.shape)
    if found != needed or (scale is not None and scale.dtype != torch.float32):
        raise ShapeError(f"{what}: scale is {found} for a {code.dtype} code; needs {needed}, fp32.")


@torch.no_grad()
def write_copy_(stack: Stack, index: int, master: Tensor) -> None:
    """Replace one copy by the master, rounded; the other copies do not change.

    master: [O, N], any floating dtype, on any device.  Its device computes, save that the CPU makes E4M3 for MPS.
    Numbers that are not finite are stored as some number, and spoil their row's or block's others.
    Raises ShapeError if the master is not of the copy's shape.
    """
    code, scale = parts_of(stack)
    code_ON = code[index]
    if master.shape != code_ON.shape or not master.dtype.is_floating_point:
        shapes = f"master is {list(master.shape)} {master.dtype}, copy {list(code_ON.shape)}"
        raise ShapeError(f"write_copy_: {shapes}; both need one shape, and the master a floating dtype.")
    if scale is None:
        code_ON.copy_(master)
        return
    encode, step = (_encode_int8, 1) if code_ON.dtype == torch.int8 else (_encode_e4m3, BLOCK)
    if step == BLOCK and master.device.type == "mps":
        master = master.to("cpu")
    for start, end in _chunks(*master.shape):
        code_RN, part = encode(master[start:end].float())
        code_ON[start:end].copy_(code_RN)
        scale[index, start // step : -(-end // step)].copy_(part)


def read_copy(stack: Stack, index: int, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """Return one matrix in dtype: [O, N].

    out: [O, N] in dtype, to be overwritten and returned; without it bf16 copies asked for in bf16 come as a view.
    Raises ShapeError if out is of another shape or dtype.
    """
    code, scales = parts_of(stack)
    code_ON = code[index]
    if out is None and not needs_decoding(code, dtype):
        return code_ON
    if out is None:
        out = torch.empty(code_ON.shape, dtype=dtype, device=code_ON.device)
    if out.shape != code_ON.shape or out.dtype != dtype:
        raise ShapeError(f"read_copy: out is {list(out.shape)} {out.dtype}; needs {list(code_ON.shape)} {dtype}.")
    if scales is None:
        return out.copy_(code_ON)
    scale = scales[index]
    platform = card_of(code_ON.device).platform  # on paper that of the imagined card: its temporaries are to be seen
    # CUDA casts inside its kernels: no temporaries there that wanted cutting, only launches.
    for start, end in [(0, out.shape[0])] if out.is_cuda else _chunks(*out.shape):
        rows_RN, code_RN = out[start:end], code_ON[start:end]
        if code_ON.dtype == torch.int8:
            rows_RN.copy_(code_RN).mul_(scale[start:end])
            continue
        if platform == "mps":
            rows_RN.copy_(_look_up(code_RN, dtype))
        elif platform == "cpu":
            # By way of fp32, since torch's cast from fp16 to bf16 is seven times as slow as these two.
            rows_RN.copy_(e4m3.decode_finite(code_RN).float().mul_(256.0))
        else:
            rows_RN.copy_(code_RN.view(torch.float8_e4m3fn))
        _multiply_blocks_(rows_RN, scale[start // BLOCK : -(-end // BLOCK)])
    return out


def needs_decoding(code: Tensor, dtype: torch.dtype) -> bool:
    """Say whether a product in dtype cannot take the code as it lies."""
    return not code.dtype.is_floating_point or code.dtype != dtype


def _scale_shape(code_ION: Tensor) -> tuple[int, int]:
    _, outputs, inputs = code_ION.shape
    return (outputs, 1) if code_ION.dtype == torch.int8 else (-(-outputs // BLOCK), -(-inputs // BLOCK))


def _chunks(rows: int, columns: int) -> Iterator[tuple[int, int]]:
    """Cut the rows into whole blocks of at most `CHUNK` elements, or single blocks where those are larger."""
    step = max(1, CHUNK // (columns * BLOCK)) * BLOCK
    yield from ((start, min(start + step, rows)) for start in range(0, rows, step))


def _encode_int8(rows_RN: Tensor) -> tuple[Tensor, Tensor]:
    absmax_R1 = rows_RN.abs().amax(1, keepdim=True)
    # Never zero: a row of zeros divides by it, and a denormal scale has too few digits to be a row's unit.
    # Not a division, which CUDA makes a product with the reciprocal: a copy has the same bits wherever it is made.
    scale_R1 = absmax_R1.mul_(1.0 / blocks.INT8_MAX).clamp_min_(torch.finfo(torch.float32).tiny)
    return (rows_RN / scale_R1).round_().to(torch.int8), scale_R1


def _encode_e4m3(rows_RN: Tensor) -> tuple[Tensor, Tensor]:
    rows, columns = rows_RN.shape
    padded_RN = F.pad(rows_RN, (0, -columns % BLOCK, 0, -rows % BLOCK))
    block_ARBN = padded_RN.view(padded_RN.shape[0] // BLOCK, BLOCK, -1, BLOCK)
    scale_AB = blocks.power_of_two_scale(block_ARBN.abs().amax((1, 3)))
    block_ARBN.div_(scale_AB[:, None, :, None])
    return padded_RN[:rows, :columns].to(torch.float8_e4m3fn).view(torch.uint8), scale_AB


def _multiply_blocks_(rows_RN: Tensor, scale_AB: Tensor) -> None:
    """Multiply the rows by their blocks' scales; both edges may cut a block."""
    scale_RB = scale_AB.repeat_interleave(BLOCK, 0)[: rows_RN.shape[0]]
    whole = rows_RN.shape[1] // BLOCK
    edge = whole * BLOCK
    rows_RN[:, :edge].view(rows_RN.shape[0], whole, BLOCK).mul_(scale_RB[:, :whole, None])
    if edge < rows_RN.shape[1]:
        rows_RN[:, edge:].mul_(scale_RB[:, whole:])


@functools.cache
def _values(dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return the numbers of all 256 bytes of E4M3; every dtype of a model has them all."""
    return torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).to(dtype).to(device)


def _look_up(code_RN: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the numbers of E4M3's bytes where torch has no such dtype."""
    return _values(dtype, code_RN.device).index_select(0, code_RN.reshape(-1).int()).view(code_RN.shape)
