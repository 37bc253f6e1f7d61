"""A run that version 0.1.0 wrote opens, is measured and goes on as it did there: run file, shards, log, checkpoint."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from lowvram.cli.app import main

WRITTEN = Path(__file__).parent / "written_by_0_1_0"
# What 0.1.0 measured of its step 12, and the losses with which it went on to step 15.
BITS_PER_BYTE = 5.1446
LOSSES = {13: 5.622074604034424, 14: 5.6463704109191895, 15: 5.664233684539795}
# fp32 sums of another order: processors multiply matrices in blocks of different sizes.
RELATIVE = 1e-4


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder, copied: a run goes on in its own directory."""
    return Path(shutil.copytree(WRITTEN, tmp_path_factory.mktemp("older") / "run"))


def test_a_run_of_an_older_version_is_measured_and_goes_on(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", str(run / "runs/first"), "--device", "cpu", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["bits_per_byte"] == pytest.approx(BITS_PER_BYTE, rel=RELATIVE)

    command = ["train", str(run / "run.toml"), "--device", "cpu", "--set", "tokens=1920"]
    assert main(command) == 0
    lines = (run / "runs/first/log.jsonl").read_text(encoding="utf-8").splitlines()
    steps = {line["step"]: line["loss"] for line in map(json.loads, lines) if line["event"] == "StepDone"}
    assert list(steps) == list(range(1, 16)), "the log is gone on with, and no step is made twice"
    assert {step: steps[step] for step in LOSSES} == pytest.approx(LOSSES, rel=RELATIVE)
