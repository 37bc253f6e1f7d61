"""What pays on this machine, compiled blocks or recorded passes: measured on gradients that are thrown away."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from typing import NamedTuple

import torch

from lowvram.config.plan import Plan
from lowvram.errors import MachineError
from lowvram.train.oom import free_memory, is_out_of_memory
from lowvram.train.step import discard, loss_for
from lowvram.train.trainer import Trainer
from lowvram.units import show_bytes

# Micro-batches before the clock runs (the first compiles, the second lets the allocator settle), and while it runs.
_UNTIMED, _TIMED = 2, 5
# What the update and a sample may need beside a recording, whose memory nothing else can use, more than validation.
_SPARE_BYTES = 128 * 2**20
# Compiling must gain more than two measurements of the same thing differ by.
_LEAST_GAIN = 1.03


class _Pace(NamedTuple):
    """The median time of a micro-batch, and the card's peak in a CUDA run (0 elsewhere)."""

    micro_batch_s: float
    peak_bytes: int


def settle_compilation(
    trainer: Trainer, asked: bool | None, is_new: bool, limit_bytes: int | None = None
) -> Iterator[str]:
    """Decide on `trainer.plan.compile` before the run begins; yields what is being done, and why it came out so.

    What was asked for stays.  Else a new run on CUDA tries both (elsewhere it stays eager: reproducible, and without a
    C++ compiler), and a run that is compiled so far goes on so if this machine still can.  limit_bytes: see
    `try_compilation`.
    """
    if asked is not None:
        return
    if trainer.plan.compile:
        problem = _find_problem(trainer)
        if problem is not None:
            trainer.plan = trainer.plan.model_copy(update={"compile": False})
            yield f"Blocks are no longer compiled: {problem}"
    elif is_new and trainer.state.model.embedding.device.type == "cuda":
        if trainer.what.train.update_during_backward:
            # A trial must change nothing, and a micro-batch without an update would hold gradients that never exist.
            yield "Blocks are not compiled where weights move during backward; --compile on does it untried."
            return
        yield "Trying whether compiled blocks are faster; compiling takes a minute or so the first time."
        trainer.plan, reason = try_compilation(trainer, limit_bytes)
        yield reason


def try_compilation(trainer: Trainer, limit_bytes: int | None = None) -> tuple[Plan, str]:
    """Return the trainer's plan with `compile` set to what a trial found, and one sentence why.

    Runs micro-batches of the next step, eager and compiled.  No state changes: weights, optimizer and counters are as
    before, and the gradients are dropped.  limit_bytes: what the card may hold then, on CUDA; the optimizer's states,
    which do not exist before the first update, must be taken off it.
    """
    eager = trainer.plan.model_copy(update={"compile": False})
    both = eager.model_copy(update={"compile": True})
    try:
        slow, fast = _measure(trainer, eager), _measure(trainer, both)
    except MachineError as error:
        return eager, f"Blocks are not compiled: {error.why}"
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return eager, "Blocks are not compiled: memory ran out in the trial."
    finally:
        free_memory(trainer.state.model.embedding.device)
    gain = slow.micro_batch_s / fast.micro_batch_s
    times = f"{1e3 * fast.micro_batch_s:,.0f} against {1e3 * slow.micro_batch_s:,.0f} ms for a micro-batch"
    if limit_bytes is not None and fast.peak_bytes > max(limit_bytes, slow.peak_bytes):
        took = f"{show_bytes(fast.peak_bytes)} of {show_bytes(limit_bytes)}."
        return eager, f"Blocks are not compiled: they would take {took}"
    if gain < _LEAST_GAIN:
        return eager, f"Blocks are not compiled, which would be {gain:.2f} times as fast: {times}."
    return both, f"Compiled blocks are {gain:.2f} times as fast: {times}."


def settle_cuda_graphs(trainer: Trainer, asked: bool | None, limit_bytes: int | None = None) -> Iterator[str]:
    """Let the trainer play a recording of its passes where that is faster and fits; yields why it came out so.

    For CUDA alone, and not where weights move during backward.  asked: True keeps it without a gain and raises
    MachineError where it cannot be, False leaves it.  limit_bytes: see `try_compilation`.
    """
    device, kind = trainer.state.model.embedding.device, "CUDA graphs"
    if asked is False:
        return
    if device.type != "cuda" or trainer.what.train.update_during_backward:
        if asked:
            why = (
                "They need a CUDA card." if device.type != "cuda" else "Weights that move during backward need Python."
            )
            raise MachineError(f"This run cannot use {kind}.", why, "Leave out --graphs on.")
        return
    launched, problem = _measure(trainer, trainer.plan), ""
    free_memory(device)
    try:
        trainer.record()
        _look_on(trainer)
        took_bytes = torch.cuda.memory_reserved(device) + _SPARE_BYTES
        played = _measure(trainer, trainer.plan)
    except RuntimeError as error:
        problem = "memory ran out." if is_out_of_memory(error) else f"{str(error).strip().splitlines()[0]}."
    else:
        gain = launched.micro_batch_s / played.micro_batch_s
        times = f"{1e3 * played.micro_batch_s:,.0f} against {1e3 * launched.micro_batch_s:,.0f} ms for a micro-batch"
        if limit_bytes is not None and took_bytes > limit_bytes:
            problem = f"they would take {show_bytes(took_bytes)} of {show_bytes(limit_bytes)}."
        elif gain < _LEAST_GAIN and not asked:
            problem = f"they would be {gain:.2f} times as fast: {times}."
        else:
            yield f"Passes are played from {kind}, {gain:.2f} times as fast: {times}."
            return
    trainer.recording = None
    free_memory(device)
    if asked:
        raise MachineError(f"This run cannot use {kind}.", problem[0].upper() + problem[1:], "Leave out --graphs on.")
    yield f"Passes are not played from {kind}: {problem}"


@torch.no_grad()
def _look_on(trainer: Trainer) -> None:
    """Pass a micro-batch forward as validation does, so that the memory for it is there."""
    (batch,) = trainer.micro_batches([0])
    loss_for(trainer.state.model, trainer.what.train, trainer.plan)(batch)


def _find_problem(trainer: Trainer) -> str | None:
    """Return why a micro-batch does not run compiled; None if it does, and the first step need not compile it again."""
    try:
        _measure(trainer, trainer.plan, untimed=0, timed=1)
    except MachineError as error:
        return error.why
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
    return None  # memory that ran out is the step's to answer, by a smaller micro-batch


def _measure(trainer: Trainer, plan: Plan, untimed: int = _UNTIMED, timed: int = _TIMED) -> _Pace:
    """Time micro-batches as the step makes them: where it has several, upon the gradients of those before."""
    device, optimizer, own = trainer.state.model.embedding.device, trainer.state.optimizer, trainer.plan
    trainer.plan = plan
    took_s = []
    try:
        for turn in range(untimed + timed):
            if device.type == "cuda" and turn == untimed:
                torch.cuda.reset_peak_memory_stats(device)
            if plan.accumulate == 1:
                discard(optimizer)
            began = time.perf_counter()
            trainer.accumulate([turn % plan.accumulate]).stats.tolist()  # reading waits for the device
            took_s.append(time.perf_counter() - began)
        peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
    finally:
        trainer.plan = own
        discard(optimizer)
    return _Pace(statistics.median(took_s[untimed:]), int(peak))
