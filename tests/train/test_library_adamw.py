"""8-bit AdamW by bitsandbytes in place of our kernel: the same steps up to rounding, and a run that changes over."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from lowvram.config.model import ModelConfig
from lowvram.config.train import AdamW, Muon, TrainConfig
from lowvram.errors import MachineError
from lowvram.model.transformer import Transformer
from lowvram.train.environment import compare_environments, current_environment
from lowvram.train.events import Started, StepDone
from lowvram.train.library_adamw import require_library
from lowvram.train.optim import LeanOptimizer, build_optimizer
from lowvram.train.step import update
from tests.model.variants import VARIANTS
from tests.tiny import prepare_home, tiny_run, trainer_of

MODEL: ModelConfig = next(iter(VARIANTS.values())).model_copy(update={"vocabulary": 512})


def steps(config: AdamW | Muon, count: int, skipped: int | None = None) -> tuple[Transformer, LeanOptimizer]:
    """Return a model after some steps with the same gradients; one of them may be skipped."""
    model = Transformer(MODEL, seed=3)
    optimizer = build_optimizer(model, config)
    for number in range(count):
        generator = torch.Generator().manual_seed(number)
        for weight in model.parameters():
            weight.grad = torch.randn(weight.shape, generator=generator) * 0.1
        skip = torch.tensor(float(number == skipped))
        update(model, optimizer, None, torch.tensor(3e-3), torch.tensor(0.5), skip)
    return model, optimizer


@pytest.mark.parametrize("kind", [AdamW, Muon], ids=["adamw", "muon"])
def test_the_library_makes_our_steps_up_to_rounding(kind: type[AdamW] | type[Muon]) -> None:
    pytest.importorskip("bitsandbytes")
    own, _ = steps(kind(bits=8), 4, skipped=1)
    other, optimizer = steps(kind(bits=8, backend="bitsandbytes"), 4, skipped=1)
    assert optimizer.unrecorded is not None
    before = dict(Transformer(MODEL, seed=3).named_parameters())
    stepped_by_library = {id(weight) for weight in other.parameters() if optimizer._is_by_library(weight)}
    assert stepped_by_library
    for (name, left), right in zip(own.named_parameters(), other.parameters(), strict=True):
        moved = (left - before[name]).norm()
        bound = 0.02 if id(right) in stepped_by_library else 0.0  # a code that rounds to its neighbour
        assert (left - right).norm() <= bound * moved, name
        assert moved > 0


def test_a_skipped_step_changes_nothing() -> None:
    pytest.importorskip("bitsandbytes")
    model, _ = steps(AdamW(bits=8, backend="bitsandbytes"), 1, skipped=0)
    fresh = Transformer(MODEL, seed=3)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), fresh.parameters(), strict=True))


def test_a_run_changes_over_when_it_resumes(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    prepare_home(tmp_path)
    what = tiny_run(tmp_path, tokens=4 * 256, optimizer=AdamW(bits=8))
    trainer = trainer_of(what)
    for event in trainer.run():
        if isinstance(event, StepDone) and event.step == 2:
            trainer.stop()
    train = what.train.model_copy(update={"optimizer": AdamW(bits=8, backend="bitsandbytes")})
    events = list(trainer_of(what.model_copy(update={"train": train})).run())
    started = next(event for event in events if isinstance(event, Started))
    assert any("optimizer own then, bitsandbytes now" in notice for notice in started.notices)
    assert [event.step for event in events if isinstance(event, StepDone)][-1] == 4


def test_a_run_that_changes_over_is_told_that_its_last_bits_may_differ() -> None:
    saved = current_environment(torch.device("cpu"))
    here = current_environment(torch.device("cpu"), "bitsandbytes")
    told = compare_environments(saved, here)
    assert told is not None
    assert "optimizer own then, bitsandbytes now" in told
    older = {name: value for name, value in saved.items() if name != "optimizer"}
    assert compare_environments(older, here) == told
    assert compare_environments(older, saved) is None


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"optimizer": AdamW(bits=32, backend="bitsandbytes")}, "Try bits = 8"),
        ({"weights": "bf16"}, 'Try weights = "fp32"'),
        ({"update_during_backward": True}, "Leave train.update_during_backward out"),
    ],
)
def test_what_it_cannot_step_is_refused(change: dict, what: str) -> None:
    given = {"tokens": 1000, "seq_len": 8, "batch_tokens": 8, "optimizer": AdamW(bits=8, backend="bitsandbytes")}
    with pytest.raises(ValueError, match=what):
        TrainConfig(**(given | change))


def test_where_it_is_missing_the_command_that_installs_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(MachineError, match=r"pip install 'bitsandbytes>=0\.50'"):
        require_library(torch.device("cpu"))
    with pytest.raises(MachineError, match="no optimizer for mps"):
        require_library(torch.device("mps"))
