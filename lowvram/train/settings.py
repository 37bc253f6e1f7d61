"""Everything that is chosen before the first step of a run, as one frozen value; decides nothing itself."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lowvram.config.plan import Plan
from lowvram.config.run import RunConfig


@dataclass(frozen=True)
class RunSettings:
    """What a trainer is made of.

    config: what is learnt.  plan: how a step is cut, for plan_reason; is_kept: it is the plan of an earlier start.
    device: where.  limit_bytes: the memory that tensors may take there, None where that is not known.  graphs: the
    passes of a micro-batch are replayed from CUDA graphs.  allow: what may differ from the last start, of
    `start.ALLOWABLE`.
    """

    config: RunConfig
    plan: Plan
    device: torch.device
    plan_reason: str = ""
    is_kept: bool = False
    limit_bytes: int | None = None
    graphs: bool = False
    allow: tuple[str, ...] = ()
