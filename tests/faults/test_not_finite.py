"""Losses that are not finite, and spikes: skipped by a rule that a resumed run repeats, never saved, not for ever.

What is saved while steps are skipped, and the checkpoint that is kept from before them: tests/train/test_divergence.py.
"""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from lowvram.config.run import RunConfig
from lowvram.errors import TrainingError
from lowvram.objective import Batch, Loss, causal_loss
from lowvram.storage.checkpoint import find_checkpoint
from lowvram.train.divergence import MOST_SKIPPED, may_go_back
from lowvram.train.events import Event, StepDone, Stopped, WentBack
from lowvram.train.spikes import (
    LEAST_LOSSES,
    LEAST_RISE,
    WINDOW,
    History,
    add_loss,
    is_history,
    is_spike,
    limit_for,
)
from tests.faults.rule import break_at, expect_same_end, faulty_run, make_trainer, rows_of, train
from tests.faulty_disk import PowerCut
from tests.tiny import tensors_of, unequal


def follow_rule(losses: list[float], skips: bool) -> tuple[History, list[int]]:
    """Return the history after these losses, and the steps that were spikes."""
    history, spikes = History(), []
    for step, loss in enumerate(losses, 1):
        limit = limit_for(step, history)
        if is_spike(loss, limit):
            spikes.append(step)
        if math.isfinite(loss) and not (skips and loss > limit):
            history = add_loss(history, step, loss, limit)
    return history, spikes


def test_the_limit_is_the_median_and_six_robust_deviations_or_a_tenth() -> None:
    noise = random.Random(3)
    wide = [(step, noise.gauss(4.0, 0.3)) for step in range(1, 41)]
    losses = [loss for _, loss in wide]
    median = statistics.median(losses)
    deviation = 1.4826 * statistics.median(abs(loss - median) for loss in losses)
    assert limit_for(42, wide) == pytest.approx(median + 6 * deviation, rel=1e-6)
    assert 6 * deviation > LEAST_RISE * median
    assert limit_for(42, [(step, 4.0) for step in range(1, 41)]) == pytest.approx(4.4, rel=1e-6)
    assert limit_for(99, wide[: LEAST_LOSSES - 1]) == math.inf


def test_a_limit_does_not_depend_on_the_step_right_before_it() -> None:
    history = [(step, 3.0 + step / 100) for step in range(1, 31)]
    assert limit_for(31, history) == limit_for(31, history[:-1]) == limit_for(31, [*history[:-1], (30, 99.0)])
    assert limit_for(32, history) != limit_for(32, history[:-1])


@pytest.mark.parametrize("skips", [True, False], ids=["skipped", "learnt from"])
@pytest.mark.parametrize("bad", [[math.nan], [math.nan] * 10, [math.inf] * 10, [80.0], [80.0] * 10], ids=str)
def test_bad_losses_never_poison_the_window(bad: list[float], skips: bool) -> None:
    noise = random.Random(1)
    usual = [3.0 + noise.gauss(0.0, 0.02) for _ in range(100)]
    history, spikes = follow_rule([*usual[:50], *bad, *usual[50:]], skips)
    finite = [50 + at for at, loss in enumerate(bad, 1) if math.isfinite(loss)]
    assert spikes == finite, "neither fewer, nor any of the steps after them"
    assert limit_for(200, history) == pytest.approx(3.3, rel=0.02)


def test_a_level_that_rises_for_good_is_followed_where_spikes_are_learnt_from() -> None:
    noise = random.Random(2)
    losses = [3.0 + noise.gauss(0.0, 0.02) for _ in range(80)] + [4.0 + noise.gauss(0.0, 0.02) for _ in range(200)]
    _, spikes = follow_rule(losses, skips=False)
    assert 81 in spikes
    assert max(spikes) <= 80 + 2 * WINDOW, "a run is not told for ever"


