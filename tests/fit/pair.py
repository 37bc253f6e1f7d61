"""Measurements of a processor in bf16 and in fp32 that nobody made: tests write them where `fit` looks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lowvram.fit.calibration_store import store_calibration
from lowvram.fit.memory_curve import Work
from lowvram.fit.throughput import Calibration
from lowvram.hardware.detect import find_torch


def measured_here(precision: str, **more: Any) -> Calibration:
    """Return a measurement by the torch that is installed."""
    build = find_torch()
    assert build is not None
    rates = {"product_flops_per_s": 2e11, "attention_flops_per_s": 9e10, "bytes_per_s": 2e10, "launch_s": 1e-5}
    ratios = {"micro_ratio": 1.0, "update_ratio": 1.0, "ledger_bytes": 760}
    given = {"profile_id": "cpu", "precision": precision, "timed": "tr-25m", "torch": build.version, "threads": 2}
    works = {"micro": Work(2e11, 4e9, 1_900, 5e10), "update": Work(0.0, 9e8, 300)}
    return Calibration.model_validate(
        {**given, **rates, **ratios, **works, "date": "2026-01-02T03:04:05+00:00", **more}
    )


def store_pair(times: float, home: Path | None = None) -> None:
    """Let bf16 take so many times as long as fp32 on this processor."""
    store_calibration(measured_here("fp32"), home)
    store_calibration(measured_here("bf16", micro_ratio=times), home)
