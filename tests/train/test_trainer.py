"""The loop around a step: what it yields, what it learns, when it saves; and that a bad gradient changes nothing."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lowvram.config.architecture import Moe
from lowvram.config.plan import choose_plan
from lowvram.config.run import RunConfig
from lowvram.errors import PromptError, TrainingError
from lowvram.model.ffn import Router, balance
from lowvram.objective import Batch, Loss, causal_loss
from lowvram.storage.checkpoint import find_checkpoint, size_of_files
from lowvram.storage.tensor_files import size_of_tensors
from lowvram.train.events import Event, Saved, StepDone, Stopped
from lowvram.train.loss_scale import FIRST_LOSS_SCALE, QUIET_STEPS
from lowvram.train.optim import LeanOptimizer
from lowvram.train.prepare import prepare
from lowvram.train.settings import RunSettings
from lowvram.train.state import TrainState
from lowvram.train.step import gradients, loss_for, update
from lowvram.train.trainer import MOST_SKIPPED, Trainer
from tests.tiny import KINDS, prepare_home, tiny_run

RELATIVE = 1e-5
every_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("home")
    prepare_home(place)
    return place


def trainer_of(what: RunConfig, micro_batch: int = 4) -> Trainer:
    return prepare(RunSettings(what, choose_plan(what.train, micro_batch)[0], torch.device("cpu")))


def with_run(what: RunConfig, **options: Any) -> RunConfig:
    return what.model_copy(update={"run": what.run.model_copy(update=options)})


def steps_of(events: list[Event]) -> list[StepDone]:
    return [event for event in events if isinstance(event, StepDone)]


def weights_of(trainer: Trainer) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in trainer.state.model.state_dict().items()}


def are_equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_events_come_in_the_order_in_which_things_happen(home: Path) -> None:
    events = list(trainer_of(tiny_run(home, run="order")).run())
    names = [type(event).__name__ for event in events]
    assert names == ["Started", *["StepDone"] * 4, "Evaluated", "StepDone", "StepDone", "Evaluated", "Sampled", "Saved",
                     "Stopped"]  # fmt: skip
    assert [event.step for event in events] == [0, 1, 2, 3, 4, 4, 5, 6, 6, 6, 6, 6]
    assert [event.tokens for event in steps_of(events)] == [256 * step for step in range(1, 7)]
    assert events[0].resumed_from is None
    assert events[0].steps == 6
    assert events[-2].directory == home / "order" / "step-00000006"
    assert events[-1] == Stopped(6, is_finished=True)
    assert events[-3].prompt == "Kış"


def test_whoever_watches_can_read_what_a_trainer_works_on(home: Path) -> None:
    trainer = trainer_of(tiny_run(home, run="watched"), micro_batch=2)
    assert (trainer.doing, trainer.micro_batches_begun) == ("starting", 0)
    work = {"StepDone": "step", "Evaluated": "validating", "Sampled": "sampling", "Saved": "saving"}
    for event in trainer.run():
        assert trainer.doing == work.get(type(event).__name__, trainer.doing)
        if isinstance(event, StepDone):
            assert trainer.micro_batches_begun == trainer.plan.accumulate == 4


def test_every_step_tells_its_measures(home: Path) -> None:
    for event in steps_of(list(trainer_of(tiny_run(home, run="measures")).run())):
        assert event.loss > 0
        assert event.gradient_norm > 0
        assert event.tokens_per_second > 0
        assert event.memory_bytes > 1 << 20
        assert event.left_s == pytest.approx((6 - event.step) * 256 / event.tokens_per_second)
        assert not event.is_skipped


@every_kind
def test_the_loss_falls(home: Path, kind: str) -> None:
    optimizer = {"name": "adamw", "lr": 1e-2}
    what = with_run(tiny_run(home, kind, f"falls-{kind}", tokens=40 * 256, optimizer=optimizer), prompts=())
    events = list(trainer_of(what, micro_batch=8).run())
    losses = [event.loss for event in steps_of(events)]
    assert len(losses) == 40
    assert losses[0] == pytest.approx(5.97, rel=0.02), "the logarithm of the vocabulary, at first"
    assert sum(losses[-5:]) / 5 < losses[0] - 1.5
    judged = [event.loss for event in events if type(event).__name__ == "Evaluated"]
    assert len(judged) == 10
    assert judged[-1] < judged[0] - 0.5


def one_batch(trainer: Trainer) -> Batch:
    return Batch(trainer.loader.batch(0, 8), torch.arange(8))


def test_a_runs_dropout_depends_on_its_seed_alone(home: Path) -> None:
    trainer = trainer_of(tiny_run(home, dropout=0.2))
    trains = [trainer.config.train.model_copy(update={"seed": seed}) for seed in (1, 2, 1)]
    totals = [loss_for(trainer.state.model, train, trainer.plan)(one_batch(trainer)).total for train in trains]
    assert totals[0] == totals[2]
    assert totals[0] != totals[1]


@every_kind
def test_accumulated_gradients_equal_those_of_one_large_micro_batch(home: Path, kind: str) -> None:
    trainer = trainer_of(tiny_run(home, kind))
    model, whole = trainer.state.model, one_batch(trainer)
    loss_of = functools.partial(causal_loss, model, dtype=torch.float32, dropout=0.2, seed=5)
    found = {}
    for size in (8, 4, 2, 1):
        model.zero_grad()
        parts = [Batch(*pair) for pair in zip(whole.token_BT.split(size), whole.sample_B.split(size), strict=True)]
        found[size] = (gradients(model, loss_of, parts, 256), {n: w.grad.clone() for n, w in model.named_parameters()})
    (stats, loads), truth = found[8]
    for size in (4, 2, 1):
        (own_stats, own_loads), own = found[size]
        torch.testing.assert_close(own_stats, stats, rtol=RELATIVE, atol=0)
        assert loads is None or torch.equal(own_loads, loads)
        for name, gradient in truth.items():
            assert (own[name] - gradient).norm() <= RELATIVE * gradient.norm(), name


def test_a_steps_loss_and_gradient_are_those_of_the_mean_over_all_its_targets(home: Path) -> None:
    trainer = trainer_of(tiny_run(home))
    model, whole = trainer.state.model, one_batch(trainer)
    parts = [Batch(*pair) for pair in zip(whole.token_BT.split(2), whole.sample_B.split(2), strict=True)]
    found = gradients(model, functools.partial(causal_loss, model, dtype=torch.float32), parts, 256)
    ours = {name: weight.grad.clone() for name, weight in model.named_parameters()}
    model.zero_grad()
    logit_NV = model.logits(whole.token_BT[:, :-1]).flatten(0, 1)
    mean = F.cross_entropy(logit_NV, whole.token_BT[:, 1:].flatten())
    mean.backward()
    norm = torch.stack([weight.grad.norm() for weight in model.parameters()]).norm()
    truth = torch.stack([mean.detach(), norm, torch.tensor(0.0)])
    torch.testing.assert_close(found.stats, truth, rtol=RELATIVE, atol=0)
    for name, weight in model.named_parameters():
        assert (ours[name] - weight.grad).norm() <= RELATIVE * weight.grad.norm(), name


def test_the_plan_changes_no_step_beyond_rounding(home: Path) -> None:
    runs = []
    for micro_batch in (8, 2):
        trainer = trainer_of(tiny_run(home, "mla-moe", f"plan-{micro_batch}", dropout=0.1), micro_batch)
        runs.append((steps_of(list(trainer.run())), weights_of(trainer)))
    (one, truth), (other, ours) = runs
    for first, second in zip(one, other, strict=True):
        assert second.loss == pytest.approx(first.loss, rel=RELATIVE)
        assert second.gradient_norm == pytest.approx(first.gradient_norm, rel=1e-4)
        assert (second.learning_rate, second.tokens) == (first.learning_rate, first.tokens)
    assert all((ours[name] - truth[name]).norm() <= 1e-3 * truth[name].norm() + 1e-9 for name in truth)


def note_norms(trainer: Trainer) -> list[float]:
    """Return a list that gets the norm of each gradient that the optimizer steps by, scaled as it is told to."""
    given: list[float] = []

    def look(optimizer: LeanOptimizer, *_: Any) -> None:
        grads = [weight.grad for group in optimizer.param_groups for weight in group["params"]]
        given.append(float(torch.nn.utils.get_total_norm(grads) * optimizer.gradient_scale))

    trainer.state.optimizer.register_step_pre_hook(look)
    return given


@pytest.mark.parametrize("clip", [1e-3, 0.3, 1e6])
def test_clipping_scales_the_whole_gradient_to_the_limit_and_lets_small_ones_be(home: Path, clip: float) -> None:
    trainer = trainer_of(tiny_run(home, run=f"clip-{clip}", clip=clip))
    given = note_norms(trainer)
    norms = [event.gradient_norm for event in steps_of(list(trainer.run()))]
    assert given == pytest.approx([min(clip, norm) for norm in norms], rel=2e-3 if clip < 1e-2 else 1e-4)
    assert (clip < min(norms)) != (clip == 1e6), "both sides of the limit must be seen"


def poison(monkeypatch: pytest.MonkeyPatch, is_bad: Callable[[int], bool], value: float = torch.nan) -> None:
    """Make the loss of each step for which is_bad(its first sample) not finite."""

    def bad_loss(model: Any, batch: Batch, **options: Any) -> Loss:
        loss = causal_loss(model, batch, **options)
        return loss._replace(total=loss.total * value) if is_bad(int(batch.sample_B[0])) else loss

    monkeypatch.setattr("lowvram.train.step.causal_loss", bad_loss)


@pytest.mark.parametrize("value", [torch.nan, torch.inf], ids=str)
def test_a_step_without_a_finite_gradient_is_skipped_counted_and_changes_nothing(
    home: Path, monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    # The fourth step's second micro-batch: samples 28 … 31.
    poison(monkeypatch, lambda sample: sample == 28, value)
    trainer = trainer_of(tiny_run(home, "mla-moe", f"skip-{value}"))
    before: dict[str, Tensor] = weights_of(trainer)
    moments = 0
    for event in trainer.run():
        if isinstance(event, StepDone):
            now, was_equal = weights_of(trainer), are_equal(before, weights_of(trainer))
            assert event.is_skipped == was_equal == (event.step == 4)
            assert trainer.state.skipped_in_row == int(event.step == 4)
            assert all(weight.grad is None for weight in trainer.state.model.parameters())
            before, moments = now, moments + (not was_equal)
    assert int(trainer.state.optimizer.state[trainer.state.model.embedding]["step"]) == moments == 5
    assert trainer.state.step == 6, "the data moves on"


def test_too_many_skipped_steps_in_a_row_end_the_run_and_save_nothing(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(monkeypatch, lambda sample: sample >= 16)
    what = with_run(tiny_run(home, run="lost", tokens=90 * 256), prompts=(), validate_every=1000)
    trainer, events = trainer_of(what), list[Event]()
    with pytest.raises(TrainingError, match=r"25 steps in a row .* step 27\. .*optimizer.lr \(now 0.001\)"):
        events.extend(trainer.run())
    assert MOST_SKIPPED == 25
    assert trainer.state.step == 2 + 25
    assert list((home / "lost").glob("step-*")) == []


def test_one_finite_step_begins_the_count_of_skipped_ones_anew(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    poison(monkeypatch, lambda sample: sample // 8 not in (0, 20))
    what = with_run(tiny_run(home, run="near", tokens=40 * 256), prompts=(), validate_every=1000)
    events = list(trainer_of(what).run())
    assert sum(event.is_skipped for event in steps_of(events)) == 38
    assert trainer_of(what).store.latest()[0].numbers()["skipped_in_row"] == 19


def state_of(**numbers: Any) -> TrainState:
    return TrainState(model=None, optimizer=None, **numbers)  # type: ignore[arg-type]


def test_the_loss_scale_halves_on_overflow_and_never_falls_below_one() -> None:
    state = state_of(loss_scale=4.0, quiet=7)
    scales = []
    for _ in range(4):
        state.update_loss_scale(finite=False, is_scaled=True)
        scales.append(state.loss_scale)
    assert scales == [2.0, 1.0, 1.0, 1.0]
    assert (state.quiet, state.skipped_in_row) == (0, 4)


def test_the_loss_scale_doubles_after_a_quiet_time_and_the_time_begins_anew() -> None:
    state = state_of(loss_scale=8.0)
    for _ in range(QUIET_STEPS - 1):
        state.update_loss_scale(finite=True, is_scaled=True)
    assert state.loss_scale == 8.0
    state.update_loss_scale(finite=True, is_scaled=True)
    assert (state.loss_scale, state.quiet) == (16.0, 0)
    for finite in (*[True] * (QUIET_STEPS - 1), False, *[True] * (QUIET_STEPS - 1)):
        state.update_loss_scale(finite, is_scaled=True)
    assert state.loss_scale == 8.0


def test_only_an_fp16_run_has_a_loss_scale() -> None:
    state = state_of()
    for finite in (True, False, True):
        state.update_loss_scale(finite, is_scaled=False)
    assert (state.loss_scale, state.quiet, state.skipped_in_row) == (1.0, 0, 0)


def test_an_fp16_run_scales_its_loss_but_neither_norm_nor_update_and_keeps_the_scale(home: Path) -> None:
    exact = steps_of(list(trainer_of(tiny_run(home, run="exact", clip=1e6)).run()))
    what = tiny_run(home, run="half", precision="fp16", clip=1e6)
    trainer = trainer_of(what)
    given = note_norms(trainer)
    rough = steps_of(list(trainer.run()))
    assert trainer.state.loss_scale == FIRST_LOSS_SCALE
    assert given == pytest.approx([event.gradient_norm for event in rough], rel=1e-4)
    for first, second in zip(exact, rough, strict=True):
        assert not second.is_skipped
        assert second.loss == pytest.approx(first.loss, rel=2e-3)
        assert second.gradient_norm == pytest.approx(first.gradient_norm, rel=2e-2)
    saved, _ = find_checkpoint(what.run.dir)
    assert saved.numbers()["loss_scale"] == FIRST_LOSS_SCALE
    assert saved.numbers()["quiet"] == 6


def test_balancing_biases_move_by_exactly_the_rate_towards_experts_that_were_used_less() -> None:
    router = Router(8, Moe(hidden=8, experts=5, top_k=2, expert_hidden=8, balance_rate=0.25))
    balance([router], torch.tensor([[3.0, 7.0, 5.0, 0.0, 10.0]]))
    assert router.bias_E.tolist() == [0.25, -0.25, 0.0, 0.25, -0.25]
    balance([router], torch.tensor([[4.0, 4.0, 4.0, 4.0, 4.0]]))
    assert router.bias_E.tolist() == [0.25, -0.25, 0.0, 0.25, -0.25]


def test_an_update_moves_each_layers_biases_by_its_own_loads(home: Path) -> None:
    trainer = trainer_of(tiny_run(home, "mla-moe"))
    model = trainer.state.model
    found = gradients(model, functools.partial(causal_loss, model, dtype=torch.float32), [one_batch(trainer)], 256)
    assert found.loads.shape == (1, 4)
    assert found.loads.sum().item() == 256 * 2
    update(model, trainer.state.optimizer, found.loads, 1e-3, 1.0)
    moved = (128 - found.loads[0]).sign() * 1e-3
    torch.testing.assert_close(model.moe_layers()[0].router.bias_E, moved, rtol=0, atol=0)


class Clock:
    """Stands still until it is told to go."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def monotonic(self) -> float:
        return self.now_s


