"""WHAT is learnt: model, training, data and run, read from TOML and checked; knows no device and no tensor."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, PositiveInt, model_validator

from lowvram.architecture import Alibi as Alibi
from lowvram.architecture import Attention, Ffn, Positions, Rope, Window
from lowvram.architecture import Gqa as Gqa
from lowvram.architecture import Mla as Mla
from lowvram.architecture import Moe as Moe
from lowvram.architecture import SwiGlu as SwiGlu
from lowvram.architecture import Yarn as Yarn
from lowvram.errors import ConfigError
from lowvram.recipe import AdamW, Cosine, Optimizer, Rotation, Schedule
from lowvram.units import count_of
from lowvram.words import Count, Share, Size, Words, as_list

# Automatic saving: at most this much written a day, and never more often than this.
WRITTEN_PER_DAY_BYTES = 50e9
LEAST_SAVE_INTERVAL_S = 600.0
# Several times the deepest published model: what is deeper is a slip, and would be built block by block for minutes.
MOST_LAYERS = 1024


class ModelConfig(Words):
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


class TrainConfig(Words):
    """How it is learnt; nothing here depends on the machine."""

    tokens: Count
    """Tokens to train on in all, such as `"500M"`; reading the text more than about four times teaches little."""
    seq_len: PositiveInt = 1024
    """Tokens of one sequence: the context that the model learns."""
    batch_tokens: Count = 65_536
    """Tokens of one optimizer step, a multiple of `seq_len`; how many run at once follows from the machine."""
    optimizer: Optimizer = AdamW()
    """A table with `name`; other keys as below."""
    schedule: Schedule = Cosine()
    """How the learning rate moves; a table with `kind`."""
    precision: Literal["fp32", "bf16", "fp16", "fp8", "int8"] = "bf16"
    """Number format of the products: `"fp16"` for RTX 20, `"bf16"` from RTX 30 on; `"fp8"` and `"int8"` only for the
    products of attention and feed-forward layers, forward and backward, with bf16 between them."""
    weights: Literal["fp32", "bf16"] = "fp32"
    """Number format in which matrices are kept; `"bf16"` halves their memory and is rounded stochastically."""
    update_during_backward: bool = False
    """Whether each weight is updated as soon as its gradient exists, so that gradients never all exist; then nothing
    accumulates."""
    rotation: Rotation | None = None
    """Experts that learn in turns; for `ffn.kind = "moe"`. Without it all learn always."""
    clip: Annotated[float, Field(gt=0.0)] = 1.0
    """Largest norm of the gradient; longer ones are shortened to it."""
    dropout: Share = 0.0
    """Share of activations that is set to zero in training."""
    seed: int = 0
    """Seed of initial weights, order of the text and dropout."""
    start_from: Path | None = None
    """Directory of a finished run whose weights this one begins with."""

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
    """Directory that `lowvram data pack` wrote."""
    weight: Annotated[float, Field(gt=0.0)] = 1.0
    """Share among the corpora, relative to the others'."""


def _as_corpora(value: Any) -> Any:
    """Take a folder for one corpus, and a list of folders for corpora that weigh the same."""
    several = as_list(value)
    if not isinstance(several, list | tuple):
        return value
    return [{"path": one} if isinstance(one, str | Path) else one for one in several]


class DataConfig(Words):
    """Where the tokens are."""

    train: Annotated[tuple[Corpus, ...], BeforeValidator(_as_corpora), Field(min_length=1)]
    """Packed text to learn: one folder, a list of folders, or a list of `{ path, weight }`."""
    valid: Path | None = None
    """Packed text that is held out, for validation; without it overfitting cannot be seen."""
    tokenizer: Path
    """Directory of the tokenizer with which the text was packed."""


class RunOptions(Words):
    """What a run keeps and tells; may change between two starts of the same run."""

    dir: Path
    """Directory of checkpoints and logs."""
    save_every_minutes: Annotated[float, Field(gt=0.0)] | None = None
    """Minutes between two checkpoints; without it ten, or more for large models, so that at most 50 GB a day are
    written."""
    keep: PositiveInt = 2
    """Checkpoints that are kept; older ones are deleted."""
    milestone_steps: PositiveInt | None = None
    """Checkpoints at multiples of so many steps are kept for good."""
    disk_budget: Size | None = None
    """Most bytes that checkpoints may take, such as `"40GB"`."""
    validate_every: PositiveInt = 250
    """Steps between two validations."""
    validate_tokens: Count = 262_144
    """Tokens of `data.valid` that a validation reads."""
    sample_every: PositiveInt = 500
    """Steps between two samples."""
    sample_tokens: PositiveInt = 40
    """Tokens of a sample."""
    prompts: Annotated[tuple[str, ...], BeforeValidator(as_list)] = ("Bir gün", "Türkiye'nin", "Bu yüzden")
    """Texts that samples continue; `[]` for none."""
    log: Annotated[tuple[Literal["tensorboard", "wandb"], ...], BeforeValidator(as_list)] = ()
    """Where figures go beside `log.jsonl`: `"tensorboard"`, `"wandb"` or both."""

    def save_interval_s(self, state_bytes: float) -> float:
        """Return the seconds between two saves of a state of this size: as told, or so that a disk lasts."""
        if self.save_every_minutes is not None:
            return 60.0 * self.save_every_minutes
        return max(LEAST_SAVE_INTERVAL_S, state_bytes / WRITTEN_PER_DAY_BYTES * 86_400)


class RunConfig(Words):
    """A whole run file."""

    model: ModelConfig
    """What the network is."""
    data: DataConfig
    """What it reads."""
    train: TrainConfig
    """How it learns."""
    run: RunOptions
    """What is kept and told; it may change between two starts."""

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
        why = (
            f"the run has {count_of(train.steps, 'step')}, in which {turns} turns must end, or some experts never learn"
        )
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
