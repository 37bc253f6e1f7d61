"""Launches both kernels around Muon's products, for one weight or for several of one shape; knows no products.

Several weights are one launch: the kernels find each weight's tensors by how many elements they lie behind those of the
first weight (`offsets`, int64 [6, P]: gradient, code, absmax, weight, step, and the hash of seed and purpose).

Shapes: P weights of N elements each.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lowvram_kernels.dispatch import Launch, is_interpreted, launch
from lowvram_kernels.opaque import opaque
from lowvram_kernels.random.stochastic_rounding import ROWS, bits_of, programs, split


def lead(
    gradient_N: Tensor,
    code_N: Tensor,
    absmax_B: Tensor,
    u_N: Tensor,
    value: Tensor,
    midpoint: Tensor,
    gradient_scale: Tensor | float,
    skip: Tensor | None,
    beta: float,
) -> None:
    """Update the momentum of one weight and write u, bf16: see `muon._lead`."""
    scale_at, scale = split(gradient_scale)
    _lead_kernel(gradient_N, code_N, absmax_B, u_N, value, midpoint, scale_at, skip, [scale, beta, 1.0 - beta])


def lead_many(
    firsts: tuple[Tensor, Tensor, Tensor],
    u_PN: Tensor,
    value: Tensor,
    midpoint: Tensor,
    offsets: Tensor,
    gradient_scale: Tensor | float,
    skip: Tensor | None,
    beta: float,
) -> None:
    """Update the momenta of several weights and write u, bf16.  firsts: gradient, code and absmax of the first one."""
    scale_at, scale = split(gradient_scale)
    numbers = [scale, beta, 1.0 - beta]
    _launch_lead(firsts, u_PN, value, midpoint, scale_at, skip, offsets, numbers)


def move(
    weight_N: Tensor,
    o_N: Tensor,
    step: Tensor,
    learning_rate: Tensor | float,
    size: float,
    decay: float,
    skip: Tensor | None,
    first: int,
    named: int,
) -> None:
    """Update one weight along o.  size: the factor beside the rate.  named: the hash of seed and purpose."""
    rate = split(learning_rate)[0]
    _move_kernel(weight_N, o_N, step.reshape(()), rate, skip, first, named, _numbers(learning_rate, size, decay))


def move_many(
    first: tuple[Tensor, Tensor],
    o_PN: Tensor,
    offsets: Tensor,
    learning_rate: Tensor | float,
    size: float,
    decay: float,
    skip: Tensor | None,
) -> None:
    """Update several weights along o.  first: the first weight and its step."""
    rate = split(learning_rate)[0]
    _launch_move(*first, o_PN, rate, skip, offsets, 0, 0, _numbers(learning_rate, size, decay))


def _numbers(learning_rate: Tensor | float, size: float, decay: float) -> list[float]:
    """Return the factor on o, that on the weight, and the decay; the kernel computes the first two from a scalar."""
    if isinstance(learning_rate, Tensor):
        return [size, 0.0, decay]
    return [learning_rate * size, 1.0 - learning_rate * decay, decay]


def _lead_one(
    gradient_N: Tensor,
    code_N: Tensor,
    absmax_B: Tensor,
    u_N: Tensor,
    value: Tensor,
    midpoint: Tensor,
    scale: Tensor | None,
    skip: Tensor | None,
    numbers: Sequence[float],
) -> None:
    _launch_lead((gradient_N, code_N, absmax_B), u_N, value, midpoint, scale, skip, None, numbers)


def _launch_lead(
    firsts: tuple[Tensor, Tensor, Tensor],
    u_PN: Tensor,
    value: Tensor,
    midpoint: Tensor,
    scale: Tensor | None,
    skip: Tensor | None,
    offsets: Tensor | None,
    numbers: Sequence[float],
) -> None:
    """Read gradients and momenta, write momenta and u."""
    gradient, code, absmax = firsts
    many = 1 if offsets is None else offsets.shape[1]
    tensors = (gradient, bits_of(code), absmax, bits_of(u_PN), value, midpoint)
    scalars = (scale, None if skip is None else bits_of(skip), offsets)
    constants = {"ROWS": ROWS, "CODED": code.dtype == torch.uint8, "FUSED": not is_interpreted()}
    constants["enable_fp_fusion"] = False
    count = u_PN.numel() // many
    arguments = (*tensors, *scalars, count, many, *numbers)
    what = Launch("optim.muon_triton", "lead_kernel", (*programs(count), many), arguments, constants)
    moved = gradient.element_size() + 2 * code.element_size()
    launch(what, moved_bytes=many * (count * moved + 2 * absmax.nbytes) + u_PN.nbytes)


def _move_one(
    weight_N: Tensor,
    o_N: Tensor,
    step: Tensor,
    rate: Tensor | None,
    skip: Tensor | None,
    first: int,
    named: int,
    numbers: Sequence[float],
) -> None:
    _launch_move(weight_N, step, o_N, rate, skip, None, first, named, numbers)


def _launch_move(
    weight: Tensor,
    step: Tensor,
    o_PN: Tensor,
    rate: Tensor | None,
    skip: Tensor | None,
    offsets: Tensor | None,
    first: int,
    named: int,
    numbers: Sequence[float],
) -> None:
    """Read o and the weights, write the weights."""
    many = 1 if offsets is None else offsets.shape[1]
    count = o_PN.numel() // many
    scalars = (step, rate, None if skip is None else bits_of(skip), offsets)
    arguments = (bits_of(weight), o_PN, *scalars, count, many, first, named, *numbers)
    constants = {"ROWS": ROWS, "ROUNDED": weight.dtype == torch.bfloat16, "enable_fp_fusion": False}
    what = Launch("optim.muon_triton", "move_kernel", (*programs(count), many), arguments, constants)
    launch(what, moved_bytes=2 * many * count * weight.element_size() + o_PN.nbytes)


_move_kernel = opaque("muon_move", _move_one, ("weight_N",))
_lead_kernel = opaque("muon_lead", _lead_one, ("code_N", "absmax_B", "u_N"))
