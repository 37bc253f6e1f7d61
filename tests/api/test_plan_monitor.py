"""What fit promised a run: the plan it begins with, and what is said when its first steps are not as reckoned."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lowvram.api import target
from lowvram.api.plan_monitor import PlanMonitor
from lowvram.config.plan import Plan
from lowvram.config.run import RunConfig
from lowvram.errors import MachineError
from lowvram.fit.search import PlanConstraints
from lowvram.hardware.detect import Detected
from lowvram.hardware.profile import load_profile
from lowvram.train.events import StepDone
from tests.flows.typed import typed
from tests.tiny import prepare_home, tiny_run

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("home")
    prepare_home(folder)
    return folder


@pytest.fixture
def what(home: Path) -> RunConfig:
    return tiny_run(home, run="promised")


def stand_on(monkeypatch: pytest.MonkeyPatch, free_bytes: int, gpu: str | None = None) -> None:
    """Let this machine be one with a card, or with a processor, that has so much memory free."""
    profile = load_profile(gpu) if gpu else load_profile("cpu")
    monkeypatch.setattr(target, "detect", lambda: Detected(profile, free_bytes, "invented"))


def done(step: int, memory_bytes: int, speed: float = 1e9) -> StepDone:
    return StepDone(step, step * 256, 5.0, 1.0, 1e-3, speed, memory_bytes, 1.0, False)


def test_a_new_run_begins_with_the_plan_that_fits_and_keeps_it(home: Path) -> None:
    run_file = home / "run.toml"
    model = "layers = 2\ndim = 32\nattention = { kind = 'gqa', heads = 4, kv_heads = 2, head_dim = 8 }\n"
    model += "ffn = { kind = 'swiglu', hidden = 64 }\n"
    data = "train = 'shards/train'\nvalid = 'shards/valid'\ntokenizer = 'tok'\n"
    train = "tokens = 1024\nseq_len = 32\nbatch_tokens = 256\nprecision = 'fp32'\n"
    run_file.write_text(f"[model]\n{model}[data]\n{data}[train]\n{train}[run]\ndir = 'new'\nprompts = []\n")
    report = typed("train", run_file, "--device", "cpu")
    assert report.code == 0, report.err
    kept = Plan.model_validate_json((home / "new/plan.json").read_bytes())
    assert f"Plan: {kept.micro_batch} sequence" in report.err
    assert kept.micro_batch * kept.accumulate == 8
    assert not kept.compile, "on a processor runs stay reproducible"


def test_less_room_makes_the_plan_smaller_and_none_at_all_is_an_error_with_a_way_out(
    what: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    fixed = load_profile("cpu").host_process_bytes
    stand_on(monkeypatch, fixed + 2**29)
    roomy = PlanMonitor(what, CPU).rehearse_fit()
    stand_on(monkeypatch, fixed + int(roomy.search_result.peak_bytes * 0.9))
    tight = PlanMonitor(what, CPU).rehearse_fit()
    assert roomy.search_result.fits
    assert tight.search_result.fits
    assert tight.search_result.peak_bytes < 0.9 * roomy.search_result.peak_bytes
    assert tight.search_result.plan != roomy.search_result.plan
    assert PlanMonitor(what, CPU).choose() == (tight.search_result.plan, tight.search_result.reason)
    stand_on(monkeypatch, fixed + 1_000)
    with pytest.raises(MachineError, match="does not fit") as refused:
        PlanMonitor(what, CPU).choose()
    assert "lowvram fit" in str(refused.value)
    assert '`micro_batch=1` with `recompute="block"`' in str(refused.value)


def test_the_processor_is_judged_where_it_was_asked_for_whatever_card_there_is(
    what: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_on(monkeypatch, 8 * 2**30, "rtx5070")
    assert PlanMonitor(what, CPU).budget.profile.id == "cpu"


def stand_on_card(monkeypatch: pytest.MonkeyPatch, name: str, gigabytes: int, free_bytes: int) -> None:
    """Let torch have a card; what torch says of it counts, whatever the driver's library says."""
    facts = SimpleNamespace(name=name, major=12, minor=0, total_memory=gigabytes * 2**30)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda device: facts)
    # Asking for it has made a context, which is not free any more.
    free_now = free_bytes - load_profile("rtx5070").context_bytes
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda device: (free_now, facts.total_memory))


