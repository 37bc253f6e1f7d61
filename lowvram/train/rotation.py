"""Experts that take turns: which learn now, and how they come to the card and leave it; knows no loop and no file.

A layer has E experts, of which the W of the window are weights with gradients and optimizer states on the card, in the
first W slots.  The others answer from low-precision copies.  In the computer's memory lie the masters and states of
all E, in natural order; those of the window are older than the card's until `bring_home`.  After `interval` steps the
window moves on by W, so that all experts learn equally often.

Everything is a function of the interval's number: a run that goes on in the middle of one goes on to the same bits.
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
from lowvram.train.optim import LeanOptimizer, State, part_of


class ExpertRotation:
    """The experts of a model's layers and their states, on the card and in the computer's memory.

    slots: where each expert lies; the window's are below W.  interval: the number of the one that is going on.
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
                what: self._host_stack(tensor).zero_() for what, tensor in optimizer.state_of(weight).items()
            }
            if seed is not None:
                draw_(self.masters[name], name, seed, model.config)
        if seed is not None:
            self._fill()

    @property
    def window(self) -> list[int]:
        """Which expert lies in each of the first W slots."""
        return [self.slots.index(slot) for slot in range(self._config.window)]

    def interval_of(self, step: int) -> int:
        """Return the number of the interval that step number `step`, counted from 0, belongs to."""
        return step // self._config.interval

    def window_in(self, interval: int) -> set[int]:
        """Return the experts that learn in an interval."""
        first = interval * self._config.window
        return {(first + turn) % self.experts for turn in range(self._config.window)}

    @torch.no_grad()
    def rotate_to(self, interval: int) -> None:
        """Let the experts of an interval learn: those that leave go home and stay as copies, those that come are read.

        Copies go in place, one matrix after the other, so that no pointer changes and nothing large is allocated.
        """
        coming = sorted(self.window_in(interval) - set(self.window))
        leaving = sorted(set(self.window) - self.window_in(interval))
        self.interval = interval
        for turn in representative(len(coming)):
            old, new = leaving[turn], coming[turn]
            slot, place = self.slots[old], self.slots[new]
            for name, weight, idle in self._stacks():
                self._send_home(name, weight, slot, old)
                write_copy_(idle, place - self._config.window, weight[slot])
                self._fetch(name, weight, slot, new)
            self.slots[old], self.slots[new] = place, slot
        self._settle()

    @torch.no_grad()
    def bring_home(self) -> None:
        """Make the masters and states in the computer's memory those of all experts, as a checkpoint holds them."""
        for name, weight in self._weights.items():
            window = self.window
            for slot in representative(len(window)):
                self._send_home(name, weight, slot, window[slot])

    def tensors(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return the masters [E, …] by weight and the states by `<what>.<weight>`, after `bring_home`."""
        states = {f"{what}.{name}": state[what] for name, state in self._states.items() for what in state}
        return self.masters, states

    @torch.no_grad()
    def restore(self, masters: dict[str, Tensor], states: dict[str, Tensor], numbers: dict[str, Any] | None) -> None:
        """Take over masters and states in natural order, and which experts were learning.

        states: empty where only weights are taken over.  numbers: what `numbers` returned; None begins anew.
        """
        for name, master in self.masters.items():
            master.copy_(masters[name])
        for name, state in self._states.items():
            for what, tensor in state.items():
                if f"{what}.{name}" in states:
                    tensor.copy_(states[f"{what}.{name}"].view(tensor.shape))
        if numbers is not None:
            self.interval, self.slots = numbers["interval"], list(numbers["slots"])
        self._fill()

    def accepts(self, numbers: object) -> bool:
        """Say whether `numbers` are of this model, or None, which begins anew."""
        if not isinstance(numbers, dict):
            return numbers is None
        interval, slots = numbers.get("interval"), numbers.get("slots")
        if not isinstance(interval, int) or interval < 0 or not isinstance(slots, list):
            return False
        return all(isinstance(slot, int) for slot in slots) and sorted(slots) == list(range(self.experts))

    def numbers(self) -> dict[str, Any]:
        """Return the schedule's place, as plain values."""
        return {"interval": self.interval, "slots": self.slots}

    def bytes_on(self) -> tuple[int, int]:
        """Return what experts and their states take on the card and in the computer's memory."""
        weights = list(self._weights.values())
        states = [tensor for weight in weights for tensor in self._optimizer.state_of(weight).values()]
        copies_bytes = sum(bytes_of(*parts_of(idle)) for _, _, idle in self._stacks())
        host = [*self.masters.values(), *(tensor for state in self._states.values() for tensor in state.values())]
        (host if self._optimizer.is_on_host else weights).extend(states)
        return copies_bytes + sum(tensor.nbytes for tensor in weights), sum(tensor.nbytes for tensor in host)

    @contextmanager
    def reading_masters(self) -> Iterator[None]:
        """Let the idle experts answer from their masters inside, which come to the card layer by layer."""
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
        """Return memory for all experts of what a tensor holds for the window's."""
        shape = (tensor.shape[0] // self._config.window * self.experts, *tensor.shape[1:])
        return empty_on_host(shape, tensor.dtype, tensor.device)

    def _homes(self, name: str, weight: Tensor, slot: int, expert: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield each tensor of an expert: where it lies on the card, and where at home."""
        yield weight[slot], self.masters[name][expert]
        size = weight[0].numel()
        here, home = (
            part_of(state, number, size)
            for state, number in ((self._optimizer.state_of(weight), slot), (self._states[name], expert))
        )
        yield from ((here[what], home[what]) for what in home)

    def _send_home(self, name: str, weight: Tensor, slot: int, expert: int) -> None:
        for here, home in self._homes(name, weight, slot, expert):
            home.copy_(here)

    def _fetch(self, name: str, weight: Tensor, slot: int, expert: int) -> None:
        for here, home in self._homes(name, weight, slot, expert):
            here.copy_(home)

    def _fill(self) -> None:
        """Make the card's weights, states and copies out of what lies at home."""
        for name, weight, idle in self._stacks():
            for expert, slot in enumerate(self.slots):
                if slot < self._config.window:
                    self._fetch(name, weight, slot, expert)
                else:
                    # On the card, as when it rotates: the same bits, and fast.
                    write_copy_(idle, slot - self._config.window, self.masters[name][expert].to(weight.device))
        self._settle()

    def _settle(self) -> None:
        for layer in self._model.moe_layers():
            layer.place_experts(self.slots)
        for weight in self._weights.values():
            self._optimizer.experts[weight] = self.window
