"""A measurement on a tiny model: its numbers make sense and predict the step that gave them; no time is asserted."""

from __future__ import annotations

import gc
import itertools
import math
from typing import Any

import pytest
import torch
from lowvram_kernels.dispatch import Card

from lowvram.config.model import ModelConfig
from lowvram.config.plan import Plan
from lowvram.config.train import TrainConfig
from lowvram.errors import MachineError
from lowvram.fit import calibrate as under_test
from lowvram.fit.calibrate import measure
from lowvram.fit.memory_curve import Work
from lowvram.fit.rehearse import rehearse
from lowvram.fit.throughput import SPREAD_REPEATED, Calibration, Rates, estimate, step_seconds, work_seconds
from lowvram.hardware.profile import load_profile
from tests.kernels.measures import take_workspaces
from tests.tiny import KINDS

CPU, HERE = load_profile("cpu"), torch.device("cpu")
EXACT = 1e-9
RATES = Rates(2e11, 9e10, 2.5e10, 1e-5)
WORK = Work(flops=1.5e11, moved_bytes=4e9, ops=1_900, attention_flops=5e10)


def model_of(kind: str) -> ModelConfig:
    return ModelConfig.model_validate({"layers": 2, "dim": 40, "vocabulary": 300, **KINDS[kind]})


def train_of(**more: Any) -> TrainConfig:
    given = {"tokens": 960, "seq_len": 24, "batch_tokens": 6 * 24, "precision": "fp32"}
    return TrainConfig.model_validate({**given, **more})


class Ticks:
    """A clock that moves on by the same seconds at every look: what is timed takes exactly that, whatever it is."""

    def __init__(self, tick_s: float) -> None:
        self._ticks = itertools.count()
        self._tick_s = tick_s

    def __call__(self) -> float:
        return next(self._ticks) * self._tick_s


def measure_tiny(kind: str = "gqa-rope", plan: Plan | None = None, **more: Any) -> Calibration:
    options = {name: more.pop(name) for name in ("micro_batch", "compiles", "clock") if name in more}
    plan = plan or Plan(micro_batch=2, accumulate=3)
    return measure("tiny", model_of(kind), train_of(**more), plan, HERE, CPU, **options)


