"""The calls whose launches the compile gate compiles: every tile of every op, and the steps of the presets' models.

Nothing is computed: tensors are meta tensors, and a launch is only recorded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from lowvram_kernels.attention import latent_attention
from lowvram_kernels.attention.mla_heads import mla_heads_
from lowvram_kernels.attention.widened_heads import widened_heads
from lowvram_kernels.dispatch import Card, Launch, choose, launch, simulate_card
from lowvram_kernels.layers import codes, rms_norm, rotary, swiglu
from lowvram_kernels.loss.linear_cross_entropy import linear_cross_entropy
from lowvram_kernels.matmul import gemv, scaled_matmul
from lowvram_kernels.matmul.quant_linear import MatmulFormat
from lowvram_kernels.moe import grouped_matmul, grouped_wgrad, routing, sorting, weighted_swiglu
from lowvram_kernels.moe.grouped_matmul import Gathered
from lowvram_kernels.optim import adamw8
from lowvram_kernels.quant import both_ways, quantise
from lowvram_kernels.quant.quantise import QuantTensor
from lowvram_kernels.random import stochastic_rounding
from torch import Tensor

from lowvram.config.model import ModelConfig
from lowvram.config.plan import Plan
from lowvram.config.run_file import load_preset, preset_names
from lowvram.config.train import TrainConfig
from lowvram.fit.rehearse import rehearse

BF16, FP16, FP32, BYTES = torch.bfloat16, torch.float16, torch.float32, torch.uint8
Call = Callable[[], object]
BLOCK = 128
# Sizes of a preset's simulated step: a shallow model has the shapes of a deep one, a short context those of a long one.
_LAYERS, _SEQ_LEN = 2, 512
PRECISIONS = ("bf16", "fp8", "int8")
CODED: tuple[MatmulFormat, ...] = ("e4m3", "int8")


def meta(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    """Return a tensor without memory."""
    return torch.empty(shape, dtype=dtype, device="meta")


def scaled(rows: int, columns: int, form: str, block_rows: int = 1, stack: int | None = None) -> QuantTensor:
    """Return a quantised matrix, or a stack of them, without memory."""
    before = () if stack is None else (stack,)
    if form == "int8":
        return QuantTensor(meta(*before, rows, columns, dtype=torch.int8), meta(*before, rows, 1, dtype=FP32))
    scale = meta(*before, -(-rows // block_rows), -(-columns // BLOCK), dtype=FP32)
    return QuantTensor(meta(*before, rows, columns, dtype=BYTES), scale)


def launches_of(card: Card) -> list[Launch]:
    """Return every launch that `cases` and the presets make on a card."""
    launches: list[Launch] = []
    with simulate_card(card, note_launch=launches.append):
        for call in cases(card):
            call()
        for model, train in presets():
            plan = Plan(micro_batch=1, accumulate=train.batch_samples)
            rehearse(model, train, plan, card)
    return launches


def presets() -> Iterator[tuple[ModelConfig, TrainConfig]]:
    """Yield the presets' models with few layers, in each precision, with steps of two short sequences."""
    for name in preset_names():
        model, train = load_preset(name)
        layers = _LAYERS + (model.ffn.dense_layers if model.ffn.kind == "moe" else 0)
        shallow = model.model_copy(update={"layers": min(model.layers, layers)})
        for precision in PRECISIONS:
            short = {"seq_len": _SEQ_LEN, "batch_tokens": 2 * _SEQ_LEN, "precision": precision}
            yield shallow, train.model_copy(update=short)


def cases(card: Card) -> Iterator[Call]:
    """Yield a call for every kernel and every tile that a card may use."""
    yield from e4m3_cases(card)
    yield from quantise_cases()
    yield from scaled_matmul_cases(card)
    yield from small_matmul_cases(card)
    yield from grouped_cases(card)
    yield from routing_cases(card)
    yield from latent_attention_cases(card)
    yield from head_cases()
    yield from optimizer_cases()
    yield from layer_cases()
    yield from code_cases()
    yield from loss_cases()


