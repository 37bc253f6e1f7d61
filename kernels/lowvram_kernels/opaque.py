"""Makes a launch one op of a compiler's graph, and nothing but a call everywhere else.

A call of an op of `torch.library` costs the host some 50 µs, several times the launch: it is made only where a compiler
looks, which cannot look into a launch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from lowvram_kernels.dispatch import is_simulated


def opaque(name: str, run: Callable[..., None], outputs: Sequence[str]) -> Callable[..., None]:
    """Return `run` in a form that torch.compile takes as one op; in meta mode the op runs it, which reports its work.

    name: of the op.  run: returns nothing; all its parameters are annotated.  outputs: those that it writes to.
    """
    op = torch.library.custom_op(f"lowvram_kernels::{name}", run, mutates_args=outputs)
    op.register_fake(lambda *arguments: run(*arguments) if is_simulated() else None)

    def call(*arguments: Any) -> None:
        (op if torch.compiler.is_compiling() else run)(*arguments)

    return call
