"""Quantisation of blocks to 8 bits in plain PyTorch: for CPU, MPS and where there is no Triton.

    scale of e4m3 = the least normal power of two with absmax ≤ 448 · scale, or absmax / 448 in fp32
    scale of int8 = absmax / 127, by whose reciprocal numbers are multiplied

A matrix is processed in parts that stay in a CPU's cache.
Alive inside: 8 bytes for each of the `CHUNK` numbers at work; on MPS, where integer arithmetic rounds to E4M3, 30.

Shapes: N rows, K columns, A × B blocks of R × C numbers.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from lowvram_kernels.dispatch import card_of, representative
from lowvram_kernels.quant import e4m3

CHUNK = 2**19
INT8_MAX = 127.0
_TINY = torch.finfo(torch.float32).tiny
_INFINITY_BITS = 0x7F800000
# Dtypes whose bits, without the sign, order as the magnitudes do, with infinity and then NaN on top.
_BITS = {
    torch.float32: (torch.int32, 0x7FFFFFFF),
    torch.bfloat16: (torch.int16, 0x7FFF),
    torch.float16: (torch.int16, 0x7FFF),
}
_Slices = tuple[slice, slice]


def encode_(code: Tensor, scale: Tensor, x: Tensor, block: tuple[int, int], fp32_scales: bool) -> None:
    """Write the codes and scales of a matrix.

    code: [N, K] uint8 (E4M3) | int8.  scale: [A, B] fp32.  x: [N, K] fp32|bf16|fp16.  block: its rows and columns.
    """
    for place, scale_place, cut in _parts(x.shape[0], x.shape[1], block):
        _encode_part_(_cut(code[place], cut), scale[scale_place], _cut(x[place], cut), fp32_scales)


def decode_(x: Tensor, code: Tensor, scale: Tensor, block: tuple[int, int]) -> None:
    """Write the numbers of codes, code · scale in fp32 and rounded once; shapes as in `encode_`."""
    for place, scale_place, cut in _parts(x.shape[0], x.shape[1], block):
        _decode_part_(_cut(x[place], cut), _cut(code[place], cut), scale[scale_place])


def _encode_part_(code_ARBC: Tensor, scale_AB: Tensor, x_ARBC: Tensor, fp32_scales: bool) -> None:
    is_int8 = code_ARBC.dtype == torch.int8
    scale_AB.copy_(_scale_of(_absmax(x_ARBC), is_int8, fp32_scales))
    if x_ARBC.dtype == torch.bfloat16 and not is_int8 and not fp32_scales:
        # Powers of two divide exactly in bf16 too, whose exponents are fp32's.
        scaled_ARBC = x_ARBC / scale_AB.to(torch.bfloat16)[:, None, :, None]
    elif is_int8:
        # One division a scale and a product a number: at most 127 · (1 + 2⁻²²), which rounds to 127.
        scaled_ARBC = x_ARBC.float() * scale_AB.reciprocal()[:, None, :, None]
    else:
        scaled_ARBC = x_ARBC.float() / scale_AB[:, None, :, None]
    if is_int8:
        code_ARBC.copy_(scaled_ARBC.round_())
    elif card_of(x_ARBC.device).platform != "mps":
        # Nothing here rounds to more than 448, so torch's cast never has to saturate.
        code_ARBC.view(torch.float8_e4m3fn).copy_(scaled_ARBC)
    else:
        code_ARBC.copy_(e4m3.encode(scaled_ARBC))


def _decode_part_(x_ARBC: Tensor, code_ARBC: Tensor, scale_AB: Tensor) -> None:
    is_int8 = code_ARBC.dtype == torch.int8
    value_ARBC = code_ARBC.float() if is_int8 else e4m3.decode(code_ARBC, torch.float32)
    x_ARBC.copy_(value_ARBC.mul_(scale_AB[:, None, :, None]))


def _absmax(x_ARBC: Tensor) -> Tensor:
    """Return the largest magnitude of each block, NaN if it holds one: fp32 [A, B].  As integers, the fastest way."""
    dtype, mask = _BITS[x_ARBC.dtype]
    bits_ARBC = x_ARBC.view(dtype) & mask
    bits_ABC = bits_ARBC[:, 0] if bits_ARBC.shape[1] == 1 else bits_ARBC.amax(1)
    return bits_ABC.amax(-1).view(x_ARBC.dtype).float()


def _scale_of(absmax_AB: Tensor, is_int8: bool, fp32_scales: bool) -> Tensor:
    bits_AB = absmax_AB.view(torch.int32)
    if is_int8:
        # Not a division, which CUDA makes a product with the reciprocal.  Never zero: rows of zeros divide by it.
        scale_AB = (absmax_AB * (1.0 / INT8_MAX)).clamp_min_(_TINY)
    elif fp32_scales:
        scale_AB = (absmax_AB / torch.full_like(absmax_AB, e4m3.MAX)).clamp_min_(_TINY)
    else:
        scale_AB = power_of_two_scale(absmax_AB)
    return torch.where(bits_AB < _INFINITY_BITS, scale_AB, torch.nan)


def power_of_two_scale(absmax: Tensor) -> Tensor:
    """Return the least normal powers of two with absmax ≤ 448 · scale.  absmax: fp32, any shape.

    Integer arithmetic, because log2 and exp2 may be off by one rounding.  absmax is 2ᵉ·1.f, 448 is 2⁸·1.75: the
    exponent is e − 8, or one more where 1.f is above 1.75, and there the addition carries.
    """
    exponent = ((absmax.view(torch.int32) + 0x1FFFFF) >> 23) - 8
    return (exponent.clamp_(1, 254) << 23).view(torch.float32)


def _parts(rows: int, width: int, block: tuple[int, int]) -> Iterator[tuple[_Slices, _Slices, tuple[int, int]]]:
    """Cut a matrix into parts of some `CHUNK` numbers whose blocks are whole, or are all cut off by an edge.

    Yields where a part lies, where its scales do, and the rows and columns of its blocks.
    """
    # A compiler fuses all passes by itself.
    chunk = rows * width if torch.compiler.is_compiling() else CHUNK
    most_rows = min(max(chunk // width, block[0]), rows)
    for start, end in _cuts(rows, block[0], most_rows):
        for left, right in _cuts(width, block[1], max(chunk // most_rows, 64)):
            place = slice(start, end), slice(left, right)
            scales = slice(start // block[0], -(-end // block[0])), slice(left // block[1], -(-right // block[1]))
            yield place, scales, (min(block[0], end - start), min(block[1], right - left))


def _cuts(size: int, block: int, most: int) -> Iterator[tuple[int, int]]:
    """Cut an axis into whole blocks, so many numbers of them at a time, and the block that the edge cuts off."""
    step, whole = max(most // block, 1) * block, size // block * block
    for index in representative(whole // step):
        yield index * step, (index + 1) * step
    if whole % step:
        yield whole // step * step, whole
    if whole < size:
        yield whole, size


def _cut(x_NK: Tensor, cut: tuple[int, int]) -> Tensor:
    """Return a view [A, R, B, C]."""
    (rows, width), (block_rows, columns) = x_NK.shape, cut
    return x_NK.view(rows // block_rows, block_rows, width // columns, columns)
