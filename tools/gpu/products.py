"""The GPU report's matrix products, and torch's own for the same work: shapes, expected results, rivals and aims.

Expected results are products of the decoded operands in fp32, on the same device.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from lowvram_kernels.matmul.gemv import gemv
from lowvram_kernels.matmul.scaled_matmul import scaled_matmul
from lowvram_kernels.moe.grouped_matmul import grouped_matmul, mask_M
from lowvram_kernels.moe.grouped_wgrad import grouped_wgrad
from lowvram_kernels.quant import quantise as q8
from lowvram_kernels.quant.quantise import QuantTensor
from torch import Tensor
from torch.nn import functional as F

from tools.gpu.kernel import Aim, Inputs, Kernel, Rival, Scene, error_of
from tools.gpu.timing import distance

# The result is rounded to 16 bits once; tensor cores accumulate E4M3 in 14 bits (DeepSeek-AI 2024, section 3.3.2).
_ROUNDED = 5e-3
CUBLAS, DENSE = "cuBLAS bf16", "one dense cuBLAS bf16 product"
BY_BLOCK, BY_TENSOR, BY_ROW = "_scaled_mm by block", "_scaled_mm by tensor", "_scaled_mm by row"
NUMBERS = {"e4m3": "fp8", "int8": "int8"}


def products(scene: Scene) -> Iterator[Kernel]:
    """Yield every product."""
    yield from _scaled(scene)
    yield from _small(scene)
    yield from _grouped(scene)
    yield from _outer(scene)


def _scaled(scene: Scene) -> Iterator[Kernel]:
    """Yield products of a layer: square, a wide model's feed-forward, tr-125m's and tiny-llm-v1's."""
    shapes = [(4_096, 4_096, 4_096), (8_192, 8_192, 8_192), (8_192, 11_264, 2_048), (8_192, 4_096, 768)]
    for index, (rows, outputs, inner) in enumerate([(20, 40, 208)] if scene.is_tiny else shapes):
        for form in q8.FORMATS:
            inputs = functools.partial(_operands, scene, form, rows, outputs, inner)
            run = functools.partial(scaled_matmul, dtype=scene.dtype)
            aims = (Aim(CUBLAS, 1.0), Aim(BY_BLOCK, 0.75)) if index == 0 and form == "e4m3" else ()
            yield Kernel(
                op="scaled_matmul",
                shape=f"{form} {rows} × {outputs} × {inner}",
                inputs=inputs,
                run=run,
                error=error_of(run, _product_of_decoded),
                tolerance=_ROUNDED,
                moved_bytes=1.0 * (rows + outputs) * inner + 2.0 * rows * outputs,
                operations=2.0 * rows * outputs * inner,
                numbers=NUMBERS[form],
                rivals=tuple(_scaled_rivals(scene, form, rows, outputs, inner)),
                aims=aims,
                rank=0 if index == 0 else 1,
            )


def _operands(scene: Scene, form: str, rows: int, outputs: int, inner: int) -> Inputs:
    return q8.quantise_rows(scene.randn(rows, inner), form), q8.quantise_weight(scene.randn(outputs, inner), form)


def _product_of_decoded(a: QuantTensor, b: QuantTensor) -> Tensor:
    return q8.dequantise(a, torch.float32) @ q8.dequantise(b, torch.float32).mT


def _scaled_rivals(scene: Scene, form: str, rows: int, outputs: int, inner: int) -> Iterator[Rival]:
    def plain() -> Inputs:
        return scene.randn(rows, inner), scene.randn(outputs, inner).mT

    yield Rival(CUBLAS, plain, torch.mm)
    if not scene.is_card:
        return
    if form == "int8":

        def whole() -> Inputs:
            a, b = _operands(scene, form, rows, outputs, inner)
            return a.code, b.code.mT

        yield Rival("_int_mm, without scales", whole, torch._int_mm)
        return
    for name, is_fast in ((BY_BLOCK, False), (BY_TENSOR, True), (BY_ROW, True)):
        yield Rival(
            name,
            functools.partial(_torch_operands, scene, name, rows, outputs, inner),
            functools.partial(torch._scaled_mm, out_dtype=torch.bfloat16, use_fast_accum=is_fast),
        )


