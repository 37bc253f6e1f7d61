"""The receipt that a run on a card keeps while it trains, and the command that shows it."""

from __future__ import annotations

import getpass
import json
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lowvram.api import receipt
from lowvram.api.receipts import ReceiptLog, conditions
from lowvram.fit.receipts import Receipt, write_receipt
from lowvram.train.events import Evaluated, Started, StepDone, Stopped
from tests.flows.typed import typed
from tests.receipts import invent

STARTED = Started(0, 100, None, ())


class Clock:
    """Seconds that pass only where a test says so."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def train(log: ReceiptLog, clock: Clock, first: int, last: int) -> None:
    for step in range(first, last + 1):
        clock.now += 2.0
        log.write(StepDone(step, step * 1000, 5.0, 1.0, 1e-3, 1e9, step * 100, 1.0, 0))


def test_only_time_from_step_to_step_is_counted(tmp_path: Path) -> None:
    clock = Clock()
    log = ReceiptLog(tmp_path, invent, clock)
    log.write(STARTED)
    train(log, clock, 1, 10)
    clock.now += 500.0
    log.write(Evaluated(10, 5.0, 2.0))
    train(log, clock, 11, 12)
    log.write(Stopped(12, True))
    (hour,) = receipt(tmp_path).hours
    # Steps 4 to 10 and 12: three warm up, and the one after a validation has no beginning.
    assert (hour.tokens, hour.seconds) == (8_000, 16.0)
    assert receipt(tmp_path).measured_peak_bytes == 1_200


def test_hours_of_an_earlier_start_stay_unless_the_plan_has_changed(tmp_path: Path) -> None:
    clock = Clock()
    for first in (1, 11):
        log = ReceiptLog(tmp_path, invent, clock)
        log.write(STARTED)
        train(log, clock, first, first + 9)
        log.close()
    assert receipt(tmp_path).hours[0].tokens == 14_000
    log = ReceiptLog(tmp_path, lambda: invent(plan={"micro_batch": 4, "accumulate": 16}), clock)
    log.write(STARTED)
    train(log, clock, 21, 30)
    log.close()
    assert receipt(tmp_path).hours[0].tokens == 7_000


def test_a_run_that_ends_in_its_first_steps_writes_no_receipt(tmp_path: Path) -> None:
    clock = Clock()
    log = ReceiptLog(tmp_path, invent, clock)
    log.write(STARTED)
    train(log, clock, 1, 3)
    log.close()
    assert not (tmp_path / "receipt.json").exists()


def on_card(monkeypatch: pytest.MonkeyPatch, run: Path) -> Receipt:
    """What is known of a run on a card that is not here, before its first step."""
    card = SimpleNamespace(name="NVIDIA GeForce RTX 5070", total_memory=12 << 30)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda device: card)
    monkeypatch.setattr("lowvram.api.receipts.find_driver_version", lambda: "580.95.05")
    model = SimpleNamespace(num_parameters=lambda: 125_000_000)
    learning = SimpleNamespace(seq_len=1024, batch_tokens=65_536, precision="bf16")
    config: Any = SimpleNamespace(model=model, train=learning, run=SimpleNamespace(dir=run))
    state = SimpleNamespace(model=SimpleNamespace(embedding=SimpleNamespace(device="cuda")))
    trainer: Any = SimpleNamespace(config=config, state=state, plan=invent().plan, captured_pass=None)
    budget = SimpleNamespace(profile=SimpleNamespace(id="rtx5070"))
    monitor: Any = SimpleNamespace(budget=budget, prediction=(4 << 30, 50_000.0))
    return conditions(trainer, monitor)


def test_a_receipt_names_the_card_and_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "secret-run-of-ayse"
    run.mkdir()
    write_receipt(on_card(monkeypatch, run).add(1000, 1.0, 100), run / "receipt.json")
    text = (run / "receipt.json").read_text()
    assert "NVIDIA GeForce RTX 5070" in text
    named = set(json.loads(text)) - {"digest"}
    assert named == set(Receipt.model_fields)
    for private in (run.name, str(tmp_path), socket.gethostname(), str(Path.home())):
        assert private not in text
    assert f'"{getpass.getuser()}"' not in text


def test_the_command_shows_a_receipt_and_writes_a_file_to_send(tmp_path: Path) -> None:
    write_receipt(invent().add(40_000, 1.0, 5 << 30), tmp_path / "receipt.json")
    shown = typed("receipt", tmp_path)
    assert shown.code == 0, shown.err
    assert [line.split() for line in shown.out.splitlines() if line.startswith(" tokens/s")] == [
        ["tokens/s", "50,000", "40,000", "1.25"]
    ], shown.out
    assert shown.out.splitlines()[-1].startswith("Next: lowvram receipt ")
    sent = tmp_path / "sent.json"
    assert typed("receipt", tmp_path, "--out", sent).code == 0
    assert receipt(sent) == receipt(tmp_path)
    assert json.loads(typed("receipt", sent, "--json").out)["card"] == "NVIDIA GeForce RTX 5070"


def test_the_command_refuses_an_edited_receipt_in_one_paragraph(tmp_path: Path) -> None:
    path = tmp_path / "receipt.json"
    write_receipt(invent().add(40_000, 1.0, 5 << 30), path)
    path.write_text(path.read_text().replace("40000", "90000"))
    answer = typed("receipt", tmp_path)
    assert answer.code == 1
    assert "its digest does not fit its contents" in answer.err
