"""Weights that move during backward: as in an ordinary step, but one at a time, and never to be tried again."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo
from torch import Tensor

from lowvram.config.plan import Plan, choose_plan
from lowvram.config.run import RunConfig
from lowvram.config.train import TrainConfig
from lowvram.errors import ConfigError, TrainingError
from lowvram.objective import Batch, causal_loss
from lowvram.train.events import Event, Halved, Saved, StepDone
from lowvram.train.loss_scale import FIRST_LOSS_SCALE
from lowvram.train.optim import LeanOptimizer
from lowvram.train.prepare import prepare
from lowvram.train.settings import RunSettings
from lowvram.train.start import keep_plan, resolve_plan
from lowvram.train.step import learn_in_backward
from lowvram.train.trainer import Trainer
from tests.tiny import KINDS, prepare_home, tiny_run

# Both orders of work are the same sums in fp32; only the factor of clipping, exactly 1 here, is applied elsewhere.
RELATIVE = 1e-6
# A step's norm is the root of a sum of squares, added in another order.
NORM_RELATIVE = 1e-5
UNCLIPPED = 1e6
KIND = "mla-moe"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("home")
    prepare_home(place)
    return place


def run_of(home: Path, name: str, kind: str = KIND, tied: bool = True, during: bool = True, **train: Any) -> RunConfig:
    what = tiny_run(home, kind, name, update_during_backward=during, **train)
    run = what.run.model_copy(update={"prompts": (), "validate_every": 1000})
    return what.model_copy(update={"run": run, "model": what.model.model_copy(update={"tied": tied})})


def trainer_of(what: RunConfig, **plan: Any) -> Trainer:
    return prepare(RunSettings(what, Plan(micro_batch=8, accumulate=1, **plan), torch.device("cpu")))


def tensors_of(trainer: Trainer) -> dict[str, Tensor]:
    weights, memory = trainer.state.tensors()
    return {name: tensor.clone() for name, tensor in (weights | memory).items()}


def unequal(first: dict[str, Tensor], second: dict[str, Tensor]) -> set[str]:
    assert first.keys() == second.keys()
    return {name for name in first if not torch.equal(first[name], second[name])}


def steps_of(events: list[Event]) -> list[StepDone]:
    return [event for event in events if isinstance(event, StepDone)]


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("kind", KINDS)
def test_where_nothing_is_clipped_the_steps_are_ordinary_ones(home: Path, kind: str, tied: bool) -> None:
    runs = {}
    for during in (False, True):
        trainer = trainer_of(run_of(home, f"same-{kind}-{tied}-{during}", kind, tied, during, clip=UNCLIPPED))
        runs[during] = steps_of(list(trainer.run())), tensors_of(trainer)
    for ordinary, ours in zip(runs[False][0], runs[True][0], strict=True):
        assert ours.loss == pytest.approx(ordinary.loss, rel=RELATIVE)
        assert ours.gradient_norm == pytest.approx(ordinary.gradient_norm, rel=NORM_RELATIVE)
        assert ours.skipped == 0
    truth, found = runs[False][1], runs[True][1]
    assert truth.keys() == found.keys()
    for name, tensor in truth.items():
        assert (found[name] - tensor).norm() <= RELATIVE * tensor.norm(), name


def learn(trainer: Trainer, clip: float = UNCLIPPED, loss_of: Any = None, scale: float = 1.0) -> Any:
    model, train = trainer.state.model, trainer.config.train
    batch = Batch(trainer.loader.batch(0, 8), torch.arange(8))

    def plainly(batch: Batch) -> Any:
        return causal_loss(model, batch, dtype=torch.float32)

    given = (batch, trainer.state.optimizer, 256, train.optimizer.lr, clip, scale)
    return learn_in_backward(model, loss_of or plainly, *given)


def watch_steps(monkeypatch: pytest.MonkeyPatch, look: Any) -> None:
    step_one = LeanOptimizer.step_one

    def watched(self: LeanOptimizer, weight: Tensor) -> None:
        look(self, weight)
        step_one(self, weight)

    monkeypatch.setattr(LeanOptimizer, "step_one", watched)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_only_one_gradient_exists_at_a_time(home: Path, monkeypatch: pytest.MonkeyPatch, tied: bool) -> None:
    trainer = trainer_of(run_of(home, "alone", tied=tied))
    weights, seen, most = list(trainer.state.model.parameters()), list[weakref.ref[Tensor]](), 0

    def look(_: LeanOptimizer, weight: Tensor) -> None:
        nonlocal most
        most = max(most, sum(other.grad is not None for other in weights))
        assert [ref for ref in seen if ref() is not None] == [], "a gradient outlives its weight's step"
        assert weight.grad is not None
        seen.append(weakref.ref(weight.grad))

    watch_steps(monkeypatch, look)
    learn(trainer)
    assert most == 1
    assert len(seen) == len(weights) > 15, "every weight has made its one step"
    assert all(weight.grad is None for weight in weights)


def test_each_weight_is_clipped_by_its_own_norm_to_an_even_share(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given, norms = dict[str, float](), dict[str, float]()
    trainer, plain = trainer_of(run_of(home, "clipped")), trainer_of(run_of(home, "plain"))
    share = 0.03
    clip = share * len(list(plain.state.model.parameters())) ** 0.5
    batch = Batch(plain.loader.batch(0, 8), torch.arange(8))
    (causal_loss(plain.state.model, batch, dtype=torch.float32).total / 256).backward()
    norms = {name: float(weight.grad.norm()) for name, weight in plain.state.model.named_parameters()}
    name_of = {weight: name for name, weight in trainer.state.model.named_parameters()}

    def look(optimizer: LeanOptimizer, weight: Tensor) -> None:
        given[name_of[weight]] = float((weight.grad * optimizer.gradient_scale).norm())

    watch_steps(monkeypatch, look)
    found = learn(trainer, clip=clip, scale=64.0)
    assert min(norms.values()) < share < max(norms.values()), "both sides of the limit must be seen"
    for name, norm in norms.items():
        assert given[name] == pytest.approx(min(norm, share), rel=1e-3), name
    assert sum(norm**2 for norm in given.values()) ** 0.5 <= clip
    whole = sum(norm**2 for norm in norms.values()) ** 0.5
    assert float(found.stats[1]) == pytest.approx(whole, rel=NORM_RELATIVE), "the norm told is that before clipping"


def poison(monkeypatch: pytest.MonkeyPatch, step: int, value: float, weight_name: str | None = None) -> None:
    """Make one weight's gradient, or all of them, not finite in one step, counted from 1."""

    def bad_loss(model: Any, batch: Batch, **options: Any) -> Any:
        loss = causal_loss(model, batch, **options)
        if batch.sample_B.is_meta or int(batch.sample_B[0]) != 8 * (step - 1):
            return loss
        if weight_name is None:
            return loss._replace(total=loss.total * value)
        hook = dict(model.named_parameters())[weight_name].register_hook(lambda gradient: spoil(gradient))

        def spoil(gradient: Tensor) -> Tensor:
            hook.remove()
            return gradient.clone().view(-1).index_fill_(0, torch.tensor([3]), value).view(gradient.shape)

        return loss

    monkeypatch.setattr("lowvram.train.step.causal_loss", bad_loss)


