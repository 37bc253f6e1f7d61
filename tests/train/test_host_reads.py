"""A step never waits for its device: no op of it, update and clipping included, reads a number on the host."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lowvram_kernels.dispatch import Card, simulate_card
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lowvram.config.plan import Plan
from lowvram.config.run import RunConfig
from lowvram.objective import Batch, Loss, causal_loss
from lowvram.train.loss_scale import LossScale
from lowvram.train.prepare import prepare
from lowvram.train.settings import RunSettings
from lowvram.train.state import build_state
from lowvram.train.step import finish, loss_for, sum_gradients
from tests.tiny import prepare_home, tiny_run

# Ops whose result, or its shape, the host has to wait for.
READS = {
    "_local_scalar_dense",
    "is_nonzero",
    "nonzero",
    "equal",
    "allclose",
    "masked_select",
    "unique_dim",
    "_unique2",
    "unique_consecutive",
    "bincount",
    "repeat_interleave",
}
META = torch.device("meta")


class NoHostReads(TorchDispatchMode):
    """Refuses ops that read a device's value on the host, and copies of a device's tensors into host memory."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.partition("::")[2]
        assert name not in READS, f"{name} waits for the device"
        tensors = [part for part in args if isinstance(part, Tensor)]
        if name == "_to_copy" and not tensors[0].is_cpu:
            assert torch.device((kwargs or {}).get("device") or META).type != "cpu", "a copy to the host"
        if name == "copy_":
            assert tensors[1].is_cpu or not tensors[0].is_cpu, "a copy to the host"
        if name in ("index", "index_put", "index_put_"):
            assert all(part is None or part.dtype != torch.bool for part in args[1]), "a mask is counted"
        return func(*args, **(kwargs or {}))


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("home")
    prepare_home(place)
    return place


MUON_8 = {"name": "muon", "bits": 8, "lr": 1e-3, "adamw_lr": 5e-4}
MUON_16 = {"name": "muon", "bits": 16, "lr": 1e-3}
STEPS: dict[str, dict[str, Any]] = {
    "adamw-32": {},
    "fp16-muon-8": {"precision": "fp16", "optimizer": MUON_8},
    "adamw-8-dropout": {"optimizer": {"name": "adamw", "bits": 8, "lr": 1e-3}, "dropout": 0.1},
    "bf16-weights-muon": {
        "precision": "bf16",
        "weights": "bf16",
        "optimizer": {"name": "muon", "bits": 16, "lr": 1e-3},
    },
}


def run_of(home: Path, name: str, kind: str = "gqa-rope", **train: Any) -> RunConfig:
    return tiny_run(home, kind, f"reads-{name}", **train)


@pytest.mark.parametrize(
    ("name", "is_bad"), [*((name, False) for name in STEPS), ("fp16-muon-8", True), ("adamw-32", True)]
)
def test_a_step_reads_nothing_on_the_host(home: Path, name: str, is_bad: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def loss_of(model: Any, batch: Batch, **options: Any) -> Loss:
        loss = causal_loss(model, batch, **options)
        return loss._replace(total=loss.total * torch.nan) if is_bad else loss

    monkeypatch.setattr("lowvram.train.step.causal_loss", loss_of)
    plan = Plan(micro_batch=4, accumulate=2)
    trainer = prepare(RunSettings(run_of(home, f"{name}-{is_bad}", **STEPS[name]), plan, torch.device("cpu")))
    numbers = []
    for _ in range(2):  # the first one makes the optimizer's states
        with NoHostReads():
            stats = trainer.finish(trainer.sum_gradients(range(2)), 1e-3)
        numbers.append(stats.tolist())
    assert [skipped for _, _, skipped in numbers] == [is_bad, is_bad]
    counts = {float(state["step"]) for state in trainer.state.optimizer.state.values()}
    assert counts == {0.0 if is_bad else 2.0}


@pytest.mark.parametrize(
    ("name", "rotation"),
    [("adamw-8-dropout", None), ("fp16-muon-8", None), ("bf16-weights-muon", {"window": 2, "interval": 2})],
    ids=["adamw-8", "fp16-muon-8", "rotation"],
)
def test_a_step_on_a_card_reads_nothing_on_the_host(home: Path, name: str, rotation: dict[str, int] | None) -> None:
    more = {"rotation": rotation} if rotation is not None else {}
    what = run_of(home, f"card-{name}", "mla-moe", **STEPS[name], **more)
    plan = Plan(micro_batch=4, accumulate=2)
    with simulate_card(Card("cuda", (12, 0))), torch.no_grad():
        state = build_state(what.model, what.train, plan, META, None)
        state.optimizer.make_states()
    loss_scale = LossScale(META) if what.train.precision == "fp16" else None
    batches = [
        Batch(torch.empty(4, 33, dtype=torch.int64, device=META), torch.arange(4, device=META)) for _ in range(2)
    ]
    with simulate_card(Card("cuda", (12, 0))), NoHostReads():
        scale = 1.0 if loss_scale is None else loss_scale.value
        sums = sum_gradients(state.model, loss_for(state.model, what.train, plan), batches, 256, scale, 7)
        stats = finish(state.model, state.optimizer, sums, 1e-3, 256, 1.0, loss_scale)
    assert stats.shape == (3,)
    assert all(weight.grad is None for weight in state.model.parameters())


def test_a_read_is_found(home: Path) -> None:
    number = torch.ones(3)
    for read in (lambda: number.sum().item(), lambda: bool(number[0]), lambda: number[number > 0], number.nonzero):
        with pytest.raises(AssertionError), NoHostReads():
            read()
