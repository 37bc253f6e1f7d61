"""The optimizer: which rule updates which weight, its states by name; knows no loop."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypedDict

import torch
from lowvram_kernels.dispatch import empty_on_host, is_simulated, representative, to_host
from lowvram_kernels.optim.adamw8 import Maps, adamw8_, build_maps
from lowvram_kernels.optim.muon import muon_
from lowvram_kernels.optim.muon_together import MuonPart, muon_together_
from lowvram_kernels.random.stochastic_rounding import has_kernels
from torch import Tensor
from torch.optim.adamw import adamw

from lowvram.config.train import AdamW, Muon
from lowvram.model.transformer import Transformer
from lowvram.train.library_adamw import UNRECORDED, Part, require_library, step_by_library
from lowvram.train.muon_stacks import OffsetTables, by_kind, count_at_once, on_device
from lowvram.train.optimizer_state import State, moments_of, momentum_of, new_state, part_of

# As in bitsandbytes: 8-bit states of smaller weights would save next to nothing.
LEAST_8BIT = 4_096


class MuonSettings(TypedDict):
    """Arguments of `muon_` and of `muon_together_`."""

    rows: int | None
    beta: float
    decay: float
    steps: int
    gradient_scale: Tensor | float
    skip: Tensor | None


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
    tables: what kernels find the weights of a stack by.
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
        self._device = next(iter(self._group_of)).device
        self.experts: dict[Tensor, list[int]] = {}
        self.tables = OffsetTables()
        self.has_stepped = False
        self._rates: dict[float, Tensor] = {}

    def bytes_on_device(self) -> int:
        """Return how many bytes the existing states take on the weights' device."""
        if self.is_on_host:
            return 0
        return sum(tensor.nbytes for state in self.state.values() for tensor in state.values())

    @property
    def unrecorded(self) -> str | None:
        """Why an update cannot be recorded as a CUDA graph; None where it can."""
        return UNRECORDED if any(map(self._is_by_library, self._group_of)) else None

    @property
    def count(self) -> int:
        """The number of weights that it updates."""
        return len(self._group_of)

    def set_rate(self, learning_rate: Tensor | float) -> None:
        """Set the learning rate of the next steps, a number or an fp32 scalar on the device; all compute with fp32."""
        rate = on_device(learning_rate, self._device)
        shares = {group["share"] for group in self.param_groups}
        self._rates = {share: rate if share == 1.0 else rate * share for share in shares}

    def _rate_of(self, group: dict[str, Any]) -> Tensor:
        if not self._rates:
            self.set_rate(self._config.lr)
        return self._rates[group["share"]]

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every weight that has a gradient, and drop the gradient; reads nothing back from the device.

        Gradients go as soon as they have been read: their memory is room for the work on those that are left.
        """
        assert closure is None, "the trainer has computed the gradients already"
        self.has_stepped = True
        if self._is_skipped_on_mps():
            return
        self.tables.begin()
        freed_bytes, stacks = 0, list[tuple[dict[str, Any], list[Tensor]]]()
        learning = [weight for weight in self._group_of if weight.grad is not None]
        self._count_steps([weight for weight in learning if self._is_in_place(weight)])
        for group in self.param_groups:
            weights = [weight for weight in group["params"] if weight.grad is not None]
            in_place = [weight for weight in weights if self._is_in_place(weight)]
            if group["rule"] == "muon" and has_kernels(self._device):
                stacks += [(group, alike) for alike in by_kind(in_place)]
            else:
                freed_bytes += self._step_in_place(group, in_place)
            for weight in weights:
                if not self._is_in_place(weight):
                    self.step_one(weight)
                    freed_bytes += _drop_gradients([weight])
        # Small ones first: the gradients of those that have stepped make room for more of the large ones at once.
        for group, alike in sorted(stacks, key=lambda stack: stack[1][0].numel()):
            while alike:
                at_once = count_at_once(alike, freed_bytes)
                freed_bytes += self._step_stack(group, alike[:at_once])
                alike = alike[at_once:]

    def _is_in_place(self, weight: Tensor) -> bool:
        """Say whether a weight steps as a whole, by states on its device: it may step with others."""
        return weight not in self.experts and not self.is_on_host

    def _count_steps(self, weights: list[Tensor]) -> None:
        """Add to the counts of steps, except where torch's fused AdamW does."""
        own = [weight for weight in weights if not self._is_fused(self._group_of[weight], weight)]
        if own:
            stepped = on_device(self._stepped(), self._device)
            torch._foreach_add_([self.state_of(weight)["step"] for weight in own], [stepped] * len(own))

    def _step_in_place(self, group: dict[str, Any], weights: list[Tensor]) -> int:
        """Update weights whose steps are counted; returns the bytes of their gradients, which are gone."""
        fused = [weight for weight in weights if self._is_fused(group, weight)]
        if fused:
            self._step_fused(group, fused, [self.state_of(w) for w in fused], [gradient_of(w) for w in fused])
        by_library = [weight for weight in weights if self._is_by_library(weight)]
        if by_library:
            self._step_by_library(group, [(weight, self.state_of(weight)) for weight in by_library])
        for weight in weights:
            if not self._is_fused(group, weight) and not self._is_by_library(weight):
                self._step(weight, weight, gradient_of(weight), self.state_of(weight))
        return _drop_gradients(weights)

    def _is_by_library(self, weight: Tensor) -> bool:
        """Say whether bitsandbytes steps a weight; a rehearsal takes our kernel, which needs the same memory."""
        group = self._group_of[weight]
        is_asked_for = self._config.backend == "bitsandbytes" and not is_simulated()
        return is_asked_for and group["rule"] == "adamw" and group["bits"] == 8 and weight not in self.experts

    def _step_by_library(self, group: dict[str, Any], states: list[tuple[Tensor, State]]) -> None:
        parts = [Part(weight, gradient_of(weight), moments_of(state), state["step"]) for weight, state in states]
        how = (self._config, self._rate_of(group), group["weight_decay"], self.gradient_scale, self.found_inf)
        step_by_library(parts, self._maps_on(self._device), *how)

    def _step_stack(self, group: dict[str, Any], weights: list[Tensor]) -> int:
        """Update weights of one kind together; returns the bytes of their gradients, which are gone."""
        gradients, states = [gradient_of(weight) for weight in weights], [self.state_of(w) for w in weights]
        parts = [
            MuonPart(weight, momentum_of(state), state["step"], self._purpose_of[weight])
            for weight, state in zip(weights, states, strict=True)
        ]
        table = self.tables.table_of(parts, gradients, self._seed)
        if table is None:
            return self._step_in_place(group, weights)
        freed_bytes = _drop_gradients(weights)
        codes, rate = self._maps_on(self._device).first, self._rate_of(group)
        muon_together_(parts, gradients, table, codes, rate, **self._muon_settings(group))
        return freed_bytes

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
        }

    def _stepped(self) -> Tensor | float:
        """Return 1, or 0 on the device where nothing changes: what a step adds to the counts of steps."""
        return 1.0 if self.found_inf is None else 1.0 - self.found_inf

    def _is_skipped_on_mps(self) -> bool:
        """Say whether nothing changes: asked on MPS alone, whose fused kernel of torch's ignores `found_inf`."""
        return self.found_inf is not None and self._device.type == "mps" and bool(self.found_inf)

    @torch.no_grad()
    def step_one(self, weight: Tensor) -> None:
        """Update one weight, which has a gradient."""
        self.has_stepped = True
        gradient = gradient_of(weight)
        with self._on_device(self.state_of(weight), weight.device) as state:
            if not self._is_fused(self._group_of[weight], weight):
                state["step"] += self._stepped()
            if self._is_by_library(weight):
                self._step_by_library(self._group_of[weight], [(weight, state)])
                return
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
            made = {"step": torch.zeros(shape, dtype=torch.float32, device=weight.device), **new_state(group, weight)}
            state |= {name: to_host(tensor) for name, tensor in made.items()} if self.is_on_host else made
        return state

    def shapes_of(self, weight: Tensor) -> dict[str, tuple[int, ...]]:
        """Return the shapes in which the state of a weight is saved."""
        made = new_state(self._group_of[weight], torch.empty_like(weight, device="meta"))
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
        """Update a weight, or the part of it that begins at element number `first` of all its experts.

        Its step is counted already, except where torch's fused AdamW counts it.
        """
        group = self._group_of[weight]
        if self._is_fused(group, weight):
            self._step_fused(group, [part], [state], [gradient])
            return
        maps = self._maps_on(weight.device)
        config, step, rate = self._config, state["step"], self._rate_of(group)
        if group["rule"] == "muon":
            key = {"seed": self._seed, "purpose": self._purpose_of[weight], "first": first}
            muon_(part, gradient, momentum_of(state), maps.first, step, rate, **key, **self._muon_settings(group))
            return
        adamw8_(
            part,
            gradient,
            moments_of(state),
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
        self, group: dict[str, Any], weights: list[Tensor], states: list[State], gradients: list[Tensor]
    ) -> None:
        if self._is_skipped_on_mps():
            return
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
            # torch has no form of this op for meta tensors that takes a rate on the device.
            lr=0.0 if is_simulated() else self._rate_of(group),
            weight_decay=group["weight_decay"],
            eps=self._config.eps,
            maximize=False,
        )


def gradient_of(weight: Tensor) -> Tensor:
    """Return the gradient of a weight that has one."""
    assert weight.grad is not None, "only weights with gradients are updated"
    return weight.grad


def _drop_gradients(weights: list[Tensor]) -> int:
    """Drop the gradients of weights that have stepped; returns their bytes."""
    freed_bytes = sum(gradient_of(weight).nbytes for weight in weights)
    for weight in weights:
        weight.grad = None
    return freed_bytes


def build_optimizer(model: Transformer, config: AdamW | Muon, seed: int = 0, on_host: bool = False) -> LeanOptimizer:
    """Return the optimizer over the model's weights; weight decay acts on matrices, not on norms.

    seed: the run's, which decides how bf16 weights are rounded.  on_host: whether the states are in host memory.
    """
    if config.backend == "bitsandbytes":
        require_library(model.embedding.device)
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
