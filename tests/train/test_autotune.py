"""Compiled blocks compute what eager ones do, only while gradients are made, and are kept only where they pay."""

from __future__ import annotations

import argparse
import functools
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch._dynamo
from torch import Tensor
from torch._dynamo.utils import counters

from lowvram.config.plan import Plan
from lowvram.config.run import RunConfig
from lowvram.errors import MachineError
from lowvram.model.transformer import Transformer
from lowvram.objective import Batch, causal_loss
from lowvram.train import autotune as trial
from lowvram.train.autotune import autotune_compilation, try_compilation
from lowvram.train.compilation import compiled
from lowvram.train.events import Event, Halved, StepDone, Stopped
from lowvram.train.prepare import prepare
from lowvram.train.settings import RunSettings
from lowvram.train.step import gradients
from lowvram.train.trainer import Trainer
from tests.model.variants import VARIANTS, VOCABULARY
from tests.tiny import prepare_home, tiny_run

# fp32 sums in another order.
RELATIVE = 1e-5
MIB = 1 << 20
# Every kind of layer; the variants left out are made of the same ones.
KINDS = (
    "gqa-rope-yarn",
    "gqa-qk_norm",
    "gqa-alibi-window",
    "gqa-moe-untied",
    "mla-yarn-q_lora",
    "mla-window",
    "mla-moe",
)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("home")
    prepare_home(place)
    return place


