"""What is said beside a predicted speed follows from which cards have been measured."""

from __future__ import annotations

import pytest

from lowvram.fit.evidence import describe_evidence
from lowvram.fit.receipts import ReceiptSummary
from lowvram.hardware.profile import load_profile, measured_ids, profile_names


@pytest.mark.parametrize(
    "card, measured, said",
    [
        ("rtx5070", [], "estimated; no GeForce has been measured by us yet"),
        ("rtx5070", ["h200", "m3"], "estimated; no GeForce has been measured by us yet"),
        (
            "rtx5070",
            ["h200", "rtx4060"],
            "estimated; this card has not been measured by us yet, other GeForce cards have",
        ),
        (
            "rtx5070",
            ["rtx5070"],
            "estimated; our kernels have been measured on this card (profiles/measured/rtx5070.md)",
        ),
        ("m3-max", ["h200", "rtx4060"], "estimated; no Apple chip has been measured by us yet"),
        ("m3-max", ["m4"], "estimated; this card has not been measured by us yet, other Apple cards have"),
        ("h100", ["h200"], "estimated; no NVIDIA H100 SXM 80GB has been measured by us yet"),
        ("cpu", ["h200"], "estimated from one processor's figures, and processors differ by far"),
    ],
)
def test_each_card_says_what_speaks_for_its_speed(card: str, measured: list[str], said: str) -> None:
    assert describe_evidence(load_profile(card), measured, False) == said
    assert describe_evidence(load_profile(card), measured, True) == "measured on this machine"


def test_the_cards_that_were_measured_are_those_of_the_catalogue() -> None:
    assert set(measured_ids()) <= set(profile_names())
    assert "h200" in measured_ids()


def test_receipts_of_a_card_are_counted_beside_its_speed() -> None:
    said = describe_evidence(load_profile("rtx5070"), ["h200"], False, ReceiptSummary(3, 0.8, 0.25))
    assert said == "estimated, and corrected by 3 receipts of such a card, median error 25% before"
