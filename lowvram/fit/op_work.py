"""What one op of PyTorch costs on a device: FLOPs, launches, and the bytes that its kernels read and write.

Counted from the op's arguments alone.  Each number is read once and written once; caches are not modelled.  A gather
reads the rows that it picks, a scatter writes those that it sets, and a result that is only written is not read.
"""

from __future__ import annotations

from collections.abc import Iterator, ValuesView
from typing import Any, NamedTuple

from torch import Tensor

# Keys that torch's CPU attention takes at a time; it skips blocks of keys that the causal mask excludes completely
# (aten/native/cpu/FlashAttentionKernel.cpp).
_CPU_KEY_BLOCK = 512
# What a launch of an op over a list of tensors takes at most: tensors, and blocks of so many elements of one tensor.
_MOST_TENSORS, _MOST_BLOCKS, _ELEMENTS_OF_A_BLOCK = 110, 320, 65_536
# Ops that overwrite their first argument without reading it.
_OVERWRITES = frozenset(("copy_", "fill_", "zero_", "normal_", "uniform_", "resize_"))
# Ops whose tensor arguments give a shape or a dtype only.
_SHAPE_ONLY = ("new_", "zeros_like", "ones_like", "full_like", "rand_like", "randn_like")
# Ops that read of their first tensor as many numbers as they return: those that the indices pick.
_GATHERS = frozenset(("index", "gather", "index_select", "embedding", "take", "take_along_dim"))
# Ops that write into their first tensor as many numbers as their last tensor has.  Those that add read them first.
_SCATTERS = frozenset(("index_put", "index_put_", "_index_put_impl_", "scatter", "scatter_", "index_copy_"))
_ADDS_BY_INDEX = frozenset(("scatter_add", "scatter_add_", "index_add", "index_add_"))


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in an op's arguments or results, which nest in tuples and lists at most."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list | ValuesView):
        for part in value:
            yield from tensors_in(part)


def is_free(func: Any, inputs: list[Tensor], outputs: list[Tensor]) -> bool:
    """Say whether an op launches nothing: it makes a view, or memory that nobody has written."""
    own = {tensor.untyped_storage()._cdata for tensor in inputs}
    is_view = not func._schema.is_mutable and all(t.untyped_storage()._cdata in own for t in outputs)
    return is_view or "empty" in func._schema.name


def bytes_moved(func: Any, args: Any, kwargs: Any, outputs: list[Tensor]) -> int:
    """Return the bytes that an op reads and writes.  outputs: the tensors of its result."""
    schema, name = func._schema, func._schema.name.partition("::")[2]
    given = dict(zip((argument.name for argument in schema.arguments), args, strict=False)) | (kwargs or {})
    changed = {argument.name for argument in schema.arguments if argument.alias_info and argument.alias_info.is_write}
    overwritten = {argument.name for argument in schema.arguments if argument.is_out}
    inputs = [tensor for key, value in given.items() if key not in overwritten for tensor in tensors_in(value)]
    if not schema.returns:  # as foreach ops, whose results are their arguments
        outputs = [tensor for key in changed for tensor in tensors_in(given.get(key))]
    if name in _SCATTERS or name in _ADDS_BY_INDEX:
        target, *indices, values = inputs
        adds = name in _ADDS_BY_INDEX or given.get("accumulate", False)
        copied = 0 if schema.is_mutable else 2 * _size(target)
        return copied + sum(map(_size, indices)) + (3 if adds else 2) * _size(values)
    if name in _GATHERS:
        return sum(map(_size, inputs[1:])) + 2 * sum(map(_size, outputs))
    if name.startswith(_SHAPE_ONLY):
        inputs = []
    elif name in _OVERWRITES:
        inputs = inputs[1:]
    return sum(map(_size, (*inputs, *outputs)))


def _size(tensor: Tensor) -> int:
    """Return the bytes of a tensor's elements, those that an expanded one repeats counted once."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


class Products(NamedTuple):
    """An op's matrix products: their FLOPs, its launches, and the bytes that they read of their operands."""

    flops: float
    launches: int
    operand_bytes: int = 0


def products_of(name: str, inputs: list[Tensor], outputs: list[Tensor]) -> Products:
    """Return the matrix products of an op; without any, 0 FLOPs and its launches.

    Meta tensors do not say which experts are chosen: all are assumed to have the same number of rows.
    """
    if name in ("mm", "bmm"):
        return Products(2.0 * inputs[0].numel() * inputs[1].shape[-1], 1, sum(map(_size, inputs[:2])))
    if name in ("addmm", "addmm_", "baddbmm"):
        return Products(2.0 * inputs[1].numel() * inputs[2].shape[-1], 1, sum(map(_size, inputs[1:3])))
    if name == "multiply_slices":
        flops = 2.0 * inputs[0].numel() * inputs[1].shape[2]
        return Products(flops, inputs[2].shape[0], sum(map(_size, inputs[:2])))
    if name.startswith("_foreach_"):
        return Products(0.0, _launches_of_many(inputs))
    if name == "sum_outer_slices":
        learning, experts = outputs[0].shape[0], inputs[2].shape[0]
        flops = 2.0 * inputs[0].numel() * inputs[1].shape[1] * learning / experts
        return Products(flops, learning, sum(map(_size, inputs[:2])) * learning // experts)
    return Products(0.0, 1)


def _launches_of_many(tensors: list[Tensor]) -> int:
    """Return the launches of an op over a list of tensors on CUDA (aten/native/cuda/MultiTensorApply.cuh)."""
    blocks = sum(-(-tensor.numel() // _ELEMENTS_OF_A_BLOCK) for tensor in tensors)
    return max(-(-blocks // _MOST_BLOCKS), -(-len(tensors) // _MOST_TENSORS))


def attention_flops(name: str, inputs: list[Tensor]) -> float:
    """Return the FLOPs that torch's fused attention really does on a CPU, 0 for every other op."""
    forward = "_scaled_dot_product_flash_attention_for_cpu"
    if name not in (forward, f"{forward}_backward"):
        return 0.0
    # Backward has the result's gradient before q and k, and five products instead of two.  A mask is the last input.
    (q, k), products = (inputs[:2], 2.0) if name == forward else (inputs[1:3], 5.0)
    rows, keys = q.shape[2], k.shape[2]
    seen = rows * keys
    if len(inputs) == (3 if name == forward else 6):
        ends = range(_CPU_KEY_BLOCK, rows + _CPU_KEY_BLOCK, _CPU_KEY_BLOCK)
        seen = sum((min(end, rows) - (end - _CPU_KEY_BLOCK)) * min(end, keys) for end in ends)
    return products * 2.0 * q.shape[0] * q.shape[1] * q.shape[3] * seen
