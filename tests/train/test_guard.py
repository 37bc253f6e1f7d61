"""Memory that runs out is recognised in every spelling, and answered with what would fit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lowvram.errors import TrainingError
from lowvram.plan import Plan
from lowvram.train.guard import explain_out_of_memory, is_out_of_memory
from lowvram.train.prepare import prepare
from lowvram.train.trainer import StepDone
from tests.tiny import prepare_home, tiny_run


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("MPS backend out of memory (MPS allocated: 8.00 GB)"),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator: can't allocate memory"),
    ],
    ids=["cuda", "mps", "cuda driver", "cpu"],
)
def test_every_spelling_is_recognised(error: RuntimeError) -> None:
    assert is_out_of_memory(error)


def test_other_errors_are_not_taken_for_it() -> None:
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied (2x3 and 4x5)"))


@pytest.mark.parametrize(
    "micro_batch, accumulate, said",
    [(8, 3, "--micro-batch 6"), (5, 1, "--micro-batch 1"), (1, 24, "Lower train.seq_len")],
)
def test_the_answer_is_the_next_smaller_micro_batch_that_divides_the_step(
    micro_batch: int, accumulate: int, said: str
) -> None:
    error = explain_out_of_memory(Plan(micro_batch=micro_batch, accumulate=accumulate), 6, 512)
    assert "in step 7" in str(error)
    assert said in str(error)


@pytest.mark.parametrize("text, expected", [("out of memory", TrainingError), ("another fault", RuntimeError)])
def test_a_step_that_runs_out_of_memory_ends_the_run_and_loses_no_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, expected: type[Exception]
) -> None:
    prepare_home(tmp_path)
    what = tiny_run(tmp_path)
    what = what.model_copy(update={"run": what.run.model_copy(update={"save_every_minutes": 1e-9})})
    trainer = prepare(what, Plan(micro_batch=4, accumulate=2), torch.device("cpu"))
    done = []

    def run() -> None:
        for event in trainer.run():
            if isinstance(event, StepDone):
                done.append(event.step)
                if event.step == 2:
                    monkeypatch.setattr("lowvram.train.trainer.gradients", fail)

    def fail(*_: object) -> None:
        raise RuntimeError(text)

    with pytest.raises(expected, match="in step 3, with 4 sequences" if expected is TrainingError else text):
        run()
    assert done == [1, 2]
    assert trainer.store.latest()[0].step == 2
