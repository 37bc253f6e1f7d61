"""Prepares models with random weights for inference, as if read from a checkpoint; for benchmarks; times nothing."""

from __future__ import annotations

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
