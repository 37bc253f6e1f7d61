"""Weights kept in bf16: which are, that they learn as fp32 ones do, and that nothing but names decides a rounding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lowvram.config.plan import Plan
from lowvram.config.run import RunConfig
from lowvram.objective import Batch
from lowvram.storage.checkpoint import find_checkpoint
from lowvram.train.events import Event, Halved, StepDone
from lowvram.train.prepare import prepare
from lowvram.train.settings import RunSettings
from lowvram.train.trainer import Trainer
from tests.tiny import KINDS, prepare_home, tensors_of, tiny_run, unequal
from tests.train.test_out_of_memory import fail_at

# Each rounding moves a weight by up to 2⁻⁸ of it, 24 times.  Weights multiplied by 1 ± 0.003 at the start, in fp32,
# bring a loss 0.7 % away, and the seed of the rounding 0.5 %; seen between bf16 and fp32 are 1.2 %, to either side.
LOSS_RELATIVE = 2e-2
# Half the distance of two bf16 numbers.
BF16_RELATIVE = 2.0**-9
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "32-bit": {"lr": 1e-2},
    "8-bit": {"lr": 1e-2, "bits": 8},
    "muon": {"name": "muon", "lr": 1e-2},
}
KIND = "mla-moe"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("home")
    prepare_home(place)
    return place


def run_of(home: Path, name: str, kind: str = KIND, weights: str = "bf16", **train: Any) -> RunConfig:
    what = tiny_run(home, kind, name, weights=weights, **train)
    return what.model_copy(update={"run": what.run.model_copy(update={"prompts": (), "validate_every": 1000})})


def trainer_of(what: RunConfig, micro_batch: int = 4) -> Trainer:
    return prepare(RunSettings(what, Plan(micro_batch=micro_batch, accumulate=8 // micro_batch), torch.device("cpu")))


def losses_of(events: list[Event]) -> list[float]:
    return [event.loss for event in events if isinstance(event, StepDone)]


def is_exact(name: str) -> bool:
    """Say whether a tensor of the model stays fp32: what computes in fp32, or is too small to matter."""
    return "norm" in name or "router" in name


@pytest.mark.parametrize("kind", KINDS)
def test_matrices_are_bf16_and_norms_routers_and_biases_are_not(home: Path, kind: str) -> None:
    trainer = trainer_of(run_of(home, f"types-{kind}", kind))
    model = trainer.state.model
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == (torch.float32 if is_exact(name) else torch.bfloat16), name
    kept = sum(tensor.nbytes for tensor in model.parameters())
    assert 2 * model.config.num_parameters() < kept < 2.2 * model.config.num_parameters()
    trainer.accumulate()
    assert all(weight.grad.dtype == weight.dtype for weight in model.parameters())
    list(trainer.run())
    states = [tensor for state in trainer.state.optimizer.state.values() for tensor in state.values()]
    assert {tensor.dtype for tensor in states} == {torch.float32}, "32-bit moments stay so for bf16 weights"


@pytest.mark.nightly
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("during", [False, True], ids=["", "during backward"])
def test_the_loss_falls_as_that_of_fp32_masters(home: Path, optimizer: str, during: bool) -> None:
    recipe = {"optimizer": OPTIMIZERS[optimizer], "tokens": 24 * 256, "update_during_backward": during}
    found = {}
    for weights in ("fp32", "bf16"):
        name = f"falls-{optimizer}-{weights}-{during}"
        trainer = trainer_of(run_of(home, name, weights=weights, **recipe), 8 if during else 2)
        found[weights] = losses_of(list(trainer.run()))
    truth, ours = found["fp32"], found["bf16"]
    assert truth[-1] < truth[0] - 0.5, "there is something to follow"
    assert ours == pytest.approx(truth, rel=LOSS_RELATIVE)
    assert ours != truth


def test_steps_below_half_a_digit_are_not_lost(home: Path) -> None:
    """To nearest, a step of 1e-5 would leave nearly every weight of 0.02 where it is."""
    optimizer = {"lr": 1e-5, "decay": 0.0}
    schedule = {"kind": "wsd", "warmup": 0.0, "decay": 1e-9, "floor": 1.0}
    moves: dict[str, Tensor] = {}
    for weights in ("fp32", "bf16"):
        recipe = {"optimizer": optimizer, "schedule": schedule, "tokens": 40 * 256}
        trainer = trainer_of(run_of(home, f"small-{weights}", "gqa-rope", weights, **recipe), 8)
        matrix = trainer.state.model.blocks[0].ffn.gate_up_proj.weight
        before = matrix.detach().double().clone()
        list(trainer.run())
        moves[weights] = (matrix.detach().double() - before).flatten()
    along = moves["bf16"] @ moves["fp32"] / moves["fp32"].norm() ** 2
    # The mean of 4,096 weights that each jump by 0.6 (rms) of a digit now and then.
    assert float(along) == pytest.approx(1.0, rel=0.2)


@pytest.mark.default_cases("8-bit", "muon")
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_halved_micro_batch_gives_the_bits_of_a_run_that_began_smaller(
    home: Path, monkeypatch: pytest.MonkeyPatch, optimizer: str
) -> None:
    recipe = {"optimizer": OPTIMIZERS[optimizer], "dropout": 0.1}
    truth = trainer_of(run_of(home, f"truth-{optimizer}", **recipe), 2)
    expected = losses_of(list(truth.run()))
    # In the second micro-batch of the third step: sums have begun, and are rounded by their samples' names.
    fail_at(monkeypatch, "late backward", lambda batch: int(batch.sample_B[0]) == 20)
    begun = trainer_of(run_of(home, f"begun-{optimizer}", **recipe), 2)
    for event in begun.run():
        if isinstance(event, StepDone) and event.step == 2:
            begun.stop()
    ours = trainer_of(begun.config, 4)
    events = list(ours.run())
    assert [event for event in events if isinstance(event, Halved)] == [Halved(2, 2, 4)]
    assert losses_of(events) == expected[2:]
    assert unequal(tensors_of(truth), tensors_of(ours)) == []


def test_sums_of_gradients_depend_on_seed_and_sample_alone(home: Path) -> None:
    def gradients_of(seed: int, name: str) -> dict[str, Tensor]:
        trainer = trainer_of(run_of(home, name), 1)
        trainer.config = trainer.config.model_copy(
            update={"train": trainer.config.train.model_copy(update={"seed": seed})}
        )  # after the weights were drawn: the rounding's seed alone is another
        trainer.accumulate()
        return {name: weight.grad.clone() for name, weight in trainer.state.model.named_parameters()}

    first, again, other = gradients_of(0, "a"), gradients_of(0, "b"), gradients_of(1, "c")
    assert unequal(first, again) == []
    different = set(unequal(first, other))
    assert different == {name for name in first if first[name].dtype == torch.bfloat16}
    for name in different:
        assert (first[name] - other[name]).double().norm() <= 8 * BF16_RELATIVE * first[name].double().norm(), name


def test_no_two_sums_of_a_step_are_rounded_under_one_name(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names: list[tuple[int, int]] = []
    monkeypatch.setattr(
        "lowvram.train.step.add_rounded_",
        lambda total, term, seed, purpose, sample: names.append((purpose, int(sample))),
    )
    trainer = trainer_of(run_of(home, "names"), 2)
    trainer.state.step = 5
    trainer.accumulate()
    matrices = [weight for weight in trainer.state.model.parameters() if weight.dtype == torch.bfloat16]
    assert len(set(names)) == len(names) == 3 * len(matrices), "the first of four micro-batches has nothing to add to"
    assert {sample for _, sample in names} == {42, 44, 46}, "as the run numbers them"


def test_eight_bf16_sums_stay_as_near_the_truth_as_their_rounding(home: Path) -> None:
    """The truth is one backward pass of all samples, in fp32."""
    exact = trainer_of(run_of(home, "exact", weights="bf16"), 8)
    model = exact.state.model.float()
    exact.accumulate()
    truth = {name: weight.grad for name, weight in model.named_parameters()}
    ours = trainer_of(run_of(home, "sums"), 1)
    ours.accumulate()
    for name, weight in ours.state.model.named_parameters():
        difference = (weight.grad.double() - truth[name].double()).norm()
        assert difference <= 8 * BF16_RELATIVE * truth[name].double().norm(), name


def test_a_checkpoint_keeps_bf16_and_every_reader_opens_it(home: Path) -> None:
    from tests.loaded import load_model

    trainer = trainer_of(run_of(home, "kept"))
    list(trainer.run())
    checkpoint, _ = find_checkpoint(home / "kept")
    weights = checkpoint.weights()
    assert {name for name, tensor in weights.items() if tensor.dtype != torch.bfloat16} == set(
        filter(is_exact, weights)
    )
    loaded = load_model(home / "kept", "cpu")
    batch = Batch(trainer.loader.batch(0, 8), torch.arange(8))
    with torch.no_grad():
        truth = trainer.state.model(batch.token_BT, torch.float32)[0]
        assert torch.equal(loaded.model(batch.token_BT, torch.float32)[0], truth)


def test_commands_read_a_run_of_bf16_weights(home: Path) -> None:
    from tests.flows.typed import typed

    list(trainer_of(run_of(home, "read", precision="bf16")).run())
    answer = typed("evaluate", home / "read", "--device", "cpu", "--data", home / "shards/valid")
    assert answer.code == 0, answer.err
    assert "bits" in answer.out
    answer = typed("chat", home / "read", "--prompt", "Kış", "--device", "cpu", "--tokens", 3)
    assert answer.code == 0, answer.err


@pytest.mark.parametrize("origin, heir", [("fp32", "bf16"), ("bf16", "fp32")])
def test_a_run_starts_from_weights_kept_otherwise(home: Path, origin: str, heir: str) -> None:
    list(trainer_of(run_of(home, f"origin-{origin}", weights=origin)).run())
    saved = find_checkpoint(home / f"origin-{origin}")[0].weights()
    what = run_of(home, f"heir-{heir}", weights=heir, start_from=home / f"origin-{origin}")
    trainer = trainer_of(what)
    events = trainer.run()
    next(events)
    for name, tensor in trainer.state.model.state_dict().items():
        assert tensor.dtype == (torch.bfloat16 if heir == "bf16" and not is_exact(name) else torch.float32)
        assert torch.equal(tensor, saved[name].to(tensor.dtype)), name
    assert len(losses_of(list(events))) == 6
