"""Times the host's part of each kernel of ours, without a card: the Python between a call and the driver.

python tools/launch_path.py [--card 12.0] [--repeats 2000] [NAME ...]

Kernels are compiled for the card by Triton, and a stub stands for its driver: it takes each launch and starts nothing.
Tensors are small ones of the CPU, so that their allocation is about as fast as that of CUDA's caching allocator.  Of
each entry it prints the launches and the CPU microseconds for each of them, the least of several rounds: checks, the
choice of kernel and tile, the allocation of results, and the launch.  Autograd is not in it.
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)  # read when Triton and our dispatch are imported
ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

import torch
import triton
from lowvram_kernels.attention.latent_attention import latent_attention
from lowvram_kernels.dispatch import Card, override_card
from lowvram_kernels.layers import rms_norm, rotary, swiglu
from lowvram_kernels.loss.linear_cross_entropy import linear_cross_entropy
from lowvram_kernels.matmul.gemv import gemv
from lowvram_kernels.matmul.scaled_matmul import scaled_matmul
from lowvram_kernels.moe.grouped_matmul import grouped_matmul
from lowvram_kernels.moe.grouped_wgrad import grouped_wgrad
from lowvram_kernels.moe.routing import route
from lowvram_kernels.moe.sorting import combine, sort_choices
from lowvram_kernels.moe.weighted_swiglu import weighted_product, weighted_product_backward
from lowvram_kernels.optim.adamw8 import adamw8_, build_maps, new_moments
from lowvram_kernels.optim.muon_launch import lead, move
from lowvram_kernels.quant.quantise import quantise_rows, quantise_weight
from lowvram_kernels.random.stochastic_rounding import add_rounded_
from triton.backends.compiler import GPUTarget

# What a launch may take, allocation included.
AIM_US = 12.0
_ROUNDS = 7
Call = Callable[[], object]


class StubDriver:
    """Triton's driver as its launches see it: one device, one stream, and binaries that are never loaded."""

    def __init__(self, capability: tuple[int, int]) -> None:
        self._target = GPUTarget("cuda", capability[0] * 10 + capability[1], 32)
        self.utils, self.launches = self, 0

    def launcher_cls(self, source: object, metadata: object) -> Callable[..., None]:
        """Return what a launch calls in place of the driver."""
        return self.take

    def take(self, *_: object) -> None:
        """Count a launch."""
        self.launches += 1

    def load_binary(self, *_: object) -> tuple[int, int, int, int, int]:
        """Return handles, registers, spills and threads of a binary."""
        return 1, 1, 32, 0, 1024

    def get_device_properties(self, _: int) -> dict[str, int]:
        """Return more shared memory than any kernel takes."""
        return {"max_shared_mem": 2**20}

    def get_current_device(self) -> int:
        """Return the only device."""
        return 0

    def get_current_stream(self, _: int) -> int:
        """Return the default stream."""
        return 0

    def get_current_target(self) -> GPUTarget:
        """Return what is compiled for."""
        return self._target


def entries() -> Iterator[tuple[str, Call]]:
    """Yield a name and a call of each op whose launches a step or a token makes."""
    x, wide = torch.zeros(64, 256, dtype=torch.bfloat16), torch.zeros(64, 512, dtype=torch.bfloat16)
    weight = torch.ones(256)
    rstd = torch.ones(64, 1)
    yield "norm", lambda: rms_norm.normalise(x, weight, 1e-6)
    yield "norm + residual", lambda: rms_norm.normalise(x, weight, 1e-6, added=x)
    yield "norm backward", lambda: rms_norm.gradients(x, x, weight, rstd, (True, True))
    yield "swiglu", lambda: swiglu.gated_product(wide)
    yield "swiglu backward", lambda: swiglu.gated_product_backward(x, wide)
    yield from _positions()
    yield from _products(x)
    yield from _optimizer()
    yield from _experts(x)
    query, cache = torch.zeros(1, 4, 64, dtype=torch.bfloat16), torch.zeros(1, 128, 64, dtype=torch.bfloat16)
    lengths = torch.full((1,), 100, dtype=torch.int32)
    turned, keys = query[..., :16].contiguous(), cache[..., :16].contiguous()
    yield "latent attention", lambda: latent_attention(query, turned, cache, keys, lengths, 0.1)
    target, table = torch.zeros(64, dtype=torch.int64), torch.zeros(512, 256, dtype=torch.bfloat16)
    yield "loss, with its products", lambda: linear_cross_entropy(x, table, target)


