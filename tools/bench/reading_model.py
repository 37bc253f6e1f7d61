"""Prepares models with random weights for inference, as if read, and names the machine; times nothing."""

from __future__ import annotations

import os
import platform
from datetime import UTC, datetime
from pathlib import Path

import torch

from lowvram.generate.weights import convert, is_matrix, put
from lowvram.model.transformer import Transformer, lay_by_columns

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.bfloat16}


@torch.no_grad()
def lay_for_reading(model: Transformer, precision: str) -> Transformer:
    """Convert the model's matrices and lay them out for decoding, in place, as reading a checkpoint does.

    precision: a key of `DTYPES`, which has the dtype of the computation.
    """
    for name, weight in list(model.named_parameters()):
        if is_matrix(name, weight.shape):
            put(model, name, convert(name, weight, precision, weight.device, DTYPES[precision]))
    return lay_by_columns(model.requires_grad_(False))


def describe_machine() -> str:
    """Return date, processor, threads and versions, which must accompany every figure."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    load = f", load {os.getloadavg()[0]:.1f} of {os.cpu_count()}" if hasattr(os, "getloadavg") else ""
    return (
        f"{datetime.now(UTC):%Y-%m-%d}, {name or platform.processor() or platform.machine()} "
        f"({torch.backends.cpu.get_cpu_capability()}), {torch.get_num_threads()} thread{load}, "
        f"Python {platform.python_version()}, torch {torch.__version__}"
    )
