"""The A/B yardstick: its size, its arithmetic over finished runs, and what it still has to do; trains nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tools.ab import MODELS, VOCABULARY, configure, missing, read_rows, table

ARMS = {"old": ["precision=fp32"], "new": ["precision=fp32", "optimizer.bits=8"]}


def row(arm: str, seed: int, loss: float, bits_per_byte: float = 1.5, **others: Any) -> dict[str, Any]:
    facts = {"arm": arm, "seed": seed, "settings": ARMS[arm], "model": "dense", "cpu_s": 200.0}
    scores = {"final_loss": loss, "valid_loss": loss + 1, "bits_per_byte": bits_per_byte, "bigram_bits_per_byte": 1.9}
    return facts | scores | others


@pytest.mark.parametrize("model", MODELS)
def test_the_yardstick_is_the_one_that_the_design_names(tmp_path: Path, model: str) -> None:
    what = configure(tmp_path, model, ["optimizer.bits=8"], 2, "runs/one")
    beside = what.model.active_parameters() - VOCABULARY * what.model.dim
    assert beside == pytest.approx(2e6, rel=0.05)
    assert what.model.vocabulary == VOCABULARY == 8192
    assert what.train.tokens >= 1_000_000
    assert (what.train.seed, what.train.optimizer.bits) == (2, 8)
    assert what.run.dir == tmp_path / "runs/one"


def test_what_is_finished_is_not_made_again_and_seeds_come_in_pairs(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    assert read_rows(path) == []
    path.write_text("\n".join(json.dumps(row(arm, 0, 3.0)) for arm in ("old", "new")) + "\n")
    with open(path, "a", encoding="utf-8") as file:
        file.write('{"arm": "old", "se')  # killed while it wrote
    rows = read_rows(path)
    assert missing(rows, ARMS, "dense", 3) == [("old", 1), ("new", 1), ("old", 2), ("new", 2)]
    assert missing(rows, ARMS, "dense", 1) == []


@pytest.mark.parametrize(("settings", "model"), [(["precision=bf16"], "dense"), (["precision=fp32"], "moe")])
def test_a_finished_run_of_other_settings_ends_the_tool(settings: list[str], model: str) -> None:
    with pytest.raises(SystemExit, match="another name"):
        missing([row("old", 0, 3.0)], {"old": settings}, model, 3)


def test_the_table_has_means_ranges_and_differences_of_the_same_seed() -> None:
    rows = [row("old", 0, 4.0), row("old", 1, 5.0), row("new", 1, 5.1), row("new", 0, 4.04)]
    lines = table(rows, ["old", "new"]).splitlines()
    assert lines[1].split() == ["final_loss", "4.5000", "(4.0000", "to", "5.0000)"]
    # 4.04 / 4 and 5.1 / 5, seed by seed in the order of the file.
    assert "4.5700  (4.0400 to 5.1000)  +1.50 % of old: +2.00 +1.00" in lines[5]
    assert lines[-1] == "bigrams: 1.9000 bits per byte, passed (worst run 1.5000)"


def test_an_arm_above_the_bigrams_makes_the_comparison_say_nothing() -> None:
    rows = [row("old", 0, 4.0), row("new", 0, 4.0, bits_per_byte=1.91)]
    assert "the comparison says nothing (worst run 1.9100)" in table(rows, ["old", "new"])


def test_seeds_that_only_one_arm_has_are_in_no_difference() -> None:
    rows = [row("old", 0, 4.0), row("new", 0, 4.0), row("new", 1, 9.0)]
    assert table(rows, ["old", "new"]).splitlines()[5].endswith(" +0.00 % of old: +0.00")
