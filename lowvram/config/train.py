"""How a model is trained: optimizer, schedule, precision, rotation of experts; nothing here depends on the machine."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, PositiveInt, model_validator

from lowvram.config.base import Count, FrozenConfig, Share, unless_named
from lowvram.config.model import ModelConfig
from lowvram.units import count_of

# The precisions whose products have 8 bits.
LOW_PRECISIONS = ("fp8", "int8")
Backend = Literal["own", "bitsandbytes"]


class AdamW(FrozenConfig):
    """AdamW (Loshchilov & Hutter 2019)."""

    name: Literal["adamw"] = "adamw"
    """AdamW."""
    bits: Literal[32, 8] = 32
    """Bits of both moments of large weights; 8 takes a quarter of the memory."""
    embeddings: Literal["same", "fp32"] = "same"
    """`"fp32"` keeps the moments of embedding and head in 32 bits."""
    lr: Annotated[float, Field(gt=0.0)] = 1e-3
    """Highest learning rate."""
    beta1: Share = 0.9
    """Decay of the first moment."""
    beta2: Share = 0.95
    """Decay of the second moment."""
    eps: Annotated[float, Field(gt=0.0)] = 1e-8
    """Added to the root of the second moment."""
    decay: Annotated[float, Field(ge=0.0)] = 0.1
    """Weight decay of matrices."""
    backend: Backend = "own"
    """What steps 8-bit moments of fp32 weights: our kernel (`"own"`) or the library (`"bitsandbytes"`, on CUDA); the
    codes are the same, so a run may change over when it resumes."""


class Muon(FrozenConfig):
    """Muon (Jordan et al. 2024) for the blocks' matrices, AdamW for embedding, head, routers and norms."""

    name: Literal["muon"] = "muon"
    """Muon for the blocks' matrices, AdamW for all other weights."""
    bits: Literal[16, 8] = 8
    """Bits of the momentum; with 8 AdamW's moments have 8 too, with 16 they have 32."""
    embeddings: Literal["same", "fp32"] = "same"
    """`"fp32"` keeps the moments of embedding and head in 32 bits."""
    lr: Annotated[float, Field(gt=0.0)] = 1e-3
    """Highest learning rate."""
    adamw_lr: Annotated[float, Field(gt=0.0)] | None = None
    """AdamW's own highest learning rate; without it `lr`."""
    momentum: Share = 0.95
    """Decay of the momentum."""
    iterations: Literal[3, 4, 5] = 3
    """Newton–Schulz iterations that make the momentum orthogonal."""
    beta1: Share = 0.9
    """Decay of AdamW's first moment."""
    beta2: Share = 0.95
    """Decay of AdamW's second moment."""
    eps: Annotated[float, Field(gt=0.0)] = 1e-8
    """Added to the root of AdamW's second moment."""
    decay: Annotated[float, Field(ge=0.0)] = 0.1
    """Weight decay of matrices."""
    backend: Backend = "own"
    """What steps AdamW's 8-bit moments, here those of embedding and head: `"own"` or `"bitsandbytes"`."""


Optimizer = Annotated[AdamW | Muon, Field(discriminator="name"), unless_named(name="adamw")]


class Cosine(FrozenConfig):
    """Linear warm-up over a share of the steps, then half a cosine down to `floor` of the peak."""

    kind: Literal["cosine"] = "cosine"
    """Half a cosine."""
    warmup: Share = 0.02
    """Share of the steps in which the rate rises."""
    floor: Annotated[float, Field(ge=0.0, le=1.0)] = 0.1
    """Last rate, as a share of the highest."""


