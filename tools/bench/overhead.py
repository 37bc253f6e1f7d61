"""Measures what a run costs beside its steps: events, guards, logs, lock, signals and the live line, together.

python tools/bench/overhead.py [--dim 256] [--layers 6] [--tokens 256] [--pairs 150] [--steps 2]

Two runs of one configuration are prepared as `lowvram train` prepares them.  Of one only the step functions are called
("bare"); the other goes the whole way of the command, with its live line on a terminal that another process reads.
Blocks of steps alternate, bare first and full first in turn, so that a busy machine slows both.  Compared are CPU
seconds of the main thread, which computes the steps.  What the other threads of a run take (the live line, guards) is
given as a share of the wall, since they work by the clock and not by the step, and added.  No block saves, validates or
samples.  In the end both runs must have the same weights.  Needs Linux, which tells the time of each thread.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

os.environ["OMP_NUM_THREADS"] = "1"  # read when torch is imported, as is the next one, which `lowvram train` sets
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from lowvram.config.run import RunConfig
from lowvram.finish import finish
from lowvram.train.events import StepDone
from lowvram.train.schedule import learning_rate
from tests.tiny import prepare_home, unequal
from tools.bench.reading_model import describe_machine

if TYPE_CHECKING:
    from lowvram.api.training import TrainingRun
    from lowvram.cli.progress import TrainingScreen
    from lowvram.train.trainer import Trainer

RESAMPLES = 2_000


class Times(NamedTuple):
    """What a block of steps took: the main thread's CPU seconds, those of the other threads, and the wall's."""

    main_s: float
    others_s: float
    wall_s: float


def connect_terminal() -> None:
    """Connect the error output to a terminal of 100 columns that another process reads and forgets."""
    import fcntl
    import pty
    import struct
    import termios

    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0))
    subprocess.Popen(["cat"], stdin=leader, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    os.close(leader)
    os.dup2(follower, 2)
    os.environ.setdefault("TERM", "xterm-256color")


def configure(home: Path, name: str, options: argparse.Namespace) -> RunConfig:
    """Return the configuration of a run that neither saves, validates nor samples within the measurement."""
    steps = 2 + 2 * options.pairs * options.steps
    heads = options.dim // 32
    return RunConfig.model_validate(
        {
            "model": {
                "layers": options.layers,
                "dim": options.dim,
                "vocabulary": 400,
                "attention": {"kind": "gqa", "heads": heads, "kv_heads": heads, "head_dim": 32},
                "ffn": {"kind": "swiglu", "hidden": 4 * options.dim},
            },
            "data": {"train": home / "shards/train", "tokenizer": home / "tok"},
            "train": {
                "tokens": steps * options.tokens,
                "seq_len": 128,
                "batch_tokens": options.tokens,
                "precision": "fp32",
            },
            "run": {"dir": home / name, "save_every_minutes": 1e6, "sample_every": 10**6, "prompts": ()},
        }
    )


def step_barely(trainer: Trainer, steps: int) -> Times:
    """Make steps by the trainer's step functions alone, and read each one's numbers; returns what they took."""
    train, state = trainer.config.train, trainer.state
    began = now()
    for _ in range(steps):
        sums = trainer.sum_gradients(range(trainer.plan.accumulate))
        trainer.finish(sums, learning_rate(train, state.step)).tolist()
        state.step, state.tokens = state.step + 1, state.tokens + train.batch_tokens
    return since(began)


def step_fully(run: TrainingRun, screen: TrainingScreen, steps: int) -> Times:
    """Make steps as `lowvram train` does, shown on the screen; returns what they took."""
    from lowvram.api.tasks import Notice

    began, done = now(), 0
    while done < steps:
        event = next(run)
        if isinstance(event, Notice):
            continue
        screen.show(event)
        done += isinstance(event, StepDone)
    return since(began)


def now() -> Times:
    """Return the seconds of the threads and of the wall until now."""
    others = [thread.ident for thread in threading.enumerate() if thread is not threading.main_thread()]
    clocks = [time.pthread_getcpuclockid(each) for each in others if each is not None]
    return Times(time.thread_time(), sum(map(time.clock_gettime, clocks)), time.perf_counter())


def since(began: Times) -> Times:
    """Return what passed since then."""
    end = now()
    return Times(end.main_s - began.main_s, end.others_s - began.others_s, end.wall_s - began.wall_s)


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Return the 95 % interval of the median, by bootstrap."""
    draw = random.Random(0)
    medians = sorted(statistics.median(draw.choices(values, k=len(values))) for _ in range(RESAMPLES))
    return medians[RESAMPLES // 40], medians[-RESAMPLES // 40]


def measure(home: Path, options: argparse.Namespace) -> tuple[list[Times], list[Times]]:
    """Return what each block of bare and of full steps took, in pairs."""
    from lowvram.api.training import TrainingRun, prepare_run
    from lowvram.cli.progress import TrainingScreen
    from lowvram.cli.train import _stop_on_signal

    plain = finish(prepare_run(configure(home, "bare", options), "cpu"))
    prepared = finish(prepare_run(configure(home, "full", options), "cpu"))
    bare, full = list[Times](), list[Times]()
    with plain.resources, TrainingRun(prepared) as run, _stop_on_signal(run), TrainingScreen(run.trainer) as screen:
        # The first step makes the optimizer's states, and reserves room for a save.
        step_barely(plain.trainer, 2)
        step_fully(run, screen, 2)
        for pair in range(options.pairs):
            for is_full in (pair % 2 == 1, pair % 2 == 0):
                if is_full:
                    full.append(step_fully(run, screen, options.steps))
                else:
                    bare.append(step_barely(plain.trainer, options.steps))
        one, other = plain.trainer.state.tensors()[0], run.trainer.state.tensors()[0]
        assert not unequal(one, other), "both must have done the same work"
    return bare, full


def main() -> None:
    """Read the options and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--tokens", type=int, default=256, help="of a step")
    parser.add_argument("--pairs", type=int, default=150)
    parser.add_argument("--steps", type=int, default=2, help="of a block")
    options = parser.parse_args()
    connect_terminal()
    torch.set_num_threads(1)
    print(describe_machine())
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        prepare_home(home)
        bare, full = measure(home, options)
    print(f"{options.layers} x {options.dim}, {options.tokens} tokens a step, {options.pairs} pairs of {options.steps}")
    each_ms = 1e3 * statistics.median(times.main_s for times in bare) / options.steps
    more = [other.main_s / one.main_s - 1 for one, other in zip(bare, full, strict=True)]
    more_ms = 1e3 * statistics.median(b.main_s - a.main_s for a, b in zip(bare, full, strict=True)) / options.steps
    both = [*bare, *full]  # the other threads of the full run go on while the bare one steps
    beside = sum(times.others_s for times in both) / sum(times.wall_s for times in both)
    (low, high), middle = interval(more), statistics.median(more)
    stretch = sum(times.wall_s for times in bare) / sum(times.main_s for times in bare)
    print(f"a bare step {each_ms:.2f} ms of the main thread, on the wall {stretch:.1f} times as much")
    print(f"main thread {more_ms:+.2f} ms a step, {middle:+.2%} ({low:+.2%} to {high:+.2%})")
    print(f"other threads {beside:.2%} of a core")
    print(f"together {middle + beside:+.2%} ({low + beside:+.2%} to {high + beside:+.2%})")


if __name__ == "__main__":
    main()
