"""Whether this processor reads and writes text faster in bf16 or in fp32: measured once, and kept in the user's cache.

A processor that has instructions for bf16 is not always faster with them, and no list of processors says which are.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

import platformdirs
import torch
from pydantic import Field, ValidationError
from torch.nn import functional as F

from lowvram.config.base import FrozenConfig
from lowvram.errors import DiskFullError
from lowvram.storage.disk import DISK, Disk
from lowvram.storage.json_files import JsonError, read_object

Clock = Callable[[], float]
Seconds = Annotated[float, Field(gt=0.0)]
# An exchange in a chat: so many tokens are read at once, and so many are written one by one.
_READ = _WRITTEN = 64
# A matrix of a model of some hundred millions of parameters: it does not fit the caches of a core.
_OUTPUTS, _INPUTS = 4096, 1024
_REPEATS = 15


class Pace(FrozenConfig):
    """The seconds that one matrix takes one thread in an exchange, in both numbers, and where they were measured.

    processor: its name and instructions, as torch and oneDNN may use them.
    """

    version: Literal[1] = 1
    processor: str
    torch: str
    fp32_s: Seconds
    bf16_s: Seconds

    @property
    def is_bf16_faster(self) -> bool:
        """Say whether bf16 takes less time."""
        return self.bf16_s < self.fp32_s

    @property
    def reason(self) -> str:
        """Return half a sentence for the numbers that were chosen."""
        return f"measured on this processor: bf16 takes {self.bf16_s / self.fp32_s:.2f} times as long as fp32"


def pace_path(home: Path | None = None) -> Path:
    """Return the file that holds the measurement: in `home`, or in the user's own place for what can be made again."""
    return (home or Path(platformdirs.user_cache_dir("lowvram", appauthor=False))) / "processor.json"


def find_pace(home: Path | None = None, clock: Clock = time.perf_counter, disk: Disk = DISK) -> tuple[Pace, bool]:
    """Return the measurement of this processor and torch, and whether it was made just now.

    It takes some tenths of a second, once.  Where it cannot be written it is made again the next time.
    """
    path = pace_path(home)
    here = {"processor": _name_processor(), "torch": torch.__version__}
    try:
        known = Pace.model_validate(read_object(path))
    except (OSError, JsonError, ValidationError):
        known = None
    if known is not None and here == known.model_dump(include=set(here)):
        return known, False
    threads = torch.get_num_threads()
    # Threads that wait for one another on a busy machine would say more about the other programs than about products.
    torch.set_num_threads(1)
    try:
        found = Pace(**here, **_time_exchange(clock))
    finally:
        torch.set_num_threads(threads)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        disk.write(path, found.model_dump_json(indent=1).encode())
    except (OSError, DiskFullError):
        return found, True  # a cache that cannot be written costs time and nothing else
    return found, True


def _name_processor() -> str:
    known = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    instructions = os.environ.get("ONEDNN_MAX_CPU_ISA") or torch.backends.cpu.get_cpu_capability()
    return f"{known.get('cpu_name', 'unknown')}, {instructions}"


def _time_exchange(clock: Clock) -> dict[str, float]:
    """Return the seconds of one matrix in an exchange, in both numbers, by the names of `Pace`.

    The numbers take turns and the fastest of several products counts: other programs can only make one slower.
    """
    weights = {"fp32_s": torch.ones(_OUTPUTS, _INPUTS).mT.contiguous().mT}  # as `lay_by_columns` lays it
    weights["bf16_s"] = torch.ones(_OUTPUTS, _INPUTS, dtype=torch.bfloat16)
    seconds = dict.fromkeys(weights, 0.0)
    for rows, times in ((_READ, 1), (1, _WRITTEN)):
        samples: dict[str, list[float]] = {name: [] for name in weights}
        for _ in range(1 + _REPEATS):
            for name, weight_OI in weights.items():
                x = torch.ones(rows, _INPUTS, dtype=weight_OI.dtype)
                began = clock()
                F.linear(x, weight_OI)
                samples[name].append(clock() - began)
        for name, taken in samples.items():
            # The first one warms up.  A clock of coarse ticks may see nothing at all.
            seconds[name] += times * max(min(taken[1:]), 1e-9)
    return seconds
