"""The parts of a training recipe of which there are several kinds: optimizers, schedules, the rotation of experts."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, PositiveInt

from lowvram.words import Share, Words


class AdamW(Words):
    """AdamW (Loshchilov & Hutter 2019); decay acts on matrices only.

    bits: 8 keeps both moments of every large weight in 8 bits; `embeddings = "fp32"` exempts embedding and head.
    """

    name: Literal["adamw"] = "adamw"
    bits: Literal[32, 8] = 32
    embeddings: Literal["same", "fp32"] = "same"
    lr: Annotated[float, Field(gt=0.0)] = 1e-3
    beta1: Share = 0.9
    beta2: Share = 0.95
    eps: Annotated[float, Field(gt=0.0)] = 1e-8
    decay: Annotated[float, Field(ge=0.0)] = 0.1


class Muon(Words):
    """Muon (Jordan et al. 2024) for the blocks' matrices, AdamW for embedding, head, routers and norms; one rate.

    bits: of the momentum; 8 keeps AdamW's moments of embedding and head in 8 bits too, 16 keeps them in fp32.
    adamw_lr: AdamW's own rate, where it is not lr.  iterations: with which a momentum is made orthogonal.
    """

    name: Literal["muon"] = "muon"
    bits: Literal[16, 8] = 8
    embeddings: Literal["same", "fp32"] = "same"
    lr: Annotated[float, Field(gt=0.0)] = 1e-3
    adamw_lr: Annotated[float, Field(gt=0.0)] | None = None
    momentum: Share = 0.95
    iterations: Literal[3, 4, 5] = 3
    beta1: Share = 0.9
    beta2: Share = 0.95
    eps: Annotated[float, Field(gt=0.0)] = 1e-8
    decay: Annotated[float, Field(ge=0.0)] = 0.1


def _as_adamw(value: Any) -> Any:
    return {"name": "adamw", **value} if isinstance(value, dict) else value


Optimizer = Annotated[AdamW | Muon, Field(discriminator="name"), BeforeValidator(_as_adamw)]


class Cosine(Words):
    """Linear warm-up over a share of the steps, then half a cosine down to `floor` of the peak."""

    kind: Literal["cosine"] = "cosine"
    warmup: Share = 0.02
    floor: Annotated[float, Field(ge=0.0, le=1.0)] = 0.1


class WarmupStableDecay(Words):
    """Linear warm-up, a constant rate, and a linear decay over the last share of the steps (Hu et al. 2024)."""

    kind: Literal["wsd"] = "wsd"
    warmup: Share = 0.02
    decay: Annotated[float, Field(gt=0.0, le=1.0)] = 0.2
    floor: Annotated[float, Field(ge=0.0, le=1.0)] = 0.0


class Rotation(Words):
    """Of each layer's experts `window` learn for `interval` steps, then the next ones; all of them always answer.

    idle: as what the others lie on the card.  Their masters and their optimizer's states lie in the computer's memory.
    """

    window: PositiveInt
    interval: PositiveInt = 80
    idle: Literal["bf16", "int8", "e4m3"] = "bf16"
