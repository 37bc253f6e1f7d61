"""Runs the model's blocks through torch.compile while gradients are computed, and only then; knows no loop, no plan."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from lowvram.errors import MachineError
from lowvram.model.transformer import Transformer
from lowvram.train.oom import is_out_of_memory

BACKEND = "inductor"


@contextmanager
def compiled(model: Transformer) -> Iterator[None]:
    """Run each block through torch.compile inside this context; a new shape or kind of block is compiled when it runs.

    Outside nothing is compiled, because evaluation and sampling change their shapes with every token.  Entering again
    costs some milliseconds: compiled code is found again by the code of the block.  `Module.compile` works in place, so
    the weights keep their names.  Raises MachineError where compiling fails; out-of-memory errors pass through.
    """
    # Imported here, because the import takes a second and an eager run does not need it.
    from torch._dynamo import config
    from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException

    try:
        # A block's number decides its dropout mask.  If it is not specialised, equal blocks share one compilation.
        with config.patch(allow_unspec_int_on_nn_module=True):
            for block in model.blocks:
                # A graph break would be a silent fallback.
                block.compile(backend=BACKEND, fullgraph=True)
            model.is_compiled = True
            yield
    except (TorchDynamoException, FailOnRecompileLimitHit) as error:
        if is_out_of_memory(error):
            raise
        raise MachineError(
            "The model's blocks could not be compiled.",
            f"torch.compile says: {_first_line(error)}",
            "Start the run again with `compile=False`: it learns the same.",
        ) from error
    finally:
        model.is_compiled = False
        for block in model.blocks:
            block.compile(disable=True)


def forget_compiled() -> None:
    """Drop all compiled code: after a change of shape, blocks would be compiled for dynamic shapes, which is slower."""
    import torch._dynamo

    torch._dynamo.reset()


def _first_line(error: Exception) -> str:
    """Return the first line of the compiler's own error; torch wraps it in one that only names the compiler."""
    cause = getattr(error, "inner_exception", error)
    return f"{type(cause).__name__}: {str(cause).strip()}".splitlines()[0]
