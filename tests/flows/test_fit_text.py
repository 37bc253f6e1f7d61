"""What `fit` and `train` say about the text: enough or too little, held out or not, in screens and in JSON."""

from __future__ import annotations

import re
import shutil
import tomllib
from pathlib import Path

import pytest

from lowvram.runfile import load_preset
from tests.fit.test_passes import pack
from tests.flows.test_fit import refused, values
from tests.flows.typed import fill_home, typed

MEMORISES = "Beyond about 4 passes over its text a model memorises it"


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("packed")
    fill_home(home)
    return home


def test_a_run_file_is_told_how_often_its_text_is_read_and_what_helps(packed: Path) -> None:
    words = ("fit", packed / "run.toml", "--gpu", "cpu", "--set", "tokens=10M")
    few, many = typed(*words, "--set", "tokens=512"), typed(*words)
    assert few.code == many.code == 0
    assert MEMORISES not in few.out
    assert MEMORISES in many.out
    assert re.search(r"10\.0M tokens in 39,063 steps: train has \S+ tokens and is read \d+\.\d\d times\.", many.out)
    better = re.search(r'What helps: train\.tokens = "(\S+)", which is 4 passes; or more text, at least', many.out)[1]
    assert MEMORISES not in typed(*words, "--set", f"tokens={better}").out
    assert "Nothing is held out" not in many.out


def test_training_says_the_same_in_a_warning_colour(packed: Path) -> None:
    words = ("--device", "cpu", "--set", "tokens=512", "--set", "batch_tokens=512", "--set", "run.dir=other")
    text = (packed / "run.toml").read_text(encoding="utf-8").replace('valid = "shards/valid"\n', "")
    (packed / "blind.toml").write_text(text, encoding="utf-8")
    pack(packed / "tiny", 65)
    before = typed("fit", packed / "blind.toml", "--gpu", "cpu", *words[2:]).out
    trained = typed("train", packed / "blind.toml", *words)
    assert trained.code == 0, trained.err
    for said in (before, trained.err):
        assert "Nothing is held out: data.valid is not set, so overfitting cannot be seen." in said
    [count] = re.findall(r"^  (512 tokens in 1 steps: .*)$", before, re.MULTILINE)
    assert f"\n{count}\n" in trained.err


def test_json_says_it_for_programs(packed: Path) -> None:
    found = values(packed / "run.toml", "--gpu", "cpu", "--set", "tokens=10M")
    text = found["text"]
    kinds = {key: type(value) for key, value in text.items()}
    assert kinds == {
        "tokens": int,
        "text_bytes": int,
        "is_held_out": bool,
        "suits_parameters": int,
        "suits_preset": type(None),
    }
    assert text["is_held_out"]
    [model] = found["models"]
    windows = (text["tokens"] - 1) // 32
    assert model["passes"] == pytest.approx(39_063 * 8 / windows, rel=1e-3)


def test_a_run_file_whose_shards_come_later_or_are_damaged_is_judged_all_the_same(packed: Path, tmp_path: Path) -> None:
    shutil.copytree(packed / "tok", tmp_path / "tok")
    shutil.copy(packed / "run.toml", tmp_path)
    answer = typed("fit", tmp_path / "run.toml", "--gpu", "cpu")
    assert answer.code == 0
    assert re.search(r"How often the text is read is not known: The folder \S+train does not exist\.", answer.err)
    (tmp_path / "shards/train").mkdir(parents=True)
    (tmp_path / "shards/train/shards.json").write_text("[]", encoding="utf-8")
    answer = typed("fit", tmp_path / "run.toml", "--gpu", "cpu")
    assert answer.code == 0
    assert "is not known: " in answer.err
    assert "run fits: " in answer.out


def test_a_text_says_which_preset_it_is_enough_for(tmp_path: Path) -> None:
    pack(tmp_path / "shards/train", 130_000_000)
    words = ("--gpu", "rtx5070", "--desktop", "linux", "--data", tmp_path / "shards")
    out = typed("fit", *words).out
    assert out.splitlines()[0].split()[4:6] == ["time", "passes"]
    rows = {line.split()[0]: line for line in out.splitlines() if line.startswith("tr-")}
    assert re.search(r" h +3\.8 ", rows["tr-25m"])
    assert re.search(r" days +54 ", rows["tr-350m"])
    assert "Passes: how often a preset's own tokens read this text of 130.0M tokens; beyond about 4" in out
    assert re.search(
        r"^A run: tr-25m, .*: the largest dense preset that this text suits and that sees all", out, re.MULTILINE
    )
    found = values(*words)
    assert (found["recommended"], found["text"]["suits_preset"]) == ("tr-25m", "tr-25m")
    assert {model["name"]: model["passes"] for model in found["models"]}["tr-25m"] == pytest.approx(3.846, abs=0.001)


def test_a_text_of_a_few_megabytes_is_not_trained_358_times(tmp_path: Path) -> None:
    pack(tmp_path / "train", 1_400_000)
    (tmp_path / "tok").mkdir()
    words = ("--gpu", "rtx5070", "--desktop", "linux", "--data", tmp_path / "train")
    out = typed("fit", *words).out
    assert "--set train.tokens=5.57M" in out
    one = typed("fit", *words, "--model", "tr-25m").out
    assert 'What helps: train.tokens = "5.57M", which is 4 passes' in one
    assert "Nothing is held out" in one
    path = tmp_path / "run.toml"
    assert typed("fit", *words, "--out", path).code == 0
    tables = tomllib.loads(path.read_text(encoding="utf-8"))
    assert tables["model"]["preset"] == "tr-25m"
    assert 5_500_000 < tables["train"]["tokens"] <= 4 * 1_400_000
    assert load_preset("tr-25m")[1].tokens == 500_000_000


def test_a_folder_without_shards_is_refused_before_anything_is_judged(tmp_path: Path) -> None:
    assert "holds no shards" in refused("--gpu", "rtx5070", "--data", tmp_path)
    pack(tmp_path / "short", 100)
    out = typed("fit", "--gpu", "rtx5070", "--data", tmp_path / "short").out
    assert "too short" in out
    assert (
        "A window of seq_len = 1024 takes 1025."
        in typed("fit", "--gpu", "rtx5070", "--data", tmp_path / "short", "--model", "tr-25m").out
    )
