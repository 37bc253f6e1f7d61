"""`lowvram fit` on run files: what one needs, what would make it fit, and one that is written and trained."""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

import pytest
import torch

from lowvram.api import rehearsals
from lowvram.api.device import ChosenDevice
from lowvram.config.run_file import load_preset, load_run
from lowvram.hardware.detect import Detected
from lowvram.hardware.profile import load_profile
from tests.fit.test_epochs import pack
from tests.flows.test_fit import kinds, refused, values
from tests.flows.typed import RUN_FILE, fill_home, typed

# 202 M parameters: 8 bytes each for weights and gradients in fp32, too much for a card with 2 GiB wherever AdamW's
# moments lie; in bf16 4 bytes.
LARGE = RUN_FILE.replace("layers = 2\ndim = 32", "layers = 8\ndim = 1024\nvocabulary = 400").replace(
    "hidden = 64", "hidden = 8192"
)


@pytest.fixture
def large(tmp_path: Path) -> Path:
    (tmp_path / "large.toml").write_text(LARGE, encoding="utf-8")
    return tmp_path / "large.toml"


CONTRADICTIONS = {
    "two models": ("{run} --model tr-25m", r"A run file and --model were both given\. Leave one"),
    "set without a run file": (
        "--gpu rtx5070 --set optimizer.bits=8",
        r"\(--set\) of one run only\. Name it: a run file, or a preset \(--model\)\.",
    ),
    "data that is not there": ("--gpu rtx5070 --data shards", r"The folder shards does not exist\."),
    "two texts": ("{run} --data shards", r"--data and \S+large\.toml both name the text\. Leave --data out\."),
    "out of a run file": ("{run} --out new.toml", r"--out has nothing to write: \S+large\.toml is a run file"),
    "out over a file": ("--gpu rtx5070 --out {run}", r"large\.toml exists already\. It is not overwritten"),
    "a card to measure elsewhere": ("--gpu rtx5070 --measure", r"--measure times this machine\. Leave --gpu"),
    "a desktop of this machine": ("--desktop windows", r"--desktop is for a card elsewhere\. Here, what is free now"),
    "a name of two words": ("--gpu RTX 5070", r'There is no run file 5070\. .*in quotes: --gpu "RTX 5070"'),
    "no run file": ("nowhere.toml --gpu rtx5070", r"There is no run file nowhere\.toml"),
    "nothing fits to write": ("--memory 1GB --out new.toml", r"There is nothing to write: no preset fits\. Name one"),
}


@pytest.mark.parametrize("command, message", CONTRADICTIONS.values(), ids=CONTRADICTIONS)
def test_options_that_say_nothing_together_are_answered(large: Path, command: str, message: str) -> None:
    answer = typed("fit", *command.format(run=large).split())
    assert answer.code == 1
    assert re.search(message, answer.err.splitlines()[-1])
    assert large.read_text(encoding="utf-8") == LARGE
    assert not Path("new.toml").exists()


def test_a_run_file_is_judged_with_its_own_tokenizer_and_settings(tmp_path: Path) -> None:
    fill_home(tmp_path)
    words = (tmp_path / "run.toml", "--gpu", "cpu", "--ram", "16GB", "--desktop", "none")
    answer = typed("fit", *words)
    assert answer.code == 0, answer.err
    assert answer.out.startswith("run fits: ")
    assert "no tokenizer" not in answer.err
    [model] = values(*words)["models"]
    what = load_run(tmp_path / "run.toml", [], lambda _: 400)
    assert model["parameters"] == what.model.num_parameters()
    assert model["plan"]["micro_batch"] * model["plan"]["accumulate"] == 8
    [deeper] = values(*words, "--set", "layers=3", "--set", "run.keep=9")["models"]
    assert deeper["parameters"] > model["parameters"]
    assert deeper["disk_bytes"] == 12 * deeper["checkpoint_bytes"] + 2 * 1536