def test_a_loss_that_falls_as_training_does_is_no_spike() -> None:
    noise = random.Random(4)
    losses = [2.5 + 7.0 * math.exp(-step / 40) + noise.gauss(0.0, 0.03) for step in range(400)]
    assert follow_rule(losses, skips=True)[1] == []


@pytest.mark.parametrize(
    "value",
    [None, 3, "x", {}, [1], [[1]], [[1, 2.0, 3]], [[1, 2]], [[1, None]], [[-1, 2.0]], [[True, 2.0]], [[1, math.inf]],
     [[1, 2.0]] * (WINDOW + 2)],
    ids=lambda value: str(value)[:12],
)  # fmt: skip
def test_a_history_that_no_run_can_have_saved_is_refused(value: object) -> None:
    assert not is_history(value)
    assert is_history([[1, 2.0]] * (WINDOW + 1))
    assert is_history([])


@pytest.mark.parametrize(
    "policy, healthy, at, to, may",
    [
        ("stop", 3, 0, 0, False),
        ("go back", None, 0, 0, False),
        ("go back", 3, 0, 0, True),
        ("go back", 0, 0, 0, True),
        ("go back", 3, 28, 3, False),
        ("go back", 0, 25, 0, False),
        ("go back", 40, 28, 3, True),
    ],
)
def test_a_run_goes_back_once_to_each_checkpoint(policy: str, healthy: int | None, at: int, to: int, may: bool) -> None:
    assert may_go_back(policy, healthy, at, to) is may


