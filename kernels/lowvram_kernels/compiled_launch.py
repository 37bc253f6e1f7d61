"""Starts Triton kernels with little Python: what Triton compiled is found again by types and divisibility alone.

Triton's own way to a compiled kernel writes a key of text at each launch, asks its settings, and calls the hooks of
profilers; that takes longer than a small kernel runs.  Here its binder alone is asked how it specialises the arguments.
Where a profiler listens, in Triton's interpreter, for a kernel's first launch, and with a Triton whose inner functions
are not what they were, Triton's own way is taken.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

# By module and name: a kernel, and what Triton has compiled of it by device, options and specialised arguments.
_kernels: dict[tuple[str, str], tuple[Any, dict[tuple[Any, ...], Any]]] = {}
# Triton's module, imported at the first launch.
_triton: Any = None
_is_short = True


def start(
    module: str,
    name: str,
    grid: tuple[int, ...],
    arguments: tuple[Any, ...],
    constants: Mapping[str, Any],
    warps: int,
    stages: int,
) -> None:
    """Launch a kernel of a module of this package; the parameters are the fields of `dispatch.Launch`."""
    global _is_short
    found = _kernels.get((module, name))
    if found is None:
        found = _kernels[module, name] = (_load(module, name), {})
    kernel, compiled_by_key = found
    # The interpreter's functions have no caches.
    if _is_short and hasattr(kernel, "device_caches") and not kernel.pre_run_hooks and not _is_listening():
        try:
            _start_compiled(kernel, compiled_by_key, grid, arguments, constants, warps, stages)
            return
        except (TypeError, AttributeError, LookupError, ValueError):
            # Not as this module knows Triton: where the fault lies elsewhere, Triton's own way shows it.
            _is_short = False
    kernel[grid](*arguments, **constants, num_warps=warps, num_stages=stages)


def _start_compiled(
    kernel: Any,
    compiled_by_key: dict[tuple[Any, ...], Any],
    grid: tuple[int, ...],
    arguments: tuple[Any, ...],
    constants: Mapping[str, Any],
    warps: int,
    stages: int,
) -> None:
    driver = _triton.runtime.driver.active
    device = driver.get_current_device()
    bound, specialised, options = kernel.device_caches[device][-1](*arguments, **constants)
    key = (device, warps, stages, *specialised, *options.items())
    compiled = compiled_by_key.get(key)
    if compiled is None:
        compiled_by_key[key] = kernel[grid](*arguments, **constants, num_warps=warps, num_stages=stages)
        return
    x, y, z = (*grid, 1, 1)[:3]
    launched = (x, y, z, driver.get_current_stream(device), compiled.function, compiled.packed_metadata)
    compiled.run(*launched, None, None, None, *bound.values())


def _load(module: str, name: str) -> Any:
    global _triton
    _triton = importlib.import_module("triton")
    return getattr(importlib.import_module(f"lowvram_kernels.{module}"), name)


def _is_listening() -> bool:
    """Say whether a profiler wants to know of launches; a chain of hooks may be empty."""
    settings = _triton.knobs.runtime
    enter, leave = settings.launch_enter_hook, settings.launch_exit_hook
    return (enter is not None and bool(getattr(enter, "calls", True))) or (
        leave is not None and bool(getattr(leave, "calls", True))
    )
