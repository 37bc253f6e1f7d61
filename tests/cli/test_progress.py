"""The live line of a run: what it says before the first step, and what it keeps in a narrow terminal."""

from __future__ import annotations

import io
import time
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from lowvram.api.training import describe_plan
from lowvram.cli import progress as screen
from lowvram.cli.progress import TrainingScreen, join_fitting, step_parts
from lowvram.config.plan import Plan
from lowvram.train.events import Halved, Recorded, StepDone

STEP = StepDone(
    step=1234,
    tokens=10**8,
    loss=3.1234,
    gradient_norm=1.0,
    learning_rate=1e-3,
    tokens_per_second=12_345.0,
    memory_bytes=1300 * 2**20,
    left_s=11_100.0,
    skipped=0,
)
WHOLE = "step 1234/7629  loss 3.123  12.3k tok/s  process 1.3 GiB  3 h 05 min left"


def trainer_on(device: str = "cpu", doing: str = "step", begun: int = 0, accumulate: int = 32) -> SimpleNamespace:
    """What a screen reads of a trainer."""
    return SimpleNamespace(
        config=SimpleNamespace(train=SimpleNamespace(steps=7629)),
        state=SimpleNamespace(step=0, model=SimpleNamespace(embedding=SimpleNamespace(device=torch.device(device)))),
        plan=SimpleNamespace(accumulate=accumulate),
        doing=doing,
        micro_batches_begun=begun,
    )


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Console:
    console = Console(file=io.StringIO(), force_terminal=True, width=80, soft_wrap=True)
    monkeypatch.setattr(screen, "err", console)
    return console


@pytest.mark.parametrize(
    ("width", "line"),
    [
        (None, WHOLE),
        (len(WHOLE), WHOLE),
        (len(WHOLE) - 1, "step 1234/7629  loss 3.123  12.3k tok/s  3 h 05 min left"),
        (50, "step 1234/7629  loss 3.123  3 h 05 min left"),
        (1, "step 1234/7629"),
    ],
    ids=["a pipe", "at the limit", "one beyond", "narrow", "hopeless"],
)
def test_a_narrow_line_leaves_out_what_matters_least(width: int | None, line: str) -> None:
    assert join_fitting(step_parts(STEP, 7629, "process"), width) == line


@pytest.mark.parametrize(
    ("trainer", "says"),
    [
        (trainer_on(begun=3), "step 1/7629  micro-batch 3 of 32, 41 s"),
        (trainer_on(accumulate=1), "step 1/7629  computing, 41 s"),
        (trainer_on("cuda", begun=1), "step 1/7629  micro-batch 1 of 32, kernels are compiled first, 41 s"),
        (trainer_on("cuda", begun=2), "step 1/7629  micro-batch 2 of 32, 41 s"),
        (trainer_on(doing="starting"), "starting, 41 s"),
    ],
    ids=["accumulating", "one micro-batch", "compiling", "compiled", "resuming"],
)
def test_before_the_first_step_the_line_says_what_it_waits_for(
    terminal: Console, monkeypatch: pytest.MonkeyPatch, trainer: SimpleNamespace, says: str
) -> None:
    shown = TrainingScreen(trainer)
    began = time.monotonic()
    monkeypatch.setattr(screen.time, "monotonic", lambda: began + 41)
    with shown:
        pass
    assert says in terminal.file.getvalue()


def test_long_work_between_steps_is_named_and_short_work_is_not(
    terminal: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = trainer_on(begun=7)
    shown = TrainingScreen(trainer)
    now = time.monotonic()
    for doing, waited_s, says in (
        ("step", 1.9, None),
        ("step", 9, "micro-batch 7 of 32, 9 s"),
        ("saving", 5, "saving, 5 s"),
    ):
        monkeypatch.setattr(screen.time, "monotonic", lambda: now)
        shown.show(STEP)
        trainer.doing = doing
        monkeypatch.setattr(screen.time, "monotonic", lambda at=now + waited_s: at)
        line = shown._live_line()
        assert line.startswith("step 1234/7629")
        assert len(line) <= terminal.width - 2
        assert says in line if says else "micro-batch" not in line


@pytest.mark.parametrize(
    ("device", "says"), [("cpu", "process 1.3 GiB"), ("cuda", "card 1.3 GiB"), ("mps", "GPU 1.3 GiB")]
)
def test_memory_is_told_with_whose_it_is(terminal: Console, device: str, says: str) -> None:
    shown = TrainingScreen(trainer_on(device))
    shown.show(STEP)
    assert says in shown._live_line()


@pytest.mark.parametrize("width", [30, 60, 80, 200])
def test_no_line_of_the_screen_is_wider_than_the_terminal(terminal: Console, width: int) -> None:
    terminal.width = width
    with TrainingScreen(trainer_on(begun=3)) as shown:
        shown.show(STEP)
        shown._progress.refresh()
    console = Console(file=io.StringIO(), width=width)
    console.print(shown._progress.get_renderable())
    for line in console.file.getvalue().splitlines():
        assert len(line.rstrip()) <= width, line


@pytest.mark.parametrize("micro_batch, says", [(1, "with 1 sequence × 16 a step"), (2, "with 2 sequences × 16 a step")])
def test_a_plan_counts_its_sequences_in_words_that_agree(
    capsys: pytest.CaptureFixture[str], micro_batch: int, says: str
) -> None:
    TrainingScreen(trainer_on()).show(Halved(3, micro_batch, 16))
    assert says in " ".join(capsys.readouterr().err.split())
    plan = Plan(micro_batch=micro_batch, accumulate=16)
    assert f"Plan: {says.removeprefix('with ')} (as asked)." == describe_plan(plan, "as asked")


@pytest.mark.parametrize("problem", ["", "memory ran out."])
def test_it_is_told_whether_updates_are_replayed(capsys: pytest.CaptureFixture[str], problem: str) -> None:
    TrainingScreen(trainer_on()).show(Recorded(2, problem))
    says = "not replayed from CUDA graphs: memory ran out." if problem else "replayed from CUDA graphs."
    assert f"Updates are {says}" in " ".join(capsys.readouterr().err.split())
