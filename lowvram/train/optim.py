"""The optimizer: which rule updates which weight, its states by name, and the learning rate; knows no loop."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypedDict

import torch
from lowvram_kernels.dispatch import empty_on_host, representative, to_host
from lowvram_kernels.optim.adamw8 import Maps, Moments, adamw8_, build_maps, new_moments
from lowvram_kernels.optim.muon import Momentum, MuonPart, muon_, muon_together_, new_momentum
from lowvram_kernels.random.stochastic_rounding import has_kernels
from torch import Tensor
from torch.optim.adamw import adamw

from lowvram.config.train import AdamW, Muon, TrainConfig
from lowvram.errors import CheckpointError
from lowvram.model.transformer import Transformer

# As in bitsandbytes: 8-bit states of smaller weights would save next to nothing.
LEAST_8BIT = 4_096
State = dict[str, Tensor]


class MuonSettings(TypedDict):
    """Arguments of `muon_` and of `muon_together_`."""

    rows: int | None
    beta: float
    decay: float
    steps: int
    gradient_scale: Tensor | float
    skip: Tensor | None
    seed: int


class LeanOptimizer(torch.optim.Optimizer):
    """AdamW and Muon, group by group, with states in 8, 16 or 32 bits.

    A group's `rule` is "adamw" or "muon"; `bits` is the width of its states; `rows` is the number of rows of each
    matrix in a Muon group's weight, 0 for whole weights; `share` is its factor on the learning rate.
    A weight's state is made at its first step: `step` (a scalar on the device; [W] for a rotating stack of experts) and
    the fields of `Moments` or `Momentum`, or `exp_avg` and `exp_avg_sq`.
    seed: for the stochastic rounding of bf16 weights.  on_host: states are in host memory and are copied to the card
    one weight at a time.
    gradient_scale: the factor on every gradient, a number or an fp32 scalar on the device.
    found_inf: None, or an fp32 scalar: where it is 1, nothing changes.
    experts: for each rotating stack, the expert in each slot.
    has_stepped: becomes true with the first weight that is updated; callers reset it themselves.
    """

    found_inf: Tensor | None = None
    gradient_scale: Tensor | float = 1.0

    def __init__(self, groups: Iterable[dict[str, Any]], config: AdamW | Muon, seed: int = 0, on_host: bool = False):
        self._config, self._seed, self.is_on_host = config, seed, on_host
        super().__init__(groups, {"lr": config.lr, "share": 1.0, "weight_decay": 0.0, "bits": 32, "rule": "adamw"})
        self._maps: dict[torch.device, Maps] = {}
        self._group_of = {w: group for group in self.param_groups for w in group["params"]}
        self._purpose_of = {weight: number for number, weight in enumerate(self._group_of)}
        self.experts: dict[Tensor, list[int]] = {}
        self.has_stepped = False

    def bytes_on_device(self) -> int:
        """Return how many bytes the existing states take on the weights' device."""
        if self.is_on_host:
            return 0
        return sum(tensor.nbytes for state in self.state.values() for tensor in state.values())

    @property
    def count(self) -> int:
        """The number of weights that it updates."""
        return len(self._group_of)

    def set_rate(self, learning_rate: float) -> None:
        """Set the learning rate of the next steps."""
        for group in self.param_groups:
            group["lr"] = learning_rate

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every weight that has a gradient; reads nothing back from the device."""
        assert closure is None, "the trainer has computed the gradients already"
        self.has_stepped = True
        for group in self.param_groups:
            weights = [weight for weight in group["params"] if weight.grad is not None]
            together = [weight for weight in weights if self._is_fused(group, weight) and weight not in self.experts]
            if together and not self.is_on_host:
                self._step_fused(group, together, [self.state_of(weight) for weight in together])
                weights = [weight for weight in weights if not self._is_fused(group, weight) or weight in self.experts]
            if group["rule"] == "muon" and not self.is_on_host:
                weights = self._step_muon_together(group, weights)
            for weight in weights:
                self.step_one(weight)

    def _step_muon_together(self, group: dict[str, Any], weights: list[Tensor]) -> list[Tensor]:
        """Update weights of equal shapes together on a card; returns the others."""
        by_kind: dict[tuple[Any, ...], list[Tensor]] = {}
        for weight in weights:
            if weight not in self.experts and has_kernels(weight.device):
                by_kind.setdefault((weight.shape, weight.dtype, weight.device), []).append(weight)
        for alike in by_kind.values():
            states = [self.state_of(weight) for weight in alike]
            torch._foreach_add_([state["step"] for state in states], self._stepped())
            parts = [
                MuonPart(weight, weight.grad, _momentum_of(state), state["step"], self._purpose_of[weight])
                for weight, state in zip(alike, states, strict=True)
                if weight.grad is not None
            ]
            codes, rate = self._maps_on(alike[0].device).first, group["lr"] * group["share"]
            muon_together_(parts, codes, rate, **self._muon_settings(group))
        done = {weight for alike in by_kind.values() for weight in alike}
        return [weight for weight in weights if weight not in done]

    def _muon_settings(self, group: dict[str, Any]) -> MuonSettings:
        """Return the arguments of Muon's step that are the same for all weights of a group."""
        config = self._config
        assert isinstance(config, Muon), "only groups of a Muon optimizer have the rule"
        return {
            "rows": group["rows"] or None,
            "beta": config.momentum,
            "decay": group["weight_decay"],
            "steps": config.iterations,
            "gradient_scale": self.gradient_scale,
            "skip": self.found_inf,
            "seed": self._seed,
        }

    def _stepped(self) -> Tensor | float:
        """Return 1, or 0 on the device where nothing changes: what a step adds to the counts of steps."""
        return 1.0 if self.found_inf is None else 1.0 - self.found_inf

    @torch.no_grad()
    def step_one(self, weight: Tensor) -> None:
        """Update one weight, which has a gradient."""
        self.has_stepped = True
        gradient = weight.grad
        assert gradient is not None, "only weights with gradients are updated"
        with self._on_device(self.state_of(weight), weight.device) as state:
            if weight not in self.experts:
                self._step(weight, weight, gradient, state)
                return
            size, experts = weight[0].numel(), self.experts[weight]
            for slot in representative(len(experts)):
                expert = experts[slot]
                # The rounding of an expert is keyed by the expert's number, so that it does not depend on its slot.
                own = part_of(state, slot, size)
                self._step(weight, weight[slot], gradient[slot], own, expert * size)

    def _is_fused(self, group: dict[str, Any], weight: Tensor) -> bool:
        """Say whether torch's fused AdamW updates a weight; it rounds bf16 to nearest, which loses small updates."""
        return group["rule"] == "adamw" and group["bits"] == 32 and weight.dtype == torch.float32

    def state_of(self, weight: Tensor) -> State:
        """Return the state of a weight; the first call makes it."""
        state: State = self.state[weight]
        if not state:
            group = self._group_of[weight]
            shape = (len(self.experts[weight]),) if weight in self.experts else ()
            made = {"step": torch.zeros(shape, dtype=torch.float32, device=weight.device), **_new_state(group, weight)}
            state |= {name: to_host(tensor) for name, tensor in made.items()} if self.is_on_host else made
        return state

    def shapes_of(self, weight: Tensor) -> dict[str, tuple[int, ...]]:
        """Return the shapes in which the state of a weight is saved."""
        made = _new_state(self._group_of[weight], torch.empty_like(weight, device="meta"))
        return {"step": (1,), **{name: tuple(tensor.shape) for name, tensor in made.items()}}

    def make_states(self) -> None:
        """Make all states now, not at the first step."""
        for weight in self._group_of:
            self.state_of(weight)
            if not self._is_fused(self._group_of[weight], weight):
                self._maps_on(weight.device)

    def _maps_on(self, device: torch.device) -> Maps:
        if device not in self._maps:
            self._maps[device] = build_maps(device)
        return self._maps[device]

    def place(self, tensor: Tensor, device: torch.device) -> Tensor:
        """Return a copy of a state tensor where states are kept: on the weights' device, or on the host."""
        if self.is_on_host:
            return empty_on_host(tensor.shape, tensor.dtype, device).copy_(tensor)
        return tensor.to(device, copy=True)

    @contextmanager
    def _on_device(self, state: State, device: torch.device) -> Iterator[State]:
        """Copy a state from the host to the card for the block, and back after it."""
        if not self.is_on_host:
            yield state
            return
        borrowed = {name: tensor.to(device, copy=True) for name, tensor in state.items()}
        yield borrowed
        for name, tensor in borrowed.items():
            state[name].copy_(tensor)

    def _step(self, weight: Tensor, part: Tensor, gradient: Tensor, state: State, first: int = 0) -> None:
        """Update a weight, or the part of it that begins at element number `first` of all its experts."""
        group = self._group_of[weight]
        if self._is_fused(group, weight):
            self._step_fused(group, [part], [state], [gradient])
            return
        maps = self._maps_on(weight.device)
        state["step"] += self._stepped()
        config, step, rate = self._config, state["step"], group["lr"] * group["share"]
        if group["rule"] == "muon":
            key, settings = {"purpose": self._purpose_of[weight], "first": first}, self._muon_settings(group)
            muon_(part, gradient, _momentum_of(state), maps.first, step, rate, **key, **settings)
            return
        adamw8_(
            part,
            gradient,
            Moments(*(state[name] for name in Moments._fields)),
            maps,
            step,
            rate,
            betas=(config.beta1, config.beta2),
            eps=config.eps,
            decay=group["weight_decay"],
            gradient_scale=self.gradient_scale,
            skip=self.found_inf,
            seed=self._seed,
            purpose=self._purpose_of[weight],
            first=first,
        )

    def _step_fused(
        self, group: dict[str, Any], weights: list[Tensor], states: list[State], gradients: list[Tensor] | None = None
    ) -> None:
        gradients = gradients or [weight.grad for weight in weights if weight.grad is not None]
        if self.found_inf is not None and weights[0].device.type == "mps" and bool(self.found_inf):
            return  # torch's fused kernel on MPS ignores found_inf, so the host checks it
        if not isinstance(self.gradient_scale, float) or self.gradient_scale != 1.0:
            torch._foreach_mul_(gradients, self.gradient_scale)
        adamw(
            weights,
            gradients,
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            fused=True,
            found_inf=self.found_inf,
            amsgrad=False,
            beta1=self._config.beta1,
            beta2=self._config.beta2,
            lr=group["lr"] * group["share"],
            weight_decay=group["weight_decay"],
            eps=self._config.eps,
            maximize=False,
        )


