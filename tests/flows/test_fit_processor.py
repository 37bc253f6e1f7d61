"""`lowvram fit` on a processor that was measured to be slower in bf16: fp32 is suggested and written, never taken."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from lowvram.api import rehearsals
from lowvram.config.model import ModelConfig
from lowvram.config.train import TrainConfig
from lowvram.fit.ledgers import PATHS, find_memory_curve
from lowvram.fit.report import FitReport, MemoryBudget, evaluate_fit
from lowvram.fit.suggestions import LEAST_GAIN
from tests.fit.pair import store_pair
from tests.flows.typed import fill_home, typed

CPU_WORDS = ("--gpu", "cpu", "--ram", "16GB", "--desktop", "none")
SLOWER = "bf16 takes 1.62 times as long as fp32, as measured on this processor"
CPU_PATH = next(path for path in PATHS if path.platform == "cpu")


@pytest.fixture(autouse=True)
def _own_home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("XDG_DATA_HOME", "LOCALAPPDATA", "HOME"):
        monkeypatch.setenv(name, str(tmp_path_factory.mktemp("measured")))


def rehearses_quickly(monkeypatch: pytest.MonkeyPatch, fits: bool) -> None:
    """Let a preset take in fp32 what it takes in bf16, which stands in a file, or more than there is."""

    def rehearse_fit(name: str, model: ModelConfig, train: TrainConfig, budget: MemoryBudget) -> FitReport:
        sketch = find_memory_curve(name, model, train, CPU_PATH)
        assert sketch is not None
        assert budget.measured is not None
        assert budget.measured.precision == train.precision == "fp32"
        return evaluate_fit(
            name, model, train, sketch, budget if fits else budget._replace(limit_bytes=1, headless_bytes=1)
        )

    monkeypatch.setattr(rehearsals, "rehearse_fit", rehearse_fit)


@pytest.mark.parametrize("times", [1.62, 1.1])
def test_a_run_in_bf16_is_told_that_fp32_is_faster_where_that_was_measured(tmp_path: Path, times: float) -> None:
    fill_home(tmp_path)
    store_pair(times)
    screen = typed("fit", tmp_path / "run.toml", *CPU_WORDS, "--set", "precision=bf16")
    assert screen.code == 0, screen.err
    offered = [line.split("; peak ")[0] for line in screen.out.splitlines() if "--set" in line]
    only = f"  FP32 products (--set train.precision=fp32): {SLOWER}; rounds less"
    assert offered == ([only] if times > LEAST_GAIN else [])


def test_training_keeps_the_precision_of_its_run_file(tmp_path: Path) -> None:
    fill_home(tmp_path)
    store_pair(1.62)
    trained = typed("train", tmp_path / "run.toml", "--set", "precision=bf16", "--device", "cpu")
    assert trained.code == 0, trained.err
    assert " parameters in bf16" in trained.err


@pytest.mark.parametrize("alone", [("--model", "tr-25m"), ()], ids=["named", "recommended"])
def test_a_run_file_is_written_in_fp32_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, alone: tuple[str, ...]
) -> None:
    store_pair(1.62)
    rehearses_quickly(monkeypatch, fits=True)
    answer = typed("fit", *CPU_WORDS, *alone, "--out", tmp_path / "new.toml")
    assert answer.code == 0, answer.err
    assert tomllib.loads((tmp_path / "new.toml").read_text(encoding="utf-8"))["train"]["precision"] == "fp32"
    assert f'; precision = "fp32", since {SLOWER}): put your folders into it' in answer.err
    # Of one preset the figures are those of the file, in fp32; the table's are the presets'.
    says_of_table = f'Precision: {SLOWER}. --out writes precision = "fp32" where that fits.\n'
    assert (says_of_table in answer.out) == (not alone)
    lasts = [re.search(r"(tr-\w+), (\d+–\d+) days", said) for said in (answer.err, typed("fit", *CPU_WORDS).out)]
    assert lasts[0] is not None
    assert lasts[1] is not None
    assert lasts[0][1] == lasts[1][1]
    assert lasts[0][2] != lasts[1][2], "the time is that of fp32"


def test_where_fp32_does_not_fit_bf16_is_written_and_that_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store_pair(1.62)
    rehearses_quickly(monkeypatch, fits=False)
    answer = typed("fit", *CPU_WORDS, "--model", "tr-25m", "--out", tmp_path / "new.toml")
    assert answer.code == 0, answer.err
    assert f'precision = "bf16", since it does not fit in fp32, although {SLOWER}' in answer.err
    assert "precision" not in (tmp_path / "new.toml").read_text(encoding="utf-8"), "bf16 is the preset's own"


@pytest.mark.parametrize("times", [None, 1.1, 0.6])
def test_without_a_measured_difference_nothing_changes(tmp_path: Path, times: float | None) -> None:
    if times is not None:
        store_pair(times)
    answer = typed("fit", *CPU_WORDS, "--model", "tr-25m", "--out", tmp_path / "new.toml")
    assert answer.code == 0, answer.err
    assert "precision" not in answer.err.lower() + answer.out.lower()
    assert "precision" not in (tmp_path / "new.toml").read_text(encoding="utf-8")
    assert not [line for line in typed("fit", "--gpu", "rtx5070").out.splitlines() if "fp32" in line]


def test_json_of_presets_stays_one_object_and_the_sentence_goes_beside_it() -> None:
    store_pair(1.62)
    answer = typed("fit", *CPU_WORDS, "--json")
    assert answer.out.count("\n") == 1
    assert SLOWER in answer.err
