"""Recognises and explains memory that runs out, spills into host memory or was misestimated; knows no loop."""

from __future__ import annotations

import functools
import gc
import os

import psutil
import torch

from lowvram.config.plan import Plan
from lowvram.config.train import TrainConfig, divisors
from lowvram.errors import DeviceFaultError, MemoryRanOutError, TrainingError
from lowvram.units import show_bytes, show_count

# Out-of-memory messages of CUDA, its libraries, MPS and CPU allocators, where they do not raise torch.OutOfMemoryError.
# MPS calls a tensor larger than its largest buffer invalid; Windows has "not enough memory".
_OOM_TEXTS = (
    "out of memory",
    "can't allocate memory",
    "cannot allocate memory",
    "not enough memory",
    "invalid buffer size",
    "cublas_status_alloc_failed",
    "cublas_status_not_initialized when calling `cublascreate",  # raised on a full card at the first matrix product
    "cudnn_status_alloc_failed",
)
# torch's own class for errors of the driver, from 2.8 on.
_DEVICE_ERRORS = tuple(kind for kind in [getattr(torch, "AcceleratorError", None)] if kind is not None)
# Driver messages for a card that hung, overheated, lost power or was removed (cudaError_t, CUDA Runtime API).
_DEVICE_FAULTS = (
    "unspecified launch failure",
    "illegal memory access",
    "illegal instruction",
    "launch timed out",
    "hardware stack error",
    "uncorrectable ecc",
    "unknown error",
    "fallen off the bus",
    "device lost",
    "device is lost",
    "busy or unavailable",
    "driver shutting down",
)
# A larger error of the ledger (the estimated memory of a step) cannot be explained by rounding.
_LEDGER_TOLERANCE = 0.05
# Spilling into host memory slows a step down far more than this (12 × on an 8 GB card); a hot card far less.
_SPILL_SLOWDOWN = 3.0


def is_out_of_memory(error: Exception) -> bool:
    """Say whether an error means that memory ran out."""
    return isinstance(error, torch.OutOfMemoryError) or any(text in str(error).lower() for text in _OOM_TEXTS)


def explain_device_fault(error: RuntimeError, saved_step: int | None) -> DeviceFaultError | None:
    """Return the error of a device or driver failure that a new process can recover from; None for any other error.

    An error that would come again with the same command (no kernel for this card, a failed assertion) is not one.
    saved_step: the step of the newest checkpoint, if any.
    """
    words = str(error)
    is_of_device = isinstance(error, _DEVICE_ERRORS) or words.startswith("CUDA error")
    if not is_of_device or is_out_of_memory(error) or not any(fault in words.lower() for fault in _DEVICE_FAULTS):
        return None
    last = "Nothing was saved yet" if saved_step is None else f"The last checkpoint is of step {saved_step}"
    return DeviceFaultError(
        f"The device failed: {words.splitlines()[0]}.",
        f"{last}; what came after it is lost.",
        "Type the same command again. If it comes back, lowvram doctor says what is wrong with driver or card.",
    )


