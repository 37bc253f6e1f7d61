"""Chooses the precision of a model's weights and of its computation, with the reason; knows no tensor and no file."""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

from lowvram_kernels.dispatch import Card, choose

ComputeDtype = Literal["fp32", "bf16", "fp16"]
Precision = Literal["fp8", "int8", "bf16", "fp32"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)
# Precisions in which the weights are also computed with.
_PLAIN: dict[Precision, ComputeDtype] = {"bf16": "bf16", "fp32": "fp32"}


class InferencePrecision(NamedTuple):
    """How a model is loaded for inference.

    weight_precision: of the matrices.  compute_dtype: of the activations.  reason: why, as half a sentence.
    """

    weight_precision: Precision | ComputeDtype
    compute_dtype: ComputeDtype
    reason: str


def choose_inference_precision(
    card: Card,
    asked: Precision | None = None,
    has_fast_bf16: bool = True,
    measured: str = "",
    has_fast_int8: bool = False,
) -> InferencePrecision:
    """Choose the precision of a model on a card.

    asked: what the user wants, None where the card decides.  has_fast_bf16: whether the processor is faster in bf16,
    where it is the one that computes.  measured: how that was measured, as half a sentence; "" where it was not.
    has_fast_int8: whether INT8 weights, which it computes with in bf16, are the fastest there.
    """
    has_packed = has_fast_int8 and card.platform == "cpu" and asked in (None, "int8")
    compute_dtype = _choose_compute_dtype(card, has_fast_bf16 or has_packed)
    if asked is not None:
        return InferencePrecision(asked, _PLAIN.get(asked, compute_dtype), "as asked")
    if card.platform == "cpu":
        if has_packed:
            return InferencePrecision("int8", compute_dtype, measured)
        has = "has" if has_fast_bf16 else "has no"
        return InferencePrecision(
            compute_dtype, compute_dtype, measured or f"the processor {has} instructions that multiply bf16"
        )
    if card.platform == "mps":
        return InferencePrecision(
            "bf16", compute_dtype, "half of fp32's bytes; 8 bits would be decoded by plain PyTorch at every token"
        )
    small = choose("small_matmul", card)
    if small.backend == "triton":
        return InferencePrecision(
            "fp8", compute_dtype, "half of bf16's bytes to read for each token, decoded in registers"
        )
    if compute_dtype == "fp16":
        return InferencePrecision("int8", compute_dtype, f"{small.reason}; INT8 is decoded with the fewest passes")
    return InferencePrecision("bf16", compute_dtype, small.reason)


def inference_precision_as_trained(precision: str) -> InferencePrecision:
    """Return the precision in which a run's own validation computes.  precision: the run's `train.precision`."""
    compute_dtype: ComputeDtype = "fp32" if precision == "fp32" else "fp16" if precision == "fp16" else "bf16"
    return InferencePrecision(compute_dtype, compute_dtype, "as the run validates")


def _choose_compute_dtype(card: Card, has_fast_bf16: bool) -> ComputeDtype:
    if card.platform == "cpu" and not has_fast_bf16:
        return "fp32"
    return "bf16" if card.capability is None or card.features.has_bf16 else "fp16"
