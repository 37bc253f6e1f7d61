"""Recorded passes give the gradients that launched ones give, on a card and, with a stand-in for its graphs, here."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lowvram.config.plan import Plan
from lowvram.config.run import RunConfig
from lowvram.errors import MachineError
from lowvram.model.transformer import Transformer
from lowvram.objective import Batch, Loss, causal_loss
from lowvram.train import autotune as trial
from lowvram.train import cuda_graph as recording
from lowvram.train import trainer as trainer_module
from lowvram.train import validation as looks
from lowvram.train.autotune import autotune_cuda_graphs
from lowvram.train.cuda_graph import CapturedPass
from lowvram.train.events import Event, Recorded, StepDone, Stopped
from lowvram.train.prepare import prepare
from lowvram.train.settings import RunSettings
from lowvram.train.step import add_gradients, gradients
from lowvram.train.trainer import Trainer
from tests.model.variants import VARIANTS, VOCABULARY
from tests.tiny import KINDS, prepare_home, tiny_run

MIB = 2**20
HERE = pytest.param(
    "cpu", id="stand-in", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="a card has graphs")
)
CARD = pytest.param("cuda", id="card", marks=pytest.mark.gpu)
each_device = pytest.mark.parametrize("device", [HERE, CARD])


class Tape:
    """What a graph does, on a processor: it runs again, and writes its results where those of the recording lie."""

    def __init__(self) -> None:
        self.weights: list[torch.nn.Parameter] = []
        self.played = self.updated = 0

    def record(self, run: Callable[[], Loss], _pool: object) -> tuple[Callable[[], None], Loss, tuple[int, int]]:
        is_first = all(weight.grad is None for weight in self.weights)
        loss = run()
        made = [weight.grad for weight in self.weights]

        def play() -> None:
            self.played += 1
            again = run()
            for own, new in zip(loss, again, strict=True):
                if own is not None:
                    own.copy_(new)
            for own, weight in zip(made, self.weights, strict=True):
                if is_first and own is not None:
                    own.copy_(weight.grad)

        return play, loss, (0, 0)

    def record_update(self, run: Callable[[], Tensor], _pool: object) -> tuple[Callable[[], None], Tensor]:
        """Recording executes nothing; playing runs it by what the recording was given."""
        stats = torch.full((3,), torch.nan)

        def play() -> None:
            self.updated += 1
            stats.copy_(run())

        return play, stats


@pytest.fixture
def tape(monkeypatch: pytest.MonkeyPatch) -> Tape:
    tape = Tape()
    if not torch.cuda.is_available():
        monkeypatch.setattr(recording, "_capture", tape.record)
        monkeypatch.setattr(recording, "_warm_up", lambda run: run())
        monkeypatch.setattr(recording, "_record_update", tape.record_update)
    return tape


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("home")
    prepare_home(place)
    return place


def batches_of(count: int, device: str) -> list[Batch]:
    tokens = torch.randint(VOCABULARY, (count, 2, 25), generator=torch.Generator().manual_seed(3))
    return [Batch(tokens[i].to(device), torch.arange(2 * i, 2 * i + 2, device=device)) for i in range(count)]


def learn(model: Transformer, batches: list[Batch], add: Any, loss_of: Any) -> tuple[list[Tensor], Any]:
    """Return the gradients of a step, none of which lie in memory that another step writes."""
    model.zero_grad(set_to_none=True)
    found = gradients(model, loss_of, batches, 48 * len(batches), 4.0, 7, add)
    return [w.grad.clone() for w in model.parameters() if w.grad is not None], found


@each_device
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["gqa-alibi-window", "mla-moe", "gqa-moe-untied"])
def test_played_gradients_are_launched_ones_to_the_bit(
    kind: str, weights: torch.dtype, count: int, device: str, tape: Tape
) -> None:
    model = Transformer(VARIANTS[kind].model_copy(update={"vocabulary": VOCABULARY}), 0, device, weights)
    tape.weights = list(model.parameters())
    loss_of = functools.partial(causal_loss, model, dtype=torch.bfloat16, dropout=0.1, seed=7)
    first, second = batches_of(2 * count, device)[:count], batches_of(2 * count, device)[count:]
    played = CapturedPass(model, functools.partial(add_gradients, model, loss_of, 7), first[0], count > 1)
    assert all(weight.grad is None for weight in model.parameters())
    for batches in (second, first):  # the second step must know nothing of the first
        truth, expected = learn(model, batches, None, loss_of)
        ours, found = learn(model, batches, played.add, loss_of)
        assert len(ours) == len(truth) > 5
        assert all(map(torch.equal, ours, truth))
        assert torch.equal(found.stats, expected.stats)
        assert (found.loads is None) == (expected.loads is None)
        assert found.loads is None or torch.equal(found.loads, expected.loads)


def run_of(home: Path, name: str, kind: str = "gqa-rope", **train: Any) -> RunConfig:
    return tiny_run(home, kind, name, tokens=5 * 256, **train)


def trainer_of(what: RunConfig, device: str = "cpu", micro_batch: int = 4) -> Trainer:
    return prepare(RunSettings(what, Plan(micro_batch=micro_batch, accumulate=8 // micro_batch), torch.device(device)))


def record(trainer: Trainer, tape: Tape) -> Trainer:
    tape.weights = list(trainer.state.model.parameters())
    trainer.capture()
    return trainer


def losses_of(events: list[Event]) -> list[float]:
    return [event.loss for event in events if isinstance(event, StepDone)]


@each_device
@pytest.mark.parametrize("micro_batch", [4, 8])
@pytest.mark.parametrize("kind", KINDS)
def test_a_recorded_run_learns_what_a_launched_one_learns(
    home: Path, kind: str, micro_batch: int, device: str, tape: Tape
) -> None:
    name = f"{kind}-{micro_batch}-{device}"
    launched = trainer_of(run_of(home, f"launched-{name}", kind), device, micro_batch)
    recorded = record(trainer_of(run_of(home, f"recorded-{name}", kind), device, micro_batch), tape)
    expected, found = list(launched.run()), list(recorded.run())
    assert losses_of(found) == losses_of(expected)
    assert len(losses_of(found)) == 5
    pairs = zip(recorded.state.model.parameters(), launched.state.model.parameters(), strict=True)
    assert all(torch.equal(ours, truth) for ours, truth in pairs)
    assert device == "cuda" or tape.played == 5 * (8 // micro_batch)
    assert device == "cuda" or tape.updated == 4, "the first update is launched"
    assert [event for event in found if isinstance(event, Recorded)] == [Recorded(2)]


@each_device
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_recorded_steps_skip_and_scale_as_launched_ones_do(
    home: Path, precision: str, device: str, tape: Tape, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lowvram.train.loss_scale.QUIET_STEPS", 2)
    bad = {8 * 2: 1.0, 8 * 3: 1.0}  # the third and the fourth step

    def broken_loss(model: Any, batch: Batch, **options: Any) -> Loss:
        loss = causal_loss(model, batch, **options)
        is_bad = torch.stack([batch.sample_B[0] == sample for sample in bad]).any()
        return loss._replace(total=loss.total * torch.where(is_bad, torch.nan, 1.0))

    monkeypatch.setattr("lowvram.train.step.causal_loss", broken_loss)
    settings = {"precision": precision, "optimizer": {"name": "muon", "bits": 8, "lr": 1e-3}}
    launched = trainer_of(run_of(home, f"launched-{precision}-{device}", "mla-moe", **settings), device)
    recorded = record(trainer_of(run_of(home, f"recorded-{precision}-{device}", "mla-moe", **settings), device), tape)
    expected, found = list(launched.run()), list(recorded.run())
    told = [(e.loss, e.gradient_norm, e.skipped) for e in found if isinstance(e, StepDone)]
    truth = [(e.loss, e.gradient_norm, e.skipped) for e in expected if isinstance(e, StepDone)]
    assert str(told) == str(truth), "NaN included"
    assert [skipped for _, _, skipped in told] == [0, 0, 1, 1, 0]
    assert (recorded.state.loss_scale, recorded.state.quiet) == (launched.state.loss_scale, launched.state.quiet)
    if recorded.loss_scale is not None:
        assert (recorded.loss_scale.value.item(), recorded.loss_scale.quiet.item()) == (2.0**15, 1)
        assert (recorded.state.loss_scale, recorded.state.quiet) == (2.0**15, 1)
    pairs = zip(recorded.state.model.parameters(), launched.state.model.parameters(), strict=True)
    assert all(torch.equal(ours, truth) for ours, truth in pairs)


@pytest.mark.parametrize("why", ["memory", "a capture", "host"])
def test_an_update_that_cannot_be_recorded_is_launched_and_that_is_told_once(
    home: Path, tape: Tape, monkeypatch: pytest.MonkeyPatch, why: str
) -> None:
    launched = trainer_of(run_of(home, f"plain-{why}"))
    trainer = record(trainer_of(run_of(home, f"unrecorded-update-{why}")), tape)
    trainer.state.optimizer.is_on_host = why == "host"

    def fail(run: Callable[[], Tensor], _pool: object) -> None:
        for weight in trainer.state.model.parameters():
            weight.grad = None  # as an update does that was recorded up to its end
        if why == "memory":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(recording, "_record_update", fail)
    events = list(trainer.run())
    (told,) = [event for event in events if isinstance(event, Recorded)]
    says = {"memory": "memory ran out.", "a capture": "operation not permitted when stream is capturing.",
            "host": "the optimizer's states are in host memory."}  # fmt: skip
    assert told == Recorded(2, says[why])
    assert losses_of(events) == losses_of(list(launched.run()))
    assert trainer.captured_pass is not None, "the passes are still played"


def test_an_update_is_recorded_anew_when_experts_rotate(home: Path, tape: Tape) -> None:
    rotation = {"window": 2, "interval": 2}
    what = run_of(home, "rotates", "mla-moe", rotation=rotation)
    trainer = record(trainer_of(what), tape)
    recorded: list[Any] = []
    for event in trainer.run():
        if isinstance(event, StepDone):
            recorded.append(trainer.recorder._graph)
    assert recorded[0] is None
    assert recorded[1] is not None, "the second step's"
    assert len({id(graph) for graph in recorded[1:]}) == 3, "of steps 2, 3 and 4, and 5"
    assert recorded[2] is recorded[3]


@pytest.mark.parametrize("kind", ["gqa-rope", "mla-moe"])
def test_numbers_that_are_read_late_are_those_of_their_step(home: Path, kind: str) -> None:
    told = []
    for is_late in (False, True):
        what = run_of(home, f"late-{is_late}-{kind}", kind)
        options = {"validate_every": 2, "save_every_minutes": 1e-9}
        trainer = trainer_of(what.model_copy(update={"run": what.run.model_copy(update=options)}))
        trainer.reads_late = is_late
        timeless = {"tokens_per_second": 0.0, "memory_bytes": 0, "left_s": 0.0}
        told.append([
            dataclasses.replace(event, **timeless) if isinstance(event, StepDone) else (type(event), event.step)
            for event in trainer.run()
        ])  # fmt: skip
    assert told[0] == told[1]
    assert sum(isinstance(event, StepDone) for event in told[0]) == 5


def test_late_numbers_come_when_the_next_step_is_launched_and_a_stop_waits_for_it(home: Path) -> None:
    trainer = trainer_of(run_of(home, "late-stop"))
    trainer.reads_late = True
    steps = []
    for event in trainer.run():
        if isinstance(event, StepDone):
            steps.append((event.step, trainer.state.step))
            if event.step == 2:
                trainer.stop()
    assert steps == [(1, 1), (2, 2), (3, 3)]
    assert trainer.store.latest()[0].step == 3


@pytest.mark.parametrize("at", ["evaluate", "write_sample"])
def test_a_look_without_memory_gives_up_the_recording_and_tells_nothing_twice(
    home: Path, tape: Tape, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    plain = trainer_of(run_of(home, f"roomy-{at}"))
    trainer = record(trainer_of(run_of(home, f"tight-{at}")), tape)
    assert [type(event).__name__ for event in plain.run()].count("Evaluated") == 2
    look = getattr(looks, at)

    def refuse_beside_a_recording(*given: Any) -> Any:
        if trainer.captured_pass is not None:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return look(*given)

    monkeypatch.setattr(trainer_module, at, refuse_beside_a_recording)
    events = list(trainer.run())
    assert trainer.captured_pass is None
    assert len(losses_of(events)) == 5
    told = [(type(event).__name__, event.step) for event in events if not isinstance(event, Recorded)]
    assert told == [("Started", 0), *[("StepDone", step) for step in (1, 2, 3, 4)], ("Evaluated", 4), ("StepDone", 5),
                    ("Evaluated", 5), ("Sampled", 5), ("Saved", 5), ("Stopped", 5)]  # fmt: skip
    assert events[-1] == Stopped(5, is_finished=True)


def test_a_halved_micro_batch_is_no_longer_played(home: Path, tape: Tape, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = record(trainer_of(run_of(home, "halved")), tape)
    assert trainer.captured_pass is not None

    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(trainer.captured_pass, "add", fail)
    events = list(trainer.run())
    assert trainer.captured_pass is None
    assert trainer.plan.micro_batch == 2
    assert len(losses_of(events)) == 5


class Decision:
    """A trainer that says it is on a card, and a clock that says what a test wants."""

    def __init__(self, trainer: Trainer, monkeypatch: pytest.MonkeyPatch, played_s: float, held_bytes: int) -> None:
        self.trainer = trainer
        trainer.state.model.embedding = _OnCard(trainer.state.model.embedding)  # type: ignore[assignment]
        monkeypatch.setattr(trial, "_measure", self.measure)
        monkeypatch.setattr(trial, "_validation_pass", lambda _: None)
        monkeypatch.setattr(trial, "free_memory", lambda _: None)
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: held_bytes)
        self.played_s = played_s

    def measure(self, trainer: Trainer, _plan: Plan) -> Any:
        return trial._Timing(1.0 if trainer.captured_pass is None else self.played_s, 0)


class _OnCard(torch.nn.Parameter):
    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return torch.device("cuda")


@pytest.mark.parametrize(
    "played_s, limit, asked, said",
    [
        (0.25, None, None, "Passes are replayed from CUDA graphs, 4.00 times as fast: 250 against 1,000 ms"),
        (0.25, 300 * MIB, None, "Passes are not replayed from CUDA graphs: they would take 328.0 MiB of 300.0 MiB."),
        (0.99, None, None, "Passes are not replayed from CUDA graphs: they would be 1.01 times as fast"),
        (0.99, None, True, "Passes are replayed from CUDA graphs, 1.01 times as fast"),
    ],
)
def test_a_recording_stays_where_it_is_faster_and_fits(
    home: Path,
    played_s: float,
    limit: int | None,
    asked: bool | None,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    trainer = trainer_of(run_of(home, "decides"))
    monkeypatch.setattr(Trainer, "capture", lambda self: setattr(self, "captured_pass", object()))
    Decision(trainer, monkeypatch, played_s, 200 * MIB)
    (sentence,) = autotune_cuda_graphs(trainer, asked, limit)
    assert sentence.startswith(said)
    assert (trainer.captured_pass is not None) == sentence.startswith("Passes are replayed")


def test_what_cannot_be_recorded_is_launched_or_told_where_it_was_asked_for(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: Trainer) -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    trainer = trainer_of(run_of(home, "unrecorded"))
    monkeypatch.setattr(Trainer, "capture", fail)
    Decision(trainer, monkeypatch, 0.1, 0)
    (sentence,) = autotune_cuda_graphs(trainer, None)
    assert sentence == "Passes are not replayed from CUDA graphs: operation not permitted when stream is capturing."
    with pytest.raises(MachineError, match=r"Operation not permitted.*Leave `graphs` out"):
        list(autotune_cuda_graphs(trainer, True))


def test_without_a_card_nothing_is_recorded_and_asking_for_it_is_answered(home: Path) -> None:
    trainer = trainer_of(run_of(home, "no-card"))
    assert list(autotune_cuda_graphs(trainer, None)) == []
    assert list(autotune_cuda_graphs(trainer, False)) == []
    with pytest.raises(MachineError, match="They need a CUDA card"):
        list(autotune_cuda_graphs(trainer, True))
