"""One flipped bit anywhere in a checkpoint is answered by the older checkpoint, or changes nothing that is read."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest
from torch import Tensor

from lowvram.config.run import RunConfig
from lowvram.generate.saved_run import check_readable
from lowvram.storage.checkpoint import Checkpoint, find_checkpoint
from tests.tiny import prepare_home, tiny_run, trainer_of, unequal

# Of the flips that every run of the tests makes, this share falls into the manifest, and the rest where bytes are.
IN_MANIFEST = 0.5


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with the checkpoints of steps 5 and 6."""
    place = tmp_path_factory.mktemp("home")
    prepare_home(place)
    list(trainer_of(run_of(place)).run())
    return place


def run_of(home: Path) -> RunConfig:
    what = tiny_run(home)
    options = {"save_every_minutes": 1e-9, "prompts": (), "validate_every": 1000}
    return what.model_copy(update={"run": what.run.model_copy(update=options)})


def draw_flips(newest: Path, count: int, in_manifest: float, seed: int) -> list[tuple[Path, int]]:
    """Return files, and in each the number of a bit; each file has a turn, and large ones the more."""
    draw, files = random.Random(seed), sorted(newest.iterdir())
    manifest = newest / "manifest.json"
    chosen = files + [manifest] * round(in_manifest * count)
    sizes = [path.stat().st_size for path in files]
    chosen += draw.choices(files, sizes, k=max(0, count - len(chosen)))
    return [(path, draw.randrange(8 * path.stat().st_size)) for path in chosen[:count]]


def flip(path: Path, bit: int) -> None:
    with open(path, "rb+") as file:
        file.seek(bit // 8)
        byte = file.read(1)[0]
        file.seek(bit // 8)
        file.write(bytes([byte ^ 1 << bit % 8]))


def contents(found: Checkpoint) -> tuple[object, dict[str, Tensor]]:
    """Return what a checkpoint's readers see of it, and its tensors."""
    said = {name: value for name, value in found.manifest.items() if name != "files"}
    return json.dumps([said, found.numbers(), found.config()], sort_keys=True), found.weights() | found.state()


def check_flips(home: Path, tmp_path: Path, count: int, in_manifest: float, seed: int) -> tuple[int, int]:
    """Flip one bit after the other; returns how often the older one answered, and how often equal bits did."""
    run = shutil.copytree(home / "run", tmp_path / "run")
    newest, trainer = run / "step-00000006", trainer_of(run_of(home))
    (text, tensors), older = contents(find_checkpoint(run)[0]), 0
    flips = draw_flips(newest, count, in_manifest, seed)
    for path, bit in flips:
        flip(path, bit)
        # As training opens it, which reads everything, and as chat does.
        found, passed_over = find_checkpoint(run, check=trainer.state.check)
        read, _ = find_checkpoint(run, needs_state=False, check=check_readable)
        where = f"bit {bit} of {path.name}"
        assert found.step in (5, 6), where
        assert read.step in ((found.step, 6) if path.name == "state.safetensors" else (found.step,)), where
        older += found.step == 5
        assert len(passed_over) == (found.step == 5), where
        if found.step == 6:
            seen, own = contents(found)
            assert seen == text, where
            assert unequal(own, tensors) == [], where
        flip(path, bit)
    return older, len(flips) - older


def test_a_flipped_bit_is_answered_by_the_older_checkpoint_or_by_equal_bits(home: Path, tmp_path: Path) -> None:
    older, equal = check_flips(home, tmp_path, 60, IN_MANIFEST, seed=6)
    assert older + equal == 60
    # All but white space in the manifest is protected.
    assert older >= 54


@pytest.mark.nightly
def test_a_thousand_flipped_bits_over_all_files_are_answered_by_the_older_one_or_by_equal_bits(
    home: Path, tmp_path: Path
) -> None:
    older, equal = check_flips(home, tmp_path, 1_000, 0.3, seed=13)
    print(f"1,000 flips: {older} answered by the older checkpoint, {equal} by equal bits")
    assert older + equal == 1_000
    assert older >= 950