def _torch_operands(scene: Scene, name: str, rows: int, outputs: int, inner: int) -> Inputs:
    """Return torch._scaled_mm's inputs; by block, a's scales are contiguous along M (native/cuda/ScaledBlas.cpp)."""
    a, b = _operands(scene, "e4m3", rows, outputs, inner)
    a8, b8 = a.code.view(torch.float8_e4m3fn), b.code.view(torch.float8_e4m3fn).mT
    if name == BY_BLOCK:
        return a8, b8, a.scale.mT.contiguous().mT, b.scale.mT
    if name == BY_ROW:
        return a8, b8, *(torch.rand(shape, device=scene.device) for shape in ((rows, 1), (1, outputs)))
    return a8, b8, *(torch.rand((), device=scene.device) for _ in range(2))


def _small(scene: Scene) -> Iterator[Kernel]:
    """Yield the products of decoding: one row, a few, sixteen."""
    shapes = [(1, 40, 208)] if scene.is_tiny else [(1, 4_096, 4_096), (4, 4_096, 4_096), (16, 4_096, 4_096)]
    shapes += [] if scene.is_tiny else [(1, 11_264, 2_048), (1, 2_048, 2_048), (1, 32_768, 768)]
    for index, (rows, outputs, inner) in enumerate(shapes):
        for form in q8.FORMATS:

            def inputs(form: str = form, rows: int = rows, outputs: int = outputs, inner: int = inner) -> Inputs:
                return scene.randn(rows, inner), q8.quantise_weight(scene.randn(outputs, inner), form)

            def plain(rows: int = rows, outputs: int = outputs, inner: int = inner) -> Inputs:
                return scene.randn(rows, inner), scene.randn(outputs, inner)

            yield Kernel(
                op="small_matmul",
                shape=f"{form} {rows} × {outputs} × {inner}",
                inputs=inputs,
                run=gemv,
                error=error_of(gemv, lambda x, weight: x.float() @ q8.dequantise(weight, torch.float32).mT),
                tolerance=_ROUNDED,
                moved_bytes=1.0 * outputs * inner + 2.0 * rows * (outputs + inner),
                operations=2.0 * rows * outputs * inner,
                numbers="bf16",  # the format to which the weight is decoded
                rivals=(Rival("cuBLAS bf16, twice the bytes", plain, F.linear),),
                aims=(Aim("copy", 0.75),) if outputs >= 4_096 and inner >= 4_096 else (),
                rank=0 if index in (0, 2) else 1,
            )


def _loads(scene: Scene, experts: int, rows: int) -> Tensor:
    """Return the end of each expert's rows, where every row chose an expert at random."""
    chosen = torch.randint(0, experts, (rows,), device=scene.device)
    return torch.bincount(chosen, minlength=experts).cumsum(0)


def _grouped_shapes(scene: Scene) -> list[tuple[int, int, int, int]]:
    """Return experts, mean rows per expert, outputs and inputs: those of tr-600m-moe, ismail-512 and tr-2b-moe."""
    if scene.is_tiny:
        return [(3, 16, 24, 48)]
    return [(8, 1_024, 1_536, 1_024), (8, 256, 1_536, 1_024), (4, 4_096, 1_024, 512), (16, 512, 2_048, 1_536)]


def _grouped(scene: Scene) -> Iterator[Kernel]:
    for index, (experts, mean, outputs, inner) in enumerate(_grouped_shapes(scene)):
        rows = experts * mean
        for form in ("bf16", *q8.FORMATS):
            inputs = functools.partial(_grouped_operands, scene, form, experts, rows, outputs, inner)
            run = functools.partial(grouped_matmul, dtype=scene.dtype)
            element = 2.0 if form == "bf16" else 1.0
            yield Kernel(
                op="grouped_matmul",
                shape=f"{form} {experts} × {mean} × {outputs} × {inner}",
                inputs=inputs,
                run=run,
                error=error_of(run, _slice_by_slice),
                tolerance=_ROUNDED,
                moved_bytes=element * (rows + experts * outputs) * inner + 2.0 * rows * outputs,
                operations=2.0 * rows * outputs * inner,
                numbers=NUMBERS.get(form, form),
                rivals=tuple(_grouped_rivals(scene, experts, rows, outputs, inner)),
                aims=(Aim(DENSE, 0.9),) if form == "bf16" else (),
                rank=0 if index < 2 else 1,
            )


