"""A model as it lies for reading, from one in fp32, for benchmarks whose weights are random; times nothing."""

from __future__ import annotations

import torch

from lowvram.generate.weights import is_matrix
from lowvram.model.transformer import Transformer, lay_by_columns


def lay_for_reading(model: Transformer, dtype: torch.dtype) -> Transformer:
    """Keep the model's matrices in dtype and lay them for decoding, in place, as a checkpoint's are when it is read."""
    for name, weight in model.named_parameters():
        if is_matrix(name, weight.shape):
            weight.data = weight.data.to(dtype)
    return lay_by_columns(model.requires_grad_(False))