def saved_steps(what: RunConfig, clock: Clock) -> list[int]:
    """Train, 100 seconds a step by that clock; return after which steps it saved."""
    saved = []
    for event in trainer_of(what).run():
        clock.now_s += 100.0 if isinstance(event, StepDone) else 0.0
        saved += [event.step] if isinstance(event, Saved) else []
    return saved


def test_runs_save_at_the_interval_asked_for_or_at_one_that_grows_with_their_size(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    for module in ("trainer", "saver"):
        monkeypatch.setattr(f"lowvram.train.{module}.time", SimpleNamespace(monotonic=clock.monotonic))
    what = with_run(tiny_run(home, tokens=22 * 256), prompts=(), validate_every=1000)
    asked = with_run(what, dir=home / "asked", save_every_minutes=5.0)
    assert saved_steps(asked, clock) == [3, 6, 9, 12, 15, 18, 21, 22]
    assert saved_steps(with_run(what, dir=home / "least"), clock) == [6, 12, 18, 22], "never more often than 600 s"
    weights, memory = trainer_of(asked), find_checkpoint(home / "asked")[0]
    size = size_of_tensors(weights.state.tensors()[0], memory.state()) + size_of_files(home / "tok")
    monkeypatch.setattr("lowvram.config.run.WRITTEN_PER_DAY_BYTES", size * 86_400 / 980)
    assert saved_steps(with_run(what, dir=home / "large"), clock)[-2:] == [20, 22]


def test_retention_reaches_the_checkpoints(home: Path) -> None:
    what = tiny_run(home, run="kept")
    what = with_run(what, keep=1, milestone_steps=2, disk_budget=10**9, save_every_minutes=1e-9, prompts=())
    trainer = trainer_of(what)
    store = trainer.store
    assert (store.run, store.keep, store.milestone_steps, store.budget_bytes) == (home / "kept", 1, 2, 10**9)
    list(trainer.run())
    assert sorted(int(path.name[5:]) for path in (home / "kept").glob("step-*")) == [2, 4, 6]


def test_a_run_that_is_stopped_before_its_first_step_saves_its_beginning(home: Path) -> None:
    trainer = trainer_of(tiny_run(home, run="at-once"))
    trainer.stop()
    names = [type(event).__name__ for event in trainer.run()]
    assert names == ["Started", "Saved", "Stopped"]
    assert find_checkpoint(home / "at-once")[0].step == 0


def test_a_sample_prompt_that_fills_the_context_is_refused_before_training(home: Path) -> None:
    what = with_run(tiny_run(home), prompts=("Kış", "çok uzun " * 12))
    with pytest.raises(PromptError, match=r"run\.prompts has \d+ tokens\. train\.seq_len is 32"):
        trainer_of(what)