def _grouped_operands(scene: Scene, form: str, experts: int, rows: int, outputs: int, inner: int) -> Inputs:
    x_MK, stack_ENK = scene.randn(rows, inner), scene.randn(experts, outputs, inner)
    ends = _loads(scene, experts, rows)
    if form == "bf16":
        return x_MK, stack_ENK, ends
    return q8.quantise_rows(x_MK, form), q8.quantise_weight(stack_ENK, form), ends


def _slice_by_slice(rows: Tensor | QuantTensor, stack: Tensor | QuantTensor, ends: Tensor) -> Tensor:
    """Return each expert's product in fp32; reads the ends on the host."""
    x_MK, stack_ENK = (t.float() if isinstance(t, Tensor) else q8.dequantise(t, torch.float32) for t in (rows, stack))
    slices = zip([0, *ends.tolist()[:-1]], ends.tolist(), stack_ENK, strict=True)
    return torch.cat([x_MK[start:end] @ matrix_NK.mT for start, end, matrix_NK in slices])


def _grouped_rivals(scene: Scene, experts: int, rows: int, outputs: int, inner: int) -> Iterator[Rival]:
    def dense() -> Inputs:
        return scene.randn(rows, inner), scene.randn(outputs, inner).mT

    def library() -> Inputs:
        x_MK, stack_ENK, ends = _grouped_operands(scene, "bf16", experts, rows, outputs, inner)
        return x_MK, stack_ENK.mT, ends.int()

    yield Rival(DENSE, dense, torch.mm)
    if scene.is_card:
        yield Rival("torch grouped_mm", library, lambda x, stack, ends: F.grouped_mm(x, stack, offs=ends))


def _outer(scene: Scene) -> Iterator[Kernel]:
    for index, (experts, mean, outputs, inner) in enumerate(_grouped_shapes(scene)):
        rows = experts * mean
        for form in ("bf16", *q8.FORMATS):
            element = 2.0 if form == "bf16" else 1.0
            yield Kernel(
                op="grouped_outer",
                shape=f"{form} {experts} × {mean} × {outputs} × {inner}",
                inputs=functools.partial(_outer_operands, scene, form, experts, rows, outputs, inner),
                run=functools.partial(grouped_wgrad, resident=experts, dtype=scene.dtype),
                error=functools.partial(_outer_error, scene),
                tolerance=_ROUNDED,
                moved_bytes=element * rows * (outputs + inner) + 2.0 * experts * outputs * inner,
                operations=2.0 * rows * outputs * inner,
                numbers=NUMBERS.get(form, form),
                rivals=tuple(_outer_rivals(scene, experts, rows, outputs, inner)),
                rank=0 if index == 0 and form == "bf16" else 1,
            )


def _outer_operands(scene: Scene, form: str, experts: int, rows: int, outputs: int, inner: int) -> Inputs:
    left_MO, right_MI, ends = scene.randn(rows, outputs), scene.randn(rows, inner), _loads(scene, experts, rows)
    if form == "bf16":
        return left_MO, right_MI, ends
    return q8.quantise_columns(left_MO, form), q8.quantise_columns(right_MI, form), ends


def _outer_rivals(scene: Scene, experts: int, rows: int, outputs: int, inner: int) -> Iterator[Rival]:
    def dense() -> Inputs:
        return scene.randn(rows, outputs).mT, scene.randn(rows, inner)

    def library() -> Inputs:
        left_MO, right_MI, ends = _outer_operands(scene, "bf16", experts, rows, outputs, inner)
        return left_MO.mT, right_MI, ends.int()

    yield Rival(DENSE, dense, torch.mm)
    if scene.is_card:
        yield Rival("torch grouped_mm", library, lambda left, right, ends: F.grouped_mm(left, right, offs=ends))


def _outer_error(scene: Scene, left: Tensor | QuantTensor, right: Tensor | QuantTensor, ends: Tensor) -> float:
    experts = len(ends)
    result = grouped_wgrad(left, right, ends, experts, scene.dtype)
    left_MO, right_MI = (
        side.float() if isinstance(side, Tensor) else q8.dequantise(side, torch.float32).mT for side in (left, right)
    )
    masks = [mask_M(ends, len(left_MO), expert)[:, None] for expert in range(experts)]
    return distance(result, torch.stack([(left_MO * mask).mT @ right_MI for mask in masks]))