def _momentum_of(state: State) -> Momentum:
    return Momentum(state["code_m"], state["absmax_m"])


def _new_state(group: dict[str, Any], weight: Tensor) -> State:
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


def build_optimizer(model: Transformer, config: AdamW | Muon, seed: int = 0, on_host: bool = False) -> LeanOptimizer:
    """Return the optimizer over the model's weights; weight decay acts on matrices, not on norms.

    seed: the run's, which decides how bf16 weights are rounded.  on_host: whether the states are in host memory.
    """
    tables = {id(model.embedding), id(model.head_VD)}
    groups: dict[tuple[Any, ...], list[Tensor]] = {}
    for name, weight in model.named_parameters():
        is_matrix, is_table = weight.dim() > 1, id(weight) in tables
        is_exempt = is_table and config.embeddings == "fp32"
        is_large = is_matrix and weight.numel() >= LEAST_8BIT and not is_exempt
        rule, rows = "adamw", 0
        bits = 8 if config.bits == 8 and is_large else 32
        if config.name == "muon" and is_matrix and not is_table and not name.endswith("router.weight"):
            rule, bits = "muon", config.bits if is_large else 16
            # Gate and up are two matrices, one above the other.
            rows = weight.shape[-2] // 2 if "gate_up" in name else 0
        groups.setdefault((rule, is_matrix, bits, rows), []).append(weight)
    adamw_share = config.adamw_lr / config.lr if config.name == "muon" and config.adamw_lr else 1.0
    return LeanOptimizer(
        [
            {
                "params": weights,
                "rule": rule,
                "bits": bits,
                "rows": rows,
                "weight_decay": config.decay if is_matrix else 0.0,
                "share": adamw_share if rule == "adamw" else 1.0,
            }
            for (rule, is_matrix, bits, rows), weights in groups.items()
        ],
        config,
        seed,
        on_host,
    )