def halve(plan: Plan) -> Plan | None:
    """Return the plan with the largest micro-batch that is at most half and divides the step; None below one.

    What only made it faster goes too: kept casts, and longer chunks of the loss.  A plan of one sequence loses these
    alone.
    """
    samples = plan.micro_batch * plan.accumulate
    smaller = [n for n in divisors(samples) if n <= plan.micro_batch // 2]
    lean = plan.model_copy(update={"keep_casts": False, "loss_chunk": None})
    if not smaller:
        return None if lean == plan else lean
    return lean.model_copy(update={"micro_batch": smaller[-1], "accumulate": samples // smaller[-1]})


def free_memory(device: torch.device) -> None:
    """Free what a failed attempt has left: tensors in reference cycles, then the allocator's unused blocks."""
    # A failed backward pass leaves its next node in this thread's queue, and with it the activations of all remaining
    # layers, until another backward pass empties the queue.
    torch.autograd.backward(torch.zeros((), requires_grad=True).sum())
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif device.type == "mps":
        torch.mps.empty_cache()


def explain_out_of_memory(plan: Plan, step: int, train: TrainConfig) -> MemoryRanOutError:
    """Return the error of a step that does not fit even with one sequence at a time; it says what would make it fit."""
    same_run = "" if plan.recompute == "block" else 'Start the run again with `recompute="block"`, or '
    fix = f"{same_run}{_suggest_run(train)}"
    return MemoryRanOutError(
        f"Memory ran out in step {step + 1}, with one sequence at a time.",
        "It cannot be cut further. Nothing is lost: what was learnt is saved.",
        f"{fix[0].upper()}{fix[1:]}",
    )


def explain_out_of_memory_in_backward(
    plan: Plan, step: int, train: TrainConfig, has_moved: bool, saved: int | None
) -> MemoryRanOutError:
    """Return the error of a step that updates during backward, which cannot be retried with smaller micro-batches.

    has_moved: some weights were already updated.  saved: the step of the checkpoint that was then loaded again.
    """
    recovery = "and nothing was saved yet" if saved is None else f"so the checkpoint of step {saved} is loaded again"
    moved = f"Some weights had moved and others not, {recovery}."
    again = "" if plan.recompute == "block" else 'Start the run again with `recompute="block"`, or '
    smaller = f"a smaller train.batch_tokens (now {train.batch_tokens}), which is one micro-batch here, or with "
    fix = f"{again}begin a new run.dir with {smaller}train.update_during_backward = false."
    return MemoryRanOutError(
        f"Memory ran out in step {step + 1}, which updates during backward and so cannot be cut.",
        moved if has_moved else "No weight had moved. Nothing is lost: what was learnt is saved.",
        f"{fix[0].upper()}{fix[1:]}",
    )


def explain_out_of_memory_in_validation(step: int) -> TrainingError:
    """Return the error of a validation or a sample that ran out of memory."""
    return TrainingError(
        f"Memory ran out after step {step}, while the model was validated or wrote its samples.",
        "Nothing is lost: what was learnt is saved.",
        "Close what else uses the memory or choose a smaller `micro_batch`, and start the run again.",
    )


def explain_out_of_memory_in_update(step: int, train: TrainConfig) -> MemoryRanOutError:
    """Return the error of an optimizer step that ran out of memory; which weights were updated is then unknown."""
    fix = _suggest_run(train)
    return MemoryRanOutError(
        f"Memory ran out in the update of step {step + 1}.",
        "Some weights may have moved and others not, so it is not tried again: the last checkpoint stands.",
        f"{fix[0].upper()}{fix[1:]}",
    )


def _suggest_run(train: TrainConfig) -> str:
    """Return how a new run could take less memory; the recipe of this run cannot change."""
    bits = "optimizer.bits = 8, " if train.optimizer.bits != 8 else ""
    return f"begin a new run.dir with {bits}a shorter train.seq_len (now {train.seq_len}) or a smaller model."


def cap_memory(device: torch.device, limit_bytes: int) -> None:
    """Make the CUDA allocator raise at limit_bytes; without that, Windows moves the excess into host memory unasked."""
    if device.type == "cuda":
        total_bytes = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, limit_bytes / total_bytes), device)


def compare_with_ledger(measured_bytes: int, ledger_bytes: int) -> str | None:
    """Return a sentence where the card's peak differs from the ledger's estimate; None where they agree."""
    difference = measured_bytes / ledger_bytes - 1.0
    if abs(measured_bytes - ledger_bytes) <= _LEDGER_TOLERANCE * ledger_bytes:
        return None
    than = "more" if difference > 0 else "less"
    return (
        f"A step takes {show_bytes(measured_bytes)}, {abs(difference):.0%} {than} than the {show_bytes(ledger_bytes)} "
        "that were estimated."
    )


def looks_spilled(tokens_per_second: float, expected: float) -> str | None:
    """Return a warning where a run is so slow that it must be using host memory; None where it is not."""
    if tokens_per_second * _SPILL_SLOWDOWN >= expected:
        return None
    return (
        f"Only {show_count(tokens_per_second)} tokens/s where {show_count(expected)} were expected: the card's memory "
        "may be spilling into the computer's. Close what else uses the card, or lower `micro_batch`."
    )


def memory_in_use(device: torch.device, is_recorded: bool = False) -> int:
    """Return the most bytes that tensors took on a CUDA card, what MPS holds now, or this process's resident bytes.

    is_recorded: CUDA graphs are in use; the peak does not count their tensors, so the reserved bytes are returned.
    """
    if device.type == "cuda":
        query = torch.cuda.memory_reserved if is_recorded else torch.cuda.max_memory_allocated
        return int(query(device))
    if device.type == "mps":
        return int(torch.mps.driver_allocated_memory())
    return int(_process(os.getpid()).memory_info().rss)


@functools.lru_cache(maxsize=1)
def _process(pid: int) -> psutil.Process:
    """Return this process as psutil knows it; to look it up takes more than half of reading its memory at each step."""
    return psutil.Process(pid)
