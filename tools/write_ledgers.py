"""Rehearses every preset on every card path and writes `lowvram/config/presets/ledgers.json`, from which `fit` answers.

python tools/write_ledgers.py [PRESET ...]        only these presets anew; the others' rows stay

Each preset is written when it is done, so that one that was interrupted goes on with those that are missing.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # nothing is computed: threads would only wait

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

import lowvram
from lowvram.config.run_file import load_preset, preset_names
from lowvram.fit.ledgers import PATH, PATHS, CardPath, hash_of, name_plan, pack, plans_of, sketch_of
from lowvram.fit.rehearse import imagine, rehearse


def rows_of(name: str, path: CardPath) -> dict[str, list[Any]]:
    """Rehearse one preset on one path, at every anchor of every technique."""
    model, train = load_preset(name)
    train = train.model_copy(update={"precision": path.precision})
    card = imagine(path)
    plans = plans_of(sketch_of(model, train, lambda plan: rehearse(model, train, plan, card)), path)
    return {name_plan(plan): pack(rehearse(model, train, plan, card)) for plan in plans}


def main() -> None:
    """Rehearse and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("presets", nargs="*", help="(default: all)")
    parser.add_argument("--platform", choices=("cuda", "mps", "cpu"), help="only the paths of one platform anew")
    arguments = parser.parse_args()
    asked = arguments.presets or preset_names()
    anew = [path for path in PATHS if arguments.platform in (None, path.platform)]
    before = json.loads(PATH.read_text(encoding="utf-8"))["presets"] if PATH.exists() else {}
    presets = {name: rows for name, rows in before.items() if name in preset_names()}
    with ProcessPoolExecutor() as pool:
        found = {(name, path.key): pool.submit(rows_of, name, path) for name in asked for path in anew}
        for name in asked:
            began = time.perf_counter()
            kept = presets[name]["paths"] if name in presets else {}
            paths = {**kept, **{path.key: found[name, path.key].result() for path in anew}}
            presets[name] = {"hash": hash_of(*load_preset(name)), "paths": paths}
            count = sum(map(len, paths.values()))
            print(f"{name}: {count} rehearsals, {time.perf_counter() - began:.0f} s waited", flush=True)
            write(presets)


def write(presets: dict[str, Any]) -> None:
    """Write the whole file."""
    versions = {"lowvram": lowvram.__version__, "torch": torch.__version__.partition("+")[0]}
    tables = {"versions": versions, "presets": dict(sorted(presets.items()))}
    text = json.dumps(tables, indent=1)
    # One row a line: a change of one rehearsal is one line of a diff.
    text = re.sub(r"\[[^]]*\]", lambda row: " ".join(row[0].split()), text)
    PATH.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
