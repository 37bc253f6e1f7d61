"""The optimizer's state of a weight: how it is made, and what it is to the rules."""

from __future__ import annotations

from typing import Any

import torch
from lowvram_kernels.optim.adamw8 import Moments, new_moments
from lowvram_kernels.optim.muon import Momentum, new_momentum
from torch import Tensor

State = dict[str, Tensor]


def moments_of(state: State) -> Moments:
    """Return AdamW's moments of a state."""
    return Moments(*(state[name] for name in Moments._fields))


def momentum_of(state: State) -> Momentum:
    """Return Muon's momentum of a state."""
    return Momentum(state["code_m"], state["absmax_m"])


def new_state(group: dict[str, Any], weight: Tensor) -> State:
    """Return a weight's state before its first step, but for the count of steps."""
    if group["rule"] == "muon":
        momentum = new_momentum(weight, group["bits"])
        return {"code_m": momentum.code, "absmax_m": momentum.absmax}
    if group["bits"] == 32 and weight.dtype == torch.float32:
        return {moment: torch.zeros_like(weight) for moment in ("exp_avg", "exp_avg_sq")}
    return new_moments(weight, exact=group["bits"] == 32)._asdict()


def part_of(state: State, slot: int, size: int) -> State:
    """Return views of the state of one slot's expert; size: elements of an expert."""
    own = {"step": state["step"][slot]}
    for name, tensor in state.items():
        if name.startswith("absmax"):
            blocks = size // 256 if tensor.numel() else 0
            own[name] = tensor[slot * blocks : (slot + 1) * blocks]
        elif name != "step":
            own[name] = tensor[slot]
    return own
