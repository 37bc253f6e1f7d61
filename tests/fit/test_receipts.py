"""Receipts: written with a digest, refused where edited or of another version, and those that ship are sound."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from lowvram.errors import DataError
from lowvram.fit.receipts import Receipt, read_receipt, receipts_of, summarize, write_receipt
from lowvram.hardware.profile import find_receipts, profile_names
from tests.receipts import invent

FOLDER = Path(__file__).parents[2] / "profiles/measured/receipts"


def test_a_receipt_is_read_as_it_was_written(tmp_path: Path) -> None:
    receipt = invent().add(80_000, 2.0, 5 << 30).add(40_000, 1.0, 4 << 30)
    write_receipt(receipt, tmp_path / "receipt.json")
    assert read_receipt(tmp_path / "receipt.json") == receipt
    assert receipt.measured_tokens_per_s == 40_000.0
    assert receipt.measured_peak_bytes == 5 << 30
    assert receipt.speed_ratio == pytest.approx(0.8)


def test_an_hour_that_is_full_is_followed_by_another() -> None:
    receipt = invent().add(10, 3_000.0, 1).add(20, 600.0, 1).add(30, 5.0, 1)
    assert [(hour.tokens, hour.seconds) for hour in receipt.hours] == [(30, 3_600.0), (30, 5.0)]


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"measured_peak_bytes": 1}, "its digest does not fit its contents"),
        ({"digest": "0" * 64}, "its digest does not fit its contents"),
        ({"version": 2}, "its version is 2.*reads version 1"),
    ],
    ids=["a figure", "the digest", "the version"],
)
def test_a_receipt_that_was_edited_is_refused_with_the_reason(
    tmp_path: Path, change: dict[str, Any], reason: str
) -> None:
    path = tmp_path / "receipt.json"
    write_receipt(invent().add(80_000, 2.0, 5 << 30), path)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(DataError, match=reason) as refused:
        read_receipt(path)
    assert "\n" not in str(refused.value)


def test_what_is_no_receipt_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="There is no receipt"):
        read_receipt(tmp_path / "receipt.json")
    (tmp_path / "receipt.json").write_text("{")
    with pytest.raises(DataError, match="is not JSON"):
        read_receipt(tmp_path / "receipt.json")


@pytest.mark.parametrize("text", ["/home/ayse/run", "C:\\run", "ayse@host"])
def test_no_field_takes_a_path_or_an_address(text: str) -> None:
    words = ("profile_id", "card", "driver", "lowvram", "torch", "triton", "python", "system")
    for name in words:
        with pytest.raises(ValidationError):
            invent(**{name: text})


def test_receipts_of_a_card_are_summarized_by_their_medians(tmp_path: Path) -> None:
    paths = []
    for number, tokens in enumerate((25_000, 40_000, 100_000)):
        paths.append(tmp_path / f"{number}.json")
        write_receipt(invent().add(tokens, 1.0, 1 << 30), paths[-1])
    paths.append(tmp_path / "other.json")
    write_receipt(invent(profile_id="rtx4090").add(1, 1.0, 1), paths[-1])
    summary = summarize(receipts_of("rtx5070", "bf16", paths))
    assert summary is not None
    assert summary.receipts == 3
    assert (summary.ratio, summary.error) == pytest.approx((0.8, 0.5))
    assert summarize([invent()]) is None


def test_recorded_and_compiled_runs_are_summarized_apart_too() -> None:
    def run(tokens: int, **ways: bool) -> Receipt:
        return invent(**ways).add(tokens, 1.0, 1 << 30)

    recorded = {"compiled": False, "recorded": True}
    launched = {"compiled": False, "recorded": False}
    summary = summarize([run(50_000, **recorded), run(100_000, **launched), run(150_000, **launched)])
    assert summary is not None
    assert summary.ratio_of(compiled=False, recorded=True) == pytest.approx(1.0)
    assert summary.ratio_of(compiled=False, recorded=False) == pytest.approx(2.5)
    assert summary.ratio_of(compiled=True, recorded=False) == pytest.approx(2.0), "none of these: the median of all"


def test_receipts_that_were_sent_in_are_sound() -> None:
    assert (FOLDER / "README.md").is_file()
    assert find_receipts() == sorted(FOLDER.glob("*.json"))
    for path in FOLDER.glob("*.json"):
        receipt = read_receipt(path)
        assert receipt.profile_id in profile_names(), path
        assert sum(hour.seconds for hour in receipt.hours) >= 600, f"{path} measured less than ten minutes"
        assert 0 < receipt.measured_peak_bytes <= receipt.card_bytes, path
        assert receipt.speed_ratio is None or 0.05 < receipt.speed_ratio < 20, path
