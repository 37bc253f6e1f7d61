"""Measures whether torch.compile and CUDA graphs are faster on this machine; discards the gradients that it makes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from typing import NamedTuple

import torch

from lowvram.config.plan import Plan
from lowvram.config.train import TrainConfig
from lowvram.errors import MachineError
from lowvram.train.cuda_graph import SPARE_BYTES
from lowvram.train.oom import free_memory, is_out_of_memory
from lowvram.train.step import discard, loss_for
from lowvram.train.trainer import Trainer
from lowvram.units import show_bytes

# The numbers of warm-up micro-batches (the first compiles, the second lets the allocator settle) and of timed ones.
_UNTIMED, _TIMED = 2, 5
# The speed-up must be greater than the difference between two measurements of the same thing.
_LEAST_GAIN = 1.03


class _Timing(NamedTuple):
    """The median time of a micro-batch, and the card's peak memory on CUDA (0 elsewhere)."""

    micro_batch_s: float
    peak_bytes: int


def autotune_compilation(
    trainer: Trainer, asked: bool | None, is_new: bool, limit_bytes: int | None = None
) -> Iterator[str]:
    """Decide on `trainer.plan.compile` before the run begins; yields what is being done, and the reason for the result.

    asked: the user's choice, which is not changed; None decides here.  Then a new run on CUDA tries both ways (on other
    devices it stays eager, which is reproducible and needs no C++ compiler), and a run that is compiled so far stays
    compiled if this machine still can.  limit_bytes: see `try_compilation`.
    """
    if asked is not None:
        return
    if trainer.plan.compile:
        problem = _find_compile_error(trainer)
        if problem is not None:
            trainer.plan = trainer.plan.model_copy(update={"compile": False})
            yield f"Blocks are no longer compiled: {problem}"
    elif is_new and trainer.state.model.embedding.device.type == "cuda":
        if trainer.config.train.update_during_backward:
            # A trial must not change weights, and without updates it would hold gradients that this run never holds.
            yield "Blocks are not compiled where weights move during backward; `compile=True` compiles without a trial."
            return
        yield "Measuring whether compiled blocks are faster; compiling takes a minute or so the first time."
        trainer.plan, reason = try_compilation(trainer, limit_bytes)
        if trainer.plan.compile and trainer.plan.keep_casts:  # which compiled blocks do not read
            trainer.plan = trainer.plan.model_copy(update={"keep_casts": False})
            trainer.state.model.kept_casts = None
        yield reason


def try_compilation(trainer: Trainer, limit_bytes: int | None = None) -> tuple[Plan, str]:
    """Return the trainer's plan with `compile` set to the faster choice, and a sentence that says why.

    Runs micro-batches of the next step, eager and compiled.  No state changes: weights, optimizer and counters stay as
    they are, and the gradients are dropped.  limit_bytes: how much memory the trial may take on CUDA; the caller must
    subtract the optimizer's states, which do not exist before the first update.
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


def refuse_cuda_graphs(device: torch.device, train: TrainConfig) -> None:
    """Raise MachineError where a run cannot replay its passes from CUDA graphs."""
    if device.type == "cuda" and not train.update_during_backward:
        return
    why = "They need a CUDA card." if device.type != "cuda" else "Weights that move during backward need Python."
    raise MachineError("This run cannot use CUDA graphs.", why, "Leave `graphs` out.")


def autotune_cuda_graphs(trainer: Trainer, asked: bool | None, limit_bytes: int | None = None) -> Iterator[str]:
    """Let the trainer replay its passes from a CUDA graph where that is faster and fits; yields the reason.

    This needs CUDA, and is not possible where weights move during backward.  asked: True uses the graph even without a
    gain and raises MachineError where it is not possible, False does nothing.  limit_bytes: see `try_compilation`.
    """
    device, kind = trainer.state.model.embedding.device, "CUDA graphs"
    if asked is False:
        return
    if asked:
        refuse_cuda_graphs(device, trainer.config.train)
    if device.type != "cuda" or trainer.config.train.update_during_backward:
        return
    eager, problem = _measure(trainer, trainer.plan), ""
    free_memory(device)
    try:
        trainer.capture()
        _validation_pass(trainer)
        took_bytes = torch.cuda.memory_reserved(device) + SPARE_BYTES
        replayed = _measure(trainer, trainer.plan)
    except RuntimeError as error:
        problem = "memory ran out." if is_out_of_memory(error) else f"{str(error).strip().splitlines()[0]}."
    else:
        gain = eager.micro_batch_s / replayed.micro_batch_s
        times = f"{1e3 * replayed.micro_batch_s:,.0f} against {1e3 * eager.micro_batch_s:,.0f} ms for a micro-batch"
        if limit_bytes is not None and took_bytes > limit_bytes:
            problem = f"they would take {show_bytes(took_bytes)} of {show_bytes(limit_bytes)}."
        elif gain < _LEAST_GAIN and not asked:
            problem = f"they would be {gain:.2f} times as fast: {times}."
        else:
            yield f"Passes are replayed from {kind}, {gain:.2f} times as fast: {times}."
            return
    trainer.captured_pass = None
    free_memory(device)
    if asked:
        raise MachineError(f"This run cannot use {kind}.", problem[0].upper() + problem[1:], "Leave `graphs` out.")
    yield f"Passes are not replayed from {kind}: {problem}"


@torch.no_grad()
def _validation_pass(trainer: Trainer) -> None:
    """Run a forward pass as validation does, so that its memory counts as reserved."""
    (batch,) = trainer.micro_batches([0])
    loss_for(trainer.state.model, trainer.config.train, trainer.plan)(batch)


def _find_compile_error(trainer: Trainer) -> str | None:
    """Return why a micro-batch does not run compiled; None if it does, and then the first step is compiled already."""
    try:
        _measure(trainer, trainer.plan, untimed=0, timed=1)
    except MachineError as error:
        return error.why
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
    return None  # where memory ran out, the step itself takes a smaller micro-batch


def _measure(trainer: Trainer, plan: Plan, untimed: int = _UNTIMED, timed: int = _TIMED) -> _Timing:
    """Time micro-batches as in a step; where a step has several, the gradients of earlier ones are kept."""
    device, optimizer, own_plan = trainer.state.model.embedding.device, trainer.state.optimizer, trainer.plan
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
        trainer.plan = own_plan
        discard(optimizer)
    return _Timing(statistics.median(took_s[untimed:]), int(peak))
