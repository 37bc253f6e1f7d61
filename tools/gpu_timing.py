"""Times what runs on a device: medians of many samples, on inputs that no cache holds; knows no kernel and no file.

On a card a sample is a row of calls between two events.  A wait of the card's own goes in front of it, in which the
host hands all of them over: so it is the card that is timed and not Python.  What the host takes for a call is told
apart.  Inputs rotate among sets whose bytes together are several times the L2 cache, and results among as much memory.
On a processor it is the clock around each call.
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

# A sample is so long that an event, which takes about a microsecond, does not show.
LEAST_SAMPLE_S = 1e-3
MOST_CALLS = 50  # times some launches each: a card's queue holds about 1,000
LEAST_SAMPLES, MOST_SAMPLES = 9, 51
BUDGET_S = 0.4  # of all samples of a run
CPU_SAMPLES = 3
# Of the L2 cache, that all sets of inputs and results take.
CACHE_TIMES = 4
MOST_SETS = 512
# More than any card's clock: a wait reckoned by it is long enough.
FASTEST_HZ = 3e9
_PROBES = 5


class Timing(NamedTuple):
    """Seconds of a call: the median of the samples and their quartiles.  host_seconds: what the host takes for it."""

    seconds: float
    low: float
    high: float
    samples: int
    calls: int
    host_seconds: float


def count_sets(moved_bytes: float, device: torch.device) -> int:
    """Return how many sets of inputs a run needs, so that none of them is in the cache when its turn comes."""
    if device.type != "cuda":
        return 2
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return min(MOST_SETS, 1 + math.ceil(CACHE_TIMES * cache / max(moved_bytes, 1.0)))


def time_runs(runs: Sequence[Run], device: torch.device, budget_s: float = BUDGET_S) -> Timing:
    """Time one call of a run.  runs: the same one, each on inputs of its own."""
    return _time_on_card(runs, budget_s) if device.type == "cuda" else _time_on_processor(runs)


def _time_on_card(runs: Sequence[Run], budget_s: float) -> Timing:
    turn = itertools.cycle(runs)
    # Kept, so that the next result goes to other memory.
    results: collections.deque[Any] = collections.deque(maxlen=len(runs))

    def call(times: int) -> None:
        for _ in range(times):
            results.append(next(turn)())

    call(max(len(runs), 3))  # compiles, and allocates what is used again
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
    return _summed_up(taken, calls, statistics.median(host_taken))


def _time_on_processor(runs: Sequence[Run]) -> Timing:
    taken = []
    for run in itertools.islice(itertools.cycle(runs), 1 + CPU_SAMPLES):
        began = time.perf_counter()
        run()
        taken.append(time.perf_counter() - began)
    return _summed_up(taken[1:], 1, statistics.median(taken[1:]))


def _summed_up(taken: list[float], calls: int, host_seconds: float) -> Timing:
    low, median, high = statistics.quantiles(taken, n=4)
    return Timing(max(median, 1e-9), low, high, len(taken), calls, host_seconds)


def distance(got: Tensor, truth: Tensor) -> float:
    """Return the norm of the difference over that of the truth; infinity where one is not finite and the other is."""
    got, truth = got.detach().float(), truth.detach().float()
    if not torch.equal(got.isfinite(), truth.isfinite()):
        return math.inf
    got, truth = got.nan_to_num(0.0, 0.0, 0.0), truth.nan_to_num(0.0, 0.0, 0.0)
    return float((got - truth).norm() / (truth.norm() or 1.0))
