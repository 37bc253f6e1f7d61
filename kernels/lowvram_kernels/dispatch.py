"""Which card an op works for, and which backend it takes there; knows no values of tensors and no training run.

Inside `simulate_card(card)` tensors are meta tensors: every op takes the path that it takes on that card and makes the
same allocations, so what is counted there is what the card will hold.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lowvram_kernels.capabilities import (
    FIRST_WITH_TRITON,
    FIRST_WITH_TRITON_DOT,
    ComputeCapability,
    Features,
    features_of,
)
from lowvram_kernels.compiled_launch import start
from lowvram_kernels.remembered import remembered


class Card(NamedTuple):
    """What ops ask of a device and its torch.

    platform: "cuda", "mps" or "cpu".  capability: CUDA's, (major, minor).  has_flash: torch has FlashAttention, which
    its wheels for Windows have not.  multiprocessors: how many blocks of a launch run side by side, at least.
    """

    platform: str
    capability: ComputeCapability | None = None
    has_flash: bool = True
    has_triton: bool = True
    multiprocessors: int = 48

    @property
    def features(self) -> Features:
        """What its compute capability can do; without one, the least."""
        return features_of(self.capability or (0, 0))

    @property
    def shared_bytes(self) -> int:
        """The most shared memory that one block of a launch may use."""
        return self.features.shared_bytes


class Choice(NamedTuple):
    """A backend, a sentence with the reason, and one that says what would change it ("" where nothing would)."""

    backend: str
    reason: str
    remedy: str = ""


class Tile(NamedTuple):
    """The part of a result that one program of a launch computes: rows × columns.

    depth: numbers that it reads at a time, along what a product sums; where nothing is summed, along the columns.
    warps, stages: of the program, and of its software pipeline.
    """

    rows: int
    columns: int
    depth: int
    warps: int = 4
    stages: int = 3


class Launch(NamedTuple):
    """One launch of a Triton kernel, as values: run on a card, recorded in meta mode, compiled by the gate.

    module: of this package, holds the kernel.  arguments: tensors and numbers in the kernel's order, before its
    constants.  expected_mma: operands of the tensor-core instruction that the kernel must compile to ("f16", "bf16",
    "e4m3", "mxf8", "s8"; "" for none).
    """

    module: str
    kernel: str
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    constants: Mapping[str, Any]
    warps: int = 4
    stages: int = 3
    expected_mma: str = ""


class HiddenWork(NamedTuple):
    """The cost of work that meta mode skips, so that no dispatch mode can count it.

    flops: of attention.  product_flops: of matrix products in 16 bits or more.  low_flops: of those in 8 bits.
    grouped_flops: of experts' products in 16 bits or more, one launch for all.  operand_bytes: of moved_bytes, those
    that matrix products read of their operands.
    """

    flops: float = 0.0
    moved_bytes: float = 0.0
    ops: float = 0.0
    product_flops: float = 0.0
    low_flops: float = 0.0
    operand_bytes: float = 0.0
    grouped_flops: float = 0.0


_ON_MPS = "Triton does not compile for Apple's GPUs"
_FLOPS_OF = {"moe.grouped_matmul_triton": "grouped_flops", "moe.grouped_wgrad_triton": "grouped_flops"}
# Operands of 8 bits.
_LOW = ("e4m3", "mxf8", "s8")


def _forget(work: HiddenWork | Tensor | Launch) -> None:
    """Do nothing: outside meta mode nobody counts."""


# Facts of the installation, asked once: Dynamo cannot trace the question.
_HAS_FLASH: bool = torch.backends.cuda.is_flash_attention_available()
_HAS_TRITON: bool = importlib.util.find_spec("triton") is not None
# Triton reads it when a kernel's module is imported.
_IS_INTERPRETED: bool = os.environ.get("TRITON_INTERPRET") == "1"
_FAKE = torch._C._TorchDispatchModeKey.FAKE
# Module globals, since Dynamo cannot trace a ContextVar; a rehearsal has one thread.
_overriding_card: Card | None = None
_is_simulated = False
_note_launch: Callable[[Launch], None] = _forget
_note: Callable[[HiddenWork], None] = _forget
_note_host: Callable[[Tensor], None] = _forget
_Tensors = Sequence[Tensor | None]
# What was asked before, since an op asks at every launch.
_cards: dict[torch.device, Card] = {}
_multiplier = 1  # how many repetitions the work that is simulated now stands for


@contextmanager
def simulate_card(
    card: Card,
    note: Callable[[HiddenWork], None] = _forget,
    note_host: Callable[[Tensor], None] = _forget,
    note_launch: Callable[[Launch], None] | None = None,
) -> Iterator[None]:
    """Meta mode: ops take `card`'s path with meta tensors, make its allocations and launch nothing.

    note: called with the cost of work that is skipped.  note_host: called with each tensor that lies in host memory.
    note_launch: called with each kernel that would be launched; without it the enclosing `simulate_card`'s is kept.
    """
    global _overriding_card, _is_simulated, _note, _note_host, _note_launch
    before = _overriding_card, _is_simulated, _note, _note_host, _note_launch
    _overriding_card, _is_simulated, _note, _note_host = card, True, note, note_host
    _note_launch = note_launch or _note_launch
    try:
        yield
    finally:
        _overriding_card, _is_simulated, _note, _note_host, _note_launch = before


@contextmanager
def override_card(card: Card) -> Iterator[None]:
    """Let ops take `card`'s path and really launch: Triton's interpreter then runs kernels on CPU tensors."""
    global _overriding_card
    before, _overriding_card = _overriding_card, card
    try:
        yield
    finally:
        _overriding_card = before


def empty_on_host(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return a tensor in host memory for data of a card ("cpu" where there is none); with `to_host` the only way there.

    Not page-locked: torch rounds each such block up to a power of two, and Windows lends little of it.
    """
    if is_simulated():
        tensor = torch.empty(shape, dtype=dtype, device=device)
        _note_host(tensor)
        return tensor
    return torch.empty(shape, dtype=dtype, device="cpu")


