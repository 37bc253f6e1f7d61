"""Measures once whether this processor is fastest in INT8, bf16 or fp32, and stores the result in the user's cache.

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
from lowvram_kernels.quant.quantise import QuantTensor
from pydantic import Field, ValidationError
from torch import Tensor

from lowvram.config.base import FrozenConfig
from lowvram.errors import DiskFullError
from lowvram.model.linear import multiply
from lowvram.storage.disk import DISK, Disk
from lowvram.storage.json_files import JsonError, read_object

Clock = Callable[[], float]
Seconds = Annotated[float, Field(gt=0.0)]
# One turn of a chat, as it is timed: so many tokens are read at once, and so many are written one by one.
_PROMPT_TOKENS = _NEW_TOKENS = 64
# A matrix as in a model of some hundred million parameters: it does not fit the caches of a core.
_OUTPUTS, _INPUTS = 4096, 1024
_REPEATS = 15


class Pace(FrozenConfig):
    """The seconds that one thread multiplies by one matrix in a chat's turn, in fp32, bf16 and by INT8 codes in bf16.

    processor, torch: where it was measured; the processor's name and the instructions that torch and oneDNN may use.
    """

    version: Literal[2] = 2
    processor: str
    torch: str
    fp32_s: Seconds
    bf16_s: Seconds
    int8_s: Seconds

    @property
    def is_bf16_faster(self) -> bool:
        """Say whether bf16 takes less time."""
        return self.bf16_s < self.fp32_s

    @property
    def fastest(self) -> Literal["fp32", "bf16", "int8"]:
        """The precision that takes the least time; of equal ones the one with more bits."""
        if self.int8_s < min(self.fp32_s, self.bf16_s):
            return "int8"
        return "bf16" if self.is_bf16_faster else "fp32"

    @property
    def reason(self) -> str:
        """The measurement as half a sentence, the reason for the choice."""
        bf16, int8 = self.bf16_s / self.fp32_s, self.int8_s / self.fp32_s
        return f"measured on this processor: bf16 takes {bf16:.2f} and INT8 {int8:.2f} times as long as fp32"


def pace_path(directory: Path | None = None) -> Path:
    """Return the path of the file with the measurement: in `directory`, by default in the user's cache directory."""
    return (directory or Path(platformdirs.user_cache_dir("lowvram", appauthor=False))) / "processor.json"


def find_pace(directory: Path | None = None, clock: Clock = time.perf_counter, disk: Disk = DISK) -> tuple[Pace, bool]:
    """Return the measurement for this processor and this torch, and whether it was made just now.

    It takes some tenths of a second, once.  Where the file cannot be written, it is made again the next time.
    """
    path = pace_path(directory)
    current = {"processor": _name_processor(), "torch": torch.__version__}
    try:
        cached = Pace.model_validate(read_object(path))
    except (OSError, JsonError, ValidationError):
        cached = None
    if cached is not None and current == cached.model_dump(include=set(current)):
        return cached, False
    threads = torch.get_num_threads()
    # On a busy machine several threads would wait for one another, and the other programs would be timed instead.
    torch.set_num_threads(1)
    try:
        pace = Pace(**current, **_time_exchange(clock))
    finally:
        torch.set_num_threads(threads)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        disk.write(path, pace.model_dump_json(indent=1).encode())
    except (OSError, DiskFullError):
        return pace, True  # without the cache the next call measures again, and nothing else is lost
    return pace, True


def _name_processor() -> str:
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    instructions = os.environ.get("ONEDNN_MAX_CPU_ISA") or torch.backends.cpu.get_cpu_capability()
    return f"{capabilities.get('cpu_name', 'unknown')}, {instructions}"


def _time_exchange(clock: Clock) -> dict[str, float]:
    """Return the seconds of one matrix in a chat's turn in each precision, by the names of `Pace`'s fields.

    The dtypes alternate and the fastest of several products counts: other programs can only make one slower.
    """
    weights: dict[str, Tensor | QuantTensor] = {
        "fp32_s": torch.ones(_OUTPUTS, _INPUTS).mT.contiguous().mT
    }  # the layout that `lay_by_columns` makes
    weights["bf16_s"] = torch.ones(_OUTPUTS, _INPUTS, dtype=torch.bfloat16)
    code_OI = torch.ones(_OUTPUTS, _INPUTS, dtype=torch.int8)
    weights["int8_s"] = QuantTensor(code_OI, torch.ones(_OUTPUTS, 1))
    seconds = dict.fromkeys(weights, 0.0)
    for rows, times in ((_PROMPT_TOKENS, 1), (1, _NEW_TOKENS)):
        samples: dict[str, list[float]] = {name: [] for name in weights}
        for _ in range(1 + _REPEATS):
            for name, weight in weights.items():
                x = torch.ones(rows, _INPUTS, dtype=torch.float32 if name == "fp32_s" else torch.bfloat16)
                began = clock()
                multiply(x, weight)
                samples[name].append(clock() - began)
        for name, taken in samples.items():
            # The first sample is warm-up.  A clock with coarse ticks may measure 0.
            seconds[name] += times * max(min(taken[1:]), 1e-9)
    return seconds
