"""Expert rotation: which experts are trained now, and how they are copied to and from the card; knows no loop, no file.

A layer has E experts.  The W experts of the window are trained: they are weights with gradients and optimizer states on
the card, in the first W slots.  The others are frozen: forward uses low-precision copies of them.  Host memory holds
the masters and states of all E experts in natural order; those of the window are out of date until `update_masters`.
After `interval` steps the window moves on by W, so that all experts are trained equally often.

Everything is a function of the interval's number: a run that resumes in the middle of one continues to the same bits.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lowvram_kernels.dispatch import bytes_of, empty_on_host, representative
from lowvram_kernels.moe.idle import Stack, write_copy_
from lowvram_kernels.quant.quantise import parts_of
from torch import Tensor

from lowvram.config.train import Rotation
from lowvram.model.ffn import MoeFfn
from lowvram.model.transformer import Transformer, draw_
from lowvram.train.optim import LeanOptimizer
from lowvram.train.optimizer_state import State, part_of


class ExpertRotation:
    """The experts of a model's layers and their states, on the card and in host memory.

    slots: the slot of each expert; those of the window are below W.  interval: the number of the current interval.
    """

    @torch.no_grad()
    def __init__(self, model: Transformer, optimizer: LeanOptimizer, config: Rotation, seed: int | None) -> None:
        assert model.config.ffn.kind == "moe", "the run file was checked"
        self._model, self._optimizer, self._config = model, optimizer, config
        self.experts, self.interval = model.config.ffn.experts, 0
        self.slots = list(range(self.experts))
        self._weights: dict[str, Tensor] = {}
        self.masters: dict[str, Tensor] = {}
        self._states: dict[str, State] = {}
        stacks = {id(stack) for layer in model.moe_layers() for stack in (layer.gate_up_EHD, layer.down_EDI)}
        for name, weight in model.named_parameters():
            if id(weight) not in stacks:
                continue
            self._weights[name] = weight
            optimizer.experts[weight] = self.window
            self.masters[name] = self._host_stack(weight)
            self._states[name] = {
                field: self._host_stack(tensor).zero_() for field, tensor in optimizer.state_of(weight).items()
            }
            if seed is not None:
                draw_(self.masters[name], name, seed, model.config)
        if seed is not None:
            self._fill()

    @property
    def window(self) -> list[int]:
        """The expert in each of the first W slots."""
        return [self.slots.index(slot) for slot in range(self._config.window)]

    def interval_of(self, step: int) -> int:
        """Return the number of the interval that step number `step`, counted from 0, belongs to."""
        return step // self._config.interval

    def window_in(self, interval: int) -> set[int]:
        """Return the experts that are trained in an interval."""
        first = interval * self._config.window
        return {(first + offset) % self.experts for offset in range(self._config.window)}

    @torch.no_grad()
    def rotate_to(self, interval: int) -> None:
        """Train the experts of an interval from now on: write back those that leave the window, load those that enter.

        Copies are made in place, one matrix at a time, so that no pointer changes and nothing large is allocated.
        """
        entering = sorted(self.window_in(interval) - set(self.window))
        leaving = sorted(set(self.window) - self.window_in(interval))
        self.interval = interval
        for number in representative(len(entering)):
            old, new = leaving[number], entering[number]
            slot, idle_slot = self.slots[old], self.slots[new]
            for name, weight, idle in self._stacks():
                self._copy_to_host(name, weight, slot, old)
                write_copy_(idle, idle_slot - self._config.window, weight[slot])
                self._copy_to_card(name, weight, slot, new)
            self.slots[old], self.slots[new] = idle_slot, slot
        self._publish_slots()

    @torch.no_grad()
    def update_masters(self) -> None:
        """Bring the masters and states in host memory up to date for all experts, as a checkpoint saves them."""
        for name, weight in self._weights.items():
            window = self.window
            for slot in representative(len(window)):
                self._copy_to_host(name, weight, slot, window[slot])

    def tensors(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return the masters [E, …] by weight and the states by `<field>.<weight>`; call `update_masters` first."""
        states = {f"{field}.{name}": state[field] for name, state in self._states.items() for field in state}
        return self.masters, states

    @torch.no_grad()
    def restore(self, masters: dict[str, Tensor], states: dict[str, Tensor], numbers: dict[str, Any] | None) -> None:
        """Load masters and states in natural order, and the position in the schedule.

        states: empty where only weights are loaded.  numbers: what `numbers` returned; None starts the schedule anew.
        """
        for name, master in self.masters.items():
            master.copy_(masters[name])
        for name, state in self._states.items():
            for field, tensor in state.items():
                if f"{field}.{name}" in states:
                    tensor.copy_(states[f"{field}.{name}"].view(tensor.shape))
        if numbers is not None:
            self.interval, self.slots = numbers["interval"], list(numbers["slots"])
        self._fill()

    def accepts(self, numbers: object) -> bool:
        """Say whether `numbers` fit this model; None does, it starts the schedule anew."""
        if not isinstance(numbers, dict):
            return numbers is None
        interval, slots = numbers.get("interval"), numbers.get("slots")
        if not isinstance(interval, int) or interval < 0 or not isinstance(slots, list):
            return False
        return all(isinstance(slot, int) for slot in slots) and sorted(slots) == list(range(self.experts))

    def numbers(self) -> dict[str, Any]:
        """Return the position in the schedule, as plain values."""
        return {"interval": self.interval, "slots": self.slots}

    def bytes_on(self) -> tuple[int, int]:
        """Return the bytes that experts and their states take on the card and in host memory."""
        weights = list(self._weights.values())
        states = [tensor for weight in weights for tensor in self._optimizer.state_of(weight).values()]
        copies_bytes = sum(bytes_of(*parts_of(idle)) for _, _, idle in self._stacks())
        host = [*self.masters.values(), *(tensor for state in self._states.values() for tensor in state.values())]
        (host if self._optimizer.is_on_host else weights).extend(states)
        return copies_bytes + sum(tensor.nbytes for tensor in weights), sum(tensor.nbytes for tensor in host)

    @contextmanager
    def reading_masters(self) -> Iterator[None]:
        """Use the masters of the idle experts inside this context; they are copied to the card layer by layer."""
        layers = dict(zip(self._model.moe_layers(), self._names(), strict=True))
        for layer, names in layers.items():
            layer.read_masters = functools.partial(self._read_masters, names)
        try:
            yield
        finally:
            for layer in layers:
                layer.read_masters = None

    def _read_masters(self, names: tuple[str, str]) -> tuple[Stack, Stack]:
        idle = sorted(
            (expert for expert in range(self.experts) if self.slots[expert] >= self._config.window),
            key=lambda expert: self.slots[expert],
        )
        gate_up, down = (self.masters[n][idle].to(self._weights[n].device) for n in names)
        return gate_up, down

    def _names(self) -> list[tuple[str, str]]:
        names = list(self._weights)
        return [(gate_up, down) for gate_up, down in zip(names[::2], names[1::2], strict=True)]

    def _stacks(self) -> Iterator[tuple[str, Tensor, Stack]]:
        """Yield each stack's name, its weight and its copies."""
        layer: MoeFfn
        for layer, names in zip(self._model.moe_layers(), self._names(), strict=True):
            for name, idle in zip(names, layer.idle(), strict=True):
                yield name, self._weights[name], idle

    def _host_stack(self, tensor: Tensor) -> Tensor:
        """Return host memory for all experts, of the kind that a tensor holds for the window's experts."""
        shape = (tensor.shape[0] // self._config.window * self.experts, *tensor.shape[1:])
        return empty_on_host(shape, tensor.dtype, tensor.device)

    def _pairs(self, name: str, weight: Tensor, slot: int, expert: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield each tensor of an expert twice: on the card and in host memory."""
        yield weight[slot], self.masters[name][expert]
        size = weight[0].numel()
        on_card, on_host = (
            part_of(state, number, size)
            for state, number in ((self._optimizer.state_of(weight), slot), (self._states[name], expert))
        )
        yield from ((on_card[field], on_host[field]) for field in on_host)

    def _copy_to_host(self, name: str, weight: Tensor, slot: int, expert: int) -> None:
        for on_card, on_host in self._pairs(name, weight, slot, expert):
            on_host.copy_(on_card)

    def _copy_to_card(self, name: str, weight: Tensor, slot: int, expert: int) -> None:
        for on_card, on_host in self._pairs(name, weight, slot, expert):
            on_card.copy_(on_host)

    def _fill(self) -> None:
        """Make the card's weights, states and copies from the masters and states in host memory."""
        for name, weight, idle in self._stacks():
            for expert, slot in enumerate(self.slots):
                if slot < self._config.window:
                    self._copy_to_card(name, weight, slot, expert)
                else:
                    # Quantised on the card, as in `rotate_to`: that gives the same bits, and is fast.
                    write_copy_(idle, slot - self._config.window, self.masters[name][expert].to(weight.device))
        self._publish_slots()

    def _publish_slots(self) -> None:
        """Tell the layers and the optimizer which expert is in which slot."""
        for layer in self._model.moe_layers():
            layer.place_experts(self.slots)
        for weight in self._weights.values():
            self._optimizer.experts[weight] = self.window
