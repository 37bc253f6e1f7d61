"""The GPU report's passes around experts' products: the router, sorting, weighted SwiGLU, and rows back to tokens."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from lowvram_kernels.moe.routing import route
from lowvram_kernels.moe.sorting import combine, sort_choices
from lowvram_kernels.moe.weighted_swiglu import weighted_product, weighted_product_backward
from torch import Tensor

from tools.gpu.kernel import Inputs, Kernel, Scene
from tools.gpu.layers import case


def routing(scene: Scene) -> Iterator[Kernel]:
    """Yield all cases; the shapes are those of tr-130m-moe, 8 × 1024 tokens."""
    tokens, width, inner = (40, 24, 16) if scene.is_tiny else (8_192, 512, 512)
    experts, choices = 8, 2
    rows, shape = tokens * choices, f"{tokens} × {choices} of {experts}"

    def tokens_of() -> Inputs:
        weight = scene.randn(experts, width, dtype=torch.float32) / width**0.5
        return scene.randn(tokens, width), weight, scene.randn(experts, dtype=torch.float32) / 10

    def by_expert(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        weights, ids = route(x, weight, bias, choices, 1.0)
        return weights.new_zeros(tokens, experts).scatter(1, ids, weights)

    def forward(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        with torch.no_grad():
            return (by_expert(x, weight, bias),)

    def back(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        leaves = x.detach().requires_grad_(), weight.detach().requires_grad_()
        with torch.enable_grad():
            y = by_expert(*leaves, bias)
        return torch.autograd.grad(y, leaves, torch.ones_like(y) + y.detach())

    # Of the router's matrix and of each choice's weight, id and score, too; too small for an aim.
    beside = 2 * experts * width + 8 * rows
    yield case("route", shape, tokens_of, forward, tokens * width + beside, aims=())
    yield case("route_and_back", shape, tokens_of, back, 3 * tokens * width + 2 * beside, aims=())

    def chosen() -> Inputs:
        return (torch.rand(tokens, experts, device=scene.device).argsort(-1)[:, :choices].contiguous(),)

    def sort(ids: Tensor) -> tuple[Tensor, ...]:
        order, place, ends, load = sort_choices(ids, experts)
        return order.double(), place.double(), ends.double().to(order.device), load

    yield case("sort_choices", shape, chosen, sort, 12 * rows, aims=())

    def sorted_rows() -> Inputs:
        return scene.randn(rows, width), torch.randperm(rows, device=scene.device).int(), scene.randn(tokens, width)

    def back_to_tokens(sorted_MD: Tensor, place_M: Tensor, added: Tensor) -> tuple[Tensor, ...]:
        return (combine(sorted_MD, place_M, choices, added),)

    yield case("combine", f"{shape} × {width}", sorted_rows, back_to_tokens, (rows + 2 * tokens) * width)

    def gates() -> Inputs:
        weights = torch.rand(tokens, choices, device=scene.device)
        return scene.randn(rows, 2 * inner), weights, torch.randperm(rows, device=scene.device).int()

    def gate(gate_up: Tensor, weights: Tensor, order: Tensor) -> tuple[Tensor, ...]:
        return (weighted_product(gate_up, weights, order),)

    def gates_with_gradient() -> Inputs:
        return scene.randn(rows, inner), *gates()

    def gate_back(dh: Tensor, gate_up: Tensor, weights: Tensor, order: Tensor) -> tuple[Tensor, ...]:
        d_gate_up, h, dweights = weighted_product_backward(dh.clone(), gate_up, weights, order, True)
        assert dweights is not None, "they are asked for"
        return d_gate_up, h, dweights

    shape = f"{rows} × 2 · {inner}"
    yield case("weighted_swiglu", shape, gates, gate, 3 * rows * inner)
    yield case("weighted_swiglu_backward", shape, gates_with_gradient, gate_back, 6 * rows * inner)