@pytest.fixture
def on_card(what: RunConfig, monkeypatch: pytest.MonkeyPatch) -> tuple[PlanMonitor, list[Any]]:
    """A monitor for a run on a card that is not here, bound to its plan; the caps that were asked for."""
    caps: list[Any] = []
    stand_on_card(monkeypatch, "NVIDIA GeForce RTX 5070", 12, 10 * 2**30)
    monkeypatch.setattr("lowvram.api.plan_monitor.cap_memory", lambda device, size: caps.append((device.type, size)))
    monkeypatch.setattr("torch.cuda.reset_peak_memory_stats", lambda device: None)
    monitor = PlanMonitor(what.model_copy(update={"train": what.train.model_copy(update={"precision": "bf16"})}),
                      torch.device("cuda", 0))  # fmt: skip
    monitor.enforce(Plan(micro_batch=2, accumulate=4, recompute="block"))
    return monitor, caps


def test_the_allocator_is_capped_at_what_tensors_and_its_losses_may_take(
    on_card: tuple[PlanMonitor, list[Any]],
) -> None:
    monitor, caps = on_card
    limit = monitor.budget.limit_bytes
    profile = load_profile("rtx5070")
    assert limit == profile.limit_bytes(free_bytes=10 * 2**30)
    assert caps == [("cuda", profile.allocator_bytes(limit))]
    assert limit < caps[0][1] <= 10 * 2**30 - profile.context_bytes
    room = monitor.room_to_compile(0)
    assert room is not None
    assert 0 < limit - room < 2**20, "less by the optimizer's states, which do not exist yet"


def test_the_third_step_is_held_against_the_ledger(on_card: tuple[PlanMonitor, list[Any]]) -> None:
    monitor, _ = on_card
    ledger = limit_of(monitor)
    assert [monitor.check_step(done(step, ledger * 2)) for step in (1, 2)] == [None, None]
    beside = monitor.budget.profile.workspace_bytes
    assert "more" in (monitor.check_step(done(3, int(ledger * 1.2) + beside)) or "")
    monitor.enforce(Plan(micro_batch=2, accumulate=4, recompute="block"))
    assert [monitor.check_step(done(step, ledger)) for step in (4, 5, 6)] == [None, None, None]


