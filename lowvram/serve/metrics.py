"""Counters and timings of a server, in Prometheus' text format; knows neither requests nor models.

Source of the format: https://prometheus.io/docs/instrumenting/exposition_formats/ (text, 0.0.4).
"""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections import Counter
from collections.abc import Mapping

# Bucket bounds: from one token of a small model to the longest answer of a slow one, in steps of about 2.5.
_BOUNDS_S = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 60.0, 150.0)
_HELP = {
    "requests_total": "Requests by path and status; 499 is a client that left.",
    "tokens_read_total": "Prompt tokens that the model read.",
    "tokens_reused_total": "Prompt tokens that a slot still held from an earlier request.",
    "tokens_written_total": "Tokens that the model wrote.",
    "failures_total": "Times that the model could not go on.",
    "request_seconds": "From a request's arrival to the end of its answer.",
    "first_token_seconds": "From a request's acceptance to its first token.",
    "running": "Answers being written.",
    "waiting": "Requests waiting for a slot.",
    "slots": "Answers that can be written at once.",
}


class _Histogram:
    def __init__(self) -> None:
        self.counts, self.sum = [0] * (len(_BOUNDS_S) + 1), 0.0

    def lines(self, name: str) -> list[str]:
        total, buckets = 0, []
        for bound, count in zip((*map(str, _BOUNDS_S), "+Inf"), self.counts, strict=True):
            total += count
            buckets.append(f'{name}_bucket{{le="{bound}"}} {total}')
        return [*buckets, f"{name}_sum {self.sum:.6f}", f"{name}_count {total}"]


class Metrics:
    """Counters and histograms that any thread may add to."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._requests: Counter[tuple[str, int]] = Counter()
        self._counts = Counter({name: 0 for name in _HELP if name.endswith("_total") and name != "requests_total"})
        self._histograms = {name: _Histogram() for name in _HELP if name.endswith("_seconds")}

    def count_request(self, path: str, status: int) -> None:
        """Count one request that was answered, or whose client left (499)."""
        with self._lock:
            self._requests[path, status] += 1

    def count(self, name: str, amount: int = 1) -> None:
        """Add to tokens_read_total, tokens_reused_total, tokens_written_total or failures_total."""
        with self._lock:
            assert name in self._counts
            self._counts[name] += amount

    def time(self, name: str, seconds: float) -> None:
        """Add one measurement to request_seconds or first_token_seconds."""
        with self._lock:
            histogram = self._histograms[name]
            histogram.counts[bisect_left(_BOUNDS_S, seconds)] += 1
            histogram.sum += seconds

    def show(self, gauges: Mapping[str, int]) -> str:
        """Return all metrics as text.  gauges: the values at this moment of running, waiting and slots."""
        with self._lock:
            families = [
                (
                    "requests_total",
                    "counter",
                    [
                        f'lowvram_requests_total{{path="{path}",status="{status}"}} {number}'
                        for (path, status), number in sorted(self._requests.items())
                    ],
                )
            ]
            families += [(name, "counter", [f"lowvram_{name} {value}"]) for name, value in self._counts.items()]
            families += [(name, "histogram", one.lines(f"lowvram_{name}")) for name, one in self._histograms.items()]
        families += [(name, "gauge", [f"lowvram_{name} {value}"]) for name, value in gauges.items()]
        lines = [
            line
            for name, kind, values in families
            for line in (f"# HELP lowvram_{name} {_HELP[name]}", f"# TYPE lowvram_{name} {kind}", *values)
        ]
        return "\n".join(lines) + "\n"
