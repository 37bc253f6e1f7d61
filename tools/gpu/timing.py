"""Times calls on a device: medians of many samples, on inputs that are in no cache; knows no kernel and no file.

On a card a sample is a series of calls between two events.  Before it the card is made to wait while the host queues
all of the calls, so that the card is timed and not Python.  The host's time per call is reported separately.  Inputs
rotate among sets whose total size is several times the L2 cache, and results among as much memory.  On a processor the
clock is read before and after each call.
"""

from __future__ import annotations

import collections
import itertools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

Run = Callable[[], Any]

# A sample is so long that an event, which takes about a microsecond, does not matter.
LEAST_SAMPLE_S = 1e-3
MOST_CALLS = 50  # times some launches each: a card's queue holds about 1,000
LEAST_SAMPLES, MOST_SAMPLES = 9, 51
BUDGET_S = 0.4  # for all samples of a run
CPU_SAMPLES = 3
# The size of all sets of inputs and results, as a multiple of the L2 cache.
CACHE_TIMES = 4
MOST_SETS = 512
# More than any card's clock, so that a wait computed from it is long enough.
FASTEST_HZ = 3e9
_PROBES = 5


class Timing(NamedTuple):
    """Seconds per call: the median of the samples and their quartiles.  host_seconds: the host's time per call."""

    seconds: float
    low: float
    high: float
    samples: int
    calls: int
    host_seconds: float


def count_sets(moved_bytes: float, device: torch.device) -> int:
    """Return how many sets of inputs a run needs so that none is still in the cache when it is used again."""
    if device.type != "cuda":
        return 2
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return min(MOST_SETS, 1 + math.ceil(CACHE_TIMES * cache / max(moved_bytes, 1.0)))


def time_runs(runs: Sequence[Run], device: torch.device, budget_s: float = BUDGET_S) -> Timing:
    """Time one call.  runs: the same call, each with its own inputs."""
    return _time_on_card(runs, budget_s) if device.type == "cuda" else _time_on_processor(runs)


def _time_on_card(runs: Sequence[Run], budget_s: float) -> Timing:
    turn = itertools.cycle(runs)
    # The results are kept, so that the next one is written to other memory.
    results: collections.deque[Any] = collections.deque(maxlen=len(runs))

    def call(times: int) -> None:
        for _ in range(times):
            results.append(next(turn)())

    call(max(len(runs), 3))  # compiles, and allocates memory that later calls reuse
    torch.cuda.synchronize()
    began = time.perf_counter()
    call(_PROBES)
    host_s = (time.perf_counter() - began) / _PROBES
    torch.cuda.synchronize()
    whole_s = (time.perf_counter() - began) / _PROBES
    calls = min(MOST_CALLS, math.ceil(LEAST_SAMPLE_S / whole_s))
    samples = min(MOST_SAMPLES, max(LEAST_SAMPLES, int(budget_s / (calls * whole_s))))
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    taken, host_taken = [], []
    for _ in range(samples):
        torch.cuda._sleep(int(2 * calls * host_s * FASTEST_HZ))
        start.record()
        began = time.perf_counter()
        call(calls)
        host_taken.append((time.perf_counter() - began) / calls)
        stop.record()
        stop.synchronize()
        taken.append(start.elapsed_time(stop) / 1e3 / calls)
    return _timing_of(taken, calls, statistics.median(host_taken))


def _time_on_processor(runs: Sequence[Run]) -> Timing:
    taken = []
    for run in itertools.islice(itertools.cycle(runs), 1 + CPU_SAMPLES):
        began = time.perf_counter()
        run()
        taken.append(time.perf_counter() - began)
    return _timing_of(taken[1:], 1, statistics.median(taken[1:]))


def _timing_of(taken: list[float], calls: int, host_seconds: float) -> Timing:
    low, median, high = statistics.quantiles(taken, n=4)
    return Timing(max(median, 1e-9), low, high, len(taken), calls, host_seconds)


def distance(got: Tensor, truth: Tensor) -> float:
    """Return the norm of the difference divided by that of the truth; infinity if only one of them is finite."""
    got, truth = got.detach().float(), truth.detach().float()
    if not torch.equal(got.isfinite(), truth.isfinite()):
        return math.inf
    got, truth = got.nan_to_num(0.0, 0.0, 0.0), truth.nan_to_num(0.0, 0.0, 0.0)
    return float((got - truth).norm() / (truth.norm() or 1.0))