def test_torchs_workspace_and_what_compiling_saves_are_no_surprise(on_card: tuple[PlanMonitor, list[Any]]) -> None:
    monitor, _ = on_card
    ledger, beside = limit_of(monitor), monitor.budget.profile.workspace_bytes
    for compiled, measured in ((False, ledger + beside), (True, ledger // 2), (False, ledger // 2)):
        monitor.enforce(Plan(micro_batch=2, accumulate=4, recompute="block", compile=compiled))
        said = [monitor.check_step(done(step, measured)) for step in (1, 2, 3)][-1]
        assert (said is not None) == (not compiled and measured < ledger)


def limit_of(monitor: PlanMonitor) -> int:
    assert monitor._rehearsal is not None
    return monitor._rehearsal.ledger.peak_bytes


def test_the_pace_after_the_first_steps_is_held_against_the_speed(
    on_card: tuple[PlanMonitor, list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monitor, _ = on_card
    ledger, expected = limit_of(monitor), monitor._speed.tokens_per_second
    for seconds_a_token, is_slow in ((0.5 / expected, False), (2.9 / expected, False), (3.5 / expected, True)):
        monitor.enforce(Plan(micro_batch=2, accumulate=4, recompute="block"))
        told = []
        for step in range(1, 12):
            # The first steps compile and load kernels: a minute that says nothing of those to come.
            now = 60.0 * min(step, 3) + 256 * step * seconds_a_token
            monkeypatch.setattr("lowvram.api.plan_monitor.time", SimpleNamespace(monotonic=lambda now=now: now))
            told.append(monitor.check_step(done(step, ledger)))
        assert [step for step, said in enumerate(told, 1) if said] == ([10] if is_slow else [])
    assert "spilling" in told[9]


def test_a_card_without_figures_promises_no_speed(what: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_on_card(monkeypatch, "AMD Radeon RX 7900 XT", 20, 19 * 2**30)
    monitor = PlanMonitor(what, torch.device("cuda", 0))
    report = monitor.rehearse_fit()
    assert monitor.budget.profile.name == "AMD Radeon RX 7900 XT", "and not the processor, which NVML leaves"
    assert report.search_result.fits
    assert report.speed is None
    assert report.days is None


def test_on_a_processor_nothing_is_capped_and_nothing_compared(what: RunConfig) -> None:
    monitor = PlanMonitor(what, CPU)
    monitor.enforce(Plan(micro_batch=2, accumulate=4))
    assert monitor.room_to_compile(0) is None
    assert [monitor.check_step(done(step, 1, speed=1e-9)) for step in range(1, 12)] == [None] * 11


def test_on_windows_attention_is_that_of_a_torch_without_flash(monkeypatch: pytest.MonkeyPatch) -> None:
    def attention_of(gpu: str, desktop: Any = None) -> str:
        return target.describe_target(gpu, desktop=desktop).profile.attention

    assert attention_of("rtx5070") == "flash"
    assert attention_of("rtx5070", "windows") == "efficient"
    assert attention_of("m3-max", "windows") == "math"
    monkeypatch.setattr(target.sys, "platform", "win32")
    assert attention_of("rtx5070") == "efficient"
    assert attention_of("rtx5070", "none") == "efficient"
    stand_on(monkeypatch, 8 * 2**30, "rtx5070")
    assert target.detect_target().profile.attention == "efficient"


def test_what_was_asked_for_is_planned_as_fit_would(what: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    fixed = load_profile("cpu").host_process_bytes
    plain = PlanMonitor(what, CPU).rehearse_fit(PlanConstraints(2, "none")).search_result.peak_bytes
    stand_on(monkeypatch, fixed + int(plain * 1.06 / 0.94))
    monitor = PlanMonitor(what, CPU)
    for constraints in (PlanConstraints(2), PlanConstraints(None, "block"), PlanConstraints(2, "block")):
        found = monitor.rehearse_fit(constraints).search_result
        assert monitor.choose(*constraints) == (found.plan, "you asked for it")
        assert constraints.micro_batch in (None, found.plan.micro_batch)
        assert constraints.recompute in (None, found.plan.recompute)
    plan, reason = monitor.choose(8, "none")
    assert (plan.micro_batch, plan.recompute) == (8, "none")
    assert "not expected to fit" in reason


def test_a_plan_that_no_longer_fits_is_told(what: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = Plan(micro_batch=8, accumulate=1)
    assert PlanMonitor(what, CPU).warn_if_tight(plan) is None
    stand_on(monkeypatch, load_profile("cpu").host_process_bytes + 1_000_000)
    assert "memory may run out" in (PlanMonitor(what, CPU).warn_if_tight(plan) or "")


def test_bf16_on_a_card_without_tensor_cores_for_it_is_told(what: RunConfig) -> None:
    bf16 = what.train.model_copy(update={"precision": "bf16"})
    assert "fp16" in (target.warn_of_precision(bf16, load_profile("rtx2070")) or "")
    assert target.warn_of_precision(bf16, load_profile("rtx3060-12gb")) is None
    assert target.warn_of_precision(what.train, load_profile("rtx2070")) is None


@pytest.mark.parametrize(
    ("precision", "slow", "fast"),
    [
        ("fp8", ("cpu", "m2", "rtx2070", "rtx3070"), ("rtx4070", "rtx5070")),
        ("int8", ("cpu", "m2", "rtx2070"), ("rtx3070",)),
    ],
)
def test_8_bits_on_a_card_that_must_decode_them_are_told(
    what: RunConfig, precision: str, slow: tuple[str, ...], fast: tuple[str, ...]
) -> None:
    train = what.train.model_copy(update={"precision": precision})
    for name in slow:
        profile = load_profile(name)
        assert f'"{profile.dtype}" is faster' in (target.warn_of_precision(train, profile) or ""), name
    assert [target.warn_of_precision(train, load_profile(name)) for name in fast] == [None] * len(fast)
