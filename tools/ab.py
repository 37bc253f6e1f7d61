"""Compares training recipes on one yardstick: some 2 M parameters beside the embedding, 8,192 ids, real Turkish text.

python tools/ab.py adamw8 --arm adamw32 "optimizer.bits=32" --arm adamw8 "optimizer.bits=8"

Every arm is the yardstick with its `--set` values, trained by lowvram's own Trainer with seeds 0, 1, … on one thread.
Each finished run is a line of docs/ab/NAME.jsonl; typed again, the command goes on with what is missing, in the
middle of a run too.  Text, shards and checkpoints lie under --work.
A comparison counts only while every arm reads held-out text better than token bigrams counted on the same shards.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

os.environ["OMP_NUM_THREADS"] = "1"  # read when torch is imported

import torch

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from lowvram.config import RunConfig
from lowvram.data.shards import ShardSet, pack
from lowvram.data.text import documents
from lowvram.data.tokenizer import Tokenizer, train_tokenizer
from lowvram.evaluate.bits_per_byte import bigram_score, score
from lowvram.objective import DTYPES
from lowvram.plan import choose_plan
from lowvram.runfile import load_run
from lowvram.train.events import Started, StepDone
from lowvram.train.prepare import prepare
from lowvram.train.start import lock_run

Row = dict[str, Any]
TEXT = ROOT.parent / "shared/data/text"
VOCABULARY = 8192
POINTS = 20  # of a loss curve
MODELS = {
    "dense": """
attention = { kind = "gqa", heads = 4, kv_heads = 2, head_dim = 48 }
ffn = { kind = "swiglu", hidden = 512 }""",
    "moe": """
attention = { kind = "mla", heads = 4, kv_lora_rank = 64, nope_dim = 32, rope_dim = 16, value_dim = 48 }
ffn = { kind = "moe", hidden = 512, dense_layers = 1, experts = 8, top_k = 2, shared = 1, expert_hidden = 160 }""",
}
RUN_FILE = """
[model]
layers = 5
dim = 192
%s
[data]
train = "shards/train"
tokenizer = "tok"
[train]
tokens = 1_048_576
seq_len = 256
batch_tokens = 2_048
precision = "fp32"
optimizer = { name = "adamw", lr = 6e-3 }
schedule = { kind = "wsd", warmup = 0.05, decay = 0.5 }
[run]
dir = "unnamed"
save_every_minutes = 1.5
keep = 1
prompts = []
"""


class Arm(NamedTuple):
    """A recipe: the yardstick with these `--set` values."""

    name: str
    settings: tuple[str, ...]


def prepare_home(work: Path, train: Sequence[Path], valid: Sequence[Path]) -> Path:
    """Return a folder with tokenizer, shards and nothing else, made once for these texts."""
    content = hashlib.sha256(str(VOCABULARY).encode())
    for path in (*train, *valid):
        content.update(path.read_bytes())
    home = work / f"text-{content.hexdigest()[:10]}"
    if not (home / "tok/tokenizer.json").exists():
        train_tokenizer((text for path in train for text in documents(path)), VOCABULARY, home / "tok")
    tokenizer = Tokenizer.load(home / "tok")
    for name, paths in (("train", train), ("valid", valid)):
        pack(list(paths), tokenizer, home / "shards" / name, processes=1)
    return home


def configure(home: Path, model: str, settings: Sequence[str], seed: int, run: str) -> RunConfig:
    """Lay an arm's settings over the yardstick."""
    run_file = home / f"{model}.toml"
    run_file.write_text(RUN_FILE % MODELS[model], encoding="utf-8")
    sets = [*settings, f"train.seed={seed}", f"run.dir={home / run}"]
    return load_run(run_file, sets, lambda _: VOCABULARY)


