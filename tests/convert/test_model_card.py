"""The card tells what checkpoint, log and shards say, and calls unknown what none of them does."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest

from lowvram.config.run import RunConfig
from lowvram.config.run_file import from_portable
from lowvram.convert.model_card import CURVE, Point, Story, draw_curve, read_curve, write_card
from lowvram.storage.checkpoint import Checkpoint, find_checkpoint
from tests.tiny import prepare_home, tiny_run, trainer_of


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Checkpoint, RunConfig]:
    home = tmp_path_factory.mktemp("home")
    prepare_home(home)
    list(trainer_of(tiny_run(home, "mla-moe")).run())
    checkpoint, _ = find_checkpoint(home / "run")
    return checkpoint, from_portable(checkpoint.config(), checkpoint.directory.parent)


def card(run: tuple[Checkpoint, RunConfig], **words: object) -> str:
    files = write_card(Story("kedi", *run, numbers="bf16", weight_bytes=123_456, **words))
    return files["README.md"].decode()


def test_the_front_matter_is_what_the_hub_reads(run: tuple[Checkpoint, RunConfig]) -> None:
    lines = card(run, licence="apache-2.0", languages=("tr", "en")).splitlines()
    assert lines[0] == "---"
    matter = lines[1 : lines.index("---", 1)]
    assert matter[:4] == ["license: apache-2.0", "language:", "- tr", "- en"]
    assert "library_name: transformers" in matter
    assert "pipeline_tag: text-generation" in matter


def test_a_licence_that_nobody_named_is_not_made_up(run: tuple[Checkpoint, RunConfig]) -> None:
    text = card(run)
    assert "license: other\nlicense_name: unknown\n" in text
    assert "Licence: unknown" in text


def test_configuration_recipe_and_data_are_told(run: tuple[Checkpoint, RunConfig]) -> None:
    checkpoint, what = run
    text = card(run)
    assert f"{what.model.num_parameters():,} parameters, of which one token" in text
    for row in (
        "| attention.kv_lora_rank | 16 |",
        "| ffn.experts | 4 |",
        "| seq_len | 32 |",
        "| optimizer.name | adamw |",
    ):
        assert row in text
    assert "Tokens seen: 1.5k." in text
    for value in (
        *checkpoint.manifest["hashes"].values(),
        checkpoint.manifest["files"]["weights.safetensors"]["sha256"],
    ):
        assert f"`{value}`" in text
    assert "| train | 1 | " in text
    assert "| valid | held out | " in text
    assert str(checkpoint.directory.parents[1]) not in text, "paths of this machine are nobody's business"


def test_shards_that_are_not_here_are_called_unknown(run: tuple[Checkpoint, RunConfig], tmp_path: Path) -> None:
    checkpoint, what = run
    data = what.data.model_copy(update={"train": (what.data.train[0].model_copy(update={"path": tmp_path / "gone"}),)})
    text = card((checkpoint, what.model_copy(update={"data": data})))
    assert "| gone | 1 | unknown | unknown | unknown | not on the exporting machine |" in text


def test_a_run_without_a_log_says_so(run: tuple[Checkpoint, RunConfig]) -> None:
    files = write_card(Story("kedi", *run, numbers="bf16", weight_bytes=1))
    assert sorted(files) == ["README.md"]
    assert "its curve is unknown" in files["README.md"].decode()


def test_the_curve_is_a_table_and_a_picture(run: tuple[Checkpoint, RunConfig]) -> None:
    points = [Point(n, 6.0 - n / 100, 2.0 if n % 50 == 0 else None) for n in range(1, 301)]
    files = write_card(Story("kedi", *run, numbers="bf16", weight_bytes=1, points=points))
    text = files["README.md"].decode()
    assert f"({CURVE})" in text
    rows = [line for line in text.splitlines() if line.startswith("| ") and line.endswith("| 2.0000 |")]
    assert rows[-1] == "| 300 | 3.0000 | 2.0000 |"
    assert len(rows) <= 12
    assert "| 1 | 5.9900 |  |" in text
    picture = ElementTree.fromstring(files[CURVE])
    assert picture.tag.endswith("svg")
    assert len(picture.findall("{*}text")) == 5


def test_a_curve_keeps_its_last_point_however_long_it_is() -> None:
    picture = draw_curve([Point(n, 1.0 + 1 / n, None) for n in range(1, 5_001)])
    assert picture is not None
    places = ElementTree.fromstring(picture).find("{*}polyline").attrib["points"].split()
    assert len(places) < 1_000
    x, y = places[-1].split(",")
    assert (float(x), float(y)) == (640 - 44, 260 - 44)
    assert places[0].startswith("44.0,22.0")


@pytest.mark.parametrize("points", [[], [Point(1, 2.0, None)], [Point(1, None, 2.0), Point(2, None, 2.0)]])
def test_fewer_than_two_losses_are_no_curve(points: list[Point]) -> None:
    assert draw_curve(points) is None


def test_equal_losses_are_a_flat_line() -> None:
    assert "nan" not in str(draw_curve([Point(1, 2.0, None), Point(2, 2.0, None)]))


def test_the_log_is_read_up_to_the_step_and_each_step_once(tmp_path: Path) -> None:
    rows = [
        {"event": "StepDone", "step": 1, "loss": 5.0},
        {"event": "StepDone", "step": 2, "loss": 4.0},
        {"event": "Evaluated", "step": 2, "bits_per_byte": 2.5},
        {"event": "StepDone", "step": 2, "loss": 4.5},
        {"event": "StepDone", "step": 3, "loss": None},
        {"event": "Saved", "step": 3},
        {"event": "StepDone", "step": 4, "loss": 1.0},
    ]
    log = tmp_path / "log.jsonl"
    log.write_text("\n".join(map(json.dumps, rows)) + '\n{"event": "StepDo\n[3]\n{"step": "x"}\n', encoding="utf-8")
    assert read_curve(log, 3) == [Point(1, 5.0, None), Point(2, 4.5, 2.5), Point(3, None, None)]
    assert read_curve(tmp_path / "none.jsonl", 3) == []
