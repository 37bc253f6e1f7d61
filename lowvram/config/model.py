"""What the network is: its size and its kinds of layers; knows no device and no tensor."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, PositiveInt, model_validator

from lowvram.config.architecture import Attention, Ffn, Positions, Rope, Window
from lowvram.config.base import FrozenConfig

# Several times the deepest published model: what is deeper is a slip, and would be built block by block for minutes.
MOST_LAYERS = 1024


class ModelConfig(FrozenConfig):
    """The network's form; everything that decides its parameters and its function."""

    layers: Annotated[PositiveInt, Field(le=MOST_LAYERS)]
    """Number of blocks."""
    dim: PositiveInt
    """Width of the model: numbers per token between two blocks."""
    vocabulary: PositiveInt
    """Number of token ids. Leave it out: it follows from the tokenizer."""
    attention: Attention
    """How tokens see each other; a table with `kind`."""
    positions: Positions = Rope()
    """How the order of tokens is told; a table with `kind`."""
    ffn: Ffn
    """The feed-forward layers; a table with `kind`."""
    window: Window | None = None
    """Sliding-window attention in some layers; without it every layer sees all. `"none"` switches a preset's off."""
    tied: bool = True
    """Whether the embedding is also the output layer."""
    norm_eps: Annotated[float, Field(gt=0.0)] = 1e-6
    """Added to the mean square in RMSNorm."""

    @model_validator(mode="after")
    def _check(self) -> ModelConfig:
        if self.positions.kind == "alibi" and self.attention.kind == "mla":
            raise ValueError('positions.kind is "alibi"; MLA goes with "rope" only')
        if self.positions.kind == "rope" and self.attention.rope_dim % 2:
            width = self.attention.rope_dim
            key = "rope_dim" if self.attention.kind == "mla" else "head_dim"
            raise ValueError(f"attention.{key} is {width}; rotation needs an even number. Try {width + 1}")
        if self.ffn.kind == "moe" and self.ffn.dense_layers >= self.layers:
            dense = self.ffn.dense_layers
            raise ValueError(f"ffn.dense_layers is {dense}; it must be less than layers ({self.layers})")
        return self

    def is_moe(self, layer: int) -> bool:
        """Say whether layer number `layer` has experts."""
        return self.ffn.kind == "moe" and layer >= self.ffn.dense_layers

    def window_of(self, layer: int) -> int | None:
        """Return the tokens that layer number `layer` sees, or None where it sees all."""
        if self.window is None or self.window.pattern[layer % len(self.window.pattern)] == "F":
            return None
        return self.window.size

    def num_parameters(self) -> int:
        """Count the trained weights of the model that this describes."""
        return self._count(lambda moe: moe.experts)

    def active_parameters(self) -> int:
        """Count the weights that one token passes through."""
        return self._count(lambda moe: moe.top_k)

    def _count(self, routed: Any) -> int:
        total = self.vocabulary * self.dim * (1 if self.tied else 2) + self.dim
        for layer in range(self.layers):
            total += self.attention.num_parameters(self.dim) + 2 * self.dim
            if self.ffn.kind == "moe" and self.is_moe(layer):
                expert = 3 * self.dim * self.ffn.expert_hidden
                total += expert * (routed(self.ffn) + self.ffn.shared) + self.dim * self.ffn.experts
            else:
                total += 3 * self.dim * self.ffn.hidden
        return total
