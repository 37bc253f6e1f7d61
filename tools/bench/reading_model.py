"""Prepares models with random weights for inference, as if read from a checkpoint; for benchmarks; times nothing."""

from __future__ import annotations

import torch

from lowvram.generate.weights import is_matrix
from lowvram.model.transformer import Transformer, lay_by_columns


def lay_for_reading(model: Transformer, dtype: torch.dtype) -> Transformer:
    """Convert the model's matrices to dtype and lay them out for decoding, in place, as reading a checkpoint does."""
    for name, weight in model.named_parameters():
        if is_matrix(name, weight.shape):
            weight.data = weight.data.to(dtype)
    return lay_by_columns(model.requires_grad_(False))