@pytest.mark.parametrize("value", [torch.nan, torch.inf], ids=str)
@pytest.mark.parametrize("optimizer", [{}, {"bits": 8}, {"name": "muon"}], ids=["32-bit", "8-bit", "muon"])
@pytest.mark.parametrize("weight", ["embedding", "blocks.0.ffn.down_proj.weight", "blocks.1.ffn.norm.weight"])
def test_a_gradient_that_is_not_finite_skips_its_weight_alone_and_is_counted(
    home: Path, monkeypatch: pytest.MonkeyPatch, weight: str, optimizer: dict[str, Any], value: float
) -> None:
    poison(monkeypatch, 3, value, weight)
    trainer = trainer_of(run_of(home, f"skips-{weight}-{value}-{optimizer}", optimizer=optimizer))
    before: dict[str, Tensor] = {}
    for event in trainer.run():
        if isinstance(event, StepDone):
            after = tensors_of(trainer)
            own = {name for name in after if name.endswith(weight) and after[name].numel()}
            if event.step == 3:
                assert own & unequal(before, after) == set(), "neither weight nor state may move"
                steps = {name for name in after if name.startswith("step.")} - own
                assert steps <= unequal(before, after), "every other weight steps"
            assert event.skipped == (event.step == 3)
            assert torch.tensor([event.loss, event.gradient_norm]).isfinite().all()
            before = after
    assert float(before[f"step.{weight}"]) == 5
    assert all(tensor.float().isfinite().all() for tensor in before.values())


