"""Experts that take turns: whose turn it is, what the others keep, and that the model answers as a plain one would."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lowvram_kernels.dispatch import Card
from lowvram_kernels.moe.idle import reference
from lowvram_kernels.quant.quantise import parts_of
from torch import Tensor

from lowvram.config.run import RunConfig
from lowvram.evaluate.bits_per_byte import score
from lowvram.fit.rehearse import rehearse
from lowvram.model.transformer import Transformer
from lowvram.objective import Batch, causal_loss
from lowvram.train.events import Evaluated, Rotated, Saved, StepDone
from lowvram.train.rotation import ExpertRotation
from lowvram.train.trainer import Trainer
from tests.tiny import prepare_home, rotation_of, tiny_run, trainer_of

# fp32 rounds at 6e-8; a forward and a backward pass add some hundred of these.
RELATIVE = 1e-5
# What a round trip does to a matrix (`idle.py`), seen through softmax and loss.
COPY_RELATIVE = 1e-3
STACKS = ("blocks.1.ffn.gate_up_EHD", "blocks.1.ffn.down_EDI")
MUON = {"name": "muon", "bits": 8}
RECIPES: dict[str, dict[str, Any]] = {
    "32-bit": {},
    "8-bit": {"optimizer": {"bits": 8}},
    "muon": {"optimizer": MUON},
    "bf16 weights": {"weights": "bf16"},
    "during backward": {"weights": "bf16", "optimizer": MUON, "update_during_backward": True},
}
# Windows that divide the experts and windows that do not; in six steps of two each, everybody's turn comes.
SIZES = [(4, 2), (4, 3), (5, 2), (5, 4), (3, 1)]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("home")
    prepare_home(place)
    return place


def run_of(
    home: Path, name: str, experts: int = 4, window: int = 2, interval: int = 2, idle: str = "bf16", **train: Any
) -> RunConfig:
    rotation = {"window": window, "interval": interval, "idle": idle}
    what = tiny_run(home, "mla-moe", name, experts=experts, rotation=rotation, **train)
    return what.model_copy(update={"run": what.run.model_copy(update={"prompts": (), "validate_every": 1000})})


def experts_of(trainer: Trainer) -> list[dict[str, Tensor]]:
    """Return each expert's masters and states, wherever they lie."""
    masters, states = (trainer.state.tensors()[kind] for kind in (0, 1))
    whole = {name: tensor for name, tensor in (masters | states).items() if name.endswith(STACKS)}
    count = rotation_of(trainer).experts
    return [{name: tensor.unflatten(0, (count, -1))[e].clone() for name, tensor in whole.items() if len(tensor)}
            for e in range(count)]  # fmt: skip