@pytest.mark.nightly
def test_a_run_file_that_does_not_fit_is_told_what_would_and_it_does(large: Path) -> None:
    words = (large, "--memory", "2GB", "--desktop", "none")
    found = values(*words)
    [model] = found["models"]
    assert (found["recommended"], model["fits"], model["fits_without_desktop"]) == (None, False, False)
    assert model["peak_bytes"] > found["limit_bytes_without_desktop"]
    assert (model["plan"]["micro_batch"], model["plan"]["recompute"]) == (1, "block")
    assert found["changes"][0]["sets"] == ["train.weights=bf16"]
    assert any("layers" in change["sets"][-1] for change in found["changes"])
    for change in found["changes"]:
        assert kinds(change) == {"sets": list, "says": str, "peak_bytes": int, "costs": str}
        sets = [word for assignment in change["sets"] for word in ("--set", assignment)]
        changed = values(*words, *sets)
        assert changed["models"][0]["fits"], change
        assert change["peak_bytes"] <= found["limit_bytes"]


WIDE = ("precision=bf16", "layers=2", "model.dim=2048", "seq_len=512", "batch_tokens=16384", "tokens=16384")


@pytest.mark.nightly
def test_a_wide_run_is_told_which_8_bits_are_faster_where_such_a_card_was_measured(
    large: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sets = [word for assignment in WIDE for word in ("--set", assignment)]
    cards = ("rtx5070", "rtx3060-12gb", "rtx2070", "cpu", "m3-max")

    def offered() -> dict[str, list[list[str]]]:
        return {
            gpu: [change["sets"] for change in values(large, "--gpu", gpu, "--desktop", "none", *sets)["faster"]]
            for gpu in cards
        }

    untimed = (
        r"  FP8 and INT8 products are unmeasured on such a card, .*: try `fit` with --measure there, which times both\."
    )
    assert not any(offered().values()), "nobody has timed them there"
    assert re.search(untimed, typed("fit", large, "--gpu", "rtx5070", "--desktop", "none", *sets).out)
    assert not re.search(untimed, typed("fit", large, "--gpu", "m3-max", *sets).out), (
        "no kernel multiplies 8 bits there"
    )
    monkeypatch.setattr(rehearsals, "measured_ids", lambda: cards)
    found = offered()
    assert found["rtx5070"] == [["train.precision=fp8"], ["train.precision=int8"]]
    assert found["rtx3060-12gb"] == [["train.precision=int8"]], "FP8 is decoded there"
    assert found["rtx2070"] == []
    assert found["cpu"] == found["m3-max"] == [], "no kernel multiplies 8 bits there"
    screen = typed("fit", large, "--gpu", "rtx5070", "--desktop", "none", *sets).out
    assert re.search(
        r"  INT8 products \(--set train\.precision=int8\): about \d\.\d times as fast; 0\.6 % more", screen
    )
    assert not re.search(untimed, screen)


@pytest.mark.nightly
def test_the_screen_of_a_run_that_does_not_fit_names_its_largest_lines_and_the_changes(large: Path) -> None:
    answer = typed("fit", large, "--memory", "2GB", "--desktop", "none")
    assert answer.code == 0, "not to fit is an answer"
    assert "There is no tokenizer yet: 400 ids are taken, as the run file or its preset says." in answer.err
    assert answer.out.startswith("large does not fit: 1 sequence × 8 a step, block computed again in backward.")
    assert re.search(r"Its largest lines: weights \S+ MiB, gradients \S+ MiB, \w+ \S+ MiB\.", answer.out)
    assert "    --set train.weights=bf16\n      weights and gradients in bf16; peak " in answer.out
    assert re.search(r"; (no slower|\d\.\d\d times as long|time not known); \w", answer.out), "what it costs"


def test_a_run_that_fits_only_without_a_desktop_is_not_told_to_change(large: Path) -> None:
    answer = typed("fit", large, "--memory", "2GB", "--desktop", "windows", "--set", "layers=3")
    assert answer.out.startswith("large fits only without a desktop: ")
    assert "--set" not in answer.out


def test_a_damaged_tokenizer_is_not_taken_for_none(large: Path) -> None:
    (large.parent / "tok").mkdir()
    assert "There is no tokenizer in " in refused(large, "--memory", "8GB")


def test_a_run_file_without_tokenizer_or_vocabulary_cannot_be_judged(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text(RUN_FILE, encoding="utf-8")
    assert "Train one with `lowvram tokenizer train`" in refused(tmp_path / "run.toml", "--memory", "8GB")


def test_a_run_file_is_written_for_what_is_recommended_and_train_names_its_gaps(tmp_path: Path) -> None:
    path = tmp_path / "new" / "run.toml"
    answer = typed("fit", "--gpu", "rtx2060", "--days", 2, "--out", path)
    assert answer.code == 0, answer.err
    [wrote] = re.findall(r"Wrote .*\n", answer.err)
    assert re.fullmatch(rf"Wrote {path} \((.*), .* (?:h|days), .* k?Wh\): put your folders into it\n", wrote)
    assert (answer.out + answer.err).count(f"lowvram train {path}\n") == 1
    tables = tomllib.loads(path.read_text(encoding="utf-8"))
    recommended = values("--gpu", "rtx2060", "--days", 2)["recommended"]
    assert tables["model"] == {"preset": recommended}
    assert wrote.startswith(f"Wrote {path} ({recommended}, ")
    assert tables["train"] == {"precision": "fp16"}, "RTX 20 has no bf16"
    said = typed("train", path)
    assert said.code == 1
    assert "leaves data.train, data.valid, data.tokenizer open." in said.err
    filled = path.read_text(encoding="utf-8").replace("PUT A FOLDER HERE", "somewhere")
    path.write_text(filled, encoding="utf-8")
    what = load_run(path, [], lambda _: load_preset(recommended)[0].vocabulary)
    assert what.train == load_preset(recommended)[1].model_copy(update={"precision": "fp16"})
    assert what.model == load_preset(recommended)[0]
    assert what.run.dir == tmp_path / "new/runs" / recommended


def test_a_run_file_with_gaps_is_judged_all_the_same(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    assert typed("fit", "--gpu", "rtx5070", "--model", "tr-25m", "--out", path).code == 0
    assert "[train]" not in path.read_text(encoding="utf-8"), "nothing differs from the preset"
    [model] = values(path, "--gpu", "rtx5070", "--set", "layers=1")["models"]
    assert model["parameters"] < load_preset("tr-25m")[0].num_parameters()


SMALL = ("layers=1", "dim=32", "attention.heads=2", "attention.kv_heads=1", "attention.head_dim=16", "ffn.hidden=32")
SHORT = ("seq_len=32", "batch_tokens=64", "tokens=64", "precision=fp32", "sample_every=9", "validate_every=9")


@pytest.mark.parametrize("folder", ["shards", "Ankara'nın gülü"])
def test_with_data_the_written_run_is_trained_at_once(tmp_path: Path, folder: str) -> None:
    fill_home(tmp_path)
    (tmp_path / "shards").rename(tmp_path / folder)
    path = tmp_path / "mine.toml"
    answer = typed("fit", "--gpu", "cpu", "--model", "tr-25m", "--out", path, "--data", tmp_path / folder)
    assert answer.err.endswith(f"): lowvram train {path}\n")
    tables = tomllib.loads(path.read_text(encoding="utf-8"))
    assert tables["data"] == {"train": f"{folder}/train", "valid": f"{folder}/valid", "tokenizer": "tok"}
    sets = [word for assignment in (*SMALL, *SHORT) for word in ("--set", assignment)]
    trained = typed("train", path, *sets, "--device", "cpu")
    assert trained.code == 0, trained.err
    assert "All tokens were seen." in trained.err


@pytest.mark.skipif(sys.platform == "win32", reason="links need a privilege there")
def test_a_run_file_behind_a_link_finds_its_folders(tmp_path: Path) -> None:
    (tmp_path / "far/away").mkdir(parents=True)
    (tmp_path / "near").symlink_to(tmp_path / "far/away")
    fill_home(tmp_path)
    words = ("--model", "tr-25m", "--data", tmp_path / "shards", "--out", tmp_path / "near/run.toml")
    assert typed("fit", "--gpu", "rtx5070", *words).code == 0
    what = load_run(tmp_path / "near/run.toml", [], lambda _: 16_384)
    assert what.data.train[0].path.samefile(tmp_path / "shards/train")
    assert what.data.tokenizer.samefile(tmp_path / "tok")


@pytest.mark.parametrize(
    "present, message",
    [
        (
            (),
            r"has no folder tok, in it or beside it, and no shards\. .* Make both: lowvram tokenizer train TEXTS "
            r"--out '\S+my data/tok', then lowvram data pack TEXTS --tokenizer '\S+my data/tok' --out '.+/train'",
        ),
        (
            ("tok",),
            r"has no shards in \S+my data/train\. .* Make them: lowvram data pack TEXTS --tokenizer '.+tok' "
            r"--out '\S+my data/train'",
        ),
        (
            ("train",),
            r"has no folder tok, in it or beside it\. .* Put the tokenizer there with which the shards were packed, "
            r"as \S+my data/tok; another one does not fit them\.",
        ),
    ],
    ids=["nothing", "only a tokenizer", "only shards"],
)
@pytest.mark.skipif(sys.platform == "win32", reason="quotes are others there")
def test_data_that_lacks_something_is_told_how_to_make_it(
    tmp_path: Path, present: tuple[str, ...], message: str
) -> None:
    data = tmp_path / "my data"
    for name in present:
        if name == "tok":
            (data / name).mkdir(parents=True)
        else:
            pack(data / name, 100)
    words = ("--gpu", "rtx5070", "--out", tmp_path / "run.toml", "--data", data)
    answer = typed("fit", *words)
    assert answer.code == 1
    assert re.search(message, answer.err.splitlines()[-1])
    assert not (tmp_path / "run.toml").exists()


def measures_on(monkeypatch: pytest.MonkeyPatch, profile_id: str, home: Path) -> None:
    """Let this machine be one card, whose torch trains on the processor, and nothing be remembered but in `home`."""
    for name in ("XDG_DATA_HOME", "LOCALAPPDATA", "HOME"):
        monkeypatch.setenv(name, str(home))
    here = Detected(load_profile(profile_id), 8 * 2**30, "A machine.")
    monkeypatch.setattr("lowvram.api.target.detect", lambda: here)
    monkeypatch.setattr("lowvram.api.device.choose_device", lambda _: ChosenDevice(torch.device("cpu")))


@pytest.mark.nightly
def test_what_was_measured_here_is_said_from_then_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measures_on(monkeypatch, "cpu", tmp_path)
    monkeypatch.setattr("lowvram.fit.calibrate._BUDGET_S", 0.01)
    monkeypatch.setattr("lowvram.fit.calibrate._LOAD_S", 0.001)
    fill_home(tmp_path)
    assert values(tmp_path / "run.toml")["models"][0]["is_measured"] is False
    answer = typed("fit", tmp_path / "run.toml", "--measure")
    assert answer.code == 0, answer.err
    for precision in ("fp32", "bf16"):
        kept = rf"Measured: \d+\.\d\d TFLOP/s in products, kept in \S+cpu-{precision}\.json\."
        assert re.search(kept, answer.err), "a processor is asked which numbers are faster"
    assert re.search(r"\nA micro-batch takes \d+\.\d\d times as long in bf16 as in fp32\.\n", answer.err)
    assert "tokens/s (measured on this machine)." in answer.out
    assert values(tmp_path / "run.toml")["models"][0]["is_measured"] is True


def test_the_processor_is_never_measured_in_place_of_a_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measures_on(monkeypatch, "rtx5070", tmp_path)
    said = refused("--measure", "--model", "tr-25m")
    assert said.startswith("Error: GeForce RTX 5070 cannot be timed. torch trains on cpu here. Install a torch for it")
    assert list(tmp_path.iterdir()) == []
