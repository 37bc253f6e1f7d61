"""Memory that runs out is recognised in every spelling, answered with what would fit, and told when it hides."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from lowvram.config.plan import Plan
from lowvram.config.train import TrainConfig
from lowvram.train.oom import (
    cap_memory,
    compare_with_ledger,
    explain_device_fault,
    explain_out_of_memory,
    explain_out_of_memory_in_update,
    free_memory,
    halve,
    is_out_of_memory,
    looks_spilled,
)

GIB = 1 << 30
RECIPE = TrainConfig(tokens=10**6, seq_len=512, batch_tokens=512 * 24)
SMALL_STATES = RECIPE.model_copy(update={"optimizer": RECIPE.optimizer.model_copy(update={"bits": 8})})


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("MPS backend out of memory (MPS allocated: 8.00 GB)"),
        RuntimeError("Invalid buffer size: 12.00 GiB"),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator: can't allocate memory"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:83] data. DefaultCPUAllocator: not enough memory"),
    ],
    ids=["cuda", "mps", "mps buffer", "cuda driver", "cublas", "cudnn", "cpu", "cpu on Windows"],
)
def test_every_spelling_is_recognised(error: RuntimeError) -> None:
    assert is_out_of_memory(error)


@pytest.mark.parametrize(
    "text",
    [
        "mat1 and mat2 shapes cannot be multiplied (2x3 and 4x5)",
        "CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx`",
        "out of resource: shared memory, Required: 131072, Hardware limit: 101376",
    ],
    ids=["shapes", "cublas", "triton"],
)
def test_other_errors_are_not_taken_for_it(text: str) -> None:
    assert not is_out_of_memory(RuntimeError(text))


def test_memory_that_really_runs_out_is_recognised() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 62, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)


@pytest.mark.parametrize(
    "micro_batch, accumulate, halved",
    [(8, 3, (4, 6)), (5, 1, (1, 5)), (12, 5, (6, 10)), (9, 4, (4, 9)), (7, 2, (2, 7)), (3, 1, (1, 3)), (2, 9, (1, 18))],
)
def test_half_a_micro_batch_is_the_most_that_divides_the_step(
    micro_batch: int, accumulate: int, halved: tuple[int, int]
) -> None:
    plan = Plan(micro_batch=micro_batch, accumulate=accumulate, recompute="attention", compile=True)
    smaller = halve(plan)
    assert smaller is not None
    assert (smaller.micro_batch, smaller.accumulate) == halved
    assert smaller.model_copy(update={"micro_batch": micro_batch, "accumulate": accumulate}) == plan, "nothing else"
    assert halve(plan.model_copy(update={"loss_chunk": 7, "keep_casts": True})) == smaller, (
        "what only made it faster goes"
    )


def test_one_sequence_has_no_half_and_gives_up_only_what_made_it_faster() -> None:
    plan = Plan(micro_batch=1, accumulate=24)
    assert halve(plan) is None
    assert halve(plan.model_copy(update={"loss_chunk": 7})) == plan
    assert halve(plan.model_copy(update={"keep_casts": True})) == plan


SAME_RUN = 'Start the run again with `recompute="block"`, or begin a new run.dir with '
SHORTER = "a shorter train.seq_len (now 512) or a smaller model."


@pytest.mark.parametrize(
    "recompute, train, fix",
    [
        ("none", RECIPE, f"{SAME_RUN}optimizer.bits = 8, {SHORTER}"),
        ("attention", SMALL_STATES, f"{SAME_RUN}{SHORTER}"),
        ("block", RECIPE, f"Begin a new run.dir with optimizer.bits = 8, {SHORTER}"),
        ("block", SMALL_STATES, f"Begin a new run.dir with {SHORTER}"),
    ],
    ids=["all", "8 bits already", "recomputed already", "both already"],
)
def test_a_step_that_cannot_be_cut_is_answered_with_what_would_still_help(
    recompute: str, train: TrainConfig, fix: str
) -> None:
    error = explain_out_of_memory(Plan(micro_batch=1, accumulate=24, recompute=recompute), 6, train)
    assert str(error).startswith("Memory ran out in step 7, with one sequence at a time.")
    assert error.fix == fix


def test_an_update_that_runs_out_of_memory_is_answered_with_what_makes_states_smaller() -> None:
    error = explain_out_of_memory_in_update(6, RECIPE)
    assert str(error).startswith("Memory ran out in the update of step 7.")
    assert "the last checkpoint stands" in error.why
    assert error.fix.startswith("Begin a new run.dir with optimizer.bits = 8, ")
    assert "bits" not in explain_out_of_memory_in_update(6, SMALL_STATES).fix


@pytest.mark.parametrize("kind", ["cuda", "mps", "cpu"])
def test_memory_is_given_back_by_the_devices_own_allocator(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    emptied: list[str] = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append("cuda"))
    monkeypatch.setattr(torch.mps, "empty_cache", lambda: emptied.append("mps"))
    free_memory(torch.device(kind))
    assert emptied == [kind] * (kind != "cpu")


@pytest.mark.parametrize("limit, fraction", [(6 * GIB, 0.75), (8 * GIB, 1.0), (9 * GIB, 1.0)], ids=str)
def test_a_card_raises_at_its_limit(limit: int, fraction: float, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[float, int]] = []
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=8 * GIB))
    # Not torch's own function, which refuses a device without a number.
    monkeypatch.setattr("torch.cuda.memory._lazy_init", lambda: None)
    monkeypatch.setattr(torch._C, "_cuda_setMemoryFraction", lambda *words: told.append(words), raising=False)
    cap_memory(torch.device("cuda", 0), limit)
    cap_memory(torch.device("cpu"), limit)
    assert told == [(fraction, 0)]


@pytest.mark.parametrize(
    "measured, said",
    [
        (100, None),
        (105, None),
        (95, None),
        (106, "A step takes 106.0 GiB, 6% more than the 100.0 GiB that were estimated."),
        (90, "A step takes 90.0 GiB, 10% less than the 100.0 GiB that were estimated."),
    ],
)
def test_a_ledger_that_is_off_by_more_than_a_twentieth_is_told(measured: int, said: str | None) -> None:
    assert compare_with_ledger(measured * GIB, 100 * GIB) == said


def test_a_run_below_a_third_of_its_speed_is_told() -> None:
    assert looks_spilled(3_400, expected=10_000) is None
    said = looks_spilled(3_300, expected=10_000)
    assert said is not None
    assert said.startswith("Only 3.3k tokens/s where 10.0k were expected")


@pytest.mark.parametrize(
    "saved_step, says", [(120, "The last checkpoint is of step 120"), (None, "Nothing was saved yet")]
)
def test_a_device_that_failed_is_told_from_a_mistake_and_from_memory(saved_step: int | None, says: str) -> None:
    fault = explain_device_fault(RuntimeError("CUDA error: unspecified launch failure\nCUDA kernel errors"), saved_step)
    assert fault is not None
    assert fault.exit_code == 75
    assert str(fault).startswith(f"The device failed: CUDA error: unspecified launch failure. {says}; what came after")
    for other in (
        RuntimeError("CUDA error: out of memory"),
        # The same command meets these again: a program that restarts on 75 would do so for ever.
        RuntimeError("CUDA error: no kernel image is available for execution on the device"),
        RuntimeError("CUDA error: device-side assert triggered"),
        RuntimeError("CUDA error: CUBLAS_STATUS_NOT_SUPPORTED when calling `cublasGemmEx`"),
        RuntimeError("shape mismatch"),
        torch.OutOfMemoryError("x"),
    ):
        assert explain_device_fault(other, saved_step) is None
