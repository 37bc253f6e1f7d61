"""The GPU report's memory-bound kernels, and torch's kernels that a training step uses: shapes and expected results.

Shapes are those of the presets' steps, and square ones for which others publish figures.  Expected results are computed
on the same device, by the op's plain PyTorch form or by its reference.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable, Iterator
from typing import Protocol

import torch
from lowvram_kernels.attention.latent_attention import encode_latent, latent_attention
from lowvram_kernels.attention.sdpa import attention
from lowvram_kernels.attention.sdpa import reference as attention_reference
from lowvram_kernels.loss.linear_cross_entropy import linear_cross_entropy
from lowvram_kernels.loss.linear_cross_entropy import reference as cross_entropy
from lowvram_kernels.optim import adamw8, muon
from lowvram_kernels.quant import quantise as q8
from lowvram_kernels.quant.both_ways import quantise_both_ways
from lowvram_kernels.quant.quantise import QuantTensor
from lowvram_kernels.random.stochastic_rounding import BLOCK, add_rounded_
from torch import Tensor
from torch.nn import functional as F

from tools.gpu.kernel import Aim, Inputs, Kernel, Rival, Scene, change_error, error_of, plainly
from tools.gpu.layers import layers
from tools.gpu.products import products
from tools.gpu.routing import routing
from tools.gpu.timing import distance

# The two backends agree bit for bit, except where a card's division decides a tie differently.
_SAME = 1e-4
# A difference in the last bit of fp32 moves one code in 10⁵ to its neighbour, a hundredth away.
_TIES = 1e-3
# Gradients in 16 bits are rounded at several places where the fp32 reference is not.
_GRADIENT = 2e-2
_ATTENDED = 1e-2  # the softmax's weights are rounded to 16 bits too
_ROUNDED = 4e-3  # one rounding to 16 bits: 2⁻⁸ at most


def kernels(scene: Scene) -> list[Kernel]:
    """Return all cases, those of rank 0 first."""
    makers = (layers, routing, _latent_attention, _quantise, _adamw8, _add_rounded, _muon, _attention, _loss)
    cases = [*products(scene), *(kernel for maker in makers for kernel in maker(scene))]
    return sorted(cases, key=lambda kernel: kernel.rank)


class _Quantise(Protocol):
    """A function of `quantise.py` from a matrix to its 8-bit form."""

    def __call__(self, x: Tensor, /, format: str) -> QuantTensor: ...


def _quantise(scene: Scene) -> Iterator[Kernel]:
    shapes = [(40, 200)] if scene.is_tiny else [(16_384, 4_096), (16_384, 688)]
    makers: dict[str, _Quantise] = {
        "rows": q8.quantise_rows,
        "columns": q8.quantise_columns,
        "weight": q8.quantise_weight,
    }
    for index, (rows, width) in enumerate(shapes):
        for what, make in makers.items():
            for form in q8.FORMATS:
                run = functools.partial(make, format=form)
                scales = {"rows": rows * -(-width // 128), "columns": width * -(-rows // 128)}
                if form == "int8":
                    scales = {"rows": rows, "columns": width, "weight": rows}
                yield Kernel(
                    op=f"quantise_{what}",
                    shape=f"{form} {rows} × {width}",
                    inputs=functools.partial(_one, scene, rows, width),
                    run=run,
                    error=error_of(_decoded(run), plainly(_decoded(run))),
                    tolerance=_SAME,
                    moved_bytes=3.0 * rows * width + 4.0 * scales.get(what, 0),
                    aims=(Aim("copy", 0.8),) if index == 0 else (),
                    rank=0 if index == 0 and what != "weight" else 1,
                )

    yield from _both_ways(scene, *shapes[0])


def _both_ways(scene: Scene, rows: int, width: int) -> Iterator[Kernel]:
    for form in q8.FORMATS:
        run = functools.partial(quantise_both_ways, format=form)

        def error(x: Tensor, run: Callable[[Tensor], tuple[QuantTensor, QuantTensor]] = run) -> float:
            pairs = zip(run(x), plainly(run)(x), strict=True)
            return max(distance(*(q8.dequantise(codes, torch.float32) for codes in pair)) for pair in pairs)

        by_rows, by_columns = rows * -(-width // 128), width * -(-rows // 128)
        scales = by_rows + by_columns if form == "e4m3" else rows + width
        yield Kernel(
            op="quantise_both_ways",
            shape=f"{form} {rows} × {width}",
            inputs=functools.partial(_one, scene, rows, width),
            run=run,
            error=error,
            tolerance=_SAME,
            moved_bytes=4.0 * rows * width + 4.0 * scales,
            aims=(Aim("copy", 0.8 if form == "e4m3" else 0.5),),
            rank=0,
        )


def _one(scene: Scene, *shape: int) -> Inputs:
    return (scene.randn(*shape),)


def _decoded(run: Callable[[Tensor], QuantTensor]) -> Callable[[Tensor], Tensor]:
    return lambda x: q8.dequantise(run(x), torch.float32)


def _adamw8(scene: Scene) -> Iterator[Kernel]:
    count = 2_560 if scene.is_tiny else 2**26
    maps = adamw8.build_maps(scene.device)

    def run(weight: Tensor, gradient: Tensor, moments: adamw8.Moments, step: Tensor) -> None:
        adamw8.adamw8_(weight, gradient, moments, maps, step, 1e-3, decay=0.1)

    def changed(weight: Tensor, _: Tensor, moments: adamw8.Moments, step: Tensor) -> list[Tensor]:
        first = adamw8.recall(moments.code_m, moments.absmax_m, maps.first)
        return [weight, first, adamw8.recall(moments.code_v, moments.absmax_v, maps.second)]

    for dtype in (torch.bfloat16, torch.float32):
        states = 2.0 * (2 * count + 2 * 4 * count // BLOCK)  # read and written
        yield Kernel(
            op="adamw8_",
            shape=f"{_short(dtype)} {count:,}",
            inputs=functools.partial(_adam_inputs, scene, count, dtype),
            run=run,
            error=change_error(run, changed),
            tolerance=_TIES,
            moved_bytes=3.0 * count * dtype.itemsize + states,
            rivals=tuple(_adam_rivals(scene, count, dtype)) if scene.is_card else (),
            rank=0 if dtype == torch.bfloat16 else 1,
        )


def _adam_inputs(scene: Scene, count: int, dtype: torch.dtype) -> Inputs:
    """Return the inputs of an update in the middle of a run: no moment is zero."""
    weight = scene.randn(count, dtype=dtype)
    first, second = adamw8.new_moments(weight), adamw8.new_moments(weight)
    moments = first._replace(code_m=first.code_m.random_(256), code_v=second.code_v.random_(100, 256))
    for absmax in (moments.absmax_m, moments.absmax_v):
        absmax.uniform_(0.1, 1.0)
    return weight, torch.randn_like(weight), moments, torch.full((), 9.0, device=scene.device)


def _adam_rivals(scene: Scene, count: int, dtype: torch.dtype) -> Iterator[Rival]:
    def inputs(library: str, kind: str, **options: bool) -> Inputs:
        weight = torch.nn.Parameter(scene.randn(count, dtype=dtype))
        weight.grad = torch.randn_like(weight)
        # Imported here: bitsandbytes takes seconds.
        make = getattr(importlib.import_module(library), kind)
        return (make([weight], lr=1e-3, weight_decay=0.1, **options),)

    def run(optimizer: torch.optim.Optimizer) -> None:
        optimizer.step()

    if importlib.util.find_spec("bitsandbytes") is not None:
        yield Rival("bitsandbytes AdamW8bit", functools.partial(inputs, "bitsandbytes.optim", "AdamW8bit"), run)
    fused = functools.partial(inputs, "torch.optim", "AdamW", fused=True)
    yield Rival("torch AdamW fused, states not in 8 bits", fused, run)


def _short(dtype: torch.dtype) -> str:
    return {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}[dtype]


def _add_rounded(scene: Scene) -> Iterator[Kernel]:
    count = 2_500 if scene.is_tiny else 2**26

    def run(total: Tensor, term: Tensor, sample: Tensor) -> None:
        add_rounded_(total, term, 1, 2, sample)

    def inputs() -> Inputs:
        total = scene.randn(count, dtype=torch.bfloat16)
        return total, torch.randn_like(total), torch.zeros((), dtype=torch.int64, device=scene.device)

    def add(total: Tensor, term: Tensor, sample: Tensor) -> None:
        total.add_(term)

    yield Kernel(
        op="add_rounded_",
        shape=f"bf16 {count:,}",
        inputs=inputs,
        run=run,
        error=change_error(run, lambda total, term, sample: [total]),
        tolerance=_SAME,
        moved_bytes=6.0 * count,
        rivals=(Rival("torch add_, rounded to nearest", inputs, add),),
    )


def _muon(scene: Scene) -> Iterator[Kernel]:
    count, rows, columns = (2, 16, 32) if scene.is_tiny else (8, 1_024, 2_048)
    codes = adamw8.build_maps(scene.device).first

    def run(weight: Tensor, gradient: Tensor, momentum: muon.Momentum, step: Tensor) -> None:
        muon.muon_(weight, gradient, momentum, codes, step, 0.1)

    def inputs() -> Inputs:
        # The weight starts at zero, so that only its change is compared.
        weight = torch.zeros(count, rows, columns, dtype=torch.bfloat16, device=scene.device)
        return weight, torch.randn_like(weight), muon.new_momentum(weight, 8), torch.ones((), device=scene.device)

    products = 4.0 * rows * rows * columns + 2.0 * rows**3
    yield Kernel(
        op="muon_",
        shape=f"bf16 {count} × {rows} × {columns}",
        inputs=inputs,
        run=run,
        error=change_error(run, lambda weight, *_: [weight]),
        tolerance=_ROUNDED,
        moved_bytes=8.0 * count * rows * columns,
        operations=5 * count * products,
        rank=2,
    )


def _latent_attention(scene: Scene) -> Iterator[Kernel]:
    """Yield decoding of ismail-1024 and of tr-600m-moe."""
    shapes = [(32, 12, 8_192, 512, 64), (1, 12, 8_192, 512, 64), (8, 8, 4_096, 256, 32), (1, 8, 32_768, 256, 32)]
    for index, shape in enumerate([(2, 3, 40, 32, 16)] if scene.is_tiny else shapes):
        batch, heads, positions, channels, rotated = shape
        for form in ("16 bits", "e4m3"):
            element = 2.0 if form == "16 bits" else 1.0 + 4.0 / 128
            of_position, of_head = element * channels + 2 * rotated, 2.0 * (2 * channels + rotated)
            yield Kernel(
                op="latent_attention",
                shape=f"{form} {batch} × {positions}, {heads} heads, {channels} + {rotated}",
                inputs=functools.partial(_latent_inputs, scene, form, shape),
                run=_attend,
                error=error_of(_attend, plainly(_attend)),
                tolerance=_ATTENDED,
                moved_bytes=batch * (positions * of_position + heads * of_head),
                operations=of_head * batch * heads * positions,
                rivals=tuple(_latent_rivals(scene, shape)),
                aims=(Aim("copy", 0.45),) if index == 0 else (),
                rank=0 if index == 0 else 1,
            )


def _latent_inputs(scene: Scene, form: str, shape: tuple[int, ...]) -> Inputs:
    batch, heads, positions, channels, rotated = shape
    cache = scene.randn(batch, positions, channels + rotated)
    latent, rope = cache.split([channels, rotated], -1)
    lengths = torch.full((batch,), positions, dtype=torch.int32, device=scene.device)
    queries = scene.randn(batch, heads, channels), scene.randn(batch, heads, rotated)
    if form == "e4m3":
        return *queries, *encode_latent(latent), rope.contiguous(), lengths
    return *queries, latent, None, rope, lengths


def _attend(
    q_latent: Tensor, q_rope: Tensor, latent: Tensor, latent_scale: Tensor | None, rope: Tensor, lengths: Tensor
) -> Tensor:
    scale = (q_latent.shape[-1] + q_rope.shape[-1]) ** -0.5
    return latent_attention(q_latent, q_rope, latent, rope, lengths, scale, latent_scale)


def _latent_rivals(scene: Scene, shape: tuple[int, ...]) -> Iterator[Rival]:
    """Yield torch's attention with a cache of keys and values that were expanded from the latent."""
    batch, heads, positions, channels, rotated = shape
    width = 128 + rotated if channels == 512 else 96 + rotated  # ismail-1024 and tr-600m-moe; values are 128 wide

    def inputs() -> Inputs:
        kinds = ((1, width), (positions, width), (positions, 128))
        return tuple(scene.randn(batch, heads, *kind) for kind in kinds)

    yield Rival("torch attention, keys and values expanded", inputs, F.scaled_dot_product_attention)


