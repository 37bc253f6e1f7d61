"""What `fit` and `train` say about the text: enough or too little, held out or not, in screens and in JSON."""

from __future__ import annotations

import re
import shutil
import tomllib
from pathlib import Path

import pytest

from lowvram.api import rehearsals
from lowvram.config.model import ModelConfig
from lowvram.config.run_file import load_preset
from lowvram.data.hf_tokenizer import load_tokenizer
from lowvram.errors import DataError
from tests.fit.test_epochs import pack
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
    assert re.search(r"10\.0M tokens in 39,063 steps: train has \S+ tokens and is read [\d,]+\.\d\d times\.", many.out)
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
    [count] = re.findall(r"^  (512 tokens in 1 step: .*)$", before, re.MULTILINE)
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


def test_a_preset_that_is_named_takes_the_vocabulary_of_the_text(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rehearsed: list[int] = []

    def rehearse(_name: str, model: ModelConfig, *_: object, **__: object) -> None:
        rehearsed.append(model.vocabulary)
        raise DataError("That is enough.")

    monkeypatch.setattr(rehearsals, "rehearse_fit", rehearse)
    words = ("fit", "--gpu", "cpu", "--data", packed / "shards")
    assert "That is enough." in typed(*words, "--model", "tr-25m").err
    ids = load_tokenizer(packed / "tok").size
    said = typed(*words)
    assert said.code == 0
    assert f"one that is named with --model takes the {ids} ids of " in said.err
    assert rehearsed == [ids], "of all presets the rehearsals are known"


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
    assert re.search(r" (h|min) +3\.8 ", rows["tr-25m"])
    assert re.search(r" days +54 ", rows["tr-350m"])
    assert "Passes: how often a preset's own tokens read this text of 130.0M tokens; beyond about 4" in out
    assert re.search(
        r"^A run: tr-25m, .*: the largest dense preset that this text suits and that is expected", out, re.MULTILINE
    )
    found = values(*words)
    assert (found["recommended"], found["text"]["suits_preset"]) == ("tr-25m", "tr-25m")
    assert {model["name"]: model["passes"] for model in found["models"]}["tr-25m"] == pytest.approx(3.846, abs=0.001)


def test_a_text_of_a_few_megabytes_is_not_trained_358_times(tmp_path: Path) -> None:
    pack(tmp_path / "train", 1_400_000)
    (tmp_path / "tok").mkdir()
    words = ("--gpu", "rtx5070", "--desktop", "linux", "--data", tmp_path / "train")
    out = typed("fit", *words).out
    assert out.splitlines()[-2].endswith(" lowvram train tr-25m.toml"), (
        "the file of the command before holds the tokens"
    )
    assert "--set" not in out
    one = typed("fit", *words, "--model", "tr-25m").out
    assert 'What helps: train.tokens = "5.57M", which is 4 passes' in one
    assert "Nothing is held out" in one
    path = tmp_path / "run.toml"
    assert typed("fit", *words, "--out", path).code == 0
    tables = tomllib.loads(path.read_text(encoding="utf-8"))
    assert tables["model"]["preset"] == "tr-25m"
    assert 5_500_000 < tables["train"]["tokens"] <= 4 * 1_400_000
    assert load_preset("tr-25m")[1].tokens == 500_000_000


def test_what_is_shown_beside_a_written_run_is_of_that_run(tmp_path: Path) -> None:
    pack(tmp_path / "train", 1_400_000)
    (tmp_path / "tok").mkdir()
    words = ("--gpu", "rtx5070", "--desktop", "linux", "--data", tmp_path / "train", "--model", "tr-25m")
    whole = values(*words)["models"][0]
    shown = typed("fit", *words, "--out", tmp_path / "run.toml").out
    assert "  5.6M tokens in 85 steps: train has 1.4M tokens and is read 3.98 times." in shown
    assert "500.0M" not in shown
    assert MEMORISES not in shown
    [less] = values(*words, "--out", tmp_path / "other.toml")["models"]
    tokens = tomllib.loads((tmp_path / "other.toml").read_text(encoding="utf-8"))["train"]["tokens"]
    assert less["days"] == pytest.approx(whole["days"] * tokens / 500_000_000, abs=0.001)
    assert whole["disk_bytes"] - less["disk_bytes"] == 2 * (500_000_000 - tokens), "two bytes a token"
    assert less["peak_bytes"] == whole["peak_bytes"]


def test_a_folder_without_shards_is_refused_before_anything_is_judged(tmp_path: Path) -> None:
    assert "holds no shards" in refused("--gpu", "rtx5070", "--data", tmp_path)
    pack(tmp_path / "short", 100)
    out = typed("fit", "--gpu", "rtx5070", "--data", tmp_path / "short").out
    assert "too short" in out
    assert "This text of 100 tokens is too little for tr-25m. One window of tr-25m is 1,025 tokens long." in out
    assert "`lowvram demo` trains a small model in minutes." in out
    assert "un: " not in out, "nothing is recommended"
    assert (
        "A window of seq_len = 1024 takes 1025."
        in typed("fit", "--gpu", "rtx5070", "--data", tmp_path / "short", "--model", "tr-25m").out
    )


@pytest.mark.parametrize("tokens", [100, 2_049, 16 * 1024])
def test_of_a_text_too_little_for_one_step_no_run_file_is_written_unasked(tmp_path: Path, tokens: int) -> None:
    pack(tmp_path / "shards/train", tokens)
    (tmp_path / "tok").mkdir()
    words = ("fit", "--gpu", "rtx5070", "--data", tmp_path / "shards", "--out", tmp_path / "run.toml")
    answer = typed(*words)
    assert answer.code == 1
    assert f"There is nothing to write. This text of {tokens:,} tokens is too little for tr-25m." in answer.err
    assert answer.err.splitlines()[-1].endswith("Or name a preset with --model.")
    assert not (tmp_path / "run.toml").exists()
    found = values("--gpu", "rtx5070", "--data", tmp_path / "shards")
    assert (found["recommended"], found["first_run"], found["first_run_tokens"]) == (None, None, None)
    named = typed(*words, "--model", "tr-60m")
    assert named.code == 0, "who names a preset gets it, with a warning"
    assert f"This text of {tokens:,} tokens is too little for tr-60m." in named.err
    assert (tmp_path / "run.toml").exists()


def test_a_first_run_and_a_long_one_of_one_preset_share_their_file(tmp_path: Path) -> None:
    """A slow card and a text for one preset only: the first run takes an hour, the long one goes on with it."""
    pack(tmp_path / "shards/train", 130_000_000)
    out = typed("fit", "--gpu", "rtx3050-8gb", "--desktop", "linux", "--data", tmp_path / "shards").out
    first, begins, long = re.search(
        r"A first run: tr-25m, .*\n  (.+)\n  (.+)\nA long run: tr-25m, .*\n  (.+)\n", out
    ).groups()
    assert first.endswith(" --model tr-25m --out tr-25m.toml")
    assert re.fullmatch(r"lowvram train tr-25m\.toml --set train\.tokens=\d+M", begins)
    assert long == "lowvram train tr-25m.toml"


def test_what_is_judged_and_what_is_written_are_the_same_folders(tmp_path: Path) -> None:
    """Shards in the folder itself, with and without a folder of held-out text, and an empty folder `valid`."""
    pack(tmp_path / "flat", 20_000_000)
    (tmp_path / "tok").mkdir()
    (tmp_path / "flat/valid").mkdir()
    for is_held_out in (False, True):
        if is_held_out:
            (tmp_path / "flat/valid").rmdir()
            pack(tmp_path / "flat/valid", 50)
        path = tmp_path / f"{is_held_out}.toml"
        assert typed("fit", "--gpu", "rtx5070", "--data", tmp_path / "flat", "--out", path).code == 0
        said = {"train": "flat", "tokenizer": "tok"} | ({"valid": "flat/valid"} if is_held_out else {})
        assert tomllib.loads(path.read_text(encoding="utf-8"))["data"] == said
        assert values("--gpu", "rtx5070", "--data", tmp_path / "flat")["text"]["is_held_out"] == is_held_out