class WarmupStableDecay(FrozenConfig):
    """Linear warm-up, a constant rate, and a linear decay over the last share of the steps (Hu et al. 2024)."""

    kind: Literal["wsd"] = "wsd"
    """A constant rate, then a linear decay."""
    warmup: Share = 0.02
    """Share of the steps in which the rate rises."""
    decay: Annotated[float, Field(gt=0.0, le=1.0)] = 0.2
    """Share of the steps, at the end, in which it falls."""
    floor: Annotated[float, Field(ge=0.0, le=1.0)] = 0.0
    """Last rate, as a share of the highest."""


Schedule = Annotated[Cosine | WarmupStableDecay, Field(discriminator="kind"), unless_named(kind="cosine")]


class Rotation(FrozenConfig):
    """In each layer `window` experts learn for `interval` steps, then the next ones; all take part in every forward.

    Master weights and optimizer states of the frozen experts are in host memory.
    """

    window: PositiveInt
    """Experts of each layer that learn at a time."""
    interval: PositiveInt = 80
    """Steps after which the next ones learn."""
    idle: Literal["bf16", "int8", "e4m3"] = "bf16"
    """Number format of the frozen experts on the card."""


class TrainConfig(FrozenConfig):
    """How the model is trained; nothing here depends on the machine."""

    tokens: Count
    """Tokens to train on in all, such as `"500M"`; reading the text more than about four times teaches little."""
    seq_len: PositiveInt = 1024
    """Tokens of one sequence: the context that the model learns."""
    batch_tokens: Count = 65_536
    """Tokens of one optimizer step, a multiple of `seq_len`; how many run at once follows from the machine."""
    optimizer: Optimizer = AdamW()
    """A table with `name`; other keys as below."""
    schedule: Schedule = Cosine()
    """How the learning rate changes; a table with `kind`."""
    precision: Literal["fp32", "bf16", "fp16", "fp8", "int8"] = "bf16"
    """Number format of matrix products: `"fp16"` for RTX 20, `"bf16"` from RTX 30 on; `"fp8"` and `"int8"` only for the
    products of attention and feed-forward layers, forward and backward, with bf16 between them."""
    weights: Literal["fp32", "bf16"] = "fp32"
    """Number format in which matrices are kept; `"bf16"` halves their memory and is rounded stochastically."""
    update_during_backward: bool = False
    """Whether each weight is updated as soon as its gradient exists, so that the gradients are never all in memory;
    it excludes gradient accumulation."""
    rotation: Rotation | None = None
    """Experts that learn in turns; for `ffn.kind = "moe"`. Without it all experts learn in every step."""
    clip: Annotated[float, Field(gt=0.0)] = 1.0
    """Largest norm of the gradient; a larger one is scaled down to it."""
    skip_spikes: bool = False
    """Whether a step whose loss is far above those before it is skipped; without it such a step is only told. It may be
    set while a run goes on."""
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
        if self.skip_spikes and self.update_during_backward:
            raise ValueError(
                "train.skip_spikes is true; with train.update_during_backward weights have moved before a step can be "
                "skipped. Leave one of the two out"
            )
        self._check_backend()
        return self

    def _check_backend(self) -> None:
        if self.optimizer.backend == "own":
            return
        what = f'optimizer.backend is "{self.optimizer.backend}"'
        if self.optimizer.bits != 8:
            raise ValueError(
                f"{what}; it steps 8-bit moments, and optimizer.bits is {self.optimizer.bits}. Try bits = 8"
            )
        if self.weights != "fp32":
            raise ValueError(
                f'{what}; it rounds bf16 weights to nearest, and so loses most steps. Try weights = "fp32"'
            )
        if self.update_during_backward:
            raise ValueError(f"{what}; it reads numbers on the host. Leave train.update_during_backward out")

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
        """Optimizer steps in which `tokens` are read."""
        return math.ceil(self.tokens / self.batch_tokens)


def check_rotation(model: ModelConfig, train: TrainConfig) -> None:
    """Raise ValueError if the experts of a model cannot rotate as the configuration says."""
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
    """Return the divisors of a number, in order."""
    return [n for n in range(1, count + 1) if count % n == 0]