def changed(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    return {name for name in before if not torch.equal(before[name], after[name])}


def turn_of(step: int, experts: int, window: int, interval: int = 2) -> set[int]:
    """Return who learns in a step, counted from 1."""
    first = (step - 1) // interval * window
    return {(first + place) % experts for place in range(window)}


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("experts, window", [(4, 2), (5, 2)])
def test_whose_turn_it_is_not_stays_as_it_is_to_the_bit(home: Path, recipe: str, experts: int, window: int) -> None:
    trainer = trainer_of(run_of(home, f"idle-{recipe}-{experts}", experts, window, **RECIPES[recipe]))
    before, counts = experts_of(trainer), [0] * experts
    for event in trainer.run():
        if not isinstance(event, StepDone):
            continue
        after, learning = experts_of(trainer), turn_of(event.step, experts, window)
        for expert in range(experts):
            moved = changed(before[expert], after[expert])
            assert set(STACKS) <= moved if expert in learning else moved == set()
            counts[expert] += expert in learning
            assert {float(after[expert][f"step.{name}"]) for name in STACKS} == {counts[expert]}
        before = after
    assert min(counts) >= 2, "everybody's turn has come"
    assert len(before[0]) >= 6, "masters, steps and what the optimizer remembers"


@pytest.mark.parametrize("experts, window", SIZES)
def test_everybody_takes_turns_and_nothing_changes_its_place_in_memory(home: Path, experts: int, window: int) -> None:
    trainer = trainer_of(run_of(home, f"turns-{experts}-{window}", experts, window, dropout=0.1))
    rotation, model, optimizer = rotation_of(trainer), trainer.state.model, trainer.state.optimizer
    told = {1: turn_of(1, experts, window)}
    places: list[list[int]] = []
    for event in trainer.run():
        if isinstance(event, Rotated):
            told[event.step + 1] = set(event.experts)
        if not isinstance(event, StepDone):
            continue
        learning = turn_of(event.step, experts, window)
        assert set(rotation.window) == learning
        assert sorted(rotation.slots) == list(range(experts)), "every expert lies in one slot"
        (layer,) = model.moe_layers()
        assert layer.slot_E.tolist() == rotation.slots
        rotation.bring_home()
        for name, weight, idle in rotation._stacks():
            for expert, slot in enumerate(rotation.slots):
                lies = weight[slot] if slot < window else parts_of(idle)[0][slot - window].float()
                home_of = rotation.masters[name][expert]
                assert torch.equal(lies, home_of if slot < window else home_of.bfloat16().float())
        states = [tensor for weight in model.parameters() for tensor in optimizer.state_of(weight).values()]
        everything = [*model.parameters(), *model.buffers(), *states, *rotation.masters.values()]
        places.append([tensor.data_ptr() for tensor in everything])
    assert told == {step: turn_of(step, experts, window) for step in (1, 3, 5)}
    assert set().union(*told.values()) == set(range(experts))
    assert all(place == places[0] for place in places)


def plain_like(trainer: Trainer, idle: str | None) -> Transformer:
    """Return a model without rotation whose experts are the masters, those that wait as their copies decode."""
    rotation, model = rotation_of(trainer), Transformer(trainer.what.model, None)
    weights = {name: tensor.clone() for name, tensor in trainer.state.tensors()[0].items()}
    for name in STACKS if idle is not None else ():
        for expert in set(range(rotation.experts)) - set(rotation.window):
            matrix = reference(weights[name][expert], idle) if idle else weights[name][expert]
            weights[name][expert] = matrix.float()
    model.load_state_dict(weights)
    return model


def rotated(home: Path, name: str, **options: Any) -> tuple[Trainer, Batch]:
    """Return a trainer after six steps, in its third interval, and a batch."""
    trainer = trainer_of(run_of(home, name, **{"window": 3} | options))
    list(trainer.run())
    assert rotation_of(trainer).slots != list(range(rotation_of(trainer).experts))
    return trainer, Batch(trainer.loader.batch(0, 8), torch.arange(8))


@pytest.mark.parametrize("idle", ["bf16", "int8", "e4m3"])
def test_all_experts_answer_those_that_wait_from_their_copies(home: Path, idle: str) -> None:
    trainer, batch = rotated(home, f"answers-{idle}", idle=idle, window=1, interval=1)
    plain, model = plain_like(trainer, idle), trainer.state.model
    ours, loads = model(batch.token_BT)
    assert (loads > 0).all(), "everybody is asked"
    truth = plain(batch.token_BT)[0]
    masters = plain_like(trainer, None)(batch.token_BT)[0]
    assert (ours - truth).norm() <= RELATIVE * truth.norm()
    assert (ours - masters).norm() > 3 * RELATIVE * truth.norm(), "the copies are not the masters"
    assert torch.equal(model.eval()(batch.token_BT)[0], ours), "evaluation sees what training saw"


@pytest.mark.parametrize("idle", ["bf16", "int8", "e4m3"])
def test_gradients_are_a_plain_models_but_for_experts_that_wait(home: Path, idle: str) -> None:
    trainer, batch = rotated(home, f"gradients-{idle}", idle=idle)
    plain, model, rotation = plain_like(trainer, idle), trainer.state.model, rotation_of(trainer)
    for each in (model, plain):
        causal_loss(each, batch, dtype=torch.float32).total.backward()
    truth = dict(plain.named_parameters())
    for name, weight in model.named_parameters():
        expected = truth[name].grad[rotation.window] if name in STACKS else truth[name].grad
        assert weight.grad.shape == expected.shape
        assert (weight.grad - expected).norm() <= RELATIVE * expected.norm(), name
    assert not any(buffer.requires_grad for buffer in model.buffers())


@pytest.mark.parametrize("weights", ["fp32", "bf16"])
@pytest.mark.parametrize("window", [1, 3])
def test_a_run_with_rotation_begins_as_the_same_function_as_one_without(home: Path, window: int, weights: str) -> None:
    what = run_of(home, f"begins-{window}-{weights}", window=window, interval=1, idle="int8", weights=weights)
    ours = trainer_of(what)
    plain = trainer_of(what.model_copy(update={"train": what.train.model_copy(update={"rotation": None})}))
    drawn, truth = ours.state.tensors()[0], plain.state.tensors()[0]
    assert drawn.keys() == truth.keys()
    assert changed(truth, drawn) == set()
    batch = Batch(ours.loader.batch(0, 8), torch.arange(8))
    losses = [float(causal_loss(t.state.model, batch, dtype=torch.float32).total.detach()) for t in (ours, plain)]
    assert losses[0] == pytest.approx(losses[1], rel=COPY_RELATIVE)
    assert losses[0] != losses[1], "the copies round"
    with rotation_of(ours).reading_masters():
        exact = float(causal_loss(ours.state.model, batch, dtype=torch.float32).total.detach())
    assert exact == pytest.approx(losses[1], rel=RELATIVE)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("idle", ["bf16", "int8", "e4m3"])
def test_bytes_are_those_of_real_tensors_and_those_that_were_rehearsed(home: Path, recipe: str, idle: str) -> None:
    what = run_of(home, f"bytes-{recipe}-{idle}", idle=idle, **RECIPES[recipe])
    trainer = trainer_of(what)
    list(trainer.run())
    card, host = rotation_of(trainer).bytes_on()
    weights, states = trainer.state.tensors()
    assert host == sum(t.nbytes for n, t in (weights | states).items() if n.endswith(STACKS))
    ledger = rehearse(what.model, what.train, trainer.plan, Card("cuda", (8, 6))).ledger
    assert host == ledger.kept_on_host
    on_one = rehearse(what.model, what.train, trainer.plan, Card("cpu")).ledger
    assert on_one.kept_on_host == 0, "one memory has no other side"
    assert on_one.weights + on_one.optimizer > ledger.kept_on_host
    # Of four experts two lie on the card whole; what each has of a copy:
    copy = {"bf16": 2 * 3 * 32 * 128, "int8": 3 * 32 * 128 + 4 * (256 + 32), "e4m3": 3 * 32 * 128 + 4 * 3}[idle]
    assert card == host / 2 + 2 * copy


def test_reading_masters_shows_the_saved_model_and_is_undone(home: Path) -> None:
    trainer, batch = rotated(home, "reads", idle="e4m3")
    model, valid = trainer.state.model, trainer.valid
    assert valid is not None
    plain = plain_like(trainer, None)

    def measure(which: Transformer) -> float:
        return score(which, valid, 0, trainer.tokenizer.byte_count_V, 32, torch.float32, 2_000, 8).loss

    before = model(batch.token_BT)[0]
    with rotation_of(trainer).reading_masters():
        assert measure(model) == pytest.approx(measure(plain), rel=RELATIVE)
        inside = model(batch.token_BT)[0]
    assert (inside - before).norm() > 10 * RELATIVE * before.norm()
    assert torch.equal(model(batch.token_BT)[0], before)
    with pytest.raises(ZeroDivisionError), rotation_of(trainer).reading_masters():
        raise ZeroDivisionError
    assert torch.equal(model(batch.token_BT)[0], before)


@pytest.mark.parametrize("often", [True, False], ids=["every step", "at the end"])
def test_each_save_is_followed_by_a_validation_with_masters(home: Path, often: bool) -> None:
    what = run_of(home, f"saves-{often}", idle="int8")
    options = {"save_every_minutes": 1e-9} if often else {}
    trainer = trainer_of(what.model_copy(update={"run": what.run.model_copy(update=options)}))
    events = list(trainer.run())
    saves = [place for place, event in enumerate(events) if isinstance(event, Saved)]
    assert len(saves) == (6 if often else 1)
    looks = [events[place + 1] for place in saves]
    assert all(isinstance(look, Evaluated) and look.reads_masters for look in looks)
    assert [look.step for look in looks] == [events[place].step for place in saves]
    last = [event for event in events if isinstance(event, Evaluated) and event.step == 6]
    assert [look.reads_masters for look in last] == [False, True]
    assert last[0].loss == pytest.approx(last[1].loss, rel=COPY_RELATIVE)
    assert last[0].loss != last[1].loss


def test_memory_that_runs_out_while_masters_are_read_loses_nothing(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lowvram.errors import TrainingError

    trainer = trainer_of(run_of(home, "look"))

    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(ExpertRotation, "_read_masters", fail)
    with pytest.raises(TrainingError, match=r"after step 6, while the model was validated.*what was learnt is saved"):
        list(trainer.run())
    assert trainer.store.latest()[0].step == 6
    assert all(layer.read_masters is None for layer in trainer.state.model.moe_layers())


def test_the_log_and_the_screen_tell_who_learns_and_what_masters_are_worth(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from lowvram.cli.train import train

    what = run_of(home, "told", window=3)
    train(what, device="cpu")
    told = " ".join(capsys.readouterr().err.split())
    rows = [json.loads(line) for line in (what.run.dir / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    turns = [row for row in rows if row["event"] == "Rotated"]
    assert [(row["step"], row["experts"]) for row in turns] == [(2, [0, 1, 3]), (4, [0, 2, 3])]
    assert all(row["card_bytes"] > 0 and row["host_bytes"] > 0 for row in turns)
    looks = [row for row in rows if row["event"] == "Evaluated"]
    assert [(row["step"], row["reads_masters"]) for row in looks] == [(6, False), (6, True)]
    assert "step 2 experts 0, 1, 3 learn now (" in told
    assert "KiB on the card, " in told
    assert f"(loss {looks[1]['loss']:.4f}, experts read from their masters)" in told
