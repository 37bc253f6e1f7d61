"""A checkpoint with a file that is cut, zeroed, emptied, half-written or swapped is passed over, and the file is named.

Single flipped bits are in tests/storage/test_bit_flips.py, damage with a right SHA-256 in
tests/train/test_signed_damage.py.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from lowvram.config.run import RunConfig
from lowvram.errors import CheckpointError
from lowvram.storage.checkpoint import find_checkpoint
from tests.faults.rule import STEPS, expect_newest_used, expect_same_end, faulty_run, train

NEWEST, OLDER = f"step-{STEPS:08d}", f"step-{STEPS - 1:08d}"
FILES = (
    "weights.safetensors",
    "state.safetensors",
    "state.json",
    "config.json",
    "manifest.json",
    "tokenizer.json",
    "tokenizer_config.json",
)
Damage = Callable[[Path, bytes], bytes]
DAMAGES: dict[str, Damage] = {
    "some bytes short": lambda _, data: data[:-9],
    "a byte long": lambda _, data: data + b"\0",
    "empty": lambda _, data: b"",
    "zeroed": lambda _, data: bytes(len(data)),
    "half written": lambda _, data: data[: len(data) // 2],
    "half zeroed": lambda _, data: data[: len(data) // 2] + bytes(len(data) - len(data) // 2),
    "a block twice": lambda _, data: data[: len(data) // 2] + data[: len(data) - len(data) // 2],
    "of another checkpoint": lambda path, _: (path.parents[1] / OLDER / path.name).read_bytes(),
}


@pytest.fixture
def copy(home: Path, whole: Path, tmp_path: Path) -> RunConfig:
    """The finished run again, in a directory of this test's own."""
    what = faulty_run(home, f"{tmp_path.name}-damaged")
    shutil.copytree(whole, what.run.dir)
    return what


@pytest.mark.parametrize("how", DAMAGES)
def test_damage_to_any_file_is_found_and_the_checkpoint_before_it_is_used(copy: RunConfig, how: str) -> None:
    hit = 0
    for name in FILES:
        path = copy.run.dir / NEWEST / name
        data = path.read_bytes()
        damaged = DAMAGES[how](path, data)
        if damaged == data:  # the tokenizer's files are the same in both
            continue
        path.write_bytes(damaged)
        found, passed_over = find_checkpoint(copy.run.dir)
        assert found.directory.name == OLDER, name
        assert [name in str(problem) for problem in passed_over] == [True], f"{name} is not named"
        path.write_bytes(data)
        hit += 1
    assert hit >= 4
    assert find_checkpoint(copy.run.dir)[0].directory.name == NEWEST


def test_damage_of_several_kinds_one_after_the_other_costs_a_step_and_no_bit(copy: RunConfig, whole: Path) -> None:
    damages: list[tuple[str, str]] = [
        ("weights.safetensors", "half zeroed"),
        ("manifest.json", "empty"),
        ("state.json", "of another checkpoint"),
    ]
    for name, how in damages:
        path = copy.run.dir / NEWEST / name
        path.write_bytes(DAMAGES[how](path, path.read_bytes()))
        events = train(copy)
        expect_newest_used(events, STEPS - 1)
        assert [name in str(problem) for problem in events[0].passed_over] == [True]
        expect_same_end(whole, copy.run.dir)


def test_two_checkpoints_whose_names_are_swapped_are_both_refused_and_nothing_begins_again(copy: RunConfig) -> None:
    run = copy.run.dir
    (run / NEWEST).rename(run / "aside")
    (run / OLDER).rename(run / NEWEST)
    (run / "aside").rename(run / OLDER)
    message = rf"No checkpoint in \S+ is whole\. .*its step is {STEPS - 1}, and the directory is called {NEWEST}"
    with pytest.raises(CheckpointError, match=message):
        train(copy)
    assert {path.name for path in run.glob("step-*")} == {NEWEST, OLDER}, "neither is deleted"


def test_the_newest_checkpoint_is_that_of_the_greatest_step_whatever_the_clock_said(copy: RunConfig) -> None:
    for name, time_s in ((OLDER, 2**31), (NEWEST, 0)):
        for path in (copy.run.dir / name, *(copy.run.dir / name).iterdir()):
            os.utime(path, (time_s, time_s))
    assert find_checkpoint(copy.run.dir)[0].step == STEPS