def _attention(scene: Scene) -> Iterator[Kernel]:
    """Yield torch's own attention, which every training step uses, forward only."""
    batch, heads, tokens, width = (1, 2, 16, 8) if scene.is_tiny else (4, 16, 2_048, 128)
    scale = width**-0.5

    def inputs() -> Inputs:
        return tuple(scene.randn(batch, heads, tokens, width) for _ in range(3))

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, k, v, scale, causal=True)

    def error(q: Tensor, k: Tensor, v: Tensor) -> float:
        # A part: the reference computes in fp64 and writes out every score.
        first_q, first_k, first_v = (x[:1, :2].float() for x in (q, k, v))
        return distance(run(q, k, v)[:1, :2], attention_reference(first_q, first_k, first_v, scale, causal=True))

    elements = batch * heads * tokens * width
    yield Kernel(
        op="attention",
        shape=f"{batch} × {heads} × {tokens} × {width}",
        inputs=inputs,
        run=run,
        error=error,
        tolerance=_ROUNDED,
        moved_bytes=4 * 2.0 * elements,
        operations=2.0 * elements * tokens,  # two products over half of the scores
        rank=2,
    )


def _loss(scene: Scene) -> Iterator[Kernel]:
    rows, width, vocabulary = (40, 16, 100) if scene.is_tiny else (4_096, 256, 64_000)

    def inputs() -> Inputs:
        weight = (scene.randn(vocabulary, width) * 0.02).requires_grad_()
        target = torch.randint(0, vocabulary, (rows,), device=scene.device)
        return scene.randn(rows, width).requires_grad_(), weight, target

    def gradients_of(loss: Callable[..., Tensor], x: Tensor, weight: Tensor, target: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(loss(x, weight, target), (x, weight))

    def error(*values: Tensor) -> float:
        x, weight, target = values
        truth = gradients_of(
            cross_entropy, x.detach().float().requires_grad_(), weight.detach().float().requires_grad_(), target
        )
        result = gradients_of(linear_cross_entropy, *values)
        return max(distance(a, b) for a, b in zip(result, truth, strict=True))

    yield Kernel(
        op="linear_cross_entropy",
        shape=f"with gradients {rows} × {width} × {vocabulary}",
        inputs=inputs,
        run=functools.partial(gradients_of, linear_cross_entropy),
        error=error,
        tolerance=_GRADIENT,
        moved_bytes=2.0 * 2 * (rows * width + vocabulary * width),
        operations=3 * 2.0 * rows * width * vocabulary,
        rivals=(Rival("torch cross_entropy of all logits", inputs, functools.partial(gradients_of, cross_entropy)),),
    )
