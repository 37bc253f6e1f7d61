"""Rehearses every preset on every card path and writes `lowvram/config/presets/ledgers.json`, from which `fit` answers.

python tools/write_ledgers.py [PRESET ...]        only these presets anew; the others' rows stay
python tools/write_ledgers.py --check             write nothing; exit with 1 where a row of the file is another one now

A run over every preset and path also writes the digest of the sources that made the rows.  Each preset is written when
it is done, so that one that was interrupted goes on with those that are missing.
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

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]

from source_digest import digest_sources

import lowvram
from lowvram.config.run_file import load_preset, preset_names
from lowvram.fit.ledgers import PATH, PATHS, CardPath, hash_of, memory_curve_of, name_plan, pack, plans_of
from lowvram.fit.rehearse import imagine, rehearse

# What makes the rows: its sources and those that it imports decide them, beside the presets.
MAKER = "lowvram.fit.rehearse"


def rows_of(name: str, path: CardPath) -> dict[str, list[Any]]:
    """Rehearse one preset on one path, at every anchor of every technique."""
    model, train = load_preset(name)
    train = train.model_copy(update={"precision": path.precision})
    card = imagine(path)
    plans = plans_of(memory_curve_of(model, train, lambda plan: rehearse(model, train, plan, card)), path)
    return {name_plan(plan): pack(rehearse(model, train, plan, card)) for plan in plans}


def main() -> None:
    """Rehearse and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("presets", nargs="*", help="(default: all)")
    parser.add_argument("--platform", choices=("cuda", "mps", "cpu"), help="only the paths of one platform anew")
    parser.add_argument("--check", action="store_true", help="compare with the file instead of writing it")
    arguments = parser.parse_args()
    asked = arguments.presets or preset_names()
    anew = [path for path in PATHS if arguments.platform in (None, path.platform)]
    before = json.loads(PATH.read_text(encoding="utf-8")) if PATH.exists() else {}
    kept_presets = before.get("presets", {})
    presets = {name: rows for name, rows in kept_presets.items() if name in preset_names()}
    is_whole = len(asked) == len(preset_names()) and len(anew) == len(PATHS)
    old_digest = before.get("versions", {}).get("sources", "")
    wrong = 0
    with ProcessPoolExecutor() as pool:
        found = {(name, path.key): pool.submit(rows_of, name, path) for name in asked for path in anew}
        for number, name in enumerate(asked):
            began = time.perf_counter()
            kept = presets[name]["paths"] if name in presets else {}
            paths = {**kept, **{path.key: found[name, path.key].result() for path in anew}}
            presets[name] = {"hash": hash_of(*load_preset(name)), "paths": paths}
            count = sum(map(len, paths.values()))
            print(f"{name}: {count} rehearsals, {time.perf_counter() - began:.0f} s waited", flush=True)
            if arguments.check:
                wrong += compare(name, kept, paths)
            else:
                is_last = number == len(asked) - 1
                write(presets, digest_sources(MAKER) if is_whole and is_last else old_digest)
    if arguments.check:
        print(f"{wrong} rows of {PATH.name} are other ones now")
        sys.exit(bool(wrong))


def compare(name: str, kept: dict[str, Any], made: dict[str, Any]) -> int:
    """Print the rows that differ; returns how many they are."""
    keys = sorted({(key, row) for paths in (kept, made) for key, rows in paths.items() for row in rows})
    differing = [(key, row) for key, row in keys if kept.get(key, {}).get(row) != made.get(key, {}).get(row)]
    for key, row in differing:
        print(f"{name} {key} {row}: {made.get(key, {}).get(row)} instead of {kept.get(key, {}).get(row)}")
    return len(differing)


def write(presets: dict[str, Any], digest: str) -> None:
    """Write the whole file.  digest: of the sources that made all of the rows."""
    torch_version = torch.__version__.partition("+")[0]
    versions = {"lowvram": lowvram.__version__, "torch": torch_version, "sources": digest}
    tables = {"versions": versions, "presets": dict(sorted(presets.items()))}
    text = json.dumps(tables, indent=1)
    # One row a line: a change of one rehearsal is one line of a diff.
    text = re.sub(r"\[[^]]*\]", lambda row: " ".join(row[0].split()), text)
    PATH.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