def layer_cases() -> Iterator[Call]:
    """Yield norms of all widths that a model may have, with and without a sum, rotations, and SwiGLU."""
    for dtype in (BF16, FP16, FP32):
        weight_dtypes = (FP32, BF16) if dtype == BF16 else (FP32,)
        for width in (64, 256, 768, 1000, 2048, 8192) if dtype == BF16 else (768,):
            for weight_dtype in weight_dtypes:
                x, rstd = meta(512, width, dtype=dtype), meta(512, 1, dtype=FP32)
                weight = meta(width, dtype=weight_dtype)
                yield partial(rms_norm.normalise, x, weight, 1e-6)
                yield partial(rms_norm.normalise, x, weight, 1e-6, None, x)
                yield partial(rms_norm.normalise, x, weight, 1e-6, rstd)
                for needs in ((True, True), (False, True), (True, False)):
                    yield partial(rms_norm.gradients, x, x, weight, rstd, needs)
                yield partial(rms_norm.gradients, x, x, weight, rstd, (True, True), x)
                yield partial(rms_norm.gradients_on_card, x, x, weight, rstd, (True, True), x, x)
                yield partial(rms_norm.gradients_on_card, x, x, weight, rstd, (True, True), None, x)
        for width, pairs in ((64, 32), (96, 16), (128, 64)):
            table = (meta(128, pairs, dtype=FP32), meta(128, pairs, dtype=FP32))
            for weight_K in (None, meta(width, dtype=FP32)):
                for interleaved in (False, True):
                    yield partial(_rotate_and_back, meta(4, 128, 12, width, dtype=dtype), table, interleaved, weight_K)
        gate_up = meta(512, 1376, dtype=dtype)
        yield partial(swiglu.gated_product, gate_up)
        yield partial(swiglu.gated_product_backward, meta(512, 688, dtype=dtype), gate_up)


def code_cases() -> Iterator[Call]:
    """Yield norms and SwiGLU that write codes, of widths that a model may have."""
    for dtype in (BF16, FP16, FP32):
        for width in (64, 256, 768, 1000, 2048, 8192) if dtype == BF16 else (768,):
            x, weight, rstd = meta(512, width, dtype=dtype), meta(width, dtype=FP32), meta(512, 1, dtype=FP32)
            for form in CODED:
                yield partial(codes.normalise_to_codes, x, weight, 1e-6, form)
                yield partial(codes.normalise_to_codes, x, weight, 1e-6, form, x)
            yield partial(codes.normed_columns, x, weight, rstd)
        for inner in (128, 688, 2048, 8192):
            for form in CODED:
                yield partial(codes.gate_to_codes, meta(512, 2 * inner, dtype=dtype), form)
        for rows in (512, 500) if dtype != FP32 else ():
            gate_up, d_product = meta(rows, 4096, dtype=dtype), meta(rows, 2048, dtype=dtype)
            yield partial(codes.gate_to_codes_backward, gate_up, d_product)


def _rotate_and_back(x: Tensor, table: tuple[Tensor, Tensor], interleaved: bool, weight: Tensor | None) -> None:
    leaves = [tensor.requires_grad_() for tensor in (x, weight) if tensor is not None]
    torch.autograd.grad(rotary.rotate(x, table, interleaved, weight), leaves, x.detach())


def loss_cases() -> Iterator[Call]:
    """Yield the loss with its gradients and without them, of rows that are held in registers and are not."""
    for dtype in (BF16, FP16, FP32):
        for vocabulary in (999, 1024, 16_384, 32_768, 49_152, 64_000, 65_536) if dtype != FP32 else (1000,):
            for learns in (True, False):
                x, weight = meta(64, 256, dtype=dtype), meta(vocabulary, 256, dtype=dtype)
                yield partial(linear_cross_entropy, x.requires_grad_(learns), weight, meta(64, dtype=torch.int64))


def e4m3_cases(card: Card) -> Iterator[Call]:
    """Yield the two kernels with which tests compare the conversions with torch's."""
    constants = {"BLOCK": 1024, "NATIVE": card.features.has_e4m3}
    what = Launch("quant.e4m3_triton", "encode_kernel", (4,), (meta(4096), meta(4096, dtype=BYTES), 4096), constants)
    yield partial(launch, what)
    back = (meta(4096, dtype=BYTES), meta(4096, dtype=FP32), 4096)
    yield partial(launch, Launch("quant.e4m3_triton", "decode_kernel", (4,), back, {"BLOCK": 1024}))


