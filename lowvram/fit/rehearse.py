"""Replays a training step on meta tensors and adds up every allocation and all work; knows no limit.

Nothing is estimated: the trainer's own code runs, and every tensor of the step exists as a meta tensor without bytes
(fake tensors give the same result and take 2.7 times as long).  Only what PyTorch cannot know (context, workspace,
fragmentation) is missing here; it is in the card's profile.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lowvram_kernels.dispatch import Card, HiddenWork, simulate_card, work_multiplier
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lowvram.config.model import ModelConfig
from lowvram.config.plan import LEDGER_LINES, Ledger, Plan
from lowvram.config.train import TrainConfig
from lowvram.fit.ledgers import CardPath
from lowvram.fit.memory_curve import Rehearsal, Work
from lowvram.fit.op_work import attention_flops, bytes_moved, is_free, products_of, tensors_in
from lowvram.hardware.profile import Profile
from lowvram.model.transformer import Transformer
from lowvram.objective import Batch, Loss, count_targets
from lowvram.train.cuda_graph import SPARE_BYTES
from lowvram.train.loss_scale import LossScale
from lowvram.train.optim import LeanOptimizer
from lowvram.train.state import TrainState, build_state
from lowvram.train.step import clip_and_update, gradients, learn_in_backward, loss_for

# The size to whose multiples torch's caching allocator rounds every block (c10/cuda/CUDACachingAllocator,
# kMinBlockSize); the CPU's does not round.  Large blocks that stay unsplit belong to the profile's fragmentation.
BLOCK_BYTES = {"cuda": 512, "mps": 512, "cpu": 1}
_META = torch.device("meta")
# Ops that make one new tensor whose shape and strides torch computes in Python; without a cache of the results that
# takes half of a rehearsal's time.
_SLOW_ON_META = frozenset(
    (
        torch.ops.aten.linalg_vector_norm.default,
        torch.ops.aten.mul.Tensor,
        torch.ops.aten.add.Tensor,
        torch.ops.aten.sub.Tensor,
        torch.ops.aten.gt.Tensor,
        torch.ops.aten.clamp_min.default,
        torch.ops.aten.neg.default,
        torch.ops.aten.abs.default,
        torch.ops.aten.__rshift__.Scalar,
        torch.ops.aten.bitwise_and.Scalar,
        torch.ops.aten.bitwise_xor.Scalar,
        torch.ops.aten.bitwise_xor.Tensor,
    )
)
# In-place ops on integers: on meta tensors they do nothing.
_WITHOUT_EFFECT_ON_META = frozenset((torch.ops.aten.bitwise_xor_.Tensor, torch.ops.aten.bitwise_and_.Scalar))


class _Lifetime:
    """One storage: its bytes, the phase that allocated it, the moments of allocation and release, card or host."""

    __slots__ = ("born", "died", "is_on_host", "phase", "size")

    def __init__(self, size: int, phase: str, born: int) -> None:
        self.size, self.phase, self.born = size, phase, born
        self.died: int | None = None
        self.is_on_host = False


class LiveStorage(TorchDispatchMode):
    """Records when every storage is allocated and released, and every op's work, under the current phase.

    A moment is the number of allocations and releases so far.
    """

    def __init__(self, block_bytes: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # untyped in torch
        self.phase, self._block_bytes = "weights", block_bytes
        self.moment = 0
        self.phase_of_moment: list[str] = []
        self.lifetimes: list[_Lifetime] = []
        self.work: dict[str, list[float]] = {}
        self._forms: dict[Any, Any] = {}
        self._alive: dict[int, tuple[weakref.ref[Any], _Lifetime]] = {}
        self._reported = 0  # how often `add_hidden` was called

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        reported = self._reported
        if func in _WITHOUT_EFFECT_ON_META and args[0].is_meta:
            result = args[0]
        elif func in _SLOW_ON_META:
            result = self._call_cached(func, args, kwargs)
        else:
            result = func(*args, **(kwargs or {}))
        outputs = list(tensors_in(result))
        if self._reported == reported:  # otherwise the op launched a kernel of ours and reported its work itself
            self._add_work(func, args, kwargs, outputs)
        for tensor in outputs:
            self._track(tensor.untyped_storage())
        return result

    def _call_cached(self, func: Any, args: Any, kwargs: Any) -> Tensor:
        """Return a tensor as the op made it before for arguments of the same shapes, strides and dtypes, or call it."""
        parts = (*args, *(kwargs or {}).items())
        if not all(part.is_meta for part in parts if isinstance(part, Tensor)):
            return func(*args, **(kwargs or {}))  # a table of positions on its way to the card: its values matter
        key = (
            func,
            *((part.shape, part.stride(), part.dtype) if isinstance(part, Tensor) else str(part) for part in parts),
        )
        form = self._forms.get(key)
        if form is None:
            result: Tensor = func(*args, **(kwargs or {}))
            self._forms[key] = (result.shape, result.stride(), result.dtype)
            return result
        return torch.empty_strided(form[0], form[1], dtype=form[2], device=_META)

    def mark_host(self, tensor: Tensor) -> None:
        """Note that a tensor is in host memory."""
        self._track(tensor.untyped_storage())
        lifetime = self.lifetime_of(tensor)
        lifetime.is_on_host = True
        lifetime.size = tensor.untyped_storage().nbytes()  # the host's allocator does not round

    def lifetime_of(self, tensor: Tensor) -> _Lifetime:
        """Return the record of a tensor's storage."""
        return self._alive[tensor.untyped_storage()._cdata][1]

    def alive_bytes(self) -> int:
        """Return the bytes that are allocated on the card now."""
        return sum(lifetime.size for lifetime in self.lifetimes if lifetime.died is None and not lifetime.is_on_host)

    def find_peak(self, since: int = 0, phases: Container[str] | None = None) -> tuple[int, int]:
        """Return the most bytes allocated at once on the card from moment `since` on, and the first moment of that.

        phases: count only what these have allocated.
        """
        change = [0] * (self.moment + 2)
        for lifetime in self.lifetimes:
            if not lifetime.is_on_host and (phases is None or lifetime.phase in phases):
                change[lifetime.born] += lifetime.size
                change[self.moment + 1 if lifetime.died is None else lifetime.died] -= lifetime.size
        now = peak = moment = 0
        for index in range(self.moment + 1):
            now += change[index]
            if now > peak and index >= since:
                peak, moment = now, index
        return peak, moment

    def _track(self, storage: torch.UntypedStorage) -> None:
        address = storage._cdata
        if address in self._alive:
            return
        size = -(-storage.nbytes() // self._block_bytes) * self._block_bytes
        lifetime = _Lifetime(size, self.phase, self._tick())
        self.lifetimes.append(lifetime)

        def died(_: object) -> None:
            del self._alive[address]
            lifetime.died = self._tick()

        self._alive[address] = (weakref.ref(storage, died), lifetime)

    def _tick(self) -> int:
        self.phase_of_moment.append(self.phase)
        self.moment += 1
        return self.moment - 1

    def _add_work(self, func: Any, args: Any, kwargs: Any, outputs: list[Tensor]) -> None:
        inputs = [*tensors_in(args), *tensors_in(kwargs.values() if kwargs else ())]
        if is_free(func, inputs, outputs):
            return
        name = func._schema.name.partition("::")[2]
        flops, launches, operand_bytes = products_of(name, inputs, outputs)
        moved = bytes_moved(func, args, kwargs, outputs)
        if any(self._lies_on_host(tensor) for tensor in inputs):
            self._add(Work(0.0, 0.0, launches, host_bytes=moved / 2))  # read on one side, written on the other
            return
        self._add(Work(flops, moved, launches, attention_flops(name, inputs), operand_bytes=operand_bytes))

    def _lies_on_host(self, tensor: Tensor) -> bool:
        entry = self._alive.get(tensor.untyped_storage()._cdata)
        return entry is not None and entry[1].is_on_host

    def add_hidden(self, work: HiddenWork) -> None:
        """Count the work of a kernel that does not run on meta tensors."""
        self._reported += 1
        launched = Work(work.product_flops, work.moved_bytes, work.ops, work.flops)
        others = {name: getattr(work, name) for name in ("low_flops", "operand_bytes", "grouped_flops")}
        self._add(launched._replace(**others))

    def _add(self, part: Work) -> None:
        total = self.work.setdefault(self.phase, [0.0] * len(Work._fields))
        times = work_multiplier()
        self.work[self.phase] = [old + times * new for old, new in zip(total, part, strict=True)]


def imagine(where: Profile | CardPath) -> Card:
    """Return the card that a rehearsal simulates, so that ops choose the kernels that they would launch on it."""
    known = where.multiprocessors if isinstance(where, Profile) else None
    return Card(
        where.platform,
        where.capability,
        has_flash=where.attention == "flash",
        multiprocessors=known or Card._field_defaults["multiprocessors"],
    )


def rehearse(model: ModelConfig, train: TrainConfig, plan: Plan, card: Card) -> Rehearsal:
    """Run one training step on meta tensors and return its ledger and its work.

    One micro-batch stands for all: if plan.accumulate is above 1 its gradients are added to existing ones, as in every
    micro-batch after the first.  The optimizer's states exist from the beginning, as in every later step.
    """
    counter = LiveStorage(BLOCK_BYTES[card.platform])
    # On Apple chips and processors card and host share one memory, so offloading would move nothing.
    if card.platform == "cuda":
        simulated = simulate_card(card, counter.add_hidden, counter.mark_host)
    else:
        simulated = simulate_card(card, counter.add_hidden)
    with simulated, counter:
        state = build_state(model, train, plan, _META, None)
        network, optimizer = state.model, state.optimizer
        counter.phase = "optimizer"
        optimizer.make_states()
        for states in optimizer.state.values():  # those of experts that rotate exist already
            for tensor in states.values():
                counter.lifetime_of(tensor).phase = "optimizer"
        counter.phase = "gradients"
        if plan.accumulate > 1:
            for weight in network.parameters():
                weight.grad = torch.empty_like(weight)
        counter.phase = "batch"
        shape = (plan.micro_batch, train.seq_len + 1)
        token_BT = torch.empty(shape, dtype=torch.int64, device=_META)
        # The other sequences of the step are on the card too.
        other_tokens = torch.empty((train.batch_samples - plan.micro_batch, shape[1]), dtype=torch.int64, device=_META)
        batch = Batch(token_BT, torch.arange(plan.micro_batch, device=_META))
        grads, forward_end = _step(state, train, plan, batch, counter)
        counter.phase = "rotation"
        if state.rotation is not None:
            state.rotation.rotate_to(1)
        counter.phase = "save"
        del other_tokens
        ledger = _make_ledger(counter, grads, forward_end, _files(state, counter))
        recorded_bytes = 0
        if card.platform == "cuda" and not train.update_during_backward:
            recorded_bytes = _price_graphs(state, train, plan, batch, counter, grads)
    no_work = [0.0] * len(Work._fields)
    parts = [counter.work[phase] for phase in ("forward", "loss", "backward")]
    micro = Work(*(sum(values) for values in zip(*parts, strict=True)))
    # Experts rotate once in an interval of steps: each step carries its share of that work.
    interval = train.rotation.interval if train.rotation is not None else 1
    rotation_work = (value / interval for value in counter.work.get("rotation", no_work))
    update_work = Work(*(a + b for a, b in zip(counter.work["update"], rotation_work, strict=True)))
    return Rehearsal(ledger, micro, update_work, recorded_bytes)


@torch.no_grad()
def _price_graphs(
    state: TrainState, train: TrainConfig, plan: Plan, batch: Batch, counter: LiveStorage, grads: set[int]
) -> int:
    """Return the bytes that a card must have where passes and update are replayed from CUDA graphs.

    The graphs' memory is that of a micro-batch's passes, or of the update beside all gradients, which stay; neither a
    validation nor a sample can use it.
    """
    counter.phase = "validation"
    loss_for(state.model, train, plan)(batch)
    passes, _ = counter.find_peak(phases=("gradients", "forward", "loss", "backward"))
    update, _ = counter.find_peak(phases=("update",))
    kept = sum(lifetime.size for lifetime in counter.lifetimes if id(lifetime) in grads)
    resting, _ = counter.find_peak(phases=("weights", "optimizer", "batch"))
    inputs, _ = counter.find_peak(phases=("batch",))
    looking, _ = counter.find_peak(phases=("validation",))
    return resting + inputs + max(passes, kept + update) + looking + SPARE_BYTES


def _step(
    state: TrainState, train: TrainConfig, plan: Plan, batch: Batch, counter: LiveStorage
) -> tuple[set[int], int]:
    """Run the trainer's step; returns the ids of the lifetimes of gradients, and the moment when forward ended."""
    network, optimizer, rate = state.model, state.optimizer, train.optimizer.lr
    forward_end = [0]
    loss_of = _mark_backward(loss_for(network, train, plan), counter)
    targets = count_targets(batch)
    grads: set[int] = set()
    if train.update_during_backward:
        with _phases(network, counter, forward_end), _mark_updates(optimizer, counter, grads):
            learn_in_backward(network, loss_of, batch, optimizer, targets, rate, train.clip)
        return grads, forward_end[0]
    with _phases(network, counter, forward_end):
        result = gradients(network, loss_of, [batch], targets)
    grads |= {id(counter.lifetime_of(w.grad)) for w in network.parameters() if w.grad is not None}
    counter.phase = "update"
    loss_scale = LossScale(_META) if train.precision == "fp16" else None
    clip_and_update(network, optimizer, result, rate, train.clip, loss_scale)
    return grads, forward_end[0]


@contextmanager
def _mark_updates(optimizer: LeanOptimizer, counter: LiveStorage, grads: set[int]) -> Iterator[None]:
    """Count updates during backward under the phase "update", and add the lifetimes of gradients to `grads`."""
    step_one = optimizer.step_one

    def marked(weight: Tensor) -> None:
        assert weight.grad is not None, "an update needs a gradient"
        grads.add(id(counter.lifetime_of(weight.grad)))
        before, counter.phase = counter.phase, "update"
        step_one(weight)
        counter.phase = before

    optimizer.step_one = marked  # type: ignore[method-assign]  # until the block ends
    try:
        yield
    finally:
        del optimizer.step_one


def _files(state: TrainState, counter: LiveStorage) -> list[list[_Lifetime]]:
    """Return the lifetimes of the tensors in each of the two files of a checkpoint."""
    return [[counter.lifetime_of(tensor) for tensor in tensors.values()] for tensors in state.tensors()]


@contextmanager
def _phases(network: Transformer, counter: LiveStorage, forward_end: list[int]) -> Iterator[None]:
    def begin(*_: Any) -> None:
        counter.phase = "forward"

    def end(*_: Any) -> None:
        counter.phase = "loss"
        forward_end[0] = counter.moment

    hooks = [network.register_forward_pre_hook(begin), network.register_forward_hook(end)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _mark_backward(loss_of: Callable[[Batch], Loss], counter: LiveStorage) -> Callable[[Batch], Loss]:
    def marked(batch: Batch) -> Loss:
        loss = loss_of(batch)
        counter.phase = "backward"
        return loss

    return marked


def _make_ledger(counter: LiveStorage, grads: set[int], forward_end: int, files: list[list[_Lifetime]]) -> Ledger:
    """Find the moment with the most bytes on the card, and add up what is allocated then by the ledger's lines."""
    end, (peak, moment) = counter.moment, counter.find_peak()
    on_card = [lifetime for lifetime in counter.lifetimes if not lifetime.is_on_host]
    lines = dict.fromkeys(LEDGER_LINES, 0)
    for lifetime in on_card:
        if lifetime.born <= moment < (end + 1 if lifetime.died is None else lifetime.died):
            lines[_line_of(lifetime, id(lifetime) in grads, forward_end)] += lifetime.size
    assert sum(lines.values()) == peak, "every byte of the peak belongs to one line"
    phase = counter.phase_of_moment[moment] if moment < end else "update"
    kept = sum(lifetime.size for lifetime in counter.lifetimes if lifetime.is_on_host and lifetime.died is None)
    saved_at_once = max(sum(lifetime.size for lifetime in file if not lifetime.is_on_host) for file in files)
    written = sum(lifetime.size for file in files for lifetime in file)
    return Ledger(**lines, moment=phase, host_bytes=kept + saved_at_once, kept_on_host=kept, checkpoint_bytes=written)


def _line_of(lifetime: _Lifetime, is_gradient: bool, forward_end: int) -> str:
    if lifetime.phase in ("weights", "optimizer"):
        return lifetime.phase
    if is_gradient or lifetime.phase == "gradients":
        return "gradients"
    if lifetime.phase == "loss":
        return "loss"
    is_kept = lifetime.phase == "forward" and (lifetime.died is None or lifetime.died >= forward_end)
    return "activations" if is_kept else "temporaries"
