"""Compares a training step with one of transformers' class of the same configuration: time and peak bytes of tensors.

python tools/bench/train.py [--preset tr-25m ismail-512] [--batch 4] [--seq-len 512] [--repeats 5]

Both use the same dtype of weights, the same tokens, one thread, AdamW (fused), clipping to 1 and no recomputation.
Steps alternate, so that a busy machine slows both.  `bf16`: weights and gradients in bf16; theirs keep AdamW's moments
in bf16 too, ours in fp32 (4 bytes a parameter more).  `autocast`: fp32 weights; theirs under torch.autocast, ours with
precision = "bf16".  Times are CPU seconds of this process.
"""

from __future__ import annotations

import argparse
import functools
import gc
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
import transformers

sys.path.insert(0, str(Path(__file__).parents[2]))

from lowvram.config.model import ModelConfig
from lowvram.config.run_file import load_preset
from lowvram.config.train import AdamW
from lowvram.model.transformer import Transformer
from lowvram.objective import Batch, causal_loss
from lowvram.train.optim import build_optimizer
from lowvram.train.step import gradients, update
from tests.kernels.measures import LiveBytes
from tests.model.outside import outside_class

Step = Callable[[], float]


def our_step(config: ModelConfig, dtype: torch.dtype, token_BT: torch.Tensor) -> Step:
    """Return a function that runs one step of lowvram's trainer and returns its loss.

    dtype: of the weights; the step computes in bf16.
    """
    model = Transformer(config).to(dtype)
    optimizer = build_optimizer(model, AdamW())
    batch = Batch(token_BT, torch.arange(token_BT.shape[0]))
    loss_of = functools.partial(causal_loss, model, dtype=torch.bfloat16)
    targets = token_BT.shape[0] * (token_BT.shape[1] - 1)

    def step() -> float:
        result = gradients(model, loss_of, [batch], targets)
        loss, norm, _ = result.stats.tolist()
        update(model, optimizer, result.loads, 1e-4, min(1.0, 1.0 / norm))
        return loss

    return step


def their_step(config: ModelConfig, dtype: torch.dtype, token_BT: torch.Tensor) -> Step:
    """Return a function that runs one step of transformers' class and returns its loss; fp32 runs under autocast."""
    kind, settings = outside_class(config)
    torch.manual_seed(0)
    model = kind(settings).to(dtype).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    # Its loss shifts the labels itself, so it gets one token more and predicts the same number.
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32)

    def step() -> float:
        with autocast:
            loss = model(input_ids=token_BT, labels=token_BT).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step


def count_peak(build: Callable[[], Step]) -> int:
    """Return the peak bytes of tensors while a model is built and takes two steps: weights to activations."""
    gc.collect()
    with LiveBytes() as live:
        step = build()
        step()
        step()
    return live.peak


def compare(name: str, mode: str, batch: int, seq_len: int, repeats: int) -> None:
    """Print one line: CPU seconds a step and peak bytes of both, and the ratios."""
    config, _ = load_preset(name)
    dtype = torch.bfloat16 if mode == "bf16" else torch.float32
    token_BT = torch.randint(0, config.vocabulary, (batch, seq_len + 1), generator=torch.Generator().manual_seed(0))
    builds = [functools.partial(make, config, dtype, token_BT) for make in (our_step, their_step)]
    peaks = [count_peak(build) for build in builds]
    steps = [build() for build in builds]
    losses = [step() for step in steps]
    taken: list[list[float]] = [[], []]
    for _ in range(repeats):
        for step, times in zip(steps, taken, strict=True):
            began = time.process_time()
            step()
            times.append(time.process_time() - began)
    ours, theirs = (statistics.median(times) for times in taken)
    pairs = statistics.median(b / a for a, b in zip(*taken, strict=True))
    print(
        f"{name:12} {mode:9} ours {ours:6.2f} s  theirs {theirs:6.2f} s  {pairs:5.2f} x   "
        f"peak {peaks[0] / 2**20:7.0f} / {peaks[1] / 2**20:7.0f} MiB = {peaks[0] / peaks[1]:.2f}   "
        f"first losses {losses[0]:.3f} {losses[1]:.3f}",
        flush=True,
    )


def describe_processor() -> str:
    """Return the processor's name and its instructions for bf16, on which the figures depend."""
    info = Path("/proc/cpuinfo")
    words = info.read_text(encoding="utf-8") if info.is_file() else ""
    name = next((line.partition(":")[2].strip() for line in words.splitlines() if line.startswith("model name")), "")
    instructions = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if f" {flag} " in f"{words} "]
    return " ".join([name or platform.processor() or platform.machine(), *instructions])


def main() -> None:
    """Read the options and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", nargs="+", default=["tr-25m", "ismail-512"])
    parser.add_argument("--mode", nargs="+", choices=["bf16", "autocast"], default=["bf16", "autocast"])
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(
        f"{datetime.now(UTC):%Y-%m-%d}, {describe_processor()}, {platform.system()}, 1 thread, "
        f"Python {platform.python_version()}, torch "
        f"{torch.__version__}, transformers {transformers.__version__}; {options.batch} x {options.seq_len} tokens, "
        f"median of {options.repeats} alternating steps"
    )
    for name in options.preset:
        for mode in options.mode:
            compare(name, mode, options.batch, options.seq_len, options.repeats)


if __name__ == "__main__":
    main()
