"""WHAT is learnt: model, training, data and run, read from TOML and checked; knows no device and no tensor."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, PositiveInt, model_validator

from lowvram.errors import ConfigError
from lowvram.recipe import AdamW, Cosine, Optimizer, Rotation, WarmupStableDecay
from lowvram.words import Count, Share, Size, Words

# Automatic saving: at most this much written a day, and never more often than this.
WRITTEN_PER_DAY_BYTES = 50e9
LEAST_SAVE_INTERVAL_S = 600.0


class Gqa(Words):
    """Grouped-query attention (Ainslie et al. 2023); kv_heads = heads is multi-head attention."""

    kind: Literal["gqa"] = "gqa"
    heads: PositiveInt
    kv_heads: PositiveInt
    head_dim: PositiveInt
    qk_norm: bool = False

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


class Mla(Words):
    """Multi-head latent attention (DeepSeek-V2, section 2.1); without q_lora_rank queries are projected directly."""

    kind: Literal["mla"] = "mla"
    heads: PositiveInt
    kv_lora_rank: PositiveInt
    q_lora_rank: PositiveInt | None = None
    nope_dim: PositiveInt
    rope_dim: PositiveInt
    value_dim: PositiveInt

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


class Yarn(Words):
    """YaRN context extension (Peng et al. 2023) from `original_len` positions by `factor`."""

    factor: Annotated[float, Field(ge=1.0)]
    original_len: PositiveInt
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: Annotated[float, Field(gt=0.0)] = 1.0

    @property
    def magnitude(self) -> float:
        """The factor on queries and on keys that keeps attention sharp over a longer context (eq. 22)."""
        return 0.1 * self.mscale * math.log(self.factor) + 1.0


class Rope(Words):
    """Rotary positions (Su et al. 2021)."""

    kind: Literal["rope"] = "rope"
    theta: Annotated[float, Field(gt=0.0)] = 10_000.0
    yarn: Yarn | None = None


class Alibi(Words):
    """Linear biases (Press et al. 2022) instead of positions; slopes follow from the number of heads."""

    kind: Literal["alibi"] = "alibi"


class Window(Words):
    """Sliding-window attention: `pattern` is repeated over the layers, S slides over `size` tokens, F sees all."""

    size: PositiveInt
    pattern: Annotated[str, Field(pattern="^[SF]+$")] = "SSSF"


class SwiGlu(Words):
    """A dense feed-forward layer (Shazeer 2020)."""

    kind: Literal["swiglu"] = "swiglu"
    hidden: PositiveInt


class Moe(Words):
    """Mixture of experts after a prefix of dense layers (DeepSeek-V3, section 2.1.2)."""

    kind: Literal["moe"] = "moe"
    hidden: PositiveInt
    dense_layers: Annotated[int, Field(ge=0)] = 1
    experts: Annotated[int, Field(ge=2)]
    top_k: PositiveInt
    shared: PositiveInt = 1
    expert_hidden: PositiveInt
    route_scale: Annotated[float, Field(gt=0.0)] = 1.0
    balance_rate: Annotated[float, Field(ge=0.0)] = 1e-3

    @model_validator(mode="after")
    def _check(self) -> Moe:
        if self.top_k > self.experts:
            raise ValueError(f"ffn.top_k is {self.top_k}; there are only {self.experts} experts")
        return self


Attention = Annotated[Gqa | Mla, Field(discriminator="kind")]
Positions = Annotated[Rope | Alibi, Field(discriminator="kind")]
Ffn = Annotated[SwiGlu | Moe, Field(discriminator="kind")]


class ModelConfig(Words):
    """The network's form; everything that decides its parameters and its function."""

    layers: PositiveInt
    dim: PositiveInt
    vocabulary: PositiveInt
    attention: Attention
    positions: Positions = Rope()
    ffn: Ffn
    window: Window | None = None
    tied: bool = True
    norm_eps: Annotated[float, Field(gt=0.0)] = 1e-6

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


class TrainConfig(Words):
    """How it is learnt; nothing here depends on the machine.

    precision: what is multiplied; fp8 and int8 are for the products of attention and feed-forward layers, forward and
    backward, with bf16 between them.
    weights: what matrices are kept in; bf16 is rounded at random with unbiased mean.  update_during_backward: each
    weight is stepped as soon as its gradient is there, so that gradients never all exist; without accumulation.
    """

    tokens: Count
    seq_len: PositiveInt = 1024
    batch_tokens: Count = 65_536
    optimizer: Optimizer = AdamW()
    schedule: Annotated[Cosine | WarmupStableDecay, Field(discriminator="kind")] = Cosine()
    precision: Literal["fp32", "bf16", "fp16", "fp8", "int8"] = "bf16"
    weights: Literal["fp32", "bf16"] = "fp32"
    update_during_backward: bool = False
    rotation: Rotation | None = None
    clip: Annotated[float, Field(gt=0.0)] = 1.0
    dropout: Share = 0.0
    seed: int = 0
    start_from: Path | None = None

    @model_validator(mode="after")
    def _check(self) -> TrainConfig:
        if self.batch_tokens % self.seq_len:
            near = max(1, round(self.batch_tokens / self.seq_len)) * self.seq_len
            rule = f"it must be a multiple of seq_len ({self.seq_len})"
            raise ValueError(f"train.batch_tokens is {self.batch_tokens}; {rule}. Try {near}")
        return self

    @property
    def micro_batches(self) -> list[int]:
        """Return how many sequences a step may take at a time, in order."""
        samples = self.batch_samples
        return [samples] if self.update_during_backward else divisors(samples)

    @property
    def batch_samples(self) -> int:
        """Sequences in one optimizer step."""
        return self.batch_tokens // self.seq_len

    @property
    def steps(self) -> int:
        """Optimizer steps until `tokens` have been seen."""
        return math.ceil(self.tokens / self.batch_tokens)


