"""In which numbers a model is read: the card's choice with its reason, the user's word, the run's own."""

from __future__ import annotations

import pytest
from lowvram_kernels.dispatch import Card

from lowvram.cli.app import build_parser
from lowvram.generate.precision import (
    PRECISIONS,
    InferencePrecision,
    Precision,
    choose_inference_precision,
    inference_precision_as_trained,
)

RTX_20, RTX_30, RTX_50 = (Card("cuda", capability) for capability in ((7, 5), (8, 6), (12, 0)))
BARE_20, BARE_30 = (card._replace(has_triton=False) for card in (RTX_20, RTX_30))


@pytest.mark.parametrize(
    "card, has_fast_bf16, weight_precision, compute_dtype, reason",
    [
        pytest.param(RTX_50, True, "fp8", "bf16", "decoded in registers", id="rtx50"),
        pytest.param(RTX_30, True, "fp8", "bf16", "decoded in registers", id="rtx30"),
        pytest.param(RTX_20, True, "fp8", "fp16", "decoded in registers", id="rtx20"),
        pytest.param(BARE_30, True, "bf16", "bf16", "Triton is not installed", id="rtx30-bare"),
        pytest.param(BARE_20, True, "int8", "fp16", "fewest passes", id="rtx20-bare"),
        pytest.param(Card("mps"), True, "bf16", "bf16", "half of fp32's bytes", id="mps"),
        pytest.param(Card("cpu"), True, "bf16", "bf16", "has instructions", id="cpu-new"),
        pytest.param(Card("cpu"), False, "fp32", "fp32", "has no instructions", id="cpu-old"),
    ],
)
def test_the_card_chooses_and_says_why(
    card: Card, has_fast_bf16: bool, weight_precision: str, compute_dtype: str, reason: str
) -> None:
    found = choose_inference_precision(card, None, has_fast_bf16)
    assert (found.weight_precision, found.compute_dtype) == (weight_precision, compute_dtype)
    assert reason in found.reason


def test_a_processor_reads_int8_where_it_was_measured_to_be_fastest_and_a_card_does_not() -> None:
    measured = "measured on this processor"
    for asked, reason in ((None, measured), ("int8", "as asked")):
        found = choose_inference_precision(Card("cpu"), asked, False, measured, has_fast_int8=True)
        assert found == InferencePrecision("int8", "bf16", reason)
    others = [(Card("cpu"), "fp8"), (Card("mps"), None), (RTX_50, None)]
    for card, asked in others:
        found = [choose_inference_precision(card, asked, False, measured, has_fast_int8=yes) for yes in (True, False)]
        assert found[0] == found[1]


@pytest.mark.parametrize("asked", PRECISIONS)
@pytest.mark.parametrize("card", [RTX_50, RTX_20, Card("mps"), Card("cpu")], ids=lambda card: str(card[:2]))
def test_what_is_asked_for_is_taken_on_every_card(card: Card, asked: Precision) -> None:
    found = choose_inference_precision(card, asked, has_fast_bf16=False)
    assert (found.weight_precision, found.reason) == (asked, "as asked")
    eight_bits = {"cuda": "fp16" if card == RTX_20 else "bf16", "mps": "bf16", "cpu": "fp32"}[card.platform]
    assert found.compute_dtype == (eight_bits if asked in ("fp8", "int8") else asked)


@pytest.mark.parametrize(
    "trained, expected", [("fp32", "fp32"), ("bf16", "bf16"), ("fp16", "fp16"), ("fp8", "bf16"), ("int8", "bf16")]
)
def test_a_run_is_evaluated_in_what_it_validates_in(trained: str, expected: str) -> None:
    assert inference_precision_as_trained(trained) == InferencePrecision(expected, expected, "as the run validates")  # type: ignore[arg-type]


def test_the_command_line_offers_every_precision() -> None:
    parsed = [build_parser().parse_args(["evaluate", "RUN", "--precision", name]) for name in PRECISIONS]
    assert [arguments.precision for arguments in parsed] == list(PRECISIONS)
    assert build_parser().parse_args(["evaluate", "RUN"]).precision is None