def train_once(what: RunConfig, home: Path) -> Row:
    """Train one run to its end, from its last checkpoint if it has one, and return what came out."""
    notes, losses, cpu_s = what.run.dir / "losses.jsonl", {}, 0.0
    with lock_run(what.run.dir):
        trainer = prepare(what, choose_plan(what.train)[0], torch.device("cpu"))
        began = time.process_time()
        for event in trainer.run():
            if isinstance(event, Started) and event.step:
                lines = [json.loads(line) for line in notes.read_text(encoding="utf-8").splitlines()]
                losses = {line["step"]: line["loss"] for line in lines if line["step"] <= event.step}
                cpu_s = next(line["cpu_s"] for line in reversed(lines) if line["step"] == event.step)
            if isinstance(event, StepDone):
                losses[event.step] = event.loss
                taken = cpu_s + time.process_time() - began
                with open(notes, "a", encoding="utf-8") as file:
                    file.write(json.dumps({"step": event.step, "loss": event.loss, "cpu_s": taken}) + "\n")
    cpu_s += time.process_time() - began
    valid = ShardSet.open(home / "shards/valid", trainer.tokenizer.hash)
    dtype = DTYPES[what.train.precision]
    found = score(trainer.state.model, valid, trainer.tokenizer.bos_id, what.train.seq_len, dtype)
    curve = [losses[step] for step in range(1, what.train.steps + 1)]
    spans = [len(curve) * point // POINTS for point in range(POINTS + 1)]
    return {
        "tokens": trainer.state.tokens,
        "steps": len(curve),
        "curve": [round(statistics.fmean(curve[a:b]), 4) for a, b in itertools.pairwise(spans)],
        "final_loss": statistics.fmean(curve[-max(1, len(curve) // 20) :]),
        "valid_loss": found.loss,
        "bits_per_byte": found.bits_per_byte,
        "cpu_s": round(cpu_s, 1),
        "torch": str(torch.__version__),
        "date": time.strftime("%Y-%m-%d"),
    }


def read_rows(path: Path) -> list[Row]:
    """Return the runs that are finished; none where there is no file."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [json.loads(line) for line in lines]


def missing(
    rows: Sequence[Row], arms: Sequence[Arm], base: Sequence[str], model: str, seeds: int
) -> list[tuple[Arm, int]]:
    """Return the runs that are still to be made, seed by seed; a finished one of other settings ends the tool."""
    done = {(row["arm"], row["seed"]): row for row in rows}
    wanted = [(arm, seed) for seed in range(seeds) for arm in arms]
    for arm, seed in wanted:
        row = done.get((arm.name, seed))
        if row and (row["settings"], row["model"]) != ([*base, *arm.settings], model):
            sys.exit(f"{arm.name} was run with {row['settings']} on {row['model']}.  Name this comparison otherwise.")
    return [(arm, seed) for arm, seed in wanted if (arm.name, seed) not in done]


def table(rows: Sequence[Row], arms: Sequence[str]) -> str:
    """Write means and ranges of each arm, and its differences from the first one, seed by seed."""
    by_arm = {arm: {row["seed"]: row for row in rows if row["arm"] == arm} for arm in arms}
    first, lines = by_arm[arms[0]], []
    for arm, runs in by_arm.items():
        lines.append(f"{arm}: {len(runs)} runs, {statistics.fmean(r['cpu_s'] for r in runs.values()):.0f} CPU s each")
        for key in ("final_loss", "valid_loss", "bits_per_byte"):
            values = [run[key] for run in runs.values()]
            mean = statistics.fmean(values)
            line = f"  {key:14} {mean:.4f}  ({min(values):.4f} to {max(values):.4f})"
            pairs = [100 * (runs[seed][key] / first[seed][key] - 1) for seed in runs if seed in first]
            if arm != arms[0] and pairs:
                each = ", ".join(f"{pair:+.2f}" for pair in pairs)
                line += f"  {statistics.fmean(pairs):+.2f} % of {arms[0]}  (seed by seed {each})"
            lines.append(line)
    bigram = max(row["bigram_bits_per_byte"] for row in rows)
    worst = max(row["bits_per_byte"] for row in rows)
    verdict = "passed" if worst < bigram else "NOT passed: the comparison says nothing"
    return "\n".join([*lines, f"bigrams: {bigram:.4f} bits per byte, {verdict} (worst run {worst:.4f})"])


def main() -> None:
    """Read the options, make the missing runs, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="results go to docs/ab/NAME.jsonl")
    parser.add_argument("--arm", nargs="+", action="append", required=True, metavar=("NAME", "KEY=VALUE"))
    parser.add_argument("--base", nargs="+", default=[], metavar="KEY=VALUE", help="settings of every arm")
    parser.add_argument("--model", choices=MODELS, default="dense")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--train", nargs="+", type=Path, default=[TEXT / "tr_mix_small.train.txt.gz"])
    parser.add_argument("--valid", nargs="+", type=Path, default=[TEXT / "tr_mix_small.valid.txt.gz"])
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "lowvram-ab")
    parser.add_argument("--results", type=Path, default=ROOT / "docs/ab")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    arms = [Arm(name, tuple(settings)) for name, *settings in asked.arm]
    path = asked.results / f"{asked.name}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    home = prepare_home(asked.work, asked.train, asked.valid)
    tokenizer = Tokenizer.load(home / "tok")
    shards = [ShardSet.open(home / "shards" / name, tokenizer.hash) for name in ("train", "valid")]
    bigram = bigram_score(*shards, tokenizer.bos_id, tokenizer.size).bits_per_byte
    print(f"{shards[0].tokens:,} tokens to learn, {shards[1].tokens:,} held out, bigrams {bigram:.4f} bits per byte")
    for arm, seed in missing(read_rows(path), arms, asked.base, asked.model, asked.seeds):
        run = f"runs/{asked.name}-{asked.model}-{arm.name}-{seed}"
        what = configure(home, asked.model, [*asked.base, *arm.settings], seed, run)
        row = {"arm": arm.name, "seed": seed, "settings": [*asked.base, *arm.settings], "model": asked.model}
        row |= {"parameters": what.model.num_parameters(), "bigram_bits_per_byte": bigram} | train_once(what, home)
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        shutil.rmtree(what.run.dir)
        print(f"{arm.name} seed {seed}: {row['bits_per_byte']:.4f} bits per byte, {row['cpu_s']} CPU s", flush=True)
    print(table(read_rows(path), [arm.name for arm in arms]))


if __name__ == "__main__":
    main()