def learning_rate(train: TrainConfig, step: int) -> float:
    """Return the learning rate of optimizer step number `step`, counted from 0."""
    schedule, steps = train.schedule, train.steps
    warmup = round(schedule.warmup * steps)
    if step < warmup:
        return train.optimizer.lr * (step + 1) / (warmup + 1)
    if schedule.kind == "cosine":
        done = min(1.0, (step - warmup) / max(1, steps - warmup))
        share = schedule.floor + (1.0 - schedule.floor) * 0.5 * (1.0 + math.cos(math.pi * done))
    else:
        decay_steps = max(1, round(schedule.decay * steps))
        left = min(1.0, max(0, steps - step) / decay_steps)
        share = schedule.floor + (1.0 - schedule.floor) * left
    return train.optimizer.lr * share


def optimizer_tensors(model: Transformer, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return the optimizer's states, by `<field>.<weight's name>`; empty before the first step."""
    tensors: dict[str, Tensor] = {}
    for name, weight in model.named_parameters():
        for field, tensor in optimizer.state.get(weight, {}).items():
            tensors[f"{field}.{name}"] = tensor.reshape(-1) if field == "step" else tensor
    return tensors


def refuse_other_states(model: Transformer, optimizer: LeanOptimizer, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise CheckpointError where a checkpoint's states do not match the model's weights.

    A weight that was never updated has no state; every other one has all of its fields.  shapes: those of the states
    in a checkpoint, by name as in `optimizer_tensors`.
    """
    unknown = set(shapes)
    for name, weight in model.named_parameters():
        expected = {f"{field}.{name}": shape for field, shape in optimizer.shapes_of(weight).items()}
        stored = {key: shapes[key] for key in expected if key in shapes}
        unknown -= stored.keys()
        if stored not in ({}, expected):
            wrong = next(key for key in expected if stored.get(key) != expected[key])
            has = f"has the shape {list(stored[wrong])}" if wrong in stored else "is missing"
            raise CheckpointError(f"The optimizer state {wrong} {has}.", f"It should be {list(expected[wrong])}.")
    if unknown:
        raise CheckpointError(f"The optimizer remembers {min(unknown)}.", "The model has no such weight.")


def load_optimizer_tensors(model: Transformer, optimizer: LeanOptimizer, tensors: dict[str, Tensor]) -> None:
    """Load states as `optimizer_tensors` returned them; they are copied, since they are views of the checkpoint's file.

    Raises CheckpointError where a tensor belongs to no weight.
    """
    weights = dict(model.named_parameters())
    for key, tensor in tensors.items():
        field, _, name = key.partition(".")
        if name not in weights:
            raise CheckpointError(f"The optimizer remembers {key}.", f"The model has no weight {name}.")
        weight = weights[name]
        shape = () if field == "step" else tensor.shape
        optimizer.state[weight][field] = optimizer.place(tensor.reshape(shape), weight.device)
