"""What to make of an error that ends a step: is it the card's memory, in whichever words it comes."""

from __future__ import annotations

import torch

from lowvram.errors import TrainingError
from lowvram.plan import Plan

# How CUDA, MPS and the CPU allocator say it when they do not raise torch.OutOfMemoryError.
_SPELLINGS = ("out of memory", "can't allocate memory", "cannot allocate memory")


def is_out_of_memory(error: RuntimeError) -> bool:
    """Say whether an error means that memory ran out."""
    return isinstance(error, torch.OutOfMemoryError) or any(words in str(error).lower() for words in _SPELLINGS)


def explain_out_of_memory(plan: Plan, step: int, seq_len: int) -> TrainingError:
    """Return the error that tells how to make the same run fit."""
    if plan.micro_batch > 1:
        smaller = max(n for n in range(1, plan.micro_batch) if (plan.micro_batch * plan.accumulate) % n == 0)
        fix = f"Type the same command with --micro-batch {smaller}: the run learns the same, a little slower."
    else:
        fix = f"Lower train.seq_len (now {seq_len}) or choose a smaller model."
    return TrainingError(
        f"Memory ran out in step {step + 1}, with {plan.micro_batch} sequences at a time.",
        "Nothing is lost: the last checkpoint stands.",
        fix,
    )
