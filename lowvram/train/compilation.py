"""Blocks that run compiled while gradients are made, and eagerly at all other times; knows no loop and no plan."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from lowvram.errors import MachineError
from lowvram.model.transformer import Transformer
from lowvram.train.oom import is_out_of_memory

BACKEND = "inductor"


@contextmanager
def compiled(model: Transformer) -> Iterator[None]:
    """Let each block run through torch.compile inside; a block of another shape or kind is compiled when it comes.

    Only inside, so that evaluation and sampling, whose shapes change with every token, compile nothing.  Entering
    again costs some milliseconds: what was compiled is found again by its code.  `Module.compile` works in place, so
    the weights keep their names.  Raises MachineError where compiling fails, and lets memory that runs out through.
    """
    # Imported here: a second that an eager run does not spend.
    from torch._dynamo import config
    from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException

    try:
        # A block's number decides its dropout mask: unspecialised, blocks that are alike share one compilation.
        with config.patch(allow_unspec_int_on_nn_module=True):
            for block in model.blocks:
                # A graph break would be a silent fallback.
                block.compile(backend=BACKEND, fullgraph=True)
            yield
    except (TorchDynamoException, FailOnRecompileLimitHit) as error:
        if is_out_of_memory(error):
            raise
        raise MachineError(
            "The model's blocks could not be compiled.",
            f"torch.compile says: {_first_line(error)}",
            "Type the same command with --compile off: the run learns the same.",
        ) from error
    finally:
        for block in model.blocks:
            block.compile(disable=True)


def forget_compiled() -> None:
    """Drop what was compiled: after a change of shape it would be compiled again for every shape, which is slower."""
    import torch._dynamo

    torch._dynamo.reset()


def _first_line(error: Exception) -> str:
    """Return what a compiler said first; around its own error stands one that only names the compiler."""
    cause = getattr(error, "inner_exception", error)
    return f"{type(cause).__name__}: {str(cause).strip()}".splitlines()[0]