def run_of(home: Path, name: str, steps: int, options: Mapping[str, Any] | None = None, **recipe: Any) -> RunConfig:
    told = {"validate_every": 1000, "prompts": ()} | dict(options or {})
    adamw = {"optimizer": {"name": "adamw"}, "dropout": 0.0}
    return faulty_run(home, name, steps, "gqa-rope", told, **(adamw | recipe))


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> Callable[[Mapping[int, float]], None]:
    """Return what multiplies the losses of steps (counted from 1) by a factor, which may be NaN."""

    def make(factors: Mapping[int, float]) -> None:
        def bad_loss(model: Any, batch: Batch, **settings: Any) -> Loss:
            loss = causal_loss(model, batch, **settings)
            return loss._replace(total=loss.total * factors.get(1 + int(batch.sample_B[0]) // 8, 1.0))

        monkeypatch.setattr("lowvram.train.step.causal_loss", bad_loss)

    return make


def cut() -> None:
    raise PowerCut


def break_off(what: RunConfig, kind: type, step: int) -> None:
    """Train, and die when the log has the event."""
    with pytest.raises(PowerCut):
        break_at(what, kind, step, cut)


def steps_of(events: list[Event]) -> list[StepDone]:
    return [event for event in events if isinstance(event, StepDone)]


BAD: dict[str, dict[int, float]] = {
    "NaN once": {4: math.nan},
    "ten infinities": dict.fromkeys(range(4, 14), math.inf),
}


@pytest.mark.default_cases("ten infinities")
@pytest.mark.parametrize("factors", BAD.values(), ids=BAD)
def test_steps_that_are_not_finite_teach_nothing_and_a_resumed_run_skips_the_same(
    home: Path, poison: Any, factors: dict[int, float], request: pytest.FixtureRequest
) -> None:
    poison(factors)
    name = request.node.callspec.id.replace(" ", "-")
    whole, broken = run_of(home, f"whole-{name}", 16), run_of(home, f"broken-{name}", 16)
    skipped = [event.step for event in steps_of(train(whole)) if event.is_skipped]
    assert skipped == sorted(factors)
    break_off(broken, StepDone, min(factors))
    train(broken)
    expect_same_end(whole.run.dir, broken.run.dir)


NEVER = {"save_every_minutes": 1000.0}
SPIKE = LEAST_LOSSES + 2  # the first step whose limit is known


@pytest.mark.default_cases("skipped")
@pytest.mark.parametrize("skips", [True, False], ids=["skipped", "told"])
def test_a_spike_is_told_and_skipped_where_asked_and_a_resumed_run_does_the_same(
    home: Path, poison: Any, skips: bool
) -> None:
    poison({SPIKE: 5.0})
    whole, broken = (
        run_of(home, f"{name}-spike-{skips}", SPIKE + 4, skip_spikes=skips) for name in ("whole", "broken")
    )
    told = {event.step: event for event in steps_of(train(whole)) if event.spike_above is not None}
    assert list(told) == [SPIKE]
    assert told[SPIKE].is_skipped is skips
    row = rows_of(whole.run.dir, "StepDone")[SPIKE - 1]
    assert row["loss"] > row["spike_above"] == told[SPIKE].spike_above
    assert "spike_above" not in rows_of(whole.run.dir, "StepDone")[SPIKE]
    break_off(broken, StepDone, SPIKE - 1)
    break_off(broken, StepDone, SPIKE)
    train(broken)
    expect_same_end(whole.run.dir, broken.run.dir)


@pytest.mark.default_cases("fp16")
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_skipped_spike_changes_no_weight_and_no_loss_scale(home: Path, poison: Any, precision: str) -> None:
    poison({SPIKE: 5.0})
    trainer = make_trainer(run_of(home, f"kept-{precision}", SPIKE + 1, NEVER, skip_spikes=True, precision=precision))
    before: dict[str, Any] = {}
    scale = 0.0
    for event in trainer.run():
        if isinstance(event, StepDone) and event.step == SPIKE - 1:
            before, scale = tensors_of(trainer), trainer.state.loss_scale
        if isinstance(event, StepDone) and event.step == SPIKE:
            assert event.is_skipped
            assert unequal(before, tensors_of(trainer)) == []
            assert trainer.state.loss_scale == scale
            assert trainer.state.skipped_in_row == 1
    assert trainer.state.skipped_in_row == 0


def test_reading_numbers_late_skips_the_same_steps_and_ends_the_same(home: Path, poison: Any) -> None:
    poison({SPIKE: 5.0, SPIKE + 1: math.nan, SPIKE + 3: 4.0})
    at_once, late = (
        make_trainer(run_of(home, name, SPIKE + 5, NEVER, skip_spikes=True)) for name in ("at-once", "late")
    )
    late.reads_late = True
    found = [[(e.step, e.is_skipped, e.spike_above) for e in steps_of(list(each.run()))] for each in (at_once, late)]
    assert found[0] == found[1]
    assert [step for step, is_skipped, _ in found[0] if is_skipped] == [SPIKE, SPIKE + 1, SPIKE + 3]
    assert unequal(tensors_of(at_once), tensors_of(late)) == []
    assert at_once.state.numbers() == late.state.numbers()


GO_BACK = {"on_divergence": "go back"}


def test_a_run_that_diverged_goes_back_passes_over_the_steps_and_a_kill_repeats_it(home: Path, poison: Any) -> None:
    last = 4 + MOST_SKIPPED
    poison(dict.fromkeys(range(5, last + 1), math.nan))
    whole, broken = (run_of(home, f"{name}-back", last + 4, GO_BACK) for name in ("whole", "broken"))
    events = train(whole)
    assert [event for event in events if isinstance(event, WentBack)] == [WentBack(last, 4)]
    assert events[-1] == Stopped(last + 4, is_finished=True)
    assert [event.step for event in steps_of(events)] == list(range(1, last + 5))
    assert find_checkpoint(whole.run.dir)[0].numbers()["went_back_to"] == 4
    break_off(broken, WentBack, last)
    break_off(broken, StepDone, last + 1)
    train(broken)
    expect_same_end(whole.run.dir, broken.run.dir)


@pytest.mark.nightly
def test_what_a_run_goes_back_to_are_the_weights_of_that_step(home: Path, poison: Any) -> None:
    last = 4 + MOST_SKIPPED
    poison(dict.fromkeys(range(5, last + 1), math.nan))
    trainer = make_trainer(run_of(home, "weights-back", last + 2, GO_BACK))
    good: dict[str, Any] = {}
    for event in trainer.run():
        if isinstance(event, StepDone) and event.step == 4:
            good = tensors_of(trainer)
        if isinstance(event, WentBack):
            assert unequal(good, tensors_of(trainer)) == []
            assert (trainer.state.step, trainer.state.tokens) == (last, last * 256)
            trainer.stop()
    # A stop right there saves; that copy is no progress, so going back to it is going back to the same step.
    assert trainer._healthy_step == 4
    again = make_trainer(run_of(home, "weights-back", last + 2, GO_BACK))
    next(iter(again.run()))
    assert again._healthy_step == 4


def test_going_back_to_the_same_step_twice_ends_the_run(home: Path, poison: Any) -> None:
    poison(dict.fromkeys(range(5, 999), math.nan))
    what = run_of(home, "twice-back", 90, GO_BACK)
    last = 4 + MOST_SKIPPED
    message = rf"stopped at step {last + MOST_SKIPPED}\. The checkpoint of step 4 .* went back to it after step {last}"
    with pytest.raises(TrainingError, match=message):
        train(what)
    assert [row["step"] for row in rows_of(what.run.dir, "WentBack")] == [last]
    kept = sorted(int(path.name[5:]) for path in what.run.dir.glob("step-*"))
    assert {4, last} <= set(kept), "the good one, and its copy behind the steps that were passed over"


@pytest.mark.nightly
def test_a_run_that_went_back_may_go_back_again_from_what_it_learnt_since(home: Path, poison: Any) -> None:
    poison({**dict.fromkeys(range(5, 30), math.nan), **dict.fromkeys(range(33, 58), math.nan)})
    events = train(run_of(home, "further-back", 60, GO_BACK))
    assert [event for event in events if isinstance(event, WentBack)] == [WentBack(29, 4), WentBack(57, 32)]
    assert events[-1] == Stopped(60, is_finished=True)


def test_where_numbers_are_read_late_the_step_in_flight_teaches_nothing_and_is_told(home: Path, poison: Any) -> None:
    last = 4 + MOST_SKIPPED
    poison(dict.fromkeys(range(5, last + 1), math.nan))
    trainer = make_trainer(run_of(home, "late-back", last + 5, GO_BACK))
    trainer.reads_late = True
    events = list(trainer.run())
    assert [event.step for event in steps_of(events)] == list(range(1, last + 6))
    void = [event for event in steps_of(events) if event.is_skipped and math.isfinite(event.loss)]
    assert [event.step for event in void] == [last + 1]
    assert events[-1] == Stopped(last + 5, is_finished=True)
    assert trainer.state.went_back_to == 4


def test_spikes_without_end_stop_a_run_too(home: Path, poison: Any) -> None:
    poison(dict.fromkeys(range(20, 999), 5.0))
    with pytest.raises(TrainingError, match=r"no finite gradient or a loss that is a spike; stopped at step 44\."):
        train(run_of(home, "many-spikes", 60, NEVER, skip_spikes=True))


def test_a_run_without_a_whole_healthy_checkpoint_stops(home: Path, poison: Any) -> None:
    poison(dict.fromkeys(range(3, 999), math.nan))
    what = run_of(home, "none-back", 60, {**GO_BACK, **NEVER})
    with pytest.raises(TrainingError, match="There is no checkpoint from before that"):
        train(what)


def test_spikes_cannot_be_skipped_where_weights_move_during_backward(home: Path) -> None:
    with pytest.raises(ValueError, match=r"train\.skip_spikes is true; with train\.update_during_backward"):
        run_of(home, "refused", 6, skip_spikes=True, update_during_backward=True)
