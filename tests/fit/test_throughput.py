"""Arithmetic of the roofline, the ranges around it, and measurements on disk; no time is taken here."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lowvram.config.plan import Ledger, Plan
from lowvram.config.train import TrainConfig
from lowvram.errors import DiskFullError
from lowvram.fit.calibration_store import load_calibration, measurements, store_calibration
from lowvram.fit.memory_curve import Rehearsal, Work
from lowvram.fit.throughput import (
    REST_OF_MACHINE_WATTS,
    SPREAD_MEASURED,
    SPREAD_REPEATED,
    SPREAD_UNMEASURED,
    SPREAD_UNMEASURED_LOW,
    Calibration,
    Rates,
    Speed,
    days,
    estimate,
    is_replayed,
    kwh,
    launch_seconds,
    published_rates,
    step_seconds,
    work_seconds,
)
from lowvram.hardware.profile import Profile, generic_profile, load_profile, profile_names
from tests.faulty_disk import FaultyDisk

EXACT = 1e-12
LEDGER = Ledger(100, 100, 200, 300, 50, 10, moment="loss")
MICRO = Work(flops=3e12, moved_bytes=7e10, ops=1_900, attention_flops=5e11)
UPDATE = Work(flops=0.0, moved_bytes=9e8, ops=300)
REHEARSAL = Rehearsal(LEDGER, MICRO, UPDATE)
TRAIN = TrainConfig(tokens=10**9, seq_len=512, batch_tokens=12 * 512)
PLAN = Plan(micro_batch=4, accumulate=3)
RATES = Rates(product_flops_per_s=2e13, attention_flops_per_s=9e12, bytes_per_s=3e11, launch_s=8e-6)


def card(**more: Any) -> Profile:
    given = {"id": "card", "name": "Card", "platform": "cuda", "capability": (8, 6), "memory_bytes": "12GiB"}
    speed = {"bandwidth_bytes_per_s": 3.6e11, "tflops": {"bf16": 27.0}, "watts": 170.0, "uncertainty": 0.1}
    return Profile.model_validate({**given, "fp8": "storage", "attention": "flash", **speed, **more})


def measured(**more: Any) -> Calibration:
    given = {"profile_id": "card", "precision": "bf16", "timed": "tr-25m", "micro": MICRO, "update": UPDATE}
    ratios = {"micro_ratio": 1.3, "update_ratio": 0.7, "ledger_bytes": 760, "torch": "2.13.0", "threads": 2}
    return Calibration.model_validate(
        {**given, **RATES._asdict(), **ratios, "date": "2026-01-02T03:04:05+00:00", **more}
    )


def speed_of(plan: Plan = PLAN, profile: Profile | None = None, found: Calibration | None = None) -> Speed:
    speed = estimate(REHEARSAL, plan, TRAIN, profile or card(), found)
    assert speed is not None
    return speed


def test_a_part_takes_its_products_attention_and_bytes_one_after_the_other() -> None:
    expected_s = 3e12 / 2e13 + 5e11 / 9e12 + 7e10 / 3e11
    assert work_seconds(MICRO, RATES, "cuda") == pytest.approx(expected_s, rel=EXACT)


def test_products_on_an_nvidia_card_read_their_operands_while_they_compute() -> None:
    work = MICRO._replace(operand_bytes=2e10)
    rest_s = 5e11 / 9e12 + 5e10 / 3e11
    assert work_seconds(work, RATES, "cuda") == pytest.approx(3e12 / 2e13 + rest_s, rel=EXACT)
    slow = RATES._replace(product_flops_per_s=1e15)
    assert work_seconds(work, slow, "cuda") == pytest.approx(2e10 / 3e11 + rest_s, rel=EXACT), "its reads bound it"
    assert [work_seconds(work, RATES, other) for other in ("mps", "cpu")] == [
        work_seconds(MICRO, RATES, other) for other in ("mps", "cpu")
    ]


def test_experts_products_take_longer_on_a_card_than_one_product_of_as_many_operations() -> None:
    one, many = Work(4e12, 0.0, 0.0), Work(0.0, 0.0, 0.0, grouped_flops=4e12)
    assert work_seconds(many, RATES, "cuda") == pytest.approx(work_seconds(one, RATES, "cuda") / 0.65, rel=EXACT)


def test_launches_hide_behind_a_card_and_add_up_on_a_processor() -> None:
    busy_s = work_seconds(MICRO._replace(ops=0), RATES, "cuda")
    assert work_seconds(MICRO, RATES, "cuda") == busy_s
    assert work_seconds(MICRO, RATES, "cpu") == pytest.approx(busy_s + 1_900 * 8e-6, rel=EXACT)


@pytest.mark.parametrize("platform", ["cuda", "mps"])
def test_a_card_with_little_to_do_waits_for_its_host(platform: str) -> None:
    little = Work(flops=1e6, moved_bytes=1e6, ops=2_345)
    assert work_seconds(little, RATES, platform) == pytest.approx(2_345 * 8e-6, rel=EXACT)


@pytest.mark.parametrize(
    ("figures", "part"),
    [
        ({"bandwidth_bytes_per_s": 7.2e11}, MICRO._replace(flops=0.0, attention_flops=0.0)),
        ({"tflops": {"bf16": 54.0}}, MICRO._replace(moved_bytes=0.0)),
    ],
    ids=["bandwidth", "tflops"],
)
def test_twice_the_figure_halves_the_time_of_what_it_bounds(figures: dict[str, Any], part: Work) -> None:
    rehearsal = Rehearsal(LEDGER, part, Work(0.0, 0.0, 0.0))
    slow, fast = (step_seconds(rehearsal, PLAN, TRAIN, profile) for profile in (card(), card(**figures)))
    assert fast == pytest.approx(slow / 2, rel=EXACT)


def test_a_step_is_its_micro_batches_and_one_update() -> None:
    rates = published_rates(card(), "bf16")
    assert rates is not None
    expected_s = 3 * work_seconds(MICRO, rates, "cuda") + work_seconds(UPDATE, rates, "cuda")
    assert step_seconds(REHEARSAL, PLAN, TRAIN, card()) == pytest.approx(expected_s, rel=EXACT)
    assert speed_of().tokens_per_second == pytest.approx(TRAIN.batch_tokens / expected_s, rel=EXACT)


def test_no_efficiency_promises_more_products_than_the_card_has() -> None:
    for profile in map(load_profile, profile_names()):
        for precision, tflops in profile.tflops.items():
            rates = published_rates(profile, precision)
            assert rates is not None, profile.id
            assert rates.attention_flops_per_s < rates.product_flops_per_s <= tflops * 1e12, profile.id


def test_8_bits_have_a_rate_of_their_own_and_the_rest_is_bf16s() -> None:
    ada, blackwell, ampere = (load_profile(name) for name in ("rtx4070", "rtx5070", "rtx3060-12gb"))
    for profile in (ada, blackwell, ampere):
        plain, low = published_rates(profile, "bf16"), published_rates(profile, "int8")
        assert plain is not None
        assert low is not None
        assert low._replace(low_flops_per_s=None) == plain._replace(low_flops_per_s=None)
        assert low.low_flops_per_s == pytest.approx(0.5 * profile.tflops["int8"] * 1e12, rel=EXACT)
    assert published_rates(ada, "fp8") != published_rates(ada, "int8"), "FP8 tensor cores are half as fast there"
    assert published_rates(blackwell, "fp8") == published_rates(blackwell, "int8"), (
        "block scales are in the instruction"
    )
    fp8_there = published_rates(ampere, "fp8")
    assert fp8_there is not None
    assert fp8_there.low_flops_per_s is None


def test_products_of_8_bits_take_their_own_time() -> None:
    rates = published_rates(load_profile("rtx4070"), "int8")
    assert rates is not None
    plain, low = Work(4e12, 0.0, 0.0), Work(0.0, 0.0, 0.0, low_flops=4e12)
    times = work_seconds(plain, rates, "cuda") / work_seconds(low, rates, "cuda")
    assert times == pytest.approx((rates.low_flops_per_s or 0.0) / rates.product_flops_per_s, rel=EXACT)
    assert work_seconds(low, rates._replace(low_flops_per_s=None), "cuda") == work_seconds(plain, rates, "cuda")


def test_a_large_cache_serves_bytes_faster_than_memory_does() -> None:
    small, large = (published_rates(card(capability=capability), "bf16") for capability in ((8, 6), (8, 9)))
    assert small is not None
    assert large is not None
    assert small.bytes_per_s < 3.6e11 < large.bytes_per_s


def test_a_card_known_by_its_memory_alone_has_no_speed_but_an_order_of_plans() -> None:
    unknown = generic_profile(12 * 2**30)
    assert estimate(REHEARSAL, PLAN, TRAIN, unknown) is None
    twice = Rehearsal(LEDGER, MICRO._replace(flops=2 * MICRO.flops), UPDATE)
    assert step_seconds(REHEARSAL, PLAN, TRAIN, unknown) < step_seconds(twice, PLAN, TRAIN, unknown) < math.inf


def test_a_precision_without_a_figure_has_no_speed() -> None:
    fp16 = TRAIN.model_copy(update={"precision": "fp16"})
    assert estimate(REHEARSAL, PLAN, fp16, card()) is None


def test_a_measurement_gives_a_card_without_figures_its_speed() -> None:
    unknown = generic_profile(12 * 2**30)
    speed = estimate(REHEARSAL, PLAN, TRAIN, unknown, measured(profile_id=unknown.id))
    assert speed is not None
    assert speed.is_measured


def test_the_step_that_was_measured_comes_back_exactly() -> None:
    micro_s, update_s = 0.81, 0.037
    ratios = {
        "micro_ratio": micro_s / work_seconds(MICRO, RATES, "cuda"),
        "update_ratio": update_s / work_seconds(UPDATE, RATES, "cuda"),
    }
    found = measured(**ratios)
    assert step_seconds(REHEARSAL, PLAN, TRAIN, card(), found) == pytest.approx(3 * micro_s + update_s, rel=EXACT)
    compiled = measured(**ratios, compiled_ratio=0.6)
    plan = PLAN.model_copy(update={"compile": True})
    expected_s = 3 * micro_s * 0.6 + update_s
    assert step_seconds(REHEARSAL, plan, TRAIN, card(), compiled) == pytest.approx(expected_s, rel=EXACT)


def test_the_range_narrows_with_what_is_known() -> None:
    other = measured(micro=MICRO._replace(ops=1_899))
    widths = [speed_of(), speed_of(found=other), speed_of(found=measured())]
    assert [speed.is_measured for speed in widths] == [False, True, True]
    for speed, spread in zip(widths, (SPREAD_UNMEASURED * 1.1, SPREAD_MEASURED, SPREAD_REPEATED), strict=True):
        assert speed.high == pytest.approx(speed.tokens_per_second * spread, rel=EXACT)
        assert speed.low == pytest.approx(speed.tokens_per_second / spread, rel=EXACT)


def test_the_range_of_8_bits_is_wider_since_kernels_reach_less_of_their_figure() -> None:
    ada = load_profile("rtx4070")
    widths = []
    for precision in ("bf16", "int8"):
        speed = estimate(REHEARSAL, PLAN, TRAIN.model_copy(update={"precision": precision}), ada)
        assert speed is not None
        widths.append(speed.high / speed.tokens_per_second / (1.0 + ada.uncertainty))
    assert widths == pytest.approx([SPREAD_UNMEASURED, SPREAD_UNMEASURED_LOW], rel=EXACT)


def test_a_compiled_plan_that_was_not_timed_keeps_the_wider_range() -> None:
    plan = PLAN.model_copy(update={"compile": True})
    unknown, known = (speed_of(plan, found=measured(compiled_ratio=ratio)) for ratio in (None, 0.6))
    assert unknown.high / unknown.tokens_per_second == pytest.approx(SPREAD_MEASURED, rel=EXACT)
    assert known.high / known.tokens_per_second == pytest.approx(SPREAD_REPEATED, rel=EXACT)


@pytest.mark.parametrize("platform", ["mps", "cpu"])
def test_compiling_saves_bytes_and_launches_where_no_kernel_of_ours_fuses_them_and_no_products(platform: str) -> None:
    profile = card(platform=platform, capability=None)
    compiled = PLAN.model_copy(update={"compile": True})
    bytes_only = Rehearsal(LEDGER, Work(0.0, 7e10, 1_900), UPDATE)
    products_only = Rehearsal(LEDGER, Work(3e12, 0.0, 0.0), UPDATE)
    assert step_seconds(bytes_only, compiled, TRAIN, profile) < step_seconds(bytes_only, PLAN, TRAIN, profile)
    assert step_seconds(products_only, compiled, TRAIN, profile) == step_seconds(products_only, PLAN, TRAIN, profile)


def test_compiling_saves_nothing_that_our_kernels_save_already() -> None:
    compiled = PLAN.model_copy(update={"compile": True})
    assert step_seconds(REHEARSAL, compiled, TRAIN, card()) == step_seconds(REHEARSAL, PLAN, TRAIN, card())


@pytest.mark.parametrize("other", [{"profile_id": "rtx5070"}, {"precision": "fp16"}], ids=lambda other: str(*other))
def test_a_measurement_of_another_card_or_precision_is_not_used(other: dict[str, str]) -> None:
    assert speed_of(found=measured(**other)) == speed_of()


def test_days_and_electricity_follow_from_tokens_and_watts() -> None:
    speed = Speed(20_000.0, 15_000.0, 25_000.0, is_measured=False)
    assert days(864_000_000, speed) == pytest.approx(0.5, rel=EXACT)
    assert kwh(2.5, card()) == pytest.approx((170.0 + REST_OF_MACHINE_WATTS) * 60 / 1000, rel=EXACT)
    assert kwh(2.5, card(platform="mps", capability=None, watts=40.0)) == pytest.approx(40 * 60 / 1000, rel=EXACT)
    assert kwh(2.5, card(watts=None)) is None


def test_a_measurement_comes_back_from_disk_as_it_was(tmp_path: Path) -> None:
    found = measured(compiled_ratio=0.61, peak_bytes=777, micro_ratio=1 / 3)
    path = store_calibration(found, tmp_path)
    assert path == measurements(tmp_path) / "card-bf16.json"
    assert load_calibration("card", "bf16", tmp_path) == (found, "")


def test_a_new_measurement_replaces_the_old_one_and_no_other(tmp_path: Path) -> None:
    store_calibration(measured(timed="old"), tmp_path)
    store_calibration(measured(precision="fp32", timed="other"), tmp_path)
    store_calibration(measured(timed="new"), tmp_path)
    loaded = [load_calibration("card", precision, tmp_path)[0] for precision in ("bf16", "fp32")]
    assert [found.timed for found in loaded if found] == ["new", "other"]
    assert len(list(measurements(tmp_path).iterdir())) == 2


def test_a_card_that_was_never_measured_is_no_news(tmp_path: Path) -> None:
    assert load_calibration("card", "bf16", tmp_path) == (None, "")


def _tear(text: str) -> bytes:
    return text.encode()[: len(text) // 2]


def _of_version_1(text: str) -> bytes:
    return json.dumps({**json.loads(text), "version": 1}).encode()


def _without_a_field(text: str) -> bytes:
    return json.dumps({name: value for name, value in json.loads(text).items() if name != "launch_s"}).encode()


def _of_another_card(text: str) -> bytes:
    return text.replace('"card"', '"rtx5070"').encode()


def _with_a_rate_of_zero(text: str) -> bytes:
    return json.dumps({**json.loads(text), "bytes_per_s": 0.0}).encode()


NO_OBJECTS = {"empty": b"", "no text": b"\xff", "a list": b"[]", "deep": b'{"a":' * 100_000}


def _bytes(name: str) -> Any:
    return lambda _: NO_OBJECTS[name]


@pytest.mark.parametrize(
    "change",
    [_tear, _of_version_1, _without_a_field, _of_another_card, _with_a_rate_of_zero, *map(_bytes, NO_OBJECTS)],
    ids=["torn", "version-1", "field-missing", "other-card", "zero-rate", *NO_OBJECTS],
)
def test_a_file_that_cannot_be_meant_is_ignored_with_a_sentence(tmp_path: Path, change: Any) -> None:
    path = store_calibration(measured(), tmp_path)
    path.write_bytes(change(path.read_text(encoding="utf-8")))
    found, sentence = load_calibration("card", "bf16", tmp_path)
    assert found is None
    assert str(path) in sentence
    assert "`measure=True`" in sentence


def test_a_full_disk_leaves_the_old_measurement(tmp_path: Path) -> None:
    store_calibration(measured(timed="old"), tmp_path)
    for at in range(2):
        with pytest.raises(DiskFullError):
            store_calibration(measured(timed="new"), tmp_path, FaultyDisk("full", at))
        found, _ = load_calibration("card", "bf16", tmp_path)
        assert found is not None
        assert found.timed == "old"


def test_the_users_own_place_is_taken_where_no_home_is_named() -> None:
    assert measurements().name == "measurements"
    assert measurements().parent.name == "lowvram"


@pytest.mark.parametrize("module", ["throughput", "calibration_store"])
def test_an_answer_needs_no_torch(module: str) -> None:
    code = f"import sys, lowvram.fit.{module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("precision", ["int8", "fp8"])
@pytest.mark.parametrize("card", ["cpu", "m3-max"])
def test_no_speed_is_promised_for_products_in_8_bits_without_a_kernel(card: str, precision: str) -> None:
    profile = load_profile(card)
    assert published_rates(profile, precision) is None
    assert published_rates(profile, "bf16") is not None


def test_a_step_whose_graphs_fit_waits_for_no_launch() -> None:
    small = Rehearsal(LEDGER, Work(1e9, 1e6, 4_000.0), Work(0.0, 1e6, 100.0), recorded_bytes=1_000)
    launched, replayed = (step_seconds(small, PLAN, TRAIN, card(), None, limit) for limit in (999, 1_000))
    assert not is_replayed(small, 999)
    assert is_replayed(small, 1_000)
    assert launched == pytest.approx((PLAN.accumulate * 4_000 + 100) * launch_seconds("cuda"))
    assert replayed == pytest.approx(launched * 1e-6 / launch_seconds("cuda"))
    assert not is_replayed(REHEARSAL, 10**12), "it is not known what its graphs take"
    busy = small._replace(micro=Work(1e15, 1e12, 4_000.0))
    assert step_seconds(busy, PLAN, TRAIN, card(), None, 1_000) == pytest.approx(
        step_seconds(busy, PLAN, TRAIN, card()), rel=1e-3
    )
