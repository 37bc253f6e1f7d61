"""Times real micro-batches on this machine, to find its rates and what share of them a step reaches; stores nothing.

Small loads in the model's shapes and precision give the rates of matrix products and of attention.  The rest of a real
micro-batch's time is attributed to memory traffic.  What these rates do not explain becomes a ratio, so that the step
that was timed is predicted exactly.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import math
import statistics
import time
from collections.abc import Callable

import torch
from lowvram_kernels.attention.sdpa import attention
from lowvram_kernels.dispatch import Card, card_of, simulate_card
from lowvram_kernels.matmul.quant_linear import along_rows, forward
from torch import Tensor

from lowvram.config.model import ModelConfig
from lowvram.config.plan import Plan
from lowvram.config.train import TrainConfig
from lowvram.errors import MachineError
from lowvram.fit.memory_curve import Work
from lowvram.fit.rehearse import LiveStorage, rehearse
from lowvram.fit.throughput import Calibration, Rates, hidden_bytes, launch_seconds, product_seconds, work_seconds
from lowvram.hardware.profile import Profile
from lowvram.model.transformer import Transformer
from lowvram.objective import DTYPES, MATMUL_FORMATS, Batch, Loss, count_targets
from lowvram.train.compilation import compiled
from lowvram.train.oom import free_memory, is_out_of_memory
from lowvram.train.optim import LeanOptimizer
from lowvram.train.state import build_state
from lowvram.train.step import discard, gradients, loss_for, update

Clock = Callable[[], float]
_LEAST_REPEATS, _MOST_REPEATS = 3, 10
_BUDGET_S = 4.0  # the time for all repeats of a run
_LOAD_S = 0.05  # a load is repeated for so long that a clock of 1 µs and a synchronisation do not matter
_TINY_TOKENS = 8  # a sequence with so little work that only its launches take time
_LOAD_LENGTH = 1_024  # tokens from which on attention's rate hardly rises: on CPU 512 reach 0.75 of it
_SLOWEST_BYTES = (
    0.2  # the least share of an elementwise load's rate: a slower step has other causes than memory traffic
)
_HIDDEN = 1.1  # a micro-batch that takes less than this many times its launches is bound by them
_GRADIENT = 1e-4  # the gradient of every weight where only an update is timed


@dataclasses.dataclass
class _Bench:
    """A real model on a device, and the clock that times it."""

    network: Transformer
    optimizer: LeanOptimizer
    loss_of: Callable[[Batch], Loss]
    accumulates: bool
    device: torch.device
    clock: Clock

    def batch(self, sequences: int, tokens: int) -> Batch:
        vocabulary = self.network.config.vocabulary
        token_BT = torch.randint(0, vocabulary, (sequences, tokens + 1), device=self.device)
        return Batch(token_BT, torch.arange(sequences, device=self.device))

    def micro_seconds(self, batch: Batch) -> float:
        """Time one micro-batch; where a step has several, one whose gradients are added to existing ones."""

        def prepare() -> None:
            if not self.accumulates:
                discard(self.optimizer)

        run = functools.partial(gradients, self.network, self.loss_of, [batch], count_targets(batch))
        return _median_seconds(run, self.device, self.clock, prepare)

    def update_seconds(self, batch: Batch) -> float:
        loads = gradients(self.network, self.loss_of, [batch], count_targets(batch)).loads

        def prepare() -> None:
            for weight in self.network.parameters():
                weight.grad = torch.full_like(weight, _GRADIENT)

        run = functools.partial(update, self.network, self.optimizer, loads, 1e-6, 0.5)
        return _median_seconds(run, self.device, self.clock, prepare)


def measure(
    timed: str,
    model: ModelConfig,
    train: TrainConfig,
    plan: Plan,
    device: torch.device,
    profile: Profile,
    *,
    micro_batch: int | None = None,
    compiles: bool | None = None,
    clock: Clock = time.perf_counter,
) -> Calibration:
    """Time a few micro-batches and updates of random tokens, and return this machine's rates.

    timed: the configuration's name, stored for people to read.  micro_batch: sequences at a time, a divisor of the
    step's; None takes the plan's, and on a CPU one, since its rate does not rise with more.  compiles: whether compiled
    blocks are timed too; None times them on CUDA only, as training does.  clock: returns seconds; another clock makes
    comparisons possible while other programs run.
    Takes some 10 to 40 s for a small preset; all of its memory is free afterwards.
    Raises torch's own error where memory runs out.
    """
    count = micro_batch or (1 if device.type == "cpu" else plan.micro_batch)
    plan = plan.model_copy(update={"micro_batch": count, "accumulate": train.batch_samples // count, "compile": False})
    card = card_of(device)
    rehearsal = rehearse(model, train, plan, card)
    held_bytes = _reset_peak(device)
    bench = _build(model, train, plan, device, clock)
    batch = bench.batch(count, train.seq_len)
    micro_s, update_s = bench.micro_seconds(batch), bench.update_seconds(batch)
    peak_bytes = torch.cuda.max_memory_allocated(device) - held_bytes if device.type == "cuda" else None
    compiles = device.type == "cuda" if compiles is None else compiles
    compiled_s = _compiled_seconds(bench, batch) if compiles else None
    launch_s = launch_seconds(card.platform)
    if device.type != "cpu":
        launch_s = bench.micro_seconds(bench.batch(1, min(_TINY_TOKENS, train.seq_len))) / rehearsal.micro.ops
    del bench, batch
    free_memory(device)
    loads = _time_loads(model, train, count, card, device, clock)._replace(launch_s=launch_s)
    rates = _explain_rest(rehearsal.micro, micro_s, loads, card.platform)
    return Calibration(
        profile_id=profile.id,
        precision=train.precision,
        timed=timed,
        micro=rehearsal.micro,
        update=rehearsal.update,
        **rates._asdict(),
        micro_ratio=micro_s / work_seconds(rehearsal.micro, rates, card.platform),
        update_ratio=update_s / work_seconds(rehearsal.update, rates, card.platform),
        compiled_ratio=compiled_s / micro_s if compiled_s is not None else None,
        ledger_bytes=rehearsal.ledger.peak_bytes,
        peak_bytes=peak_bytes,
        torch=torch.__version__,
        threads=torch.get_num_threads(),
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    )


def _build(model: ModelConfig, train: TrainConfig, plan: Plan, device: torch.device, clock: Clock) -> _Bench:
    state = build_state(model, train, plan, device, train.seed)
    loss_of = loss_for(state.model, train, plan)
    return _Bench(state.model, state.optimizer, loss_of, plan.accumulate > 1, device, clock)


def _compiled_seconds(bench: _Bench, batch: Batch) -> float | None:
    try:
        with compiled(bench.network):
            return bench.micro_seconds(batch)
    except MachineError:
        return None  # `lowvram train`, which compiles on trial too, prints the reason
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return None


def _explain_rest(work: Work, seconds: float, rates: Rates, platform: str) -> Rates:
    """Return the rates, with bytes_per_s chosen (within bounds) so that they add up to a real micro-batch's seconds.

    An elementwise load alone is faster than the passes of a step, which allocate, read with strides and accumulate.
    """
    launching_s = work.ops * rates.launch_s
    if platform != "cpu" and seconds < _HIDDEN * launching_s:
        return rates  # the card waits for its host, so this time says nothing about the card
    products_s = product_seconds(work, rates, platform) + work.attention_flops / rates.attention_flops_per_s
    rest_s = seconds - products_s - (launching_s if platform == "cpu" else 0.0)
    slowest, fastest = rates.bytes_per_s * _SLOWEST_BYTES, rates.bytes_per_s
    implied = (work.moved_bytes - hidden_bytes(work, platform)) / rest_s if rest_s > 0.0 else fastest
    return rates._replace(bytes_per_s=min(fastest, max(slowest, implied)))


def _time_loads(
    model: ModelConfig,
    train: TrainConfig,
    sequences: int,
    card: Card,
    device: torch.device,
    clock: Clock,
) -> Rates:
    dtype, tokens = DTYPES[train.precision], sequences * train.seq_len
    heads, head_dim = model.attention.heads, _head_dim(model)
    kv_heads = model.attention.kv_heads if model.attention.kind == "gqa" else heads
    hidden = 2 * model.ffn.hidden

    def product(x: Tensor, weight: Tensor) -> Tensor:
        return x @ weight.mT

    def low_product(x: Tensor, weight: Tensor) -> Tensor:
        matmul_format = MATMUL_FORMATS[train.precision]
        return forward(along_rows(x, matmul_format), weight, matmul_format, dtype)

    def attend(q: Tensor, k: Tensor, v: Tensor, gradient: Tensor) -> object:
        return torch.autograd.grad(attention(q, k, v, head_dim**-0.5, causal=True), (q, k, v), gradient)

    def time_load(load: Callable[..., object], *shapes: tuple[int, ...]) -> tuple[Work, float]:
        needs_gradient = load is attend
        counter = LiveStorage(1)
        with simulate_card(card, counter.add_hidden), counter:
            load(*(torch.empty(shape, dtype=dtype, device="meta", requires_grad=needs_gradient) for shape in shapes))
        work = Work(*(sum(values) for values in zip(*counter.work.values(), strict=True)))
        tensors = [torch.randn(shape, device=device).to(dtype).requires_grad_(needs_gradient) for shape in shapes]
        seconds = _median_seconds(functools.partial(load, *tensors), device, clock, least_s=_LOAD_S)
        return work, seconds

    by_bytes, seconds = time_load(torch.mul, (tokens, hidden), (tokens, hidden))
    bytes_per_s = by_bytes.moved_bytes / seconds

    def rate_of(load: Callable[..., object], operations: Callable[[Work], float], *shapes: tuple[int, ...]) -> float:
        work, seconds = time_load(load, *shapes)
        exposed_s = (work.moved_bytes - hidden_bytes(work, card.platform)) / bytes_per_s
        return operations(work) / max(seconds - exposed_s, seconds / 2)  # caches serve some of the traffic

    operands = ((tokens, model.dim), (hidden, model.dim))
    product_flops_per_s = rate_of(product, lambda work: work.flops, *operands)
    length = max(train.seq_len, _LOAD_LENGTH)
    count = max(1, tokens // length)
    queries, keys = (count, heads, length, head_dim), (count, kv_heads, length, head_dim)
    # 0 where no fused kernel runs: attention's products are then counted with the other products.
    fused_flops_per_s = rate_of(attend, lambda work: work.attention_flops, queries, keys, keys, queries)
    low_flops_per_s = None
    if MATMUL_FORMATS[train.precision] != "plain":
        # 0 where no kernel for 8 bits runs: these products are then counted with the others, too.
        low_flops_per_s = rate_of(low_product, lambda work: work.low_flops, *operands) or None
    free_memory(device)
    return Rates(product_flops_per_s, fused_flops_per_s or product_flops_per_s, bytes_per_s, 0.0, low_flops_per_s)


def _head_dim(model: ModelConfig) -> int:
    return model.attention.head_dim if model.attention.kind == "gqa" else model.attention.query_dim


def _median_seconds(
    run: Callable[[], object],
    device: torch.device,
    clock: Clock,
    prepare: Callable[[], None] = lambda: None,
    least_s: float = 0.0,
) -> float:
    """Return the median seconds of a run, after one run that warms up and is not counted.

    prepare: called before each sample and not timed.  least_s: each sample repeats the run for at least so long, which
    is possible only where nothing needs to be prepared.
    """

    def time_calls(calls: int) -> float:
        prepare()
        _synchronize(device)
        began = clock()
        for _ in range(calls):
            run()
        _synchronize(device)
        return (clock() - began) / calls

    time_calls(1)
    first_s = time_calls(1)
    calls = max(1, math.ceil(least_s / max(first_s, 1e-6)))
    repeats = min(_MOST_REPEATS, max(_LEAST_REPEATS, math.floor(_BUDGET_S / max(first_s * calls, 1e-6))))
    samples = [first_s] if calls == 1 else []
    samples += [time_calls(calls) for _ in range(repeats - len(samples))]
    # A clock with coarse ticks (15 ms on Windows) may measure 0.
    return max(statistics.median(samples), 1e-9)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def _reset_peak(device: torch.device) -> int:
    """Reset the card's peak statistics; returns the bytes that are in use already."""
    if device.type != "cuda":
        return 0
    torch.cuda.reset_peak_memory_stats(device)
    return int(torch.cuda.memory_allocated(device))
