"""The parts of a model of which there are several kinds: attention, positions, feed-forward layers, windows."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field, PositiveInt, model_validator

from lowvram.config.base import FrozenConfig, unless_named


class Gqa(FrozenConfig):
    """Grouped-query attention (Ainslie et al. 2023); kv_heads = heads is multi-head attention."""

    kind: Literal["gqa"] = "gqa"
    """Grouped-query attention."""
    heads: PositiveInt
    """Number of query heads."""
    kv_heads: PositiveInt
    """Number of key and value heads; it divides `heads`, and equal to it this is multi-head attention."""
    head_dim: PositiveInt
    """Width of one head; it is even where positions are rotated."""
    qk_norm: bool = False
    """Whether queries and keys are normalised (RMSNorm) before they are multiplied."""

    @model_validator(mode="after")
    def _check(self) -> Gqa:
        if self.heads % self.kv_heads:
            raise ValueError(f"attention.kv_heads is {self.kv_heads}; it must divide heads ({self.heads})")
        return self

    @property
    def rope_dim(self) -> int:
        """The part of each head that is rotated: all of it."""
        return self.head_dim

    def num_parameters(self, dim: int) -> int:
        """Count the weights of one layer's attention."""
        matrices = dim * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        return matrices + (2 * self.head_dim if self.qk_norm else 0)


class Mla(FrozenConfig):
    """Multi-head latent attention (DeepSeek-V2, section 2.1); without q_lora_rank queries are projected directly."""

    kind: Literal["mla"] = "mla"
    """Multi-head latent attention."""
    heads: PositiveInt
    """Number of heads."""
    kv_lora_rank: PositiveInt
    """Width of the latent from which keys and values are computed; it is what the cache keeps."""
    q_lora_rank: PositiveInt | None = None
    """Width of the latent of the queries; without it queries are projected directly."""
    nope_dim: PositiveInt
    """Width of the part of a query or key that carries no position."""
    rope_dim: PositiveInt
    """Width of the part that is rotated by its position; it is even."""
    value_dim: PositiveInt
    """Width of one value; at most `nope_dim + rope_dim`."""

    @model_validator(mode="after")
    def _check(self) -> Mla:
        if self.value_dim > self.query_dim:
            widths = f"nope_dim + rope_dim ({self.nope_dim} + {self.rope_dim})"
            raise ValueError(f"attention.value_dim is {self.value_dim}; it must not exceed {widths}")
        return self

    @property
    def query_dim(self) -> int:
        """The width of one query or key: the part without position and the rotated part."""
        return self.nope_dim + self.rope_dim

    def num_parameters(self, dim: int) -> int:
        """Count the weights of one layer's attention."""
        queries = self.heads * self.query_dim
        to_queries = dim * queries
        if self.q_lora_rank is not None:
            to_queries = dim * self.q_lora_rank + self.q_lora_rank + self.q_lora_rank * queries
        to_latent = dim * (self.kv_lora_rank + self.rope_dim) + self.kv_lora_rank
        from_latent = self.kv_lora_rank * self.heads * (self.nope_dim + self.value_dim)
        return to_queries + to_latent + from_latent + self.heads * self.value_dim * dim


class Yarn(FrozenConfig):
    """YaRN context extension (Peng et al. 2023) from `original_len` positions by `factor`."""

    factor: Annotated[float, Field(ge=1.0)]
    """How many times longer the context becomes."""
    original_len: PositiveInt
    """The context of the model before it is extended, in tokens."""
    beta_fast: float = 32.0
    """Dimensions that rotate more often than this over `original_len` stay as they are."""
    beta_slow: float = 1.0
    """Dimensions that rotate less often than this over `original_len` are stretched by the whole factor."""
    mscale: Annotated[float, Field(gt=0.0)] = 1.0
    """Scale of the correction that keeps attention sharp."""

    @property
    def magnitude(self) -> float:
        """The factor on queries and on keys that keeps attention sharp over a longer context (eq. 22)."""
        return 0.1 * self.mscale * math.log(self.factor) + 1.0


class Rope(FrozenConfig):
    """Rotary positions (Su et al. 2021)."""

    kind: Literal["rope"] = "rope"
    """Rotary positions."""
    theta: Annotated[float, Field(gt=0.0)] = 10_000.0
    """Base of the wavelengths; larger for longer contexts."""
    yarn: Yarn | None = None
    """Extension of the context of a trained model; `"none"` switches a preset's off."""


class Alibi(FrozenConfig):
    """Linear biases (Press et al. 2022) instead of positions; slopes follow from the number of heads."""

    kind: Literal["alibi"] = "alibi"
    """Linear biases by distance; only with attention of kind `gqa`."""


class Window(FrozenConfig):
    """Sliding-window attention: `pattern` is repeated over the layers, S slides over `size` tokens, F sees all."""

    size: PositiveInt
    """Tokens that a sliding layer sees."""
    pattern: Annotated[str, Field(pattern="^[SF]+$")] = "SSSF"
    """Letters repeated over the layers: `S` slides, `F` sees all."""


class SwiGlu(FrozenConfig):
    """A dense feed-forward layer (Shazeer 2020)."""

    kind: Literal["swiglu"] = "swiglu"
    """A dense feed-forward layer."""
    hidden: PositiveInt
    """Width inside the layer."""


class Moe(FrozenConfig):
    """Mixture of experts after a prefix of dense layers (DeepSeek-V3, section 2.1.2)."""

    kind: Literal["moe"] = "moe"
    """A mixture of experts."""
    hidden: PositiveInt
    """Width inside the dense layers that come first."""
    dense_layers: Annotated[int, Field(ge=0)] = 1
    """Number of dense layers before the mixtures."""
    experts: Annotated[int, Field(ge=2)]
    """Number of routed experts in each layer."""
    top_k: PositiveInt
    """Routed experts that a token passes through."""
    shared: PositiveInt = 1
    """Experts that every token passes through."""
    expert_hidden: PositiveInt
    """Width inside one expert."""
    route_scale: Annotated[float, Field(gt=0.0)] = 1.0
    """Factor on the sum of the routed experts."""
    balance_rate: Annotated[float, Field(ge=0.0)] = 1e-3
    """How far the bias of an expert moves at each step so that all are used equally often."""

    @model_validator(mode="after")
    def _check(self) -> Moe:
        if self.top_k > self.experts:
            raise ValueError(f"ffn.top_k is {self.top_k}; there are only {self.experts} experts")
        return self


Attention = Annotated[Gqa | Mla, Field(discriminator="kind")]
Positions = Annotated[Rope | Alibi, Field(discriminator="kind"), unless_named(kind="rope")]
Ffn = Annotated[SwiGlu | Moe, Field(discriminator="kind")]
