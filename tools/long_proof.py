"""Kills one long run again and again and compares its end, to the bit, with that of a run that was never stopped.

python tools/long_proof.py shared/data/text/tr_legal.train.txt.gz --home runs/proof --out docs/proof.json

Both runs learn the same text with expert rotation and 8-bit Muon, at the same time, each on one thread, through the
command line that users type.  The second one is ended at random steps: by Ctrl-C, by kill -9, and by kill -9 while a
checkpoint is being written.  The same command goes on where it was stopped itself, also after a restart of the
computer; every end of a process is a line of HOME/ends.jsonl, with its processor time.  With more --tokens than before
both runs are made longer, and the second is ended --kills times more.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

Row = dict[str, Any]
WHOLE, KILLED = "whole", "killed"
KINDS = ("Ctrl-C", "kill -9", "kill -9 in a save")
RUN_FILE = """
[model]
layers = 6
dim = 256
[model.attention]
kind = "mla"
heads = 4
kv_lora_rank = 64
nope_dim = 32
rope_dim = 32
value_dim = 64
[model.ffn]
kind = "moe"
hidden = 768
dense_layers = 1
experts = 10
top_k = 2
shared = 1
expert_hidden = 256
[data]
train = "shards/train"
valid = "shards/valid"
tokenizer = "tok"
[train]
tokens = {tokens}
seq_len = 256
batch_tokens = 4096
precision = "fp32"
optimizer = {{ name = "muon", bits = 8, lr = 4e-3 }}
rotation = {{ window = 5, interval = 10 }}
[run]
dir = "{name}"
save_every_minutes = 1.0
validate_every = 100
validate_tokens = 4096
sample_every = 100
sample_tokens = 10
"""


def main() -> None:
    """Prepare, run both to their ends, compare, and write what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path)
    parser.add_argument("--home", type=Path, default=Path("runs/proof"))
    parser.add_argument("--tokens", type=int, default=3_000_000)
    parser.add_argument("--kills", type=int, default=24)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    prepare(asked)
    threads = [threading.Thread(target=train, args=(asked, name)) for name in (WHOLE, KILLED)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = compare(asked)
    print(json.dumps(found, indent=1))
    if asked.out is not None:
        asked.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    sys.exit(0 if found["equal"] else 1)


def command(*words: str) -> list[str]:
    """Return the command line that a user types as `lowvram` and these words."""
    return [sys.executable, "-m", "lowvram", *words]


def environment() -> dict[str, str]:
    """Return the variables of both runs: one thread each, and this tree's code."""
    code = os.pathsep.join((str(ROOT), str(ROOT / "kernels")))
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": code}


def prepare(asked: argparse.Namespace) -> None:
    """Train a tokenizer, pack the text, and write a run file for each run, as far as they are not there."""
    asked.home.mkdir(parents=True, exist_ok=True)
    text, home = str(asked.text.resolve()), asked.home
    steps = {
        home / "tok": ("tokenizer", "train", text, "--vocab", "8192", "--holdout", "1%", "--out", "tok"),
        home / "shards": ("data", "pack", text, "--tokenizer", "tok", "--holdout", "1%", "--out", "shards"),
    }
    for made, words in steps.items():
        if not made.exists():
            subprocess.run(command(*words), cwd=home, env=environment(), check=True)
    for name in (WHOLE, KILLED):
        (home / f"{name}.toml").write_text(RUN_FILE.format(tokens=asked.tokens, name=name), encoding="utf-8")


def train(asked: argparse.Namespace, name: str) -> None:
    """Type the run's command until it has finished; the killed run is ended at each of its steps, in their order."""
    ends = [row for row in read_rows(asked.home / "ends.jsonl") if row["run"] == name]
    finished = [row for row in ends if row["code"] == 0]
    first = finished[-1]["seen_step"] if finished else 0
    if first >= steps_of_all(asked.tokens):
        return
    now = ends[ends.index(finished[-1]) + 1 :] if finished else ends
    left = [] if name == WHOLE else plan_kills(asked, first)[sum(bool(row["kind"]) for row in now) :]
    while True:
        kind, step = left[0] if left else ("", 0)
        child = subprocess.Popen(
            command("train", f"{name}.toml", "--device", "cpu"),
            cwd=asked.home,
            env=environment(),
            stdin=subprocess.DEVNULL,
            stdout=open(asked.home / f"{name}.out", "ab"),  # noqa: SIM115 - the child's own
            stderr=subprocess.STDOUT,
        )
        was_hit = bool(kind) and hit(child, asked.home / name, kind, step)
        _, status, used = os.wait4(child.pid, 0)
        code = os.waitstatus_to_exitcode(status)
        row = {"run": name, "kind": kind if was_hit else "", "asked_step": step, "code": code}
        row |= {"seen_step": last_step(asked.home / name), "cpu_s": round(used.ru_utime + used.ru_stime, 1)}
        row |= {"at": datetime.now(UTC).isoformat(timespec="seconds")}
        with open(asked.home / "ends.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        if code == 0:
            return
        if not was_hit:
            sys.exit(f"{name} ended with {code} by itself; see {asked.home / name}.out")
        left = left[1:]


def steps_of_all(tokens: int) -> int:
    """Return the steps in which so many tokens are seen."""
    return -(-tokens // 4096)


def plan_kills(asked: argparse.Namespace, first: int) -> list[tuple[str, int]]:
    """Return how and after which steps, from the first one on, a run is ended: random ones, each kind equally often."""
    chance = random.Random(asked.seed)
    at = sorted(chance.sample(range(first + 3, steps_of_all(asked.tokens) - 3), asked.kills))
    kinds = [KINDS[number % len(KINDS)] for number in range(asked.kills)]
    chance.shuffle(kinds)
    return list(zip(kinds, at, strict=True))


def hit(child: subprocess.Popen[bytes], run: Path, kind: str, step: int) -> bool:
    """Wait for the step, and for a save in progress where the kind says so, then end the process; False if it ended."""
    chance = random.Random(f"{kind} {step}")
    while last_step(run) < step or (kind == KINDS[2] and not list(run.glob("step-*.tmp"))):
        if has_ended(child.pid):
            return False
        time.sleep(0.01 if kind == KINDS[2] else 0.2)
    time.sleep(chance.uniform(0.0, 0.05 if kind == KINDS[2] else 3.0))
    if has_ended(child.pid):
        return False
    os.kill(child.pid, signal.SIGINT if kind == KINDS[0] else signal.SIGKILL)
    return True


def has_ended(pid: int) -> bool:
    """Say whether a child has ended, without taking its status."""
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def read_rows(path: Path) -> Iterator[Row]:
    """Yield the rows of a JSONL file; a last one that a kill has torn is left out."""
    if not path.exists():
        return
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            continue


def last_step(run: Path) -> int:
    """Return the last step in a run's log, from its last bytes; 0 where there is none."""
    path = run / "log.jsonl"
    if not path.exists():
        return 0
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - 4096))
        lines = file.read().decode(errors="replace").splitlines()
    for line in reversed(lines):
        try:
            return int(json.loads(line)["step"])
        except (json.JSONDecodeError, KeyError, TypeError):
            continue
    return 0


def compare(asked: argparse.Namespace) -> Row:
    """Return whether both runs ended with the same bytes and lost the same at each step, and what was done to one."""
    import torch

    import lowvram
    from lowvram.storage.checkpoint import find_checkpoint

    ends = list(read_rows(asked.home / "ends.jsonl"))
    last = {name: find_checkpoint(asked.home / name)[0] for name in (WHOLE, KILLED)}
    hashes = {
        name: {
            file: hashlib.sha256((checkpoint.directory / file).read_bytes()).hexdigest()
            for file in ("weights.safetensors", "state.safetensors")
        }
        for name, checkpoint in last.items()
    }
    losses = {name: losses_of(asked.home / name) for name in last}
    # Masters are validated at each save, and when a run saves depends on the clock: only what both did is compared.
    validations = {name: losses_of(asked.home / name, "Evaluated") for name in last}
    both = validations[WHOLE].keys() & validations[KILLED].keys()
    plain = [{key for key in found if " " not in key} for found in validations.values()]
    numbers = {name: checkpoint.numbers() for name, checkpoint in last.items()}
    equal = {
        "weights and states": hashes[WHOLE] == hashes[KILLED],
        "loss of each step": losses[WHOLE] == losses[KILLED],
        "validations": plain[0] == plain[1]
        and all(validations[WHOLE][key] == validations[KILLED][key] for key in both),
        "numbers": numbers[WHOLE] == numbers[KILLED],
    }
    killed = [row for row in ends if row["run"] == KILLED]
    return {
        "equal": all(equal.values()),
        "compared": equal,
        "validations compared": len(both),
        "steps": last[WHOLE].step,
        "weights sha256": hashes[WHOLE]["weights.safetensors"],
        "ended": dict(Counter(row["kind"] for row in killed if row["kind"])),
        "exit codes": dict(Counter(str(row["code"]) for row in killed)),
        "steps logged": {name: sum(1 for _ in steps_of(asked.home / name)) for name in last},
        "cpu hours": {name: round(sum(row["cpu_s"] for row in ends if row["run"] == name) / 3600, 3) for name in last},
        "leftovers": [path.name for path in (asked.home / KILLED).iterdir() if path.suffix in (".tmp", ".deleted")],
        "checkpoint bytes": last[WHOLE].size_bytes,
        "versions": {"lowvram": lowvram.__version__, "torch": torch.__version__, "python": platform.python_version()},
        "ends": killed,
    }


def steps_of(run: Path, event: str = "StepDone") -> Iterator[Row]:
    """Yield the rows of one kind in a run's log."""
    return (row for row in read_rows(run / "log.jsonl") if row.get("event") == event)


def losses_of(run: Path, event: str = "StepDone") -> dict[str, float]:
    """Return the loss of each step; of a step that was made again after a kill the last one, which entered the end."""
    return {
        f"{row['step']}{' masters' if row.get('reads_masters') else ''}": row["loss"] for row in steps_of(run, event)
    }


if __name__ == "__main__":
    main()