def to_host(tensor: Tensor) -> Tensor:
    """Return a copy in host memory, of the same shape and dtype."""
    return empty_on_host(tensor.shape, tensor.dtype, tensor.device).copy_(tensor)


def note_work(flops: float = 0.0, moved_bytes: float = 0.0, ops: float = 1.0) -> None:
    """Report the cost of work that meta mode skips."""
    _note(HiddenWork(flops, moved_bytes, ops))


def note_product(flops: float, moved_bytes: float, operand_bytes: float) -> None:
    """Report the cost of a matrix product of the library that meta mode skips."""
    _note(HiddenWork(moved_bytes=moved_bytes, ops=1.0, product_flops=flops, operand_bytes=operand_bytes))


def representative(count: int) -> Iterator[int]:
    """Yield 0 … count − 1; in meta mode 0 alone, whose work counts for all: for iterations that allocate the same.

    The caller must use each number before it asks for the next, and the last one too.
    """
    if not is_simulated():
        yield from range(count)
        return
    with _counting(count):
        if count:
            yield 0


def uncounted() -> AbstractContextManager[None]:
    """In meta mode, count the memory of what is done inside and none of its work, reported separately."""
    return _counting(0)


@contextmanager
def _counting(times: int) -> Iterator[None]:
    """Count simulated work so many times."""
    global _multiplier
    before, _multiplier = _multiplier, _multiplier * times
    try:
        yield
    finally:
        _multiplier = before


def work_multiplier() -> int:
    """Return how many repetitions the work that is simulated now stands for."""
    return _multiplier


def is_simulated() -> bool:
    """Say whether this runs in meta mode, inside `simulate_card`."""
    return _is_simulated


def card_of(device: torch.device) -> Card:
    """Return the card that computes tensors on `device`; inside `simulate_card` and `override_card` theirs."""
    if _overriding_card is not None:
        return _overriding_card
    if torch.compiler.is_compiling():
        return _ask_card(device)
    card = _cards.get(device)
    if card is None:
        card = _ask_card(device)
        if device.type != "cuda" or device.index is not None:  # "cuda" without a number is whichever is current
            _cards[device] = card
    return card


def _ask_card(device: torch.device) -> Card:
    if device.type != "cuda":
        return Card(device.type)
    facts = torch.cuda.get_device_properties(device)
    return Card("cuda", (facts.major, facts.minor), _HAS_FLASH, _HAS_TRITON, facts.multi_processor_count)


def is_interpreted() -> bool:
    """Say whether Triton's kernels run in its interpreter, whose casts to bf16 and to 8-bit floats are wrong."""
    return _IS_INTERPRETED


def converts_e4m3(device: torch.device) -> bool:
    """Say whether kernels there convert to E4M3 and back by the card's own instructions."""
    return card_of(device).features.has_e4m3 and not is_interpreted()


def runs_kernels(op: str, device: torch.device) -> bool:
    """Say whether an op launches its Triton kernels there and now: not in compiled blocks, which fuse the plain form.

    op: one of `OPS` whose kernel torch.compile does not go through.
    """
    if torch.compiler.is_compiling():
        return False
    return choose(op, card_of(device)).backend == "triton"


def as_read(x: Tensor) -> Tensor:
    """Return a view as such kernels read and write it: in Triton's interpreter bf16 as int16, others as they are."""
    return x.view(torch.int16) if is_interpreted() and x.dtype == torch.bfloat16 else x


def bytes_of(*tensors: Tensor | None) -> int:
    """Return the bytes of the elements of all tensors that are not None, gaps between strided rows not counted."""
    return sum([tensor.nbytes for tensor in tensors if tensor is not None])


def launch(
    what: Launch, flops: float = 0.0, moved_bytes: float = 0.0, operand_bytes: float = 0.0, moved: _Tensors = ()
) -> None:
    """Launch a kernel; in meta mode only report it.

    flops, moved_bytes: its operations and the bytes that it reads and writes, from which its roofline follows.
    operand_bytes: of a product, those that it reads of its operands.  moved: more tensors, each read or written once.
    """
    if _is_simulated:
        _note_launch(what)
        kind = "low_flops" if what.expected_mma in _LOW else _FLOPS_OF.get(what.module, "product_flops")
        moved_bytes += bytes_of(*moved)
        _note(HiddenWork(moved_bytes=moved_bytes, ops=1.0, operand_bytes=operand_bytes, **{kind: flops}))
        return
    if torch._C._get_dispatch_mode(_FAKE) is not None:
        return  # fake tensors have no values that a kernel could read or write
    start(*what[:7])


