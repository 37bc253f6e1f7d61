"""The presets' ledgers are what a rehearsal says now: made again where a source of the rehearsal has changed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lowvram.config.plan import TECHNIQUES, Plan
from lowvram.config.run_file import load_preset, preset_names
from lowvram.fit import ledgers
from lowvram.fit.ledgers import (
    PATHS,
    CardPath,
    find_memory_curve,
    hash_of,
    name_plan,
    pack,
    path_of,
    plans_of,
    read_ledgers,
    unpack,
)
from lowvram.fit.rehearse import imagine, rehearse
from lowvram.hardware.profile import load_profile, profile_names
from tools.source_digest import digest_sources

# Below a straight line between two rehearsals lies the truth, above it never.
MOST_OVER = 0.06


def rows() -> list[tuple[str, CardPath, str]]:
    """Every rehearsal in the file: preset, path, plan."""
    table = read_ledgers()["presets"]
    return [(name, path, row) for name in sorted(table) for path in PATHS for row in table[name]["paths"][path.key]]


def plan_of(name: str, row: str) -> Plan:
    _, train = load_preset(name)
    recompute, micro_batch, *words = row.split()
    accumulate = 1 if "once" in words else train.batch_samples // int(micro_batch)
    offload = "optimizer" if "offloaded" in words else "none"
    return Plan(micro_batch=int(micro_batch), accumulate=accumulate, recompute=recompute, offload=offload)


def test_the_file_knows_every_preset_as_it_is_on_every_path() -> None:
    table = read_ledgers()["presets"]
    assert sorted(table) == preset_names()
    for name in preset_names():
        model, train = load_preset(name)
        assert table[name]["hash"] == hash_of(model, train), f"run: python tools/write_ledgers.py {name}"
        for path in PATHS:
            sketch = find_memory_curve(name, model, train, path)
            for plan in plans_of(sketch, path):
                side = sketch if plan.offload == "none" else sketch.offloaded()
                assert side.exactly(plan.recompute, plan.micro_batch).ledger.peak_bytes > model.num_parameters()


def test_every_card_of_the_catalogue_takes_one_of_the_paths() -> None:
    _, train = load_preset("tr-25m")
    known = {path.key for path in PATHS}
    for name in profile_names():
        profile = load_profile(name)
        assert path_of(profile, train.model_copy(update={"precision": profile.dtype})).key in known, name


def rehearsed_otherwise(chosen: list[tuple[str, CardPath, str]]) -> list[str]:
    """Rehearse these rows of the file again; returns those that are other ones now."""
    is_same_torch = torch.__version__.startswith(read_ledgers()["versions"]["torch"])
    wrong = []
    for name, path, row in chosen:
        model, train = load_preset(name)
        train = train.model_copy(update={"precision": path.precision})
        made = pack(rehearse(model, train, plan_of(name, row), imagine(path)))
        kept = read_ledgers()["presets"][name]["paths"][path.key][row]
        # Another torch may take other scratch; the version that wrote the file is held to the byte.
        same = made == kept if is_same_torch else unpack(made).ledger.peak_bytes == pytest.approx(
            unpack(kept).ledger.peak_bytes, rel=0.01
        )  # fmt: skip
        wrong += [] if same else [f"{name} {path.key} {row}: {made} instead of {kept}"]
    return wrong


def test_a_row_of_each_path_is_what_a_rehearsal_says() -> None:
    chosen = [next(row for row in rows() if row[:2] == ("tr-25m", path)) for path in PATHS]
    assert rehearsed_otherwise(chosen) == [], "run: python tools/write_ledgers.py"


@pytest.mark.nightly
def test_after_a_change_of_the_sources_a_row_of_every_preset_on_every_path_is_rehearsed_again() -> None:
    # One change may touch any row, and all of them take a quarter of an hour: `tools/write_ledgers.py --check`.
    if read_ledgers()["versions"].get("sources") == digest_sources("lowvram.fit.rehearse"):
        return
    groups = [[row for row in rows() if row[:2] == (name, path)] for name in preset_names() for path in PATHS]
    # Steps of 7 through the groups' rows meet every technique and every size of a micro-batch.
    chosen = [group[7 * number % len(group)] for number, group in enumerate(groups)]
    assert {row.split()[0] for _, _, row in chosen} == set(TECHNIQUES)
    assert {word for _, _, row in chosen for word in row.split()} >= {"once", "offloaded"}
    assert rehearsed_otherwise(chosen) == [], "run: python tools/write_ledgers.py"


@pytest.mark.parametrize("name, micro_batch", [("tr-25m", 4), ("tiny-llm-v1", 8), ("ismail-512", 8), ("tr-350m", 32)])
@pytest.mark.parametrize("recompute", TECHNIQUES)
def test_between_two_rehearsals_the_line_never_promises_too_much_room(
    name: str, micro_batch: int, recompute: Any
) -> None:
    model, train = load_preset(name)
    path = PATHS[0]
    sketch = find_memory_curve(name, model, train, path)
    line = sketch.at(recompute, micro_batch).ledger.peak_bytes
    plan = Plan(micro_batch=micro_batch, accumulate=train.batch_samples // micro_batch, recompute=recompute)
    truth = rehearse(model, train, plan, imagine(path)).ledger.peak_bytes
    assert truth <= line * 1.0002, "blocks of the allocator are whole"
    assert line <= truth * (1 + MOST_OVER)


def test_a_row_comes_back_as_it_was_packed() -> None:
    name, path, row = rows()[5]
    kept = read_ledgers()["presets"][name]["paths"][path.key][row]
    assert pack(unpack(kept)) == kept
    graphs = unpack(kept)._replace(recorded_bytes=12_345)
    assert unpack(pack(graphs)) == graphs
    assert name_plan(plan_of(name, row)) == row


def test_what_changes_the_step_changes_the_hash_and_what_does_not_leaves_it() -> None:
    model, train = load_preset("tr-25m")
    wider = train.model_copy(update={"optimizer": train.optimizer.model_copy(update={"bits": 16})})
    longer = train.model_copy(update={"seq_len": 2048})
    deeper = model.model_copy(update={"layers": 13})
    hashes = [hash_of(model, train), hash_of(model, wider), hash_of(model, longer), hash_of(deeper, train)]
    assert len(set(hashes)) == 4
    other = {"tokens": 5, "seed": 7, "precision": "fp16"}
    faster = train.optimizer.model_copy(update={"lr": 0.1})
    assert hash_of(model, train.model_copy(update={**other, "optimizer": faster})) == hashes[0]


def test_a_changed_preset_or_an_unknown_path_is_not_answered_from_the_file() -> None:
    model, train = load_preset("tr-25m")
    assert find_memory_curve("tr-25m", model, train, PATHS[0]) is not None
    assert find_memory_curve("tr-25m", model.model_copy(update={"layers": 13}), train, PATHS[0]) is None
    assert find_memory_curve("tr-26m", model, train, PATHS[0]) is None
    assert find_memory_curve("tr-25m", model, train, PATHS[0]._replace(precision="fp32")) is None


def test_a_file_of_another_version_or_damage_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = ledgers.PATH.read_text(encoding="utf-8")
    for content in (
        None,
        text.replace(f'"lowvram": "{json.loads(text)["versions"]["lowvram"]}"', '"lowvram": "0.0.1"'),
        text[:999],
        '{"versions": "0.1.0"}',
        "[]",
    ):
        if content is not None:
            (tmp_path / "ledgers.json").write_text(content, encoding="utf-8")
        monkeypatch.setattr(ledgers, "PATH", tmp_path / "ledgers.json")
        read_ledgers.cache_clear()
        assert read_ledgers() == {}
    monkeypatch.undo()
    read_ledgers.cache_clear()
    assert read_ledgers()
