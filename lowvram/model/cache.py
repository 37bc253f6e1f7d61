"""What decoding keeps of the tokens already read, per layer; knows shapes, not attention.

Legend: B batch, M most tokens, G key/value heads, K width of a head, L latent rank + rotated width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowvram.config import ModelConfig


class Cache:
    """Preallocated memory for `max_context` tokens of `batch` sequences.

    GQA keeps keys and values, [2, B, M, G, K] a layer; MLA keeps its latent, [B, M, kv_lora_rank + rope_dim].
    """

    def __init__(
        self,
        config: ModelConfig,
        batch: int,
        max_context: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        self.max_context = max_context
        self.length = 0
        shape: tuple[int, ...]
        if config.attention.kind == "mla":
            shape = (batch, max_context, config.attention.kv_lora_rank + config.attention.rope_dim)
        else:
            shape = (2, batch, max_context, config.attention.kv_heads, config.attention.head_dim)
        self.layers = [torch.empty(shape, dtype=dtype, device=device) for _ in range(config.layers)]

    def values_per_token(self) -> int:
        """Return how many numbers one token of one sequence takes, all layers together."""
        first = self.layers[0]
        batch = first.shape[0 if first.dim() == 3 else 1]
        return len(self.layers) * first.numel() // (batch * self.max_context)

    def store_latent(self, layer: int, new_BTL: Tensor) -> Tensor:
        """Write the new tokens' latents behind the old ones; returns all so far, [B, length + T, L]."""
        memory_BML = self.layers[layer]
        end = self.length + new_BTL.shape[1]
        memory_BML[:, self.length : end] = new_BTL
        return memory_BML[:, :end]

    def store_keys(self, layer: int, k_BTGK: Tensor, v_BTGK: Tensor) -> tuple[Tensor, Tensor]:
        """Write the new tokens' keys and values behind the old ones; returns all so far, [B, length + T, G, K] each."""
        memory = self.layers[layer]
        end = self.length + k_BTGK.shape[1]
        memory[0, :, self.length : end] = k_BTGK
        memory[1, :, self.length : end] = v_BTGK
        return memory[0, :, :end], memory[1, :, :end]

    def advance(self, count: int) -> None:
        """Count `count` tokens as read, after every layer has stored them."""
        self.length += count

    def rewind(self, length: int) -> None:
        """Forget every token from number `length` on."""
        self.length = min(self.length, length)