# FlashAttention's limits on a head's width: on every card, and in training on the consumer cards whose blocks have
# 99 KiB of shared memory, where the backward pass has no kernel for the widths between (torch, sdp_utils.cpp).
_WIDEST_FLASH = 256
_GAP_OF_FLASH = range(193, 225)


def _has_gap(capability: tuple[int, int]) -> bool:
    return (8, 6) <= capability <= (8, 9) or (12, 0) <= capability <= (12, 1)


def choose_attention(card: Card, dtype: torch.dtype, is_masked: bool, width: int = 128, learns: bool = True) -> Choice:
    """Choose the attention kernel: "flash", "efficient" or "math", which stores every score.

    width: of a head's queries and keys, extra columns included.  learns: a backward pass may follow.
    Source: torch, aten/native/transformers/cuda/sdp_utils.cpp and aten/native/mps.
    """
    if card.platform == "cpu":
        return Choice("flash", "torch's CPU kernel is fused")
    if card.platform != "cuda":
        return Choice("math", "torch's attention on MPS writes out every score while it learns")
    if card.capability is None or not card.features.has_flash:
        return Choice("efficient", "FlashAttention 2 needs compute capability 8.0")
    if not card.has_flash:
        reason = "this torch was built without FlashAttention, as those for Windows are"
        return Choice("efficient", reason, "Linux, or WSL under Windows")
    if dtype == torch.float32:
        return Choice("efficient", "FlashAttention 2 takes 16-bit numbers only")
    if is_masked:
        return Choice("efficient", "FlashAttention 2 takes no mask")
    if width > _WIDEST_FLASH:
        return Choice("efficient", f"FlashAttention 2 takes heads of {_WIDEST_FLASH} numbers at most, not {width}")
    if learns and width in _GAP_OF_FLASH and _has_gap(card.capability):
        reason = f"FlashAttention 2 does not learn with heads of {width} numbers on {_name(card)}"
        return Choice("efficient", reason)
    return Choice("flash", "16-bit numbers, no mask, compute capability 8.0 or more")


# Ops that have a Triton form, and the least capability that it needs.
_TRITON_FROM = {
    "quantise": FIRST_WITH_TRITON,
    "adamw8": FIRST_WITH_TRITON,
    "rms_norm": FIRST_WITH_TRITON,
    "swiglu": FIRST_WITH_TRITON,
    "linear_cross_entropy": FIRST_WITH_TRITON,
    "grouped_matmul": FIRST_WITH_TRITON_DOT,
    "small_matmul": FIRST_WITH_TRITON,
    "latent_attention": FIRST_WITH_TRITON_DOT,
    "fp8_matmul": FIRST_WITH_TRITON_DOT,
    "int8_matmul": FIRST_WITH_TRITON_DOT,
}
OPS = tuple(_TRITON_FROM)


@remembered
def choose(op: str, card: Card) -> Choice:
    """Choose the backend of an op on a card; the same in meta mode as on the card.

    op: one of `OPS`.  Returns "reference" (plain PyTorch), "triton", and for fp8_matmul "mxfp8" (block-scaled tensor
    cores), "tensor" (FP8 tensor cores), "storage" (bytes decoded in registers) or "decode" (bytes decoded, then
    cuBLAS), of which int8_matmul has "tensor" and "decode".
    """
    if card.platform != "cuda" or card.capability is None:
        return Choice("reference", "Triton compiles for NVIDIA cards only" if card.platform == "cpu" else _ON_MPS)
    if not card.has_triton:
        package = "triton-windows" if os.name == "nt" else "triton"
        command = f'pip install "{package}>=3.5,<3.8"'
        return Choice("reference", "Triton is not installed, so plain PyTorch computes, slower", command)
    least = _TRITON_FROM[op]
    if card.capability < least:
        reason = f"{_name(card)}: Triton's products reach tensor cores from capability {least[0]}.{least[1]} on"
        return Choice("decode" if op.endswith("8_matmul") else "reference", f"{reason}; cuBLAS computes in fp16")
    if op == "fp8_matmul":
        return _choose_fp8(card)
    if op == "int8_matmul":
        return Choice("tensor", f"{_name(card)} has INT8 tensor cores")
    return Choice("triton", f"{_name(card)} runs our kernel")


def _name(card: Card) -> str:
    major, minor = card.capability or (0, 0)
    return f"capability {major}.{minor}"


def _choose_fp8(card: Card) -> Choice:
    reasons = {
        "storage": "has no FP8 tensor cores: bytes are decoded in registers to fp16",
        "mxfp8": "multiplies FP8 with its block scales in one instruction",
        "tensor": "has FP8 tensor cores",
    }
    backend = card.features.fp8
    return Choice(backend, f"{_name(card)} {reasons[backend]}")
