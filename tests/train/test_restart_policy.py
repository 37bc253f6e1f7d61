"""When a training process that ended is started again, when not, and what is said: pure decisions, no process."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lowvram.train.supervision import (
    MOST_RESTARTS,
    PAUSES_S,
    End,
    GiveUp,
    Life,
    Restart,
    describe_end,
    device_of,
    newest_step,
    next_action,
    unseen_lives,
)

HOUR_S = 3600.0


def crash(before: int | None = None, after: int | None = None, ran_s: float = 60.0, code: int | None = -11) -> Life:
    return Life(code, ran_s, before, after)


def test_a_process_that_ended_as_it_was_meant_to_is_never_started_again() -> None:
    for code in (0, 2, 3, 130):
        assert next_action([Life(code, 5 * HOUR_S, 1, 9)]) == End(code)
        assert next_action([crash(), Life(code, 1.0, None, None)]) == End(code)


@pytest.mark.parametrize("code", [75, -9, -11, -7, 70, 139, 0xC0000005])
def test_a_fault_a_crash_and_an_unknown_exit_code_are_started_again(code: int) -> None:
    assert next_action([crash(code=code)]) == Restart(PAUSES_S[0], 1)


def test_the_pauses_grow_stay_at_the_longest_and_begin_anew_after_an_hour_with_a_checkpoint() -> None:
    lives, pauses = list[Life](), list[float]()
    for number in range(7):  # each saves, in less than an hour
        lives.append(crash(number or None, number + 1))
        action = next_action(lives)
        assert isinstance(action, Restart)
        assert action.stalled == 1
        pauses.append(action.after_s)
    assert pauses == [10.0, 30.0, 60.0, 300.0, 900.0, 900.0, 900.0]
    lives.append(crash(7, 8, HOUR_S))
    assert next_action(lives) == Restart(10.0, 1)
    lives.append(crash(8, 9))
    assert next_action(lives) == Restart(30.0, 1)
    lives.append(crash(9, 9, 9 * HOUR_S))
    assert next_action(lives) == Restart(60.0, 2), "an hour without a checkpoint is no progress"


@pytest.mark.parametrize("first", [crash(), crash(None, 3)], ids=["from the start on", "after a checkpoint"])
def test_after_five_restarts_without_a_new_checkpoint_it_gives_up_and_says_why(first: Life) -> None:
    lives, step = [first], first.step_after
    for number in range(1, MOST_RESTARTS + 1):
        action = next_action(lives)
        assert isinstance(action, Restart)
        assert action.stalled == number
        lives.append(crash(step, step, 90.0, -9))
    action = next_action(lives)
    assert isinstance(action, GiveUp)
    assert "started 5 times in a row without saving a new checkpoint" in action.why
    assert "ended by SIGKILL (the system does that where memory runs out), after 1 min 30 s" in action.why
    assert isinstance(next_action([*lives[:-1], crash(step, 99)]), Restart), "a checkpoint in the last one counts"


def test_an_error_ends_it_but_after_a_checkpoint_it_is_tried_once_more() -> None:
    error = Life(1, 5.0, 4, 4)
    assert next_action([error]) == End(1)
    saved = Life(1, 5.0, 4, 9)
    assert isinstance(next_action([saved]), Restart)
    assert next_action([saved, Life(1, 5.0, 9, 9)]) == End(1)
    assert next_action([crash(1, 2), crash(2, 3, code=1), Life(1, 5.0, 3, 3)]) == End(1), "the crash is long past"


def test_an_error_after_a_fault_counts_as_the_same_fault_until_it_gives_up() -> None:
    lives = [Life(75, HOUR_S, 4, 9), *[Life(1, 5.0, 9, 9)] * 4]
    assert next_action(lives) == Restart(900.0, 5)
    assert isinstance(next_action([*lives, lives[-1]]), GiveUp)
    assert isinstance(next_action([Life(None, 0.0, 4, 4), Life(1, 5.0, 4, 4)]), Restart), "after a power cut, too"


def test_where_the_checkpoints_are_gone_no_run_is_begun_anew_in_their_place() -> None:
    for code in (1, 75, -9):
        action = next_action([crash(5, 9), Life(code, HOUR_S, 9, None)])
        assert action == End(1) or isinstance(action, GiveUp)
    action = next_action([Life(75, HOUR_S, 9, None)])
    assert isinstance(action, GiveUp)
    assert "would begin at the first step" in action.why


def test_who_asks_for_the_end_gets_it_whatever_the_process_does() -> None:
    for code in (0, 1, 3, 75, 130):
        assert next_action([Life(code, 1.0, None, 9)], is_asked=True) == End(code)
    for code in (-9, -10, -11, 70):
        assert next_action([Life(code, 1.0, None, 9)], is_asked=True) == End(130)
    for code in (-2, -15, 0xC000013A):
        assert next_action([Life(code, 1.0, None, 9)]) == End(130), "asked before it could hear"


def test_how_a_process_ended_is_said_in_words() -> None:
    assert describe_end(75) == "exit code 75 (a fault of the device)"
    assert describe_end(70) == "exit code 70"
    assert describe_end(-11) == "SIGSEGV (a driver or a library crashed)"
    assert describe_end(-200) == "signal 200"
    assert describe_end(0xC0000005) == "exit code 0xc0000005 (access violation)"


def checkpoint(run: Path, step: int, device: str | None = "NVIDIA GeForce RTX 5070") -> Path:
    folder = run / f"step-{step:08d}"
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text("{}")
    (folder / "state.json").write_text(json.dumps({"conditions": {"device": device}}))
    return folder


def test_the_newest_checkpoint_is_found_by_its_name_and_drafts_are_none(tmp_path: Path) -> None:
    assert newest_step(tmp_path / "not there") is None
    for step in (9, 120, 30):
        checkpoint(tmp_path, step)
    checkpoint(tmp_path, 500).rename(tmp_path / "step-00000500.17.tmp")
    (tmp_path / "step-00000600").mkdir()
    assert newest_step(tmp_path) == 120


def test_a_run_stays_on_the_kind_of_device_of_its_newest_checkpoint(tmp_path: Path) -> None:
    assert device_of(tmp_path) is None
    for step, (name, kind) in enumerate({"NVIDIA GeForce RTX 5070": "cuda", "mps": "mps", "cpu": "cpu"}.items()):
        checkpoint(tmp_path, step, name)
        assert device_of(tmp_path) == kind
    checkpoint(tmp_path, 9, None)
    assert device_of(tmp_path) is None, "of another version"
    (tmp_path / "step-00000009/state.json").write_text("{torn")
    assert device_of(tmp_path) is None


def test_a_computer_that_goes_off_while_it_trains_leaves_processes_whose_end_nobody_saw(tmp_path: Path) -> None:
    record = tmp_path / "supervisor.jsonl"
    assert unseen_lives(record, 7) == []
    rows = [{"event": "Began", "step": 1}, {"event": "Ended", "code": 0}, {"event": "Began", "step": 3}, [], {}]
    rows += [{"event": "Began", "step": 3}, {"event": "Began", "step": "x"}]
    record.write_text("\n".join(map(json.dumps, rows)) + '\n{"event": "Beg')
    assert [(life.step_before, life.step_after) for life in unseen_lives(record, 7)] == [(3, 3), (3, None), (None, 7)]
    assert all(life.code is None for life in unseen_lives(record, 7))
