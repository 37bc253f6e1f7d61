"""Measures what the light subset of a validation takes: minimal pairs, suffixes and questions, each kind by itself.

python tools/bench/light_subset.py --tokenizer DIR [--pairs FILE] [--suffixes FILE] [--choices FILE]
                                   [--preset tr-25m] [--precision fp32 bf16] [--seq-len 1024] [--micro-batch 4]

The weights are random: the time does not depend on them. A first round, which reads the files, is not counted.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

os.environ["OMP_WAIT_POLICY"] = "PASSIVE"  # read when torch is imported; as `lowvram train` sets it

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from lowvram.config.run import RunOptions
from lowvram.config.run_file import load_preset
from lowvram.data.hf_tokenizer import load_tokenizer
from lowvram.evaluate.scorer import Scorer
from lowvram.model.transformer import Transformer
from lowvram.objective import DTYPES
from lowvram.train.light_subset import measure_light_subset, read_light_subset
from tools.bench.reading_model import describe_machine

KINDS = ("pairs", "suffixes", "choices")


def measure(scorer: Scorer, run: RunOptions) -> tuple[float, float]:
    """Return the seconds and the CPU seconds that the light subset takes."""
    began_s, began_cpu_s = time.perf_counter(), time.process_time()
    measure_light_subset(run, scorer)
    return time.perf_counter() - began_s, time.process_time() - began_cpu_s


def main() -> None:
    """Read the options and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, required=True)
    for kind in KINDS:
        parser.add_argument(f"--{kind}", type=Path)
    parser.add_argument("--preset", default="tr-25m")
    parser.add_argument("--precision", nargs="+", choices=DTYPES, default=["fp32", "bf16"])
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--micro-batch", type=int, default=4, help="windows that a validation reads at once")
    options = parser.parse_args()
    print(describe_machine())
    tokenizer = load_tokenizer(options.tokenizer)
    config = load_preset(options.preset)[0].model_copy(update={"vocabulary": tokenizer.size})
    model, seq_len = Transformer(config), options.seq_len
    for precision in options.precision:
        scorer = Scorer(model, DTYPES[precision], tokenizer, seq_len, batch_tokens=options.micro_batch * seq_len)
        total_s = total_cpu_s = 0.0
        for kind in KINDS:
            if (file := getattr(options, kind)) is None:
                continue
            run = RunOptions.model_validate({"dir": "unused", kind: file})
            asked = read_light_subset(run)
            items = len(asked.pairs) + len(asked.sentences) + len(asked.items)
            measure(scorer, run)
            took_s, took_cpu_s = measure(scorer, run)
            total_s, total_cpu_s = total_s + took_s, total_cpu_s + took_cpu_s
            print(f"{options.preset} {precision} {kind:8} {items:5} items  {took_s:5.1f} s  {took_cpu_s:5.1f} CPU s")
        print(f"{options.preset} {precision} together {total_s:11.1f} s  {total_cpu_s:5.1f} CPU s", flush=True)
    assert not torch.cuda.is_initialized(), "it is measured on the processor"


if __name__ == "__main__":
    main()