@pytest.fixture(autouse=True)
def backend(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Trace forward and backward, but generate no code: the compiler's own work takes minutes for so many models."""
    monkeypatch.setattr("lowvram.train.compilation.BACKEND", "aot_eager")
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def graphs() -> int:
    assert not counters["graph_break"]
    return counters["stats"]["unique_graphs"]


def run_of(home: Path, name: str, kind: str = "gqa-rope", **train: Any) -> RunConfig:
    what = tiny_run(home, kind, name, tokens=3 * 256, **train)
    return what.model_copy(update={"run": what.run.model_copy(update={"prompts": (), "validate_every": 100})})


def trainer_of(what: RunConfig, micro_batch: int = 4, compiles: bool = True, **plan: Any) -> Trainer:
    how = Plan(micro_batch=micro_batch, accumulate=8 // micro_batch, compile=compiles, **plan)
    return prepare(RunSettings(what, how, torch.device("cpu")))


def steps_of(events: list[Event]) -> list[StepDone]:
    return [event for event in events if isinstance(event, StepDone)]


def everything(trainer: Trainer) -> dict[str, Tensor]:
    weights, memory = trainer.state.tensors()
    return {name: tensor.clone() for name, tensor in (weights | memory).items()}


def gradients_of(model: Transformer, recompute: str = "none") -> dict[str, Tensor]:
    model.zero_grad()
    tokens = torch.randint(VOCABULARY, (2, 25), generator=torch.Generator().manual_seed(3))
    loss_of = functools.partial(causal_loss, model, dtype=torch.float32, dropout=0.1, recompute=recompute)
    gradients(model, loss_of, [Batch(tokens, torch.arange(2))], 48)
    return {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}


@pytest.mark.nightly
@pytest.mark.parametrize("name", KINDS)
def test_a_compiled_block_of_every_kind_is_one_graph_with_the_eager_gradients(name: str) -> None:
    model = Transformer(VARIANTS[name])
    truth = gradients_of(model)
    with compiled(model):
        ours = gradients_of(model)
    assert graphs() > 0
    assert ours.keys() == truth.keys()
    for weight, gradient in truth.items():
        assert (ours[weight] - gradient).norm() <= RELATIVE * gradient.norm(), weight


@pytest.mark.nightly
@pytest.mark.parametrize("name, kinds", [("gqa-rope", 1), ("mla-moe", 2)])
def test_blocks_that_are_alike_share_one_compilation_and_keep_it(name: str, kinds: int) -> None:
    model = Transformer(VARIANTS[name].model_copy(update={"layers": 11}))
    names = list(model.state_dict())
    for _ in range(3):
        with compiled(model):
            assert list(model.state_dict()) == names
            gradients_of(model, "block")
        # One more, for the number that keys a block's dropout becomes a variable when a second one is seen.
        assert graphs() <= kinds + 1


@pytest.mark.nightly
@pytest.mark.parametrize(
    "recompute, bits, kind", [("none", 8, "mla-moe"), ("attention", 32, "gqa-alibi"), ("block", 8, "mla-moe")]
)
def test_compiled_steps_equal_eager_ones(home: Path, recompute: str, bits: int, kind: str) -> None:
    recipe = {"optimizer": {"name": "adamw", "bits": bits}}
    eager, ours = (
        trainer_of(run_of(home, f"{name}-{recompute}", kind, **recipe), 2, name == "compiled", recompute=recompute)
        for name in ("eager", "compiled")
    )
    pairs = zip(steps_of(list(eager.run())), steps_of(list(ours.run())), strict=True)
    for first, second in pairs:
        assert second.loss == pytest.approx(first.loss, rel=RELATIVE)
        assert second.gradient_norm == pytest.approx(first.gradient_norm, rel=1e-4)
    assert graphs() > 0


def test_validation_and_samples_compile_nothing(home: Path) -> None:
    what = run_of(home, "looks")
    often = {"validate_every": 1, "sample_every": 1, "prompts": ("Kış", "Bir gün")}
    what = what.model_copy(update={"run": what.run.model_copy(update=often)})
    seen = []
    for event in trainer_of(what).run():
        seen.append((type(event).__name__, graphs()))
    assert [name for name, _ in seen].count("Sampled") == 6
    assert {count for name, count in seen if name != "Started"} == {1}


@pytest.mark.nightly
@pytest.mark.parametrize("place", ["step", "compiler"])
def test_memory_that_runs_out_halves_a_compiled_micro_batch_too(
    home: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    truth = trainer_of(run_of(home, f"half-{place}"), 2)
    list(truth.run())
    torch._dynamo.reset()
    failures = []

    def fail_once() -> None:
        failures.append(place)
        if len(failures) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    def loss_of(model: Any, batch: Batch, **options: Any) -> Any:
        found = causal_loss(model, batch, **options)
        fail_once()
        return found

    def compile_graph(graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        fail_once()
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    if place == "step":
        monkeypatch.setattr("lowvram.train.step.causal_loss", loss_of)
    else:
        monkeypatch.setattr("lowvram.train.compilation.BACKEND", compile_graph)
    ours = trainer_of(run_of(home, f"whole-{place}"), 4)
    assert [event for event in ours.run() if isinstance(event, Halved)] == [Halved(0, 2, 4)]
    assert ours.plan == truth.plan
    expected, found = everything(truth), everything(ours)
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []


def refuse(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
    raise FileNotFoundError("no C++ compiler here")


def test_a_compiler_that_fails_ends_a_run_that_asked_for_it_with_a_way_out(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lowvram.train.compilation.BACKEND", refuse)
    trainer = trainer_of(run_of(home, "asked"))
    assert list(autotune_compilation(trainer, asked=True, is_new=True)) == []
    with pytest.raises(MachineError, match=r"could not be compiled\. .*no C\+\+ compiler here.*`compile=False`"):
        list(trainer.run())


def test_a_compiler_that_fails_leaves_an_automatic_run_eager(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lowvram.train.compilation.BACKEND", refuse)
    trainer = trainer_of(run_of(home, "automatic"), compiles=False)
    plan, reason = try_compilation(trainer)
    assert plan == trainer.plan
    assert reason.startswith("Blocks are not compiled: torch.compile says: ")
    assert "no C++ compiler here" in reason
    goes_on = trainer_of(run_of(home, "goes-on"))
    (told,) = autotune_compilation(goes_on, asked=None, is_new=False)
    assert told.startswith("Blocks are no longer compiled: torch.compile says: ")
    assert not goes_on.plan.compile
    assert len(steps_of(list(goes_on.run()))) == 3


def test_a_run_that_was_compiled_goes_on_so(home: Path) -> None:
    trainer = trainer_of(run_of(home, "kept"))
    assert list(autotune_compilation(trainer, asked=None, is_new=False)) == []
    assert trainer.plan.compile
    assert graphs() > 0


def test_outside_cuda_nothing_is_tried_unasked(home: Path) -> None:
    trainer = trainer_of(run_of(home, "cpu"), compiles=False)
    assert list(autotune_compilation(trainer, asked=None, is_new=True)) == []
    assert not trainer.plan.compile
    assert graphs() == 0


@pytest.mark.parametrize("during", [False, True], ids=["after", "during-backward"])
@pytest.mark.parametrize("is_new", [True, False], ids=["new", "resumed"])
def test_on_cuda_only_a_new_run_tries(monkeypatch: pytest.MonkeyPatch, is_new: bool, during: bool) -> None:
    plan = Plan(micro_batch=4, accumulate=2)
    faster = plan.model_copy(update={"compile": True})
    device = torch.device("cuda")
    trainer: Any = SimpleNamespace(
        plan=plan,
        config=SimpleNamespace(train=SimpleNamespace(update_during_backward=during)),
        state=SimpleNamespace(model=SimpleNamespace(embedding=SimpleNamespace(device=device))),
    )
    limits: list[int | None] = []

    def found(_: Trainer, limit_bytes: int | None) -> tuple[Plan, str]:
        limits.append(limit_bytes)
        return faster, "It is faster."

    monkeypatch.setattr(trial, "try_compilation", found)
    told = list(autotune_compilation(trainer, None, is_new, limit_bytes=77))
    if during:
        assert (trainer.plan, limits, len(told)) == (plan, [], int(is_new)), "gradients that never all exist"
    else:
        assert (trainer.plan, limits, told[1:]) == ((faster, [77], ["It is faster."]) if is_new else (plan, [], []))


@pytest.mark.parametrize(
    "eager, both, limit, said",
    [
        (
            (1.064, 0),
            (0.812, 0),
            None,
            "Compiled blocks are 1.31 times as fast: 812 against 1,064 ms for a micro-batch.",
        ),
        ((1.0, 9 * MIB), (0.5, 10 * MIB), 10 * MIB, "Compiled blocks are 2.00 times as fast"),
        ((1.0, 12 * MIB), (0.5, 11 * MIB), 10 * MIB, "Compiled blocks are 2.00 times as fast"),
        ((1.0, 9 * MIB), (0.5, 11 * MIB), 10 * MIB, "Blocks are not compiled: they would take 11.0 MiB of 10.0 MiB."),
        ((1.0, 0), (0.98, 0), None, "Blocks are not compiled, which would be 1.02 times as fast: 980 against 1,000 ms"),
        ((1.0, 0), (2.0, 0), None, "Blocks are not compiled, which would be 0.50 times as fast"),
    ],
    ids=["faster", "at the limit", "less than eager", "over the limit", "no gain", "slower"],
)
def test_compilation_is_kept_only_if_it_is_faster_and_fits(
    home: Path,
    monkeypatch: pytest.MonkeyPatch,
    eager: tuple[float, int],
    both: tuple[float, int],
    limit: int | None,
    said: str,
) -> None:
    monkeypatch.setattr(trial, "_measure", lambda _, plan: trial._Timing(*(both if plan.compile else eager)))
    trainer = trainer_of(run_of(home, "decides"), compiles=False)
    plan, reason = try_compilation(trainer, limit)
    assert reason.startswith(said)
    assert plan == trainer.plan.model_copy(update={"compile": said.startswith("Compiled")})


def test_memory_that_runs_out_in_the_trial_leaves_the_run_eager(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    trainer = trainer_of(run_of(home, "tried"), compiles=False)
    monkeypatch.setattr("lowvram.train.step.causal_loss", fail)
    assert try_compilation(trainer) == (trainer.plan, "Blocks are not compiled: memory ran out in the trial.")
    monkeypatch.undo()
    assert len(steps_of(list(trainer.run()))) == 3


@pytest.mark.default_cases("accumulated")
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
@pytest.mark.parametrize("micro_batch", [8, 4], ids=["one micro-batch", "accumulated"])
def test_a_real_trial_leaves_no_trace(home: Path, monkeypatch: pytest.MonkeyPatch, micro_batch: int) -> None:
    if micro_batch == 8:
        monkeypatch.setattr("lowvram.train.compilation.BACKEND", "inductor")
    truth = trainer_of(run_of(home, f"untried-{micro_batch}"), micro_batch, compiles=False)
    list(truth.run())
    trainer = trainer_of(run_of(home, f"tried-{micro_batch}"), micro_batch, compiles=False)
    before = everything(trainer)
    plan, reason = try_compilation(trainer)
    assert graphs() == 1
    assert plan.compile == reason.startswith("Compiled blocks are ")
    assert "times as fast: " in reason
    assert all(weight.grad is None for weight in trainer.state.model.parameters())
    assert all(torch.equal(before[name], tensor) for name, tensor in everything(trainer).items())
    assert not trainer.plan.compile
    list(trainer.run())
    expected, found = everything(truth), everything(trainer)
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []


@pytest.mark.nightly
def test_the_command_compiles_and_recomputes_when_asked_and_keeps_to_it(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from lowvram.cli.train import train

    what = run_of(home, "typed")
    train(what, device="cpu", stop_at=1, recompute="attention", compiled=True)
    said = "Plan: 8 sequences × 1 a step, attention computed again in backward, blocks compiled"
    assert said in capsys.readouterr().err
    assert graphs() == 1
    train(what, device="cpu", stop_at=2)
    assert f"{said} (this run's plan so far)." in capsys.readouterr().err
    train(what, device="cpu", recompute="none", compiled=False)
    assert "Plan: 8 sequences × 1 a step (this run's plan so far)." in capsys.readouterr().err


@pytest.mark.parametrize("word, expected", [("auto", None), ("on", True), ("off", False)])
def test_the_option_means_what_it_says(monkeypatch: pytest.MonkeyPatch, word: str, expected: bool | None) -> None:
    from lowvram.cli.app import build_parser

    given: list[Any] = []

    def train_nothing(*words: Any) -> Stopped:
        given.extend(words)
        return Stopped(1, is_finished=False)

    monkeypatch.setattr("lowvram.config.run_file.load_run", lambda *_, **__: "what")
    monkeypatch.setattr("lowvram.cli.train.train", train_nothing)
    options = ["--compile", word, "--recompute", "block", "--graphs", "off"]
    words = ["train", "run.toml", *options]
    arguments = build_parser().parse_args(words, argparse.Namespace(typed=words))
    arguments.run(arguments)
    assert given[:7] == ["what", None, "auto", None, "block", expected, False]