def test_an_fp16_step_that_overflows_halves_the_scale_and_counts_every_weight(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(monkeypatch, 2, torch.inf)
    trainer = trainer_of(run_of(home, "half", precision="fp16"))
    scales, skipped, rows = [], [], []
    for event in trainer.run():
        if isinstance(event, StepDone):
            scales.append(trainer.state.loss_scale)
            skipped.append(event.skipped)
            rows.append((trainer.state.skipped_in_row, event.is_skipped))
    assert scales == [FIRST_LOSS_SCALE] + [FIRST_LOSS_SCALE / 2] * 5
    assert skipped == [0, len(list(trainer.state.model.parameters())), 0, 0, 0, 0]
    assert rows == [(0, False), (1, True), (0, False), (0, False), (0, False), (0, False)]


@pytest.mark.parametrize("recipe", [{}, {"weights": "bf16", "optimizer": {"name": "muon"}}], ids=["fp32", "bf16"])
def test_recomputation_gives_the_same_bits(home: Path, recipe: dict[str, Any]) -> None:
    found = {}
    for recompute in ("none", "attention", "block"):
        what = run_of(home, f"again-{recompute}-{len(recipe)}", dropout=0.1, **recipe)
        trainer = trainer_of(what, recompute=recompute)
        list(trainer.run())
        found[recompute] = tensors_of(trainer)
    for recompute in ("attention", "block"):
        assert unequal(found["none"], found[recompute]) == set()


@pytest.mark.nightly
def test_compiled_blocks_make_the_same_steps(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lowvram.train.compilation.BACKEND", "aot_eager")
    torch._dynamo.reset()
    eager, ours = (
        trainer_of(run_of(home, name, tokens=3 * 256, clip=0.1), compile=name == "compiled")
        for name in ("eager", "compiled")
    )
    pairs = zip(steps_of(list(eager.run())), steps_of(list(ours.run())), strict=True)
    for first, second in pairs:
        assert second.loss == pytest.approx(first.loss, rel=NORM_RELATIVE)
        assert second.gradient_norm == pytest.approx(first.gradient_norm, rel=1e-4)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0


def run_out(monkeypatch: pytest.MonkeyPatch, trainer: Trainer, step: int, moved: int | None) -> None:
    """Run out of memory in a step, counted from 1: in its forward pass, or after that many weights have moved."""
    count = 0

    def fail() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    def look(_: LeanOptimizer, __: Tensor) -> None:
        nonlocal count
        count += trainer.state.step == step - 1
        if moved is not None and count > moved:
            fail()

    def loss_of(model: Any, batch: Batch, **options: Any) -> Any:
        if moved is None and trainer.state.step == step - 1:
            fail()
        return causal_loss(model, batch, **options)

    watch_steps(monkeypatch, look)
    monkeypatch.setattr("lowvram.train.step.causal_loss", loss_of)


def ends_without_memory(trainer: Trainer, message: str) -> list[Event]:
    events: list[Event] = []
    with pytest.raises(TrainingError, match=message):
        events.extend(trainer.run())
    return events


@pytest.mark.parametrize("moved", [None, 0], ids=["forward", "before the first weight"])
def test_memory_that_ends_before_a_weight_moved_costs_nothing(
    home: Path, monkeypatch: pytest.MonkeyPatch, moved: int | None
) -> None:
    truth = trainer_of(run_of(home, f"whole-{moved}"))
    list(truth.run())
    what = run_of(home, f"forward-{moved}")
    trainer = trainer_of(what)
    run_out(monkeypatch, trainer, 4, moved)
    events = ends_without_memory(
        trainer, r"in step 4, which .* cannot be cut\. No weight had moved\. .*what was learnt is saved\. Start .*block"
    )
    assert isinstance(events[-1], Saved)
    assert not any(isinstance(event, Halved) for event in events)
    assert all(weight.grad is None for weight in trainer.state.model.parameters())
    monkeypatch.undo()
    goes_on = trainer_of(what)
    assert [event.step for event in steps_of(list(goes_on.run()))] == [4, 5, 6]
    assert unequal(tensors_of(truth), tensors_of(goes_on)) == set()


@pytest.mark.parametrize("recipe", [{}, {"weights": "bf16", "optimizer": {"name": "muon"}}], ids=["fp32", "bf16"])
@pytest.mark.parametrize("rotation", [None, {"window": 1, "interval": 1, "idle": "int8"}], ids=["", "rotation"])
def test_memory_that_ends_between_two_weights_brings_the_last_checkpoint_back(
    home: Path, monkeypatch: pytest.MonkeyPatch, recipe: dict[str, Any], rotation: dict[str, Any] | None
) -> None:
    name = f"broken-{len(recipe)}-{rotation is None}"
    what = run_of(home, name, rotation=rotation, **recipe)
    first = trainer_of(what)
    for event in first.run():
        if isinstance(event, StepDone) and event.step == 3:
            first.stop()
    saved, numbers = tensors_of(first), first.state.numbers()
    trainer = trainer_of(what)
    run_out(monkeypatch, trainer, 5, moved=4)
    message = (
        r"in step 5, .*others not, so the checkpoint of step 3 is loaded again\. Start the run again with "
        r"`recompute=.block.`, or .*batch_tokens \(now 256\).*train\.update_during_backward = false"
    )
    events = ends_without_memory(trainer, message)
    assert not any(isinstance(event, Saved) for event in events), "what is broken must not be saved"
    assert unequal(saved, tensors_of(trainer)) == set()
    assert trainer.state.numbers() == numbers
    assert all(weight.grad is None for weight in trainer.state.model.parameters())
    assert [path.name for path in sorted(what.run.dir.glob("step-*"))] == ["step-00000003"]


def test_memory_that_ends_before_anything_was_saved_says_so(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = trainer_of(run_of(home, "nothing"), recompute="block")
    run_out(monkeypatch, trainer, 2, moved=1)
    ends_without_memory(trainer, r"others not, and nothing was saved yet\. Begin a new run\.dir with a smaller")
    assert list((home / "nothing").glob("step-*")) == []


def test_another_fault_than_memory_is_not_explained_away(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = trainer_of(run_of(home, "fault"))

    def fail(*_: object) -> None:
        raise RuntimeError("another fault")

    watch_steps(monkeypatch, fail)
    with pytest.raises(RuntimeError, match="another fault"):
        list(trainer.run())


TRAIN = TrainConfig(tokens=10**6, seq_len=512, batch_tokens=512 * 24, update_during_backward=True)


def test_a_step_has_one_micro_batch_and_no_other_is_taken(tmp_path: Path) -> None:
    whole = Plan(micro_batch=24, accumulate=1)
    assert TRAIN.micro_batches == [24]
    assert choose_plan(TRAIN) == (whole, "a step that updates during backward has one micro-batch")
    assert resolve_plan(tmp_path, TRAIN).plan == whole
    assert resolve_plan(tmp_path, TRAIN, 24).plan == whole
    message = (
        r"`micro_batch` is 2\. update_during_backward excludes accumulation: .* 24 sequences go at once\. .*: 24\."
    )
    with pytest.raises(ConfigError, match=message):
        resolve_plan(tmp_path, TRAIN, 2)


def test_a_plan_of_the_time_before_cuts_no_step_that_updates_during_backward(tmp_path: Path) -> None:
    keep_plan(tmp_path, Plan(micro_batch=4, accumulate=6))
    ordinary = TRAIN.model_copy(update={"update_during_backward": False})
    assert resolve_plan(tmp_path, ordinary).plan.micro_batch == 4
    plan, _, is_kept = resolve_plan(tmp_path, TRAIN)
    assert (plan, is_kept) == (Plan(micro_batch=24, accumulate=1), False)
