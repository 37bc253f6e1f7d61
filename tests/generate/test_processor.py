"""The processor's pace in two kinds of numbers: measured once, kept, made again where anything else is there."""

from __future__ import annotations

import errno
import itertools
from pathlib import Path
from typing import IO

import pytest
import torch

from lowvram.generate import processor as under_test
from lowvram.generate.processor import Pace, find_pace, pace_path
from lowvram.storage.disk import DISK, Disk


class Clock:
    """A clock by which fp32's, bf16's and INT8's products, in turns, last as told; each first one lasts longer."""

    def __init__(self, fp32_s: float, bf16_s: float, int8_s: float = 4.0) -> None:
        turns = [(fp32_s, bf16_s, int8_s)] * under_test._REPEATS
        lasting = [seconds for turn in [(50.0, 60.0, 70.0), *turns] * 2 for seconds in turn]
        self.times = itertools.accumulate(step for seconds in lasting for step in (0.0, seconds))
        self.looks = 0

    def __call__(self) -> float:
        self.looks += 1
        return next(self.times)


@pytest.fixture(autouse=True)
def _be_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(under_test, "_OUTPUTS", 8)
    monkeypatch.setattr(under_test, "_INPUTS", 8)


@pytest.mark.parametrize(
    ("fp32_s", "bf16_s", "int8_s", "fastest"),
    [(2.0, 3.0, 4.0, "fp32"), (3.0, 2.0, 4.0, "bf16"), (2.0, 2.0, 2.0, "fp32"), (3.0, 2.0, 1.0, "int8")],
)
def test_the_faster_numbers_are_found_once_and_kept(
    tmp_path: Path, fp32_s: float, bf16_s: float, int8_s: float, fastest: str
) -> None:
    found, is_new = find_pace(tmp_path, Clock(fp32_s, bf16_s, int8_s))
    assert is_new
    exchange = 1 + under_test._NEW_TOKENS
    assert (found.fp32_s, found.bf16_s, found.int8_s) == tuple(exchange * s for s in (fp32_s, bf16_s, int8_s))
    assert found.fastest == fastest
    assert found.is_bf16_faster == (bf16_s < fp32_s)
    assert f"bf16 takes {bf16_s / fp32_s:.2f} and INT8 {int8_s / fp32_s:.2f} times as long as fp32" in found.reason
    clock, threads = Clock(1.0, 1.0), torch.get_num_threads()
    assert find_pace(tmp_path, clock) == (found, False)
    assert torch.get_num_threads() == threads
    assert clock.looks == 0


@pytest.mark.parametrize("change", ["torch", "processor", "torn", "deep", "version"])
def test_what_was_measured_elsewhere_or_is_damaged_is_measured_again(tmp_path: Path, change: str) -> None:
    found, _ = find_pace(tmp_path, Clock(2.0, 3.0))
    path = pace_path(tmp_path)
    others = {"torch": "1.0", "processor": "abacus"}
    damaged = {"torn": path.read_bytes()[:40], "deep": b"[" * 100_000, "version": b'{"version": 1}'}
    if change in others:
        path.write_text(found.model_copy(update={change: others[change]}).model_dump_json(), encoding="utf-8")
    else:
        path.write_bytes(damaged[change])
    again, is_new = find_pace(tmp_path, Clock(3.0, 2.0))
    assert is_new
    assert again.is_bf16_faster
    assert Pace.model_validate_json(path.read_bytes()) == again


def test_a_cache_that_cannot_be_written_costs_a_measurement_and_no_error(tmp_path: Path) -> None:
    class FullDisk(Disk):
        def write_handle(self, file: IO[bytes], data: bytes | memoryview) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

    (tmp_path / "file").write_text("in the way")
    for home, disk in ((tmp_path / "file", DISK), (tmp_path, FullDisk())):
        for _ in range(2):
            found, is_new = find_pace(home, Clock(2.0, 3.0), disk)
            assert (is_new, found.is_bf16_faster) == (True, False)
