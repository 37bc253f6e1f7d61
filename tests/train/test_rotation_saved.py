"""Experts that take turns, saved and taken up again: within an interval, at its end, with and without turns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lowvram.config.plan import choose_plan
from lowvram.config.run import RunConfig
from lowvram.errors import ConfigError
from lowvram.model.transformer import Transformer
from lowvram.objective import Batch
from lowvram.storage.checkpoint import find_checkpoint
from lowvram.train.events import Event, Rotated, StepDone
from lowvram.train.prepare import prepare
from lowvram.train.settings import RunSettings
from lowvram.train.state import load_weights
from lowvram.train.trainer import Trainer
from tests.tiny import prepare_home, rotation_of, tiny_run, trainer_of, unequal

RELATIVE = 1e-5
STACKS = ("blocks.1.ffn.gate_up_EHD", "blocks.1.ffn.down_EDI")
MUON = {"name": "muon", "bits": 8}
EIGHT = {"bits": 8}
RECIPES: dict[str, dict[str, Any]] = {
    "bf16": {"idle": "bf16"},
    "bf16, three of four": {"idle": "bf16", "window": 3, "optimizer": EIGHT},
    "int8, 8-bit": {"idle": "int8", "optimizer": EIGHT},
    "int8, three of five, bf16 weights": {"idle": "int8", "experts": 5, "window": 3, "weights": "bf16"},
    "e4m3, muon": {"idle": "e4m3", "optimizer": MUON},
    "e4m3, muon, bf16 weights": {"idle": "e4m3", "window": 3, "optimizer": MUON, "weights": "bf16"},
    "bf16, during backward": {"idle": "bf16", "update_during_backward": True},
    "all together": {"idle": "int8", "optimizer": MUON, "weights": "bf16", "update_during_backward": True},
}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("home")
    prepare_home(place)
    return place


def run_of(
    home: Path, name: str, experts: int = 4, window: int = 2, idle: str = "int8", turns: bool = True, **train: Any
) -> RunConfig:
    rotation = {"window": window, "interval": 2, "idle": idle} if turns else None
    what = tiny_run(home, "mla-moe", name, experts=experts, rotation=rotation, dropout=0.1, **train)
    return what.model_copy(update={"run": what.run.model_copy(update={"prompts": (), "validate_every": 1000})})


def run_until(trainer: Trainer, step: int) -> list[Event]:
    events = []
    for event in trainer.run():
        events.append(event)
        if isinstance(event, StepDone) and event.step == step:
            trainer.stop()
    return events


def losses_of(events: list[Event]) -> list[float]:
    return [event.loss for event in events if isinstance(event, StepDone)]


def everything(trainer: Trainer) -> dict[str, Tensor]:
    """Return what a checkpoint holds, and what only the card does: copies and slots."""
    weights, memory = trainer.state.tensors()
    held = {f"buffer.{name}": tensor for name, tensor in trainer.state.model.named_buffers()}
    return {name: tensor.clone() for name, tensor in (weights | memory | held).items()}


@pytest.mark.default_cases("int8, 8-bit", "all together")
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_run_goes_on_to_the_same_bits_wherever_it_was_stopped(home: Path, recipe: str) -> None:
    whole = trainer_of(run_of(home, f"whole-{recipe}", **RECIPES[recipe]))
    expected = losses_of(list(whole.run()))
    # Within the second interval, and at its end, when nobody has moved on yet.
    for stop in (3, 4):
        what = run_of(home, f"stopped-{recipe}-{stop}", **RECIPES[recipe])
        first = trainer_of(what)
        run_until(first, stop)
        goes_on = trainer_of(what)
        events = goes_on.run()
        next(events)
        assert unequal(everything(first), everything(goes_on)) == []
        assert goes_on.state.numbers() == first.state.numbers()
        rest = list(events)
        assert losses_of(rest) == expected[stop:]
        assert [event.step for event in rest if isinstance(event, Rotated)] == [4]
        assert unequal(everything(whole), everything(goes_on)) == []
        assert goes_on.state.numbers() == whole.state.numbers()


def test_a_checkpoint_holds_the_schedules_place_and_all_experts_in_natural_order(home: Path) -> None:
    trainer = trainer_of(run_of(home, "natural", window=3))
    run_until(trainer, 5)
    checkpoint, _ = find_checkpoint(home / "natural")
    rotation = rotation_of(trainer)
    assert checkpoint.numbers()["rotation"] == {"interval": 2, "slots": rotation.slots}
    assert rotation.slots != [0, 1, 2, 3]
    weights, states = checkpoint.weights(), checkpoint.state()
    model, optimizer = trainer.state.model, trainer.state.optimizer
    for name in STACKS:
        assert weights[name].shape[0] == 4
        stack = model.get_parameter(name)
        for expert, slot in enumerate(rotation.slots):
            if slot < 3:
                assert torch.equal(weights[name][expert], stack[slot])
                for what, tensor in optimizer.state_of(stack).items():
                    assert torch.equal(states[f"{what}.{name}"][expert], tensor[slot])
        # In five steps of two each: experts 0 1 2, then 3 0 1, and 2 3 0 for one.
        assert states[f"step.{name}"].tolist() == [5, 4, 3, 3]


def test_a_checkpoint_opens_in_a_plain_model_that_answers_as_the_masters(home: Path) -> None:
    what = run_of(home, "opens", window=3, idle="e4m3")
    trainer = trainer_of(what)
    list(trainer.run())
    checkpoint, _ = find_checkpoint(home / "opens")
    plain = Transformer(what.model, None)
    load_weights(plain, checkpoint)
    batch = Batch(trainer.loader.batch(0, 8), torch.arange(8))
    with torch.no_grad(), rotation_of(trainer).reading_masters():
        ours = trainer.state.model(batch.token_BT)[0]
    truth = plain(batch.token_BT)[0].detach()
    assert (ours - truth).norm() <= RELATIVE * truth.norm()


def test_commands_read_a_run_with_rotation(home: Path) -> None:
    from tests.flows.typed import typed

    list(trainer_of(run_of(home, "read")).run())
    answer = typed("evaluate", home / "read", "--device", "cpu", "--data", home / "shards/valid")
    assert answer.code == 0, answer.err
    assert "bits" in answer.out
    answer = typed("chat", home / "read", "--prompt", "Kış", "--device", "cpu", "--tokens", 3)
    assert answer.code == 0, answer.err


@pytest.mark.parametrize("origin", [True, False], ids=["from turns", "from a plain run"])
@pytest.mark.parametrize("heir", [True, False], ids=["to turns", "to a plain run"])
def test_a_run_with_or_without_turns_starts_from_the_other(home: Path, origin: bool, heir: bool) -> None:
    begun, what = f"origin-{origin}", run_of(home, f"heir-{origin}-{heir}", window=3, turns=heir)
    if not (home / begun).exists():
        list(trainer_of(run_of(home, begun, turns=origin, window=3)).run())
    saved = find_checkpoint(home / begun)[0].weights()
    trainer = trainer_of(what.model_copy(update={"train": what.train.model_copy(update={"start_from": home / begun})}))
    events = trainer.run()
    next(events)
    weights, memory = trainer.state.tensors()
    assert unequal(saved, weights) == []
    assert [name for name, tensor in memory.items() if tensor.count_nonzero()] == [], "states and steps begin anew"
    if heir:
        rotation = rotation_of(trainer)
        assert rotation.numbers() == {"interval": 0, "slots": [0, 1, 2, 3]}
        for name, weight, idle in rotation._stacks():
            assert torch.equal(weight, saved[name][:3])
            row = saved[name][3].abs().amax(1, keepdim=True)
            assert ((idle.code[0] * idle.scale[0] - saved[name][3]).abs() <= row / 253).all()
    assert len(losses_of(list(events))) == 6


@pytest.mark.parametrize("change", [{"window": 1}, {"interval": 3}, {"idle": "bf16"}, None], ids=str)
def test_a_run_cannot_go_on_with_other_turns(home: Path, change: dict[str, Any] | None) -> None:
    what = run_of(home, "settled")
    if not what.run.dir.exists():
        run_until(trainer_of(what), 3)
    assert what.train.rotation is not None
    other = what.train.rotation.model_copy(update=change) if change is not None else None
    changed = what.model_copy(update={"train": what.train.model_copy(update={"rotation": other})})
    key = next(iter(change)) if change else "window"
    with pytest.raises(ConfigError, match=rf"train\.rotation\.{key} was .* and is now .*Put that back to go on"):
        list(trainer_of(changed).run())


def test_states_on_the_host_give_the_same_bits(home: Path) -> None:
    found = []
    for offload in ("none", "optimizer"):
        what = run_of(home, f"lies-{offload}", window=3, optimizer=EIGHT)
        plan = choose_plan(what.train)[0].model_copy(update={"offload": offload})
        trainer = prepare(RunSettings(what, plan, torch.device("cpu")))
        list(trainer.run())
        found.append(everything(trainer))
    assert unequal(*found) == []