def quantise_cases() -> Iterator[Call]:
    """Yield every format, dtype and tile, for sizes that the tile divides and others."""
    for dtype in (BF16, FP32):
        for form in quantise.FORMATS:
            for width in (100, 688, 1376, 2048, 4096, 8192, 16_384):
                x = meta(512, width, dtype=dtype)
                yield partial(quantise.quantise_rows, x, form)
            x = meta(688, 1376, dtype=dtype)
            for columns in (
                meta(300, 1376, dtype=dtype),
                x,
                meta(2048, 1376, dtype=dtype),
                meta(4096, 1376, dtype=dtype),
            ):
                yield partial(quantise.quantise_columns, columns, form)
            yield partial(both_ways.quantise_both_ways, x, form)
            if dtype == BF16:  # gradients of 16 bits have odd sizes, masters' are even
                yield partial(both_ways.quantise_both_ways, meta(687, 1375), form)
            for weight in (x, meta(4, 1024, 512, dtype=dtype)):
                yield partial(quantise.quantise_weight, weight, form)
                yield partial(quantise.quantise_weight, weight, form, transposed=True)
        yield partial(quantise.quantise_rows, meta(512, 2048, dtype=dtype), "e4m3", fp32_scales=True)
        yield partial(quantise.quantise_weight_both, meta(512, 2048, dtype=dtype), "e4m3")
        for operand in (scaled(688, 1376, "e4m3"), scaled(688, 1376, "e4m3", BLOCK), scaled(688, 1376, "int8")):
            yield partial(quantise.dequantise, operand, dtype)


def scaled_matmul_cases(card: Card) -> Iterator[Call]:
    """Yield every backend and tile: forward and dx (weight in blocks), dW (both in rows)."""
    for form, code in (("e4m3", BYTES), ("int8", torch.int8)):
        backends = dict.fromkeys(scaled_matmul.backend_of(code, card, plain) for plain in (False, True))
        for backend in backends:
            if backend in ("decode", "reference"):
                continue
            for tile in scaled_matmul.matmul_tiles(card, backend):
                for inputs, dtype, block_rows in ((1376, BF16, BLOCK), (1024, FP32, 1), (100, BF16, 1)):
                    a, b = scaled(1024, inputs, form), scaled(688, inputs, form, block_rows)
                    yield partial(scaled_matmul.multiply_tiles, a, b, dtype, backend, tile)
                    if inputs != 100:
                        total = meta(1024, 688, dtype=dtype)
                        yield partial(scaled_matmul.multiply_tiles, a, b, dtype, backend, tile, total)


def small_matmul_cases(card: Card) -> Iterator[Call]:
    """Yield both kernels with every tile and number of rows; in fp16 only with the first tile."""
    for form, block_rows in (("e4m3", BLOCK), ("int8", 1)):
        weight = scaled(4096, 4096, form, block_rows)
        for dtype in (BF16, FP16):
            for rows in (1, 2, 4, 8, 16):
                x, kernel = meta(rows, 4096, dtype=dtype), gemv.kernel_of(card, rows, dtype)
                for tile in gemv.gemv_tiles(kernel)[: 2 if dtype == BF16 else 1]:
                    for splits in (1, 4) if rows in (1, 16) and dtype == BF16 else (4,):
                        yield partial(gemv.multiply_bands, x, weight, kernel, tile, splits)


