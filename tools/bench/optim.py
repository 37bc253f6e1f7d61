"""Measures the share of Muon's iteration in a training step, in CPU seconds and in FLOPs, beside forward and backward.

python tools/bench/optim.py [--preset tr-25m ismail-512] [--batch 1] [--seq-len 512] [--step-tokens 8192] [--repeats 3]

One micro-batch of batch x seq-len tokens is timed, and its time is multiplied so that it covers the step's tokens.  The
iteration (orthogonalise, for every matrix that Muon updates) runs once a step.  Both are in bf16 on one thread and
alternate, so that a busy machine slows both; figures are medians of this process's CPU seconds.  The rest of an update
is not measured.
"""

from __future__ import annotations

import argparse
import functools
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # read when torch is imported

import torch
from lowvram_kernels.dispatch import Card
from lowvram_kernels.optim.muon import QUINTICS, orthogonalise

sys.path.insert(0, str(Path(__file__).parents[2]))

from lowvram.config.model import ModelConfig
from lowvram.config.plan import Plan
from lowvram.config.run_file import load_preset
from lowvram.config.train import Muon, TrainConfig
from lowvram.fit.rehearse import rehearse
from lowvram.model.transformer import Transformer
from lowvram.objective import Batch, causal_loss
from lowvram.train.optim import build_optimizer
from lowvram.train.step import gradients


def matrices_of(model: Transformer) -> list[tuple[int, int, int]]:
    """Return, for each weight that Muon updates, the number of its matrices, their rows and their columns."""
    matrices = []
    for group in build_optimizer(model, Muon()).param_groups:
        for weight in group["params"] if group["rule"] == "muon" else []:
            rows, columns = group["rows"] or weight.shape[-2], weight.shape[-1]
            matrices.append((weight.numel() // (rows * columns), rows, columns))
    return matrices


def iteration_flops(matrices: list[tuple[int, int, int]], steps: int) -> float:
    """Count the FLOPs of so many iterations: two products with the matrix itself, one of its square with itself."""
    sides = [(count, *sorted((rows, columns))) for count, rows, columns in matrices]
    return float(sum(count * steps * (4 * m * m * n + 2 * m**3) for count, m, n in sides))


def micro_batch_flops(config: ModelConfig, batch: int, seq_len: int) -> float:
    """Count the FLOPs of forward and backward of one micro-batch, as a rehearsal does."""
    tokens = batch * seq_len
    train = TrainConfig(tokens=tokens, seq_len=seq_len, batch_tokens=tokens, precision="bf16")
    work = rehearse(config, train, Plan(micro_batch=batch, accumulate=1), Card("cpu")).micro
    return work.flops + work.attention_flops


def micro_batch_of(model: Transformer, batch: int, seq_len: int) -> Callable[[], object]:
    """Return a function that runs forward and backward of one micro-batch and discards the gradients."""
    token_BT = torch.randint(0, model.embedding.shape[0], (batch, seq_len + 1))
    loss_of = functools.partial(causal_loss, model, dtype=torch.bfloat16)

    def run() -> None:
        gradients(model, loss_of, [Batch(token_BT, torch.arange(batch))], batch * seq_len)
        model.zero_grad(set_to_none=True)

    return run


def alternate(runs: list[Callable[[], object]], repeats: int) -> list[float]:
    """Return each run's median CPU seconds, after one round that is not counted."""
    taken: list[list[float]] = [[] for _ in runs]
    for _ in range(repeats + 1):
        for run, times in zip(runs, taken, strict=True):
            began = time.process_time()
            run()
            times.append(time.process_time() - began)
    return [statistics.median(times[1:]) for times in taken]


def measure(name: str, batch: int, seq_len: int, step_tokens: int, repeats: int) -> None:
    """Print one line for the micro-batch and one for each number of iterations."""
    config, _ = load_preset(name)
    model = Transformer(config).to(torch.bfloat16)
    matrices, times = matrices_of(model), step_tokens / (batch * seq_len)
    u_of = [torch.randn(shape).bfloat16() for shape in matrices]

    def iterate(steps: int) -> None:
        for u_BMN in u_of:
            orthogonalise(u_BMN, steps)

    iterations = [functools.partial(iterate, steps) for steps in QUINTICS]
    micro_s, *iteration_s = alternate([micro_batch_of(model, batch, seq_len), *iterations], repeats)
    flops = micro_batch_flops(config, batch, seq_len)
    print(f"{name}: forward and backward of {step_tokens:,} tokens {micro_s * times:.2f} s, {flops * times:.3g} FLOPs")
    print(f"  timed for {batch * seq_len:,} tokens ({micro_s:.2f} s), scaled linearly by {times:g}")
    for steps, taken_s in zip(QUINTICS, iteration_s, strict=True):
        own = iteration_flops(matrices, steps)
        of_time, of_flops = taken_s / (taken_s + micro_s * times), own / (own + flops * times)
        shares = f"{of_time:6.1%} of the step's CPU seconds, {of_flops:6.1%} of its FLOPs"
        print(f"  {steps} iterations {taken_s:6.2f} s, {own:.3g} FLOPs: {shares}", flush=True)


def main() -> None:
    """Read the options and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", nargs="+", default=["tr-25m"])
    for name, default in (("batch", 1), ("seq-len", 512), ("step-tokens", 8192), ("repeats", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(
        f"{datetime.now(UTC):%Y-%m-%d}, {platform.machine()} {platform.system()}, 1 thread, "
        f"{torch.backends.cpu.get_cpu_capability()}, Python {platform.python_version()}, torch {torch.__version__}; "
        f"{options.batch} x {options.seq_len} tokens a micro-batch, median of {options.repeats} alternating runs"
    )
    for name in options.preset:
        measure(name, options.batch, options.seq_len, options.step_tokens, options.repeats)


if __name__ == "__main__":
    main()
