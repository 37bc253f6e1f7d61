"""The parts of a training recipe of which there are several kinds: optimizers, schedules, the rotation of experts."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveInt

from lowvram.words import Share, Words, unless_named


class AdamW(Words):
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


class Muon(Words):
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


Optimizer = Annotated[AdamW | Muon, Field(discriminator="name"), unless_named(name="adamw")]


class Cosine(Words):
    """Linear warm-up over a share of the steps, then half a cosine down to `floor` of the peak."""

    kind: Literal["cosine"] = "cosine"
    """Half a cosine."""
    warmup: Share = 0.02
    """Share of the steps in which the rate rises."""
    floor: Annotated[float, Field(ge=0.0, le=1.0)] = 0.1
    """Last rate, as a share of the highest."""


class WarmupStableDecay(Words):
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


class Rotation(Words):
    """Of each layer's experts `window` learn for `interval` steps, then the next ones; all of them always answer.

    The masters and the optimizer's states of the experts that wait lie in the computer's memory.
    """

    window: PositiveInt
    """Experts of each layer that learn at a time."""
    interval: PositiveInt = 80
    """Steps after which the next ones learn."""
    idle: Literal["bf16", "int8", "e4m3"] = "bf16"
    """Number format of the experts that wait, on the card."""
