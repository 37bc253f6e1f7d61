"""The optimizer and its learning rate: which rule steps which weight, what it remembers by name; knows no loop."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from lowvram_kernels.dispatch import empty_on_host, representative, to_host
from lowvram_kernels.optim.adamw8 import Maps, Moments, adamw8_, build_maps, new_moments
from lowvram_kernels.optim.muon import Momentum, muon_, new_momentum
from torch import Tensor
from torch.optim.adamw import adamw

from lowvram.config.train import AdamW, Muon, TrainConfig
from lowvram.errors import CheckpointError
from lowvram.model.transformer import Transformer

# As in bitsandbytes: what is smaller weighs nothing.
LEAST_8BIT = 4_096
State = dict[str, Tensor]


class LeanOptimizer(torch.optim.Optimizer):
    """AdamW and Muon, group by group, with states in 8, 16 or 32 bits.

    A group's `rule` is "adamw" or "muon"; its `bits` are those of the states; `rows` those of one of a Muon group's
    matrices, 0 for whole weights; `share` is its part of the learning rate.  A weight's state, made at its first step:
    `step` (a scalar on the device; [W] for a stack of experts that rotates) and the fields of `Moments` or of
    `Momentum`, or `exp_avg` and `exp_avg_sq`.
    seed: of a bf16 weight's rounding.  on_host: states lie in the computer's memory, and come to the card one weight at
    a time.
    gradient_scale: what every gradient is multiplied by, a number or an fp32 scalar on the device.
    found_inf: None, or an fp32 scalar: where it is 1, not a bit changes.
    experts: of each stack that rotates, which expert lies in which slot.
    has_stepped: turns true with the first weight that is stepped; whoever wants to know sets it false before.
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
        """Return what the states that exist take where the weights are."""
        if self.is_on_host:
            return 0
        return sum(tensor.nbytes for state in self.state.values() for tensor in state.values())

    @property
    def count(self) -> int:
        """How many weights it steps."""
        return len(self._group_of)

    def set_rate(self, learning_rate: float) -> None:
        """Set the rate of the steps to come."""
        for group in self.param_groups:
            group["lr"] = learning_rate

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Step every weight that has a gradient; reads nothing back from the device."""
        assert closure is None, "the trainer has made the gradients already"
        self.has_stepped = True
        for group in self.param_groups:
            weights = [weight for weight in group["params"] if weight.grad is not None]
            together = [weight for weight in weights if self._is_fused(group, weight) and weight not in self.experts]
            if together and not self.is_on_host:
                self._step_fused(group, together, [self.state_of(weight) for weight in together])
                weights = [weight for weight in weights if not self._is_fused(group, weight) or weight in self.experts]
            for weight in weights:
                self.step_one(weight)

    @torch.no_grad()
    def step_one(self, weight: Tensor) -> None:
        """Step one weight, which has a gradient."""
        self.has_stepped = True
        with self._at_hand(self.state_of(weight), weight.device) as state:
            if weight not in self.experts:
                self._step(weight, weight, weight.grad, state)
                return
            size, experts = weight[0].numel(), self.experts[weight]
            for slot in representative(len(experts)):
                expert = experts[slot]
                # An expert's rounding is named by its own number, so that it does not depend on its slot.
                own = part_of(state, slot, size)
                self._step(weight, weight[slot], weight.grad[slot], own, expert * size)

    def _is_fused(self, group: dict[str, Any], weight: Tensor) -> bool:
        """Say whether torch's own AdamW steps a weight; it rounds a bf16 one to nearest, and so would lose steps."""
        return group["rule"] == "adamw" and group["bits"] == 32 and weight.dtype == torch.float32

    def state_of(self, weight: Tensor) -> State:
        """Return what is remembered of a weight, made at the first call."""
        state: State = self.state[weight]
        if not state:
            group = self._group_of[weight]
            shape = (len(self.experts[weight]),) if weight in self.experts else ()
            made = {"step": torch.zeros(shape, dtype=torch.float32, device=weight.device), **_new_state(group, weight)}
            state |= {name: to_host(tensor) for name, tensor in made.items()} if self.is_on_host else made
        return state

    def shapes_of(self, weight: Tensor) -> dict[str, tuple[int, ...]]:
        """Return the shapes of what is remembered of a weight once it was stepped, as they are saved."""
        made = _new_state(self._group_of[weight], torch.empty_like(weight, device="meta"))
        return {"step": (1,), **{name: tuple(tensor.shape) for name, tensor in made.items()}}

    def make_states(self) -> None:
        """Make what would be made at the first step."""
        for weight in self._group_of:
            self.state_of(weight)
            if not self._is_fused(self._group_of[weight], weight):
                self._maps_on(weight.device)

    def _maps_on(self, device: torch.device) -> Maps:
        if device not in self._maps:
            self._maps[device] = build_maps(device)
        return self._maps[device]

    def place(self, tensor: Tensor, device: torch.device) -> Tensor:
        """Return a copy of a state where states lie: on the weights' device, or on the host."""
        if self.is_on_host:
            return empty_on_host(tensor.shape, tensor.dtype, device).copy_(tensor)
        return tensor.to(device, copy=True)

    @contextmanager
    def _at_hand(self, state: State, device: torch.device) -> Iterator[State]:
        """Bring a state that lies on the host to the card, and back."""
        if not self.is_on_host:
            yield state
            return
        borrowed = {name: tensor.to(device, copy=True) for name, tensor in state.items()}
        yield borrowed
        for name, tensor in borrowed.items():
            state[name].copy_(tensor)

    def _step(self, weight: Tensor, part: Tensor, gradient: Tensor | None, state: State, first: int = 0) -> None:
        """Step a weight, or the part of it that begins with element number `first` of all its experts."""
        group = self._group_of[weight]
        assert gradient is not None, "only weights with gradients are stepped"
        if self._is_fused(group, weight):
            self._step_fused(group, [part], [state], [gradient])
            return
        maps = self._maps_on(weight.device)
        state["step"] += 1.0 if self.found_inf is None else 1.0 - self.found_inf
        rounding = {"skip": self.found_inf, "seed": self._seed, "purpose": self._purpose_of[weight], "first": first}
        common = (state["step"], group["lr"] * group["share"])
        if group["rule"] == "muon":
            momentum = Momentum(state["code_m"], state["absmax_m"])
            muon = self._config
            assert isinstance(muon, Muon), "only Muon's groups have its rule"
            options = {"rows": group["rows"] or None, "beta": muon.momentum, "steps": muon.iterations}
            options |= {"decay": group["weight_decay"], "gradient_scale": self.gradient_scale, **rounding}
            muon_(part, gradient, momentum, maps.first, *common, **options)
            return
        betas, eps = (self._config.beta1, self._config.beta2), self._config.eps
        moments = Moments(*(state[name] for name in Moments._fields))
        scale = self.gradient_scale
        adamw8_(part, gradient, moments, maps, *common, betas, eps, group["weight_decay"], scale, **rounding)

    def _step_fused(
        self, group: dict[str, Any], weights: list[Tensor], states: list[State], gradients: list[Tensor] | None = None
    ) -> None:
        gradients = gradients or [weight.grad for weight in weights if weight.grad is not None]
        if self.found_inf is not None and weights[0].device.type == "mps" and bool(self.found_inf):
            return  # torch's kernel there does not look at found_inf, so the host must
        if not isinstance(self.gradient_scale, float) or self.gradient_scale != 1.0:
            torch._foreach_mul_(gradients, self.gradient_scale)
        adamw(
            weights,
            gradients,
            *([state[moment] for state in states] for moment in ("exp_avg", "exp_avg_sq")),
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


def _new_state(group: dict[str, Any], weight: Tensor) -> State:
    if group["rule"] == "muon":
        momentum = new_momentum(weight, group["bits"])
        return {"code_m": momentum.code, "absmax_m": momentum.absmax}
    if group["bits"] == 32 and weight.dtype == torch.float32:
        return {moment: torch.zeros_like(weight) for moment in ("exp_avg", "exp_avg_sq")}
    return new_moments(weight, exact=group["bits"] == 32)._asdict()


def part_of(state: State, slot: int, size: int) -> State:
    """Return views of what belongs to one slot's expert; size: elements of an expert."""
    own = {"step": state["step"][slot]}
    for name, tensor in state.items():
        if name.startswith("absmax"):
            blocks = size // 256 if tensor.numel() else 0
            own[name] = tensor[slot * blocks : (slot + 1) * blocks]
        elif name != "step":
            own[name] = tensor[slot]
    return own


def build_optimizer(model: Transformer, config: AdamW | Muon, seed: int = 0, on_host: bool = False) -> LeanOptimizer:
    """Return the optimizer over the model's weights; decay acts on matrices, not on norms.

    seed: the run's; it decides how bf16 weights are rounded.  on_host: where the states lie.
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
            # Gate and up lie above each other, and are two matrices.
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
    """Return the rate of optimizer step number `step`, counted from 0."""
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
    """Return what the optimizer remembers, by `<what>.<weight's name>`; empty before the first step."""
    tensors: dict[str, Tensor] = {}
    for name, weight in model.named_parameters():
        for what, tensor in optimizer.state.get(weight, {}).items():
            tensors[f"{what}.{name}"] = tensor.reshape(-1) if what == "step" else tensor
    return tensors


def refuse_other_states(model: Transformer, optimizer: LeanOptimizer, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise CheckpointError where states, by name as in `optimizer_tensors`, are not those of the model's weights.

    A weight that was never stepped has none; every other one has all of its own.  shapes: of what a checkpoint holds.
    """
    unknown = set(shapes)
    for name, weight in model.named_parameters():
        expected = {f"{what}.{name}": shape for what, shape in optimizer.shapes_of(weight).items()}
        stored = {key: shapes[key] for key in expected if key in shapes}
        unknown -= stored.keys()
        if stored not in ({}, expected):
            wrong = next(key for key in expected if stored.get(key) != expected[key])
            has = f"has the shape {list(stored[wrong])}" if wrong in stored else "is missing"
            raise CheckpointError(f"The optimizer state {wrong} {has}.", f"It should be {list(expected[wrong])}.")
    if unknown:
        raise CheckpointError(f"The optimizer remembers {min(unknown)}.", "The model has no such weight.")


def load_optimizer_tensors(model: Transformer, optimizer: LeanOptimizer, tensors: dict[str, Tensor]) -> None:
    """Put back copies of what `optimizer_tensors` returned: loaded tensors are views of the checkpoint's file.

    Raises CheckpointError where a tensor belongs to no weight.
    """
    weights = dict(model.named_parameters())
    for key, tensor in tensors.items():
        what, _, name = key.partition(".")
        if name not in weights:
            raise CheckpointError(f"The optimizer remembers {key}.", f"The model has no weight {name}.")
        weight = weights[name]
        shape = () if what == "step" else tensor.shape
        optimizer.state[weight][what] = optimizer.place(tensor.reshape(shape), weight.device)
