"""Stochastic rounding of fp32 to bf16.

    bf16(x) = x truncated, or the next number away from zero with probability (truncated part) / (last bit)

The 16 bits that decide are a function of a key and of the element's index: there is no generator state.  Rounding to
nearest has the smaller error, by a factor of √2 in a sum of varying terms, but loses every step and term that is
smaller than half of the last bit.
Source: Gupta et al. 2015, "Deep Learning with Limited Numerical Precision", section 3.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from lowvram_kernels.dispatch import Launch, card_of, choose, is_simulated, launch, note_work
from lowvram_kernels.errors import ShapeError
from lowvram_kernels.opaque import opaque
from lowvram_kernels.random.counter_rng import chain, chain_numbers, draw_bits, name_noise

# Elements that a chunked op has at work at once, a multiple of 256.  On CPU fewer cost calls (2¹⁴ take twice as long),
# more gain nothing from 2¹⁷ on and leave the cache.  A card is launched some 50 times for each chunk, so there it is
# longer.
CHUNK, CARD_CHUNK = 2**17, 2**21
BLOCK = 256
_MOVED_BYTES, _LAUNCHES = 190, 22
# Blocks that one program of a kernel takes: one for each of its four warps, eight elements for each thread.
ROWS = 4


def has_kernels(device: torch.device) -> bool:
    """Say whether the Triton kernels of AdamW, Muon and the stochastically rounded sum run on a device."""
    return choose("adamw8", card_of(device)).backend == "triton"


def programs(count: int) -> tuple[int]:
    """Return the grid of a kernel over so many elements."""
    return (-(-count // (ROWS * BLOCK)),)


def bits_of(tensor: Tensor) -> Tensor:
    """Return a view as kernels read and write it: bf16 as int16, bool as uint8, others as they are."""
    dtype = tensor.dtype
    if dtype == torch.bfloat16:
        return tensor.view(torch.int16)
    return tensor.view(torch.uint8) if dtype == torch.bool else tensor


def split(value: Tensor | float) -> tuple[Tensor | None, float]:
    """Return a scalar on the device and 0, or None and the number: a kernel takes the scalar where there is one."""
    if not isinstance(value, Tensor):
        return None, float(value)
    return value if value.dim() == 0 else value.reshape(()), 0.0


def ranges(
    weight: Tensor, moved_bytes: float, launches: float, block: int = BLOCK, masked: tuple[float, float] = (0.0, 0.0)
) -> Iterator[tuple[int, int]]:
    """Cut a weight's elements into chunks of whole blocks, and what is left over as one shorter block.

    In meta mode the first chunk stands for all: every other one allocates the same, moves moved_bytes for each of its
    elements and is so many launches.  block: 1 where elements are independent, so that nothing is left over.  masked:
    the bytes and launches of stores under a skip that a processor has in addition.
    """
    count, on_processor = weight.numel(), card_of(weight.device).platform == "cpu"
    chunk = CHUNK if on_processor else CARD_CHUNK
    if on_processor:
        moved_bytes, launches = moved_bytes + masked[0], launches + masked[1]
    whole = count // block * block
    shown = min(whole, chunk) if is_simulated() else whole
    yield from ((start, min(start + chunk, whole)) for start in range(0, shown, chunk))
    if shown < whole:
        left = whole - shown
        note_work(moved_bytes=left * moved_bytes, ops=-(-left // chunk) * launches)
    if whole < count:
        yield whole, count


def reference(x: Tensor, uniform: Tensor) -> Tensor:
    """Round by the formula, in fp64; uniform: random numbers in [0, 1) of x's shape."""
    low = (x.float().view(torch.int32) & -0x10000).view(torch.float32)
    high = ((x.float().view(torch.int32) & -0x10000) + 0x10000).view(torch.float32)
    share = (x.double() - low.double()) / (high.double() - low.double())
    return torch.where(uniform < share, high, low).to(torch.bfloat16)


def round_to_bf16(x: Tensor, noise: Tensor) -> Tensor:
    """Round fp32 to bf16, up in magnitude with the probability of the part cut off; noise: 16 bits are used."""
    return round_drawn(x * 1.0, (noise & 0xFFFF).int())  # a product is no signalling NaN


def round_drawn(x: Tensor, bits: Tensor) -> Tensor:
    """Round as `round_to_bf16` does what arithmetic has made.

    bits: int32 in [0, 2¹⁶), of x's shape.  Both are overwritten.
    """
    rounded = bits.add_(x.view(torch.int32)).bitwise_and_(-0x10000).view(torch.float32)
    # A NaN of CUDA has all bits set but the sign's: noise would carry it over into -0, and hide it.
    if card_of(x.device).platform != "cpu":
        return rounded.to(torch.bfloat16).masked_fill_(x.isnan(), torch.nan)
    # Numbers are divided by 1, and that zero by 0.  On CPU a mask of bool takes four times as long.
    return rounded.div_(x.eq_(x)).to(torch.bfloat16)


@torch.no_grad()
def add_rounded_(total: Tensor, term: Tensor, seed: int, purpose: int, sample: Tensor) -> None:
    """Add term to total in fp32 and round the sum stochastically, in place.

    total: bf16, contiguous.  term: as many elements, floating.  seed, purpose (which weight), sample (int64 scalar on
    the device: which micro-batch): the key of the rounding.
    Raises ShapeError if the two do not fit together.
    """
    if total.dtype != torch.bfloat16 or not total.is_contiguous() or term.numel() != total.numel():
        raise ShapeError(f"add_rounded_: total {list(total.shape)} {total.dtype}; needs bf16, contiguous, as term.")
    if not term.dtype.is_floating_point:
        raise ShapeError(f"add_rounded_: term is {term.dtype}; needs a floating one.")
    if has_kernels(total.device):
        _add_kernel(total.view(-1), term.reshape(-1), sample, chain_numbers(seed, purpose))
        return
    named = name_noise(chain(torch.zeros_like(sample.reshape(())), seed, purpose, sample.reshape(())), total.numel())
    flat, new = total.view(-1), term.reshape(-1)
    for start, end in ranges(total, _MOVED_BYTES, _LAUNCHES, block=1):
        noise = draw_bits(named, start, end - start)
        flat[start:end] = round_drawn(flat[start:end].float().add_(new[start:end]), noise)
        del noise


def _launch_add(total_N: Tensor, term_N: Tensor, sample: Tensor, named: int) -> None:
    """Launch the kernel, which reads both and writes the sum once.  named: see `chain_numbers`."""
    count = total_N.numel()
    arguments = (bits_of(total_N), term_N, sample.reshape(()), count, named)
    what = Launch("random.stochastic_rounding_triton", "add_rounded_kernel", programs(count), arguments, {"ROWS": ROWS})
    launch(what, moved_bytes=2 * total_N.nbytes + term_N.nbytes)


_add_kernel = opaque("add_rounded", _launch_add, ("total_N",))
