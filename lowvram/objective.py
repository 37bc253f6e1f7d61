"""What a batch asks of the model, and the loss of its answer; knows no optimizer and no loop.

Legend: B batch, T tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from lowvram_kernels.layers.dropout import hash_keys
from lowvram_kernels.loss.linear_cross_entropy import linear_cross_entropy
from lowvram_kernels.matmul.quant_linear import MatmulFormat
from torch import Tensor

from lowvram.config.plan import Recompute
from lowvram.model.transformer import Dropout, Transformer

# Of what flows between the layers, by the run file's precision; and what their products are made of.
DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp8": torch.bfloat16,
    "int8": torch.bfloat16,
}
MATMUL_FORMATS: dict[str, MatmulFormat] = {
    "fp32": "plain",
    "bf16": "plain",
    "fp16": "plain",
    "fp8": "e4m3",
    "int8": "int8",
}


class Batch(NamedTuple):
    """token_BT: [B, seq_len + 1] int64, inputs and targets overlapping.  sample_B: their global sample indices."""

    token_BT: Tensor
    sample_B: Tensor


class Loss(NamedTuple):
    """total: the sum over targets in nats, fp32.  loads: [MoE layers, E] choices made, or None."""

    total: Tensor
    loads: Tensor | None


def count_targets(batch: Batch) -> int:
    """Return how many tokens of the batch are predicted."""
    return batch.token_BT.shape[0] * (batch.token_BT.shape[1] - 1)


def causal_loss(
    model: Transformer,
    batch: Batch,
    dtype: torch.dtype,
    dropout: float = 0.0,
    seed: int = 0,
    loss_chunk: int | None = None,
    recompute: Recompute = "none",
) -> Loss:
    """Predict each next token; return the summed cross-entropy.  Dropout depends on seed and sample index alone."""
    drop = Dropout(dropout, hash_keys(seed, batch.sample_B)) if dropout else None
    stream_BTD, loads = model(batch.token_BT[:, :-1], dtype, drop, recompute=recompute)
    target_N = batch.token_BT[:, 1:].reshape(-1)
    return Loss(linear_cross_entropy(stream_BTD.flatten(0, 1), model.head_VD, target_N, loss_chunk), loads)
