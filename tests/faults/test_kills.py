"""`kill -9` at any moment, at any call of the disk layer, and twice in a row, changes no bit of what is learnt."""

from __future__ import annotations

import random
import signal
import sys
from collections import Counter
from pathlib import Path

import pytest

from lowvram.storage.checkpoint import find_checkpoint
from tests.faults.children import KillingDisk, end_of, kill_at, train_and_save_beside, train_on
from tests.faults.rule import expect_newest_used, expect_same_end, faulty_run, train
from tests.faulty_disk import FaultyDisk
from tests.tiny import KINDS

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="sends POSIX signals")

# What a child has just begun when it is killed, and within how many seconds after that.
MOMENTS = {
    "at random": ("owner", 0.5),
    "in a save": ("*.tmp/*.safetensors", 0.02),
    "beside a validation or a sample": ("step-0000000[36]", 0.05),
}


def kill_often(home: Path, whole: Path, kills: int, kind: str) -> Counter[str]:
    """Kill a run up to six times, let it end, and so on; returns how often each kind of kill fell, and what it left."""
    moments, found = random.Random(kind), Counter[str]()
    for number in range(kills):
        moment = [*MOMENTS][number % len(MOMENTS)]
        what = faulty_run(home, f"killed-{kind}-{number // 6}", kind=kind)
        died = kill_at(what, *MOMENTS[moment], moments)
        found[moment] += died == -signal.SIGKILL
        found["torn"] += bool(list(what.run.dir.glob("*.tmp")))
        if number % 6 == 5 or number == kills - 1:
            stood = newest_step(what.run.dir)
            expect_newest_used(train(what), stood)
            expect_same_end(whole, what.run.dir)
    return found


def newest_step(run: Path) -> int:
    return find_checkpoint(run)[0].step if list(run.glob("step-????????")) else 0


def test_kills_at_random_moments_change_no_bit(home: Path, whole: Path) -> None:
    found = kill_often(home, whole, 12, "mla-moe")
    assert sum(found[moment] for moment in MOMENTS) >= 8, f"too few kills fell before the end: {found}"


@pytest.mark.nightly
@pytest.mark.parametrize("kind", KINDS)
def test_two_hundred_kills_at_random_moments_change_no_bit(home: Path, kind: str) -> None:
    unbroken = faulty_run(home, f"whole-{kind}", kind=kind)
    train(unbroken)
    found = kill_often(home, unbroken.run.dir, 67, kind)
    assert min(found[moment] for moment in MOMENTS) >= 5, f"too few kills fell before the end: {found}"
    assert found["torn"] >= 5, "too few kills fell inside a save"


@pytest.fixture(scope="module")
def counted() -> FaultyDisk:
    """The disk of `short`, which counts its calls."""
    return FaultyDisk()


@pytest.fixture(scope="module")
def short(home: Path, counted: FaultyDisk) -> Path:
    """The directory of a run of three steps that nothing breaks."""
    what = faulty_run(home, "short", steps=3)
    train(what, counted)
    return what.run.dir


@pytest.fixture(scope="module")
def calls(short: Path, counted: FaultyDisk) -> list[str]:
    """The calls of the disk layer in that run, by name."""
    return counted.seen


def kill_twice(home: Path, short: Path, first: int, second: int) -> None:
    """Kill a run at two calls of the disk layer, one start after the other, and let it end."""
    what = faulty_run(home, f"at-{first}-{second}", steps=3)
    ends = [end_of(train_on, what, KillingDisk(at)) for at in (first, second)]
    assert ends[0] == -signal.SIGKILL, f"call {first} was not reached"
    assert ends[1] in (-signal.SIGKILL, 0), "the second start has fewer calls to make, and may end before"
    train(what)
    expect_same_end(short, what.run.dir)


def test_a_kill_at_a_disk_call_and_one_at_the_next_start_change_no_bit(
    home: Path, short: Path, calls: list[str]
) -> None:
    # The last one gives a checkpoint its name.
    last = {name: at for at, name in enumerate(calls)}
    assert {"write_with", "write_handle", "sync_handle", "sync_directory", "rename", "delete"} <= last.keys()
    kill_twice(home, short, last["rename"], last["rename"] // 3)


@pytest.mark.nightly
def test_a_kill_at_every_disk_call_twice_in_a_row_changes_no_bit(home: Path, short: Path, calls: list[str]) -> None:
    seconds = random.Random("second kills")
    for at in range(len(calls)):
        kill_twice(home, short, at, seconds.choice([at % 40, at, seconds.randrange(len(calls))]))


@pytest.mark.nightly
def test_a_kill_at_a_disk_call_of_a_save_beside_training_changes_no_bit(
    home: Path, short: Path, calls: list[str]
) -> None:
    killed = 0
    for at in range(0, len(calls), 5):
        what = faulty_run(home, f"beside-{at}", steps=3)
        # While one save is being written no other begins, so there may be fewer calls.
        end = end_of(train_and_save_beside, what, KillingDisk(at))
        assert end in (-signal.SIGKILL, 0)
        killed += end != 0
        train(what)
        expect_same_end(short, what.run.dir)
    assert killed >= 5