def grouped_cases(card: Card) -> Iterator[Call]:
    """Yield products and weight gradients of 8 experts: plain, E4M3, int8, and with frozen copies in every format."""
    if choose("grouped_matmul", card).backend != "triton":
        return
    experts, outputs, inputs, ends = 8, 1408, 1024, meta(8, dtype=torch.int64)
    for dtype in (BF16, FP16):
        rows, stack = meta(4096, inputs, dtype=dtype), meta(experts, outputs, inputs, dtype=dtype)
        transposed = meta(experts, inputs, outputs, dtype=dtype).mT
        most = None if dtype == BF16 else 1  # fp16 gives the same code except for the names of instructions
        for tile in grouped_matmul.grouped_tiles(card, "half")[:most]:
            gathered = Gathered(meta(2048, inputs, dtype=dtype), meta(4096, dtype=torch.int32), 2)
            for matrices in (stack, transposed):
                yield partial(grouped_matmul.grouped_matmul, rows, matrices, ends, tile=tile)
                yield partial(grouped_matmul.grouped_matmul, gathered, matrices, ends, tile=tile)
        left = meta(4096, outputs, dtype=dtype)
        for tile in grouped_matmul.grouped_tiles(card, "half", is_outer=True)[:most]:
            for out in (dtype, FP32):
                yield partial(grouped_wgrad.grouped_wgrad, left, rows, ends, experts, out, tile=tile)
        total, order = meta(experts, outputs, inputs, dtype=FP32), meta(4096, dtype=torch.int32)
        of_left, of_right = (Gathered(meta(2048, width, dtype=dtype), order, 2) for width in (outputs, inputs))
        for tile in grouped_matmul.grouped_tiles(card, "gathered", is_outer=True)[:most]:
            add = partial(grouped_wgrad.grouped_wgrad, tile=tile, total=total)
            yield partial(add, of_left, rows, ends, experts, FP32)
            yield partial(add, left, of_right, ends, experts, FP32)
        blocks = meta(experts, -(-outputs // BLOCK), -(-inputs // BLOCK), dtype=FP32)
        copies = QuantTensor(meta(experts, outputs, inputs, dtype=BYTES), blocks)
        in_rows = QuantTensor(meta(experts, outputs, inputs, dtype=torch.int8), meta(experts, outputs, 1, dtype=FP32))
        transposed_rows = QuantTensor(
            meta(experts, inputs, outputs, dtype=torch.int8).mT, meta(experts, inputs, 1, dtype=FP32).mT
        )
        transposed_copies = QuantTensor(
            meta(experts, inputs, outputs, dtype=BYTES).mT,
            meta(experts, -(-inputs // BLOCK), -(-outputs // BLOCK), dtype=FP32).mT,
        )
        masters = meta(experts, outputs, inputs, dtype=FP32)  # read in place of their copies
        for tile in grouped_matmul.grouped_tiles(card, "decode")[:most]:
            for idle in (copies, transposed_copies, in_rows, transposed_rows, masters):
                yield partial(grouped_matmul.grouped_matmul, rows, idle, ends, tile=tile)
    fp8 = scaled(4096, inputs, "e4m3")
    stack8 = scaled(outputs, inputs, "e4m3", BLOCK, experts)
    backend = choose("fp8_matmul", card).backend
    for tile in grouped_matmul.grouped_tiles(card, backend):
        yield partial(grouped_matmul.grouped_matmul, fp8, stack8, ends, tile=tile)
    columns = scaled(outputs, 4096, "e4m3"), scaled(inputs, 4096, "e4m3")
    for tile in grouped_matmul.grouped_tiles(card, backend, is_outer=True):
        yield partial(grouped_wgrad.grouped_wgrad, *columns, ends, experts, FP32, tile=tile)
    # Sizes that tiles divide and that they do not; sums that fit into int32 and that do not.
    for tile in grouped_matmul.grouped_tiles(card, "int8"):
        for inputs, dtype in ((1024, BF16), (688, FP32), (100, BF16)):
            rows8, stack8 = scaled(4096, inputs, "int8"), scaled(outputs, inputs, "int8", stack=experts)
            yield partial(grouped_matmul.grouped_matmul, rows8, stack8, ends, dtype=dtype, tile=tile)
    for tile in grouped_matmul.grouped_tiles(card, "int8", is_outer=True):
        for count, dtype in ((4096, FP32), (2**18, BF16)):
            columns = scaled(outputs, count, "int8"), scaled(inputs, count, "int8")
            yield partial(grouped_wgrad.grouped_wgrad, *columns, ends, experts, dtype, tile=tile)


def routing_cases(card: Card) -> Iterator[Call]:
    """Yield routers of few experts and of many with their gradients, sorting, and what surrounds experts' products."""
    if choose("grouped_matmul", card).backend != "triton":
        return
    for experts, choices, width in ((8, 2, 512), (64, 6, 2048), (128, 8, 1000)):
        for dtype in (BF16, FP16, FP32) if experts == 8 else (BF16,):
            yield partial(_route_and_back, meta(512, width, dtype=dtype), meta(experts, width, dtype=FP32), choices)
        ids = meta(512, choices, dtype=torch.int64)
        for slots in (None, meta(experts, dtype=torch.int64)):
            yield partial(sorting.sort_choices, ids, experts, slots)
    order, weights = meta(1024, dtype=torch.int32), meta(512, 2, dtype=FP32)
    for dtype in (BF16, FP16, FP32):
        rows, gate_up, dh = meta(1024, 512, dtype=dtype), meta(1024, 1376, dtype=dtype), meta(1024, 688, dtype=dtype)
        yield partial(sorting.combine, rows, order, 2)
        yield partial(sorting.combine, rows, order, 2, meta(512, 512, dtype=dtype))
        yield partial(weighted_swiglu.weighted_product, gate_up, weights, order)
        for needs in (True, False):
            yield partial(weighted_swiglu.weighted_product_backward, dh, gate_up, weights, order, needs)


def _route_and_back(x: Tensor, weight: Tensor, choices: int) -> None:
    x, weight = x.requires_grad_(), weight.requires_grad_()
    weights, _ = routing.route(x, weight, meta(weight.shape[0], dtype=FP32), choices, 1.0)
    torch.autograd.grad(weights, [x, weight], weights.detach())


def latent_attention_cases(card: Card) -> Iterator[Call]:
    """Yield caches in 16 and in 8 bits, for the widths of MLA models, with few heads and many."""
    if choose("latent_attention", card).backend != "triton":
        return
    length = meta(4, dtype=torch.int32)
    for channels, rotated in ((512, 64), (256, 32), (64, 16)):
        for heads in (12, 16, 32, 128):
            for is_coded in (False, True):
                queries = meta(4, heads, channels), meta(4, heads, rotated)
                cache = meta(4, 1024, channels, dtype=BYTES if is_coded else BF16), meta(4, 1024, rotated)
                scale = meta(4, 1024, -(-channels // BLOCK), dtype=FP32) if is_coded else None
                given = (*queries, *cache, length, 0.1, scale)
                yield partial(latent_attention.latent_attention, *given)
                yield partial(latent_attention.latent_attention, *given, 256)


def head_cases() -> Iterator[Call]:
    """Yield queries, keys and values of MLA and for ALiBi, whose widths are multiples of 16 and are not."""
    for dtype in (BF16, FP16, FP32):
        for heads, unrotated, pairs, values in ((8, 64, 16, 96), (16, 128, 32, 128), (3, 20, 4, 20)):
            sizes = ((heads, unrotated + 2 * pairs), (heads, unrotated + values), (2 * pairs,))
            leaves = [meta(4, 128, *size, dtype=dtype) for size in sizes]
            yield partial(_widen_and_back, [meta(4, 128, count, unrotated, dtype=dtype) for count in (heads, 2, 2)])
            yield partial(_mla_heads_and_back, leaves, (meta(128, pairs, dtype=FP32), meta(128, pairs, dtype=FP32)))


def _mla_heads_and_back(leaves: list[Tensor], table: tuple[Tensor, Tensor]) -> None:
    q, kv, k_rope = (leaf.requires_grad_() for leaf in leaves)
    made = mla_heads_(q, kv, k_rope, table)
    torch.autograd.grad(made, leaves, [part.detach() for part in made])


def _widen_and_back(leaves: list[Tensor]) -> None:
    q, k, v = (leaf.requires_grad_() for leaf in leaves)
    made = widened_heads(q, k, v, q.new_empty(q.shape[2], 8), q.new_empty(q.shape[1], 8))
    torch.autograd.grad(made, leaves, [part.detach() for part in made])


def optimizer_cases() -> Iterator[Call]:
    """Yield AdamW with 8-bit and with exact moments, and the sum with stochastic rounding."""
    step, rate = meta(dtype=FP32), meta(dtype=FP32)
    maps = adamw8.build_maps("meta")
    for weight_dtype in (FP32, BF16):
        for exact in (False, True):
            weight, gradient = meta(1000, 300, dtype=weight_dtype), meta(1000, 300, dtype=weight_dtype)
            moments = adamw8.new_moments(weight, exact)
            yield partial(adamw8.adamw8_, weight, gradient, moments, maps, step, 1e-3)
            yield partial(adamw8.adamw8_, weight, gradient, moments, maps, step, rate, skip=step)
    yield partial(stochastic_rounding.add_rounded_, meta(1000, 300), meta(1000, 300), 1, 2, meta(dtype=torch.int64))
