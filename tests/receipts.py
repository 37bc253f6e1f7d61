"""Invents receipts of runs that never were."""

from __future__ import annotations

from typing import Any

from lowvram.fit.receipts import Receipt


def invent(**changes: Any) -> Receipt:
    """A receipt of a run that never was, for tests only."""
    values: dict[str, Any] = {
        "profile_id": "rtx5070",
        "card": "NVIDIA GeForce RTX 5070",
        "card_bytes": 12 << 30,
        "driver": "580.95.05",
        "lowvram": "0.2.0",
        "torch": "2.11.0+cu130",
        "triton": "3.6.0",
        "python": "3.11.9",
        "system": "Linux",
        "parameters": 125_000_000,
        "seq_len": 1024,
        "batch_tokens": 65_536,
        "precision": "bf16",
        "plan": {"micro_batch": 8, "accumulate": 8},
        "compiled": False,
        "recorded": True,
        "predicted_peak_bytes": 4 << 30,
        "predicted_tokens_per_s": 50_000.0,
    }
    return Receipt.model_validate(values | changes)