class Corpus(Words):
    """A directory of shards and its share among the corpora."""

    path: Path
    weight: Annotated[float, Field(gt=0.0)] = 1.0


def _as_corpora(value: Any) -> Any:
    return [{"path": value}] if isinstance(value, str | Path) else value


class DataConfig(Words):
    """Where the tokens are."""

    train: Annotated[tuple[Corpus, ...], BeforeValidator(_as_corpora), Field(min_length=1)]
    valid: Path | None = None
    tokenizer: Path


class RunOptions(Words):
    """What a run keeps and tells; may change between two starts of the same run."""

    dir: Path
    save_every_minutes: Annotated[float, Field(gt=0.0)] | None = None
    keep: PositiveInt = 2
    milestone_steps: PositiveInt | None = None
    disk_budget: Size | None = None
    validate_every: PositiveInt = 250
    validate_tokens: Count = 262_144
    sample_every: PositiveInt = 500
    sample_tokens: PositiveInt = 40
    prompts: tuple[str, ...] = ("Bir gün", "Türkiye'nin", "Bu yüzden")
    log: tuple[Literal["tensorboard", "wandb"], ...] = ()

    def save_interval_s(self, state_bytes: float) -> float:
        """Return the seconds between two saves of a state of this size: as told, or so that a disk lasts."""
        if self.save_every_minutes is not None:
            return 60.0 * self.save_every_minutes
        return max(LEAST_SAVE_INTERVAL_S, state_bytes / WRITTEN_PER_DAY_BYTES * 86_400)


class RunConfig(Words):
    """A whole run file."""

    model: ModelConfig
    data: DataConfig
    train: TrainConfig
    run: RunOptions

    @model_validator(mode="after")
    def _check(self) -> RunConfig:
        check_rotation(self.model, self.train)
        return self


def check_rotation(model: ModelConfig, train: TrainConfig) -> None:
    """Raise ValueError where the experts of a model cannot rotate as the recipe says."""
    rotation, ffn = train.rotation, model.ffn
    if rotation is None:
        return
    if ffn.kind != "moe":
        raise ValueError(
            f'train.rotation rotates experts; ffn.kind is "{ffn.kind}", which has none. Leave train.rotation out'
        )
    if rotation.window >= ffn.experts:
        why = f"a layer has {ffn.experts} experts, and some must wait for their turn"
        raise ValueError(f"rotation.window is {rotation.window}; {why}. Try {max(1, ffn.experts // 4)}")
    turns = math.ceil(ffn.experts / rotation.window)
    if turns * rotation.interval > train.steps:
        why = f"the run has {train.steps} steps, in which {turns} turns must end, or some experts never learn"
        fix = f"Try {max(1, train.steps // turns // 8)}" if turns <= train.steps else "Train on more tokens"
        raise ValueError(f"rotation.interval is {rotation.interval}; {why}. {fix}")
    size = model.dim * ffn.expert_hidden
    if size % 256 and train.optimizer.bits == 8:
        why = f"experts that rotate have dim · expert_hidden = {size}, which blocks of 256 must divide"
        more = 16 if train.optimizer.name == "muon" else 32
        raise ValueError(f"optimizer.bits is 8; {why}. Try bits = {more}")


def divisors(count: int) -> list[int]:
    """Return what divides a number, in order."""
    return [n for n in range(1, count + 1) if count % n == 0]


def differences(was: Words, now: Words) -> list[tuple[str, Any, Any]]:
    """List `(dotted key, value before, value now)` for every value in which two configurations differ."""
    before, after = flatten(was.model_dump(mode="json")), flatten(now.model_dump(mode="json"))
    keys = dict.fromkeys([*before, *after])
    return [(key, before.get(key), after.get(key)) for key in keys if before.get(key) != after.get(key)]


def flatten(table: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested tables as one table of dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in table.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def check_vocabulary(said: int | None, tokenizer_size: int, tokenizer: Path) -> None:
    """Raise ConfigError where a run file states another vocabulary than its tokenizer has."""
    if said is not None and said != tokenizer_size:
        raise ConfigError(
            f"model.vocabulary is {said}.",
            f"The tokenizer {tokenizer} has {tokenizer_size} ids, and every id needs its row.",
            "Leave model.vocabulary out: it then follows the tokenizer.",
        )
