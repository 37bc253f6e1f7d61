"""In which numbers a model is read, and why; knows no tensor and no file."""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

from lowvram_kernels.dispatch import Card, choose

Flow = Literal["fp32", "bf16", "fp16"]
Precision = Literal["fp8", "int8", "bf16", "fp32"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)
_PLAIN: dict[Precision, Flow] = {"bf16": "bf16", "fp32": "fp32"}  # those that are computed in as they are kept


class InferencePrecision(NamedTuple):
    """kept: the numbers of the matrices.  flow: those between them.  reason: why, as half a sentence."""

    kept: Precision | Flow
    flow: Flow
    reason: str


def choose_inference_precision(
    card: Card, asked: Precision | None = None, has_fast_bf16: bool = True, measured: str = ""
) -> InferencePrecision:
    """Choose how a model is read on a card.

    asked: what the user wants, None where the card decides.  has_fast_bf16: of the processor, where that computes.
    measured: how that was found out, as half a sentence, where it was measured.
    """
    flow = _choose_flow(card, has_fast_bf16)
    if asked is not None:
        return InferencePrecision(asked, _PLAIN.get(asked, flow), "as asked")
    if card.platform == "cpu":
        has = "has" if has_fast_bf16 else "has no"
        return InferencePrecision(flow, flow, measured or f"the processor {has} instructions that multiply bf16")
    if card.platform == "mps":
        return InferencePrecision(
            "bf16", flow, "half of fp32's bytes; 8 bits would be decoded by plain PyTorch at every token"
        )
    small = choose("small_matmul", card)
    if small.backend == "triton":
        return InferencePrecision("fp8", flow, "half of bf16's bytes to read for each token, decoded in registers")
    if flow == "fp16":
        return InferencePrecision("int8", flow, f"{small.reason}; INT8 is decoded with the fewest passes")
    return InferencePrecision("bf16", flow, small.reason)


def inference_precision_as_trained(precision: str) -> InferencePrecision:
    """Return the reading in which a run's own validation reads.  precision: the run's `train.precision`."""
    flow: Flow = "fp32" if precision == "fp32" else "fp16" if precision == "fp16" else "bf16"
    return InferencePrecision(flow, flow, "as the run validates")


def _choose_flow(card: Card, has_fast_bf16: bool) -> Flow:
    if card.platform == "cpu" and not has_fast_bf16:
        return "fp32"
    return "bf16" if card.capability is None or card.features.has_bf16 else "fp16"