@pytest.fixture(autouse=True)
def _be_quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(under_test, "_BUDGET_S", 0.01)
    monkeypatch.setattr(under_test, "_LOAD_S", 0.001)
    monkeypatch.setattr(under_test, "_LOAD_LENGTH", 32)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp8", "int8"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_model_gives_positive_finite_numbers(kind: str, precision: str) -> None:
    found = measure_tiny(kind, precision=precision)
    for number in (*found.rates[:4], found.micro_ratio, found.update_ratio):
        assert 0.0 < number < math.inf
    assert (found.profile_id, found.precision, found.timed) == ("cpu", precision, "tiny")
    assert (found.torch, found.threads) == (torch.__version__, torch.get_num_threads())
    assert found.compiled_ratio is None
    assert found.peak_bytes is None, "a processor's allocator does not say"


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp8", "int8"])
def test_each_load_gives_its_own_rate_and_no_other(monkeypatch: pytest.MonkeyPatch, precision: str) -> None:
    # Bytes take no time here, so that a load's rate is its operations by its seconds.
    seconds = {"mul": 1e-9, "product": 1.0, "attend": 3.0, "low_product": 7.0}
    asked: list[str] = []

    def answer(run: Any, *_: object, **__: object) -> float:
        asked.append(run.func.__name__)
        return seconds[asked[-1]]

    monkeypatch.setattr(under_test, "_median_seconds", answer)
    model, train = model_of("gqa-rope"), train_of(precision=precision)
    tokens, sequences, card = 6 * 24, 6, Card("cuda", (8, 9)) if precision == "fp8" else under_test.card_of(HERE)
    rates = under_test._time_loads(model, train, sequences, card, HERE, Ticks(0.25))
    assert asked == ["mul", "product", "attend", *(["low_product"] if precision in ("fp8", "int8") else [])]
    products = 2.0 * tokens * model.dim * 2 * model.ffn.hidden
    assert rates.product_flops_per_s == pytest.approx(products / seconds["product"], rel=1e-6)
    # Forward two products of every query with every key, backward five, on a processor counted without the causal mask.
    shown = 0.5 if card.platform == "cuda" else 1.0
    attention = shown * 7.0 * 2 * model.attention.heads * model.attention.head_dim * (tokens // 32) * 32**2
    assert rates.attention_flops_per_s == pytest.approx(attention / seconds["attend"], rel=1e-3)
    assert rates.attention_flops_per_s != pytest.approx(rates.product_flops_per_s, rel=0.5)
    has_kernel = precision == "fp8"
    # The kernel counts what it multiplies: codes are filled up with zeros to whole lines of 16 bytes.
    filled = products * (-(-model.dim // 16) * 16) / model.dim
    low = pytest.approx(filled / seconds["low_product"], rel=1e-6) if has_kernel else None
    assert rates.low_flops_per_s == low


@pytest.mark.parametrize("bits", [32, 8], ids=lambda bits: f"{bits}-bit")
@pytest.mark.parametrize(("micro_batch", "accumulate"), [(2, 3), (6, 1)], ids=["accumulating", "at-once"])
def test_the_step_that_was_timed_is_predicted_exactly(micro_batch: int, accumulate: int, bits: int) -> None:
    tick_s = 0.25
    plan, train = Plan(micro_batch=micro_batch, accumulate=accumulate), train_of(optimizer={"bits": bits})
    found = measure_tiny(plan=plan, micro_batch=micro_batch, clock=Ticks(tick_s), optimizer={"bits": bits})
    rehearsal = rehearse(model_of("gqa-rope"), train, plan, under_test.card_of(HERE))
    expected_s = accumulate * tick_s + tick_s
    assert step_seconds(rehearsal, plan, train, CPU, found) == pytest.approx(expected_s, rel=EXACT)
    speed = estimate(rehearsal, plan, train, CPU, found)
    assert speed is not None
    assert speed.tokens_per_second == pytest.approx(train.batch_tokens / expected_s, rel=EXACT)
    assert speed.high == pytest.approx(speed.tokens_per_second * SPREAD_REPEATED, rel=EXACT), "it is the same step"
    assert found.ledger_bytes == rehearsal.ledger.peak_bytes


def test_a_processor_is_timed_with_one_sequence_unless_asked() -> None:
    train = train_of()
    found = measure_tiny(plan=Plan(micro_batch=6, accumulate=1))
    one = rehearse(model_of("gqa-rope"), train, Plan(micro_batch=1, accumulate=6), under_test.card_of(HERE))
    assert (found.micro, found.update) == (one.micro, one.update)


def test_blocks_are_compiled_on_a_processor_only_when_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []

    def refuse(_: object) -> Any:
        asked.append(True)
        raise MachineError("no compiler")

    monkeypatch.setattr(under_test, "compiled", refuse)
    assert measure_tiny().compiled_ratio is None
    assert not asked
    assert measure_tiny(compiles=True).compiled_ratio is None, "what cannot be compiled has no ratio, and is no error"
    assert asked == [True]


def test_what_compiling_gains_is_a_ratio_of_micro_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([2.0, 0.5])
    monkeypatch.setattr(under_test._Bench, "micro_seconds", lambda *_: next(times))
    monkeypatch.setattr(under_test, "compiled", lambda _: torch.no_grad())
    assert measure_tiny(compiles=True).compiled_ratio == pytest.approx(0.25, rel=EXACT)


def test_bytes_get_the_time_that_products_do_not_explain() -> None:
    seconds = work_seconds(WORK, RATES._replace(bytes_per_s=1.1e10), "cpu")
    found = under_test._explain_rest(WORK, seconds, RATES, "cpu")
    assert found.bytes_per_s == pytest.approx(1.1e10, rel=EXACT)
    assert found._replace(bytes_per_s=0.0) == RATES._replace(bytes_per_s=0.0), "nothing else moves"


@pytest.mark.parametrize(("seconds", "bytes_per_s"), [(0.1, 2.5e10), (60.0, 0.5e10)], ids=["too-fast", "too-slow"])
def test_no_time_makes_the_rate_of_bytes_absurd(seconds: float, bytes_per_s: float) -> None:
    assert under_test._explain_rest(WORK, seconds, RATES, "cpu").bytes_per_s == pytest.approx(bytes_per_s, rel=EXACT)


def test_a_card_that_waits_for_its_host_says_nothing_about_its_memory() -> None:
    waiting = WORK._replace(ops=1e6)
    assert under_test._explain_rest(waiting, 1e6 * RATES.launch_s, RATES, "cuda") == RATES


def test_the_median_is_of_three_runs_after_one_that_warms_up() -> None:
    runs: list[int] = []
    assert under_test._median_seconds(lambda: runs.append(1), HERE, Ticks(0.5)) == pytest.approx(0.5, rel=EXACT)
    assert len(runs) == 4


def test_a_clock_of_coarse_ticks_still_gives_a_number() -> None:
    assert under_test._median_seconds(lambda: None, HERE, lambda: 7.0) > 0.0


@pytest.mark.nightly
def test_nothing_of_a_measurement_stays_in_memory() -> None:
    def alive() -> int:
        gc.collect()
        return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())

    measure_tiny("mla-moe")
    before = alive()
    measure_tiny("mla-moe")
    assert alive() == before


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_a_cards_measured_peak_stands_beside_the_ledgers(kind: str) -> None:
    device = torch.device("cuda")
    plan = Plan(micro_batch=2, accumulate=3)
    held_bytes = take_workspaces()
    train = train_of(precision="bf16")
    found = measure("tiny", model_of(kind), train, plan, device, load_profile("rtx3060-12gb"), compiles=False)
    assert found.peak_bytes is not None
    assert found.peak_bytes > 0
    assert torch.cuda.memory_allocated(device) == held_bytes
    rehearsal = rehearse(model_of(kind), train, plan, under_test.card_of(device))
    speed = estimate(rehearsal, plan, train, load_profile("rtx3060-12gb"), found)
    assert speed is not None
    assert speed.is_measured