def _positions() -> Iterator[tuple[str, Call]]:
    q = torch.zeros(1, 16, 4, 64, dtype=torch.bfloat16)
    table = torch.zeros(16, 32), torch.zeros(16, 32)
    weight = torch.ones(64)
    yield "rotation", lambda: rotary.rotate(q, table, False)
    yield "norm + rotation", lambda: rotary.rotate(q, table, False, weight)


def _products(x: torch.Tensor) -> Iterator[tuple[str, Call]]:
    matrix = torch.zeros(256, 256, dtype=torch.bfloat16)
    for form in ("e4m3", "int8"):
        rows, weight = quantise_rows(x, form), quantise_weight(matrix, form)
        yield f"quantise rows {form}", functools.partial(quantise_rows, x, form)
        yield f"product {form}", functools.partial(scaled_matmul, rows, weight, x.dtype)
        yield f"small product {form}", functools.partial(gemv, x[:1], weight)


def _optimizer() -> Iterator[tuple[str, Call]]:
    weight, gradient = torch.zeros(64, 256), torch.zeros(64, 256)
    maps, moments, step, rate = build_maps(), new_moments(weight), torch.ones(()), torch.ones(())
    yield "adamw8", lambda: adamw8_(weight, gradient, moments, maps, step, rate, skip=step, gradient_scale=rate)
    flat, u = weight.view(-1), torch.zeros(64 * 256, dtype=torch.bfloat16)
    codes = (moments.code_m.view(-1), moments.absmax_m, u, maps.first.value, maps.first.midpoint)
    yield "muon before", lambda: lead(gradient.view(-1), *codes, rate, step, 0.95)
    yield "muon behind", lambda: move(flat, u, step, rate, 0.2, 0.1, step, 0, 7)
    total, sample = torch.zeros(64, 256, dtype=torch.bfloat16), torch.zeros((), dtype=torch.int64)
    yield "rounded sum", lambda: add_rounded_(total, gradient, 1, 2, sample)


def _experts(x: torch.Tensor) -> Iterator[tuple[str, Call]]:
    experts, choices = 4, 2
    router, bias = torch.zeros(experts, x.shape[1]), torch.zeros(experts)
    yield "routing", lambda: route(x, router, bias, choices, 1.0)
    ids = torch.arange(2 * x.shape[0]).view(-1, choices) % experts
    count = ids.numel()
    yield "sorting", lambda: sort_choices(ids, experts)
    stack = torch.zeros(experts, 2 * x.shape[1], x.shape[1], dtype=x.dtype)
    rows, wide = torch.zeros(count, x.shape[1], dtype=x.dtype), torch.zeros(count, 2 * x.shape[1], dtype=x.dtype)
    ends = torch.arange(1, experts + 1) * (count // experts)
    order = torch.arange(count, dtype=torch.int32)
    yield "grouped product", lambda: grouped_matmul(rows, stack, ends)
    yield "grouped gradient", lambda: grouped_wgrad(wide, rows, ends, experts, x.dtype)
    weights = torch.zeros(ids.shape)
    yield "weighted swiglu", lambda: weighted_product(wide, weights, order)
    yield "weighted swiglu backward", lambda: weighted_product_backward(rows, wide, weights, order, True)
    yield "return of rows", lambda: combine(rows, order, choices)


def measure(call: Call, driver: StubDriver, repeats: int) -> tuple[float, float]:
    """Return the launches of a call, and the least CPU microseconds that one of them took."""
    for _ in range(10):
        call()
    before, best = driver.launches, float("inf")
    for _ in range(_ROUNDS):
        began = time.process_time()
        for _ in range(repeats // _ROUNDS):
            call()
        best = min(best, time.process_time() - began)
    calls = repeats // _ROUNDS
    launches = (driver.launches - before) / (calls * _ROUNDS)
    return launches, 1e6 * best / calls / max(1.0, launches)


def main() -> None:
    """Time and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="only entries whose name contains one of these")
    parser.add_argument("--card", default="12.0", help="compute capability (default: 12.0)")
    parser.add_argument("--repeats", type=int, default=2000)
    given: Any = parser.parse_args()
    major, _, minor = given.card.partition(".")
    capability = (int(major), int(minor or 0))
    driver = StubDriver(capability)
    triton.runtime.driver.set_active(driver)
    torch.set_num_threads(1)
    worst = 0.0
    with override_card(Card("cuda", capability)), torch.no_grad():
        for name, call in entries():
            if given.names and not any(part in name for part in given.names):
                continue
            launches, took_us = measure(call, driver, given.repeats)
            worst = max(worst, took_us)
            print(f"{name:<24} {launches:4.0f} launches  {took_us:6.1f} µs each{'' if took_us <= AIM_US else '  *'}")
    print(f"the slowest: {worst:.1f} µs; the aim: {AIM_US:.0f} µs")


if __name__ == "__main__":
    main()
