"""The GPU report's passes over activations: norms, rotary positions, heads and SwiGLU, forward and backward.

Norms and SwiGLU also write codes of 8 bits in the place of numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from lowvram_kernels.attention.mla_heads import mla_heads_
from lowvram_kernels.attention.widened_heads import widened_heads
from lowvram_kernels.layers import codes, rms_norm, rotary, swiglu
from lowvram_kernels.quant.quantise import QuantTensor, dequantise, quantise_columns, quantise_rows
from torch import Tensor

from tools.gpu.kernel import Aim, Inputs, Kernel, Scene, plainly
from tools.gpu.timing import distance

# Results are rounded to 16 bits once by a kernel, several times by the plain form.
_ROUNDED = 1e-2


def layers(scene: Scene) -> Iterator[Kernel]:
    """Yield all cases; the shapes are those of tr-125m, 8 × 1024 tokens, and of the preset that has such heads."""
    rows, width, inner = (40, 40, 24) if scene.is_tiny else (8_192, 768, 2_048)
    heads = (2, 8, 3, 16) if scene.is_tiny else (8, 1_024, 12, 64)
    yield from _norms(scene, rows, width)
    yield from _rotations(scene, heads)
    yield from _mla_heads(scene, *((2, 8, 3, 16, 8, 24) if scene.is_tiny else (8, 1_024, 8, 64, 32, 96)))
    yield from _widened_heads(scene, *((2, 8, 3, 1, 16) if scene.is_tiny else (32, 512, 8, 2, 32)))
    yield from _gates(scene, rows, inner)
    yield from _codes(scene, rows, width, 128 if scene.is_tiny else inner)


def case(
    op: str,
    shape: str,
    inputs: Callable[[], Inputs],
    run: Callable[..., tuple[Tensor, ...]],
    numbers: float,
    aims: tuple[Aim, ...] = (Aim("copy", 0.8),),
) -> Kernel:
    """Return a case that is compared with its plain form and timed beside a copy.

    numbers: how many of 16 bits are read and written, each once; those that are few need not be told.
    """

    def error(*values: Any) -> float:
        return max(distance(own, plain) for own, plain in zip(run(*values), plainly(run)(*values), strict=True))

    return Kernel(
        op=op,
        shape=shape,
        inputs=inputs,
        run=run,
        error=error,
        tolerance=_ROUNDED,
        moved_bytes=2.0 * numbers,
        aims=aims,
        rank=0,
    )


def _norms(scene: Scene, rows: int, width: int) -> Iterator[Kernel]:
    def given() -> Inputs:
        return scene.randn(rows, width), scene.randn(rows, width), scene.randn(width, dtype=torch.float32)

    def forward(x: Tensor, added: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        return rms_norm.normalise(x, weight, 1e-6, added=added)

    def with_scales() -> Inputs:
        dy, x, weight = given()
        scale_N1 = torch.rsqrt(x.float().square().mean(-1, keepdim=True) + 1e-6)
        return dy, x, weight, scale_N1, scene.randn(rows, width)

    def backward(dy: Tensor, x: Tensor, weight: Tensor, scale_N1: Tensor, d_stream: Tensor) -> tuple[Tensor, ...]:
        dx, dweight = rms_norm.gradients(dy, x, weight, scale_N1, (True, True), d_stream)
        assert dx is not None, "it is asked for"
        assert dweight is not None, "it is asked for"
        return dx, dweight

    shape = f"{rows} × {width}"
    yield case("rms_norm", f"of a sum {shape}", given, forward, 4 * rows * width)
    yield case("rms_norm_backward", shape, with_scales, backward, 4 * rows * width)


def _rotations(scene: Scene, heads: tuple[int, int, int, int]) -> Iterator[Kernel]:
    tokens, width = heads[1], heads[3]
    angle_TR = torch.arange(tokens, device=scene.device)[:, None] * torch.logspace(0, -3, width // 2).to(scene.device)
    shape = " × ".join(map(str, heads))

    def given() -> Inputs:
        return scene.randn(*heads), scene.randn(width, dtype=torch.float32), angle_TR.cos(), angle_TR.sin()

    for interleaved in (False, True):

        def run(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, pairs: bool = interleaved) -> tuple[Tensor, ...]:
            return (rotary.rotate(x, (cos, sin), pairs, weight),)

        yield case("rotate", f"normed {shape}{', interleaved' * interleaved}", given, run, 2 * math.prod(heads))

    def with_gradient() -> Inputs:
        return scene.randn(*heads), *given()

    def backward(dy: Tensor, x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
        leaves = [x.detach().requires_grad_(), weight.detach().requires_grad_()]
        with torch.enable_grad():
            y = rotary.rotate(leaves[0], (cos, sin), False, leaves[1])
        return torch.autograd.grad(y, leaves, dy)

    yield case("rotate_and_back", f"normed {shape}", with_gradient, backward, 5 * math.prod(heads))


def _mla_heads(
    scene: Scene, batch: int, tokens: int, heads: int, unrotated: int, rotated: int, values: int
) -> Iterator[Kernel]:
    angle_TR = torch.arange(tokens, device=scene.device)[:, None] * torch.logspace(0, -3, rotated // 2).to(scene.device)
    width = unrotated + rotated
    rows = batch * tokens * heads

    def given() -> Inputs:
        shapes = ((heads, width), (heads, unrotated + values), (rotated,))
        return *(scene.randn(batch, tokens, *shape) for shape in shapes), angle_TR.cos(), angle_TR.sin()

    def forward(q: Tensor, kv: Tensor, k_rope: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
        return mla_heads_(q.clone(), kv, k_rope, (cos, sin))

    def with_gradients() -> Inputs:
        return *(scene.randn(batch, tokens, heads, width) for _ in range(3)), *given()

    def backward(dq: Tensor, dk: Tensor, dv: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        q, kv, k_rope = (tensor.detach().requires_grad_() for tensor in tensors[:3])
        with torch.enable_grad():
            made = mla_heads_(q, kv, k_rope, (tensors[3], tensors[4]))
        return torch.autograd.grad(made, (q, kv, k_rope), (dq, dk, dv))

    shape = f"{batch} × {tokens} × {heads} × ({unrotated} + {rotated}), values {values}"
    once = rows * (unrotated + values + 2 * width + 2 * rotated)
    back = rows * (3 * width + unrotated + 2 * values)
    yield case("mla_heads", shape, given, forward, once)
    yield case("mla_heads_and_back", shape, with_gradients, backward, once + back)


def _widened_heads(scene: Scene, batch: int, tokens: int, heads: int, groups: int, width: int) -> Iterator[Kernel]:
    columns, rows = 8, batch * tokens * (heads + 2 * groups)

    def given() -> Inputs:
        parts = (scene.randn(batch, tokens, count, width) for count in (heads, groups, groups))
        return *parts, scene.randn(heads, columns), scene.randn(tokens, columns)

    def with_gradients() -> Inputs:
        return *(scene.randn(batch, tokens, count, width + columns) for count in (heads, groups, groups)), *given()

    def backward(dq: Tensor, dk: Tensor, dv: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        q, k, v = (tensor.detach().requires_grad_() for tensor in tensors[:3])
        with torch.enable_grad():
            made = widened_heads(q, k, v, tensors[3], tensors[4])
        return torch.autograd.grad(made, (q, k, v), (dq, dk, dv))

    shape = f"{batch} × {tokens} × ({heads} + 2 · {groups}) × {width} + {columns}"
    yield case("widened_heads", shape, given, widened_heads, rows * (2 * width + columns))
    yield case("widened_heads_and_back", shape, with_gradients, backward, rows * (4 * width + columns))


def _gates(scene: Scene, rows: int, inner: int) -> Iterator[Kernel]:
    def given() -> Inputs:
        return (scene.randn(rows, 2 * inner),)

    def forward(gate_up: Tensor) -> tuple[Tensor, ...]:
        return (swiglu.gated_product(gate_up),)

    def with_gradient() -> Inputs:
        return scene.randn(rows, inner), *given()

    shape = f"{rows} × 2 · {inner}"
    yield case("swiglu", shape, given, forward, 3 * rows * inner)
    yield case("swiglu_backward", shape, with_gradient, swiglu.gated_product_backward, 6 * rows * inner)


def _codes(scene: Scene, rows: int, width: int, inner: int) -> Iterator[Kernel]:
    """Yield the passes of a layer in E4M3; expected are the codes of two launches, which tests hold to be the same."""

    def sum_given() -> Inputs:
        return scene.randn(rows, width), scene.randn(rows, width), scene.randn(width, dtype=torch.float32)

    def norm(x: Tensor, added: Tensor, weight: Tensor) -> tuple[QuantTensor, ...]:
        return (codes.normalise_to_codes(x, weight, 1e-6, "e4m3", added).operand,)

    def norm_apart(x: Tensor, added: Tensor, weight: Tensor) -> tuple[QuantTensor, ...]:
        return (codes.reference(x, weight, 1e-6, "e4m3", added).operand,)

    def scaled() -> Inputs:
        x, _, weight = sum_given()
        return x, weight, torch.rsqrt(x.float().square().mean(-1, keepdim=True) + 1e-6)

    def columns(x: Tensor, weight: Tensor, scale_N1: Tensor) -> tuple[QuantTensor, ...]:
        return (codes.normed_columns(x, weight, scale_N1),)

    def columns_apart(x: Tensor, weight: Tensor, scale_N1: Tensor) -> tuple[QuantTensor, ...]:
        return (quantise_columns(rms_norm.normalise(x, weight, 0.0, scale_N1).y, "e4m3"),)

    def gate_given() -> Inputs:
        return (scene.randn(rows, 2 * inner),)

    def gate(gate_up: Tensor) -> tuple[QuantTensor, ...]:
        return (codes.gate_to_codes(gate_up, "e4m3"),)

    def gate_apart(gate_up: Tensor) -> tuple[QuantTensor, ...]:
        return (quantise_rows(swiglu.gated_product(gate_up), "e4m3"),)

    def with_gradient() -> Inputs:
        return scene.randn(rows, 2 * inner), scene.randn(rows, inner)

    of_width, of_inner = f"e4m3 {rows} × {width}", f"e4m3 {rows} × 2 · {inner}"
    size, wide = rows * width, rows * inner
    yield _code_case("rms_norm_codes", f"of a sum {of_width}", sum_given, norm, norm_apart, 7.0 * size)
    yield _code_case("normed_columns", of_width, scaled, columns, columns_apart, 3.0 * size)
    yield _code_case("swiglu_codes", of_inner, gate_given, gate, gate_apart, 5.0 * wide)
    back, apart = codes.gate_to_codes_backward, codes.reference_of_gate
    yield _code_case("swiglu_backward_codes", of_inner, with_gradient, back, apart, 11.0 * wide)


def _code_case(
    op: str,
    shape: str,
    inputs: Callable[[], Inputs],
    run: Callable[..., tuple[QuantTensor, ...]],
    apart: Callable[..., tuple[QuantTensor, ...]],
    moved_bytes: float,
) -> Kernel:
    def error(*values: Any) -> float:
        pairs = zip(run(*values), apart(*values), strict=True)
        return max(distance(*(dequantise(codes, torch.float32) for codes in pair)) for pair in pairs)

    # A number that two ways of computing exp round apart moves to the next of E4M3's, a sixteenth away.
    return Kernel(
        op=op,
        shape=shape,
        inputs=inputs,
        run=run,
        error=error,
        tolerance=_ROUNDED,
        moved_bytes=moved_bytes,
        aims=(Aim("copy", 0.8),),
        rank=0,
    )
