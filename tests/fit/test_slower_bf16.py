"""A processor that is slower in bf16: what two measurements say together, and when fp32 is proposed for it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from lowvram.config.model import ModelConfig
from lowvram.config.plan import Plan
from lowvram.config.run_file import load_preset
from lowvram.config.train import TrainConfig
from lowvram.fit.calibration_store import compare_precisions, store_calibration
from lowvram.fit.rehearse import imagine, rehearse
from lowvram.fit.suggestions import LEAST_GAIN, Weighed, describe_slower, propose_fp32
from lowvram.hardware.detect import TorchBuild
from lowvram.hardware.profile import load_profile
from tests.fit.pair import measured_here, store_pair
from tests.tiny import KINDS

CPU = load_profile("cpu")
MODEL, PRESET = load_preset("tr-25m")
TRAIN = PRESET.model_copy(update={"precision": "bf16"})


@pytest.mark.parametrize("times", [0.5, 1.0, 1.62, 100.0])
def test_the_ratio_is_that_of_the_seconds_of_the_timed_micro_batches(tmp_path: Path, times: float) -> None:
    store_pair(times, tmp_path)
    assert compare_precisions(CPU, tmp_path) == pytest.approx(times, rel=1e-12)


def test_one_precision_alone_says_nothing_and_a_card_is_not_asked(tmp_path: Path) -> None:
    assert compare_precisions(CPU, tmp_path) is None
    for precision in ("bf16", "fp32"):
        home = tmp_path / precision
        store_calibration(measured_here(precision), home)
        assert compare_precisions(CPU, home) is None
    for profile_id in ("rtx5070", "m3-max"):
        for precision in ("bf16", "fp32"):
            store_calibration(measured_here(precision, profile_id=profile_id), tmp_path)
        assert compare_precisions(load_profile(profile_id), tmp_path) is None


@pytest.mark.parametrize(
    "other",
    [
        {"timed": "tr-60m"},
        {"threads": 7},
        {"torch": "2.10.0"},
        {"micro": {"flops": 3e9, "moved_bytes": 4e8, "ops": 90}},
        {"micro": {"flops": 0.0, "moved_bytes": 0.0, "ops": 0}},
    ],
    ids=["other name", "other threads", "other torch", "other model", "no work"],
)
def test_measurements_under_other_conditions_are_not_compared(tmp_path: Path, other: dict[str, Any]) -> None:
    store_pair(2.0, tmp_path)
    store_calibration(measured_here("fp32", **other), tmp_path)
    assert compare_precisions(CPU, tmp_path) is None


def test_measurements_with_another_torch_than_is_installed_are_not_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store_pair(2.0, tmp_path)
    for found in (None, TorchBuild("2.99", None)):
        monkeypatch.setattr("lowvram.fit.calibration_store.find_torch", lambda found=found: found)
        assert compare_precisions(CPU, tmp_path) is None


@pytest.mark.parametrize("kind", KINDS)
def test_both_precisions_of_a_model_have_the_same_operations_so_that_they_are_compared(kind: str) -> None:
    model = ModelConfig.model_validate({"layers": 2, "dim": 40, "vocabulary": 300, **KINDS[kind]})
    plan, counted = Plan(micro_batch=1, accumulate=2), []
    for precision in ("bf16", "fp32"):
        train = TrainConfig.model_validate({"tokens": 96, "seq_len": 24, "batch_tokens": 48, "precision": precision})
        work = rehearse(model, train, plan, imagine(CPU)).micro
        counted.append(work.flops + work.attention_flops)
    assert counted[0] == counted[1] > 0


def weigh(_: ModelConfig, train: TrainConfig) -> Weighed:
    assert train.precision == "fp32", "nothing else is asked for"
    return Weighed(1_000, None)


@pytest.mark.parametrize("times", [LEAST_GAIN, 1.62, 100 * LEAST_GAIN])
def test_fp32_is_proposed_with_the_measured_ratio_where_it_is_faster_and_fits(times: float) -> None:
    [change] = propose_fp32(MODEL, TRAIN, 1_000, weigh, times)
    assert (change.sets, change.peak_bytes) == (("train.precision=fp32",), 1_000)
    assert f"bf16 takes {times:.2f} times as long as fp32, as measured on this processor" in change.costs
    assert list(propose_fp32(MODEL, TRAIN, 999, weigh, times)) == []
    lacks = list(propose_fp32(MODEL, TRAIN, 1_000, lambda *_: Weighed(1_000, None, fits_host=False), times))
    assert lacks == []


@pytest.mark.parametrize("times", [None, 0.5, 1.0, math.nextafter(LEAST_GAIN, 0.0)])
def test_where_bf16_was_not_measured_to_be_slower_nothing_is_proposed(times: float | None) -> None:
    assert list(propose_fp32(MODEL, TRAIN, 1_000, weigh, times)) == []


@pytest.mark.parametrize("precision", ["fp32", "fp16", "fp8", "int8"])
def test_a_run_in_other_numbers_is_left_alone(precision: str) -> None:
    train = TRAIN.model_copy(update={"precision": precision})
    assert list(propose_fp32(MODEL, train, 1_000, weigh, 3.0)) == []


def test_the_ratio_is_said_with_two_digits() -> None:
    assert describe_slower(1.4999).startswith("bf16 takes 1.50 times as long as fp32")
