"""The whole road by its commands: text, tokenizer, shards, training, resuming, evaluation, chat."""

from __future__ import annotations

import argparse
import json
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import lowvram
from lowvram.cli.app import COMMANDS, build_parser
from lowvram.cli.train import train
from lowvram.config.run_file import load_run
from lowvram.data.tokenizer import Tokenizer
from lowvram.storage.checkpoint import find_checkpoint
from lowvram.train.events import Stopped
from tests.flows.typed import Output, environment, fill_home, typed, write_home


@pytest.fixture(scope="module")
def road(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Output]]:
    """Every command once or twice, in the order in which a user types them; and what each answered."""
    home = tmp_path_factory.mktemp("road")
    write_home(home)
    pack = ("data", "pack", home / "train.txt", "--tokenizer", home / "tok", "--out", home / "shards/train")
    valid = ("data", "pack", home / "valid.txt", "--tokenizer", home / "tok", "--out", home / "shards/valid")
    training = ("train", home / "run.toml", "--set", "optimizer.lr=5e-3", "--device", "cpu")
    told = {
        "tokenizer": typed("tokenizer", "train", home / "train.txt", "--vocab", 400, "--out", home / "tok"),
        "pack": typed(*pack, "--processes", 1),
    }
    written = (home / "shards/train/00000.bin").stat().st_mtime_ns
    told |= {"pack again": typed(*pack), "pack valid": typed(*valid)}
    whole = ("data", "pack", home / "train.txt", "--tokenizer", home / "tok", "--out", home / "whole")
    told |= {"pack whole": typed(*whole, "--processes", 1)}
    assert (home / "shards/train/00000.bin").stat().st_mtime_ns == written, "a finished shard is not written again"
    told["start"] = typed(*training, "--set", "tokens=1024", "--micro-batch", 2)
    told["resume"] = typed(*training)
    told["finished"] = typed(*training)
    told["evaluate"] = typed("evaluate", home / "run")
    told["json"] = typed("evaluate", home / "run", "--json")
    return home, told


def test_every_command_ends_well(road: tuple[Path, dict[str, Output]]) -> None:
    assert {name: answer.code for name, answer in road[1].items()} == dict.fromkeys(road[1], 0)


def test_a_tokenizer_is_trained_and_the_next_command_named(road: tuple[Path, dict[str, Output]]) -> None:
    home, told = road
    size = Tokenizer.load(home / "tok").size
    first, second = told["tokenizer"].out.splitlines()
    assert first.startswith(f"{home / 'tok'}: {size} ids")
    texts = f"{home / 'train.txt'} --holdout 0.5% --tokenizer {home / 'tok'}"
    assert second == f"Next: lowvram data pack {texts} --out shards"
    assert "--holdout 0.5% leaves out" in told["tokenizer"].err


def test_text_with_little_to_merge_is_said_to_have_given_a_smaller_vocabulary(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("abab abab", encoding="utf-8")
    answer = typed("tokenizer", "train", tmp_path / "text.txt", "--vocab", 9000, "--out", tmp_path / "tok")
    assert "(the text has no more pairs to merge; 9000 ids were asked for)" in answer.out


def test_packing_says_what_came_out_and_the_same_the_second_time(road: tuple[Path, dict[str, Output]]) -> None:
    _, told = road
    pattern = r"\S+/train: \d+\.\dk tokens of 96 documents, 1\d\.\d KiB of text \(\d\.\d\d bytes a token\)\n"
    following = r"Next: lowvram fit --data \S+/shards --out run\.toml  \(which model fits, and a run file for it\)\n"
    assert re.fullmatch(pattern + following, told["pack"].out)
    assert told["pack again"].out == told["pack"].out
    assert "--holdout 0.5% packs that share" in told["pack again"].err
    assert told["pack valid"].err == ""
    assert re.search(r"\nNext: lowvram fit --data \S+/whole --out run\.toml ", told["pack whole"].out)


def test_the_steps_from_text_to_a_run_file_follow_from_one_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "Türkçe Metinler"
    home.mkdir()
    write_home(home)
    (home / "run.toml").unlink()
    # Enough for a step of the smallest preset: below that `fit` writes no run file.
    text = (home / "train.txt").read_text(encoding="utf-8").strip()
    (home / "train.txt").write_text("\n\n".join([text] * 6), encoding="utf-8")
    monkeypatch.chdir(home)
    first = typed("tokenizer", "train", home / "train.txt", "--vocab", 400, "--holdout", "4%")
    words = shlex.split(first.out.splitlines()[-1].removeprefix("Next: lowvram "))
    assert words[2:5] == [str(home / "train.txt"), "--holdout", "4%"]
    assert first.err == ""
    second = typed(*words)
    sides = [re.search(rf"{name}: .* of (\d+) documents", second.out)[1] for name in ("train", "valid")]
    assert sum(map(int, sides)) == 6 * 96
    [warning] = second.err.splitlines()
    assert re.match(r"[\d,]+ tokens of held-out text are few: .* Give --holdout a larger share", warning)
    words = shlex.split(second.out.splitlines()[-1].removeprefix("Next: lowvram ").partition("  (")[0])
    assert typed(*words, "--gpu", "rtx4060").code == 0
    assert load_run(home / "run.toml", [], lambda _: 400).data.valid == home / "shards/valid"


@pytest.mark.parametrize("share", ["0.5", "0%", "100%", "%", "x%", "-1%"])
def test_a_share_is_written_in_percent_since_a_bare_number_could_mean_either(share: str) -> None:
    answer = typed("data", "pack", "a.txt", f"--holdout={share}")
    assert answer.code == 2
    assert "is not a share" in answer.err or "invalid share" in answer.err


def test_training_speaks_on_stderr_only_and_goes_on_where_it_stopped(
    road: tuple[Path, dict[str, Output]],
) -> None:
    home, told = road
    start, resume, finished = (told[name] for name in ("start", "resume", "finished"))
    assert start.out == resume.out == finished.out == ""
    assert "parameters in fp32 on cpu." in start.err
    assert "Plan: 2 sequences × 4 a step (you asked for it)." in start.err
    assert "Going on from" not in start.err
    assert "All tokens were seen." in start.err
    assert f"Going on from {home / 'run' / 'step-00000004'} (step 4 of 6)." in resume.err
    assert "Plan: 2 sequences × 4 a step (this run's plan so far)" in resume.err
    assert re.search(r"step +6  valid \d\.\d{4} bits/byte", resume.err)
    assert "Kış│" in resume.err
    assert "This run was finished before: all of its tokens were seen by step 6." in finished.err
    assert "step 6/6" in resume.err
    assert "step 6/6" not in finished.err
    assert find_checkpoint(home / "run")[0].step == 6


def test_a_set_value_reaches_the_run(road: tuple[Path, dict[str, Output]]) -> None:
    assert find_checkpoint(road[0] / "run")[0].config()["train"]["optimizer"]["lr"] == 5e-3


def test_the_log_holds_both_starts(road: tuple[Path, dict[str, Output]]) -> None:
    rows = [json.loads(line) for line in (road[0] / "run/log.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["step"] for row in rows if row["event"] == "StepDone"] == [1, 2, 3, 4, 5, 6]
    assert [row["step"] for row in rows if row["event"] == "Started"] == [0, 4, 6]


def test_evaluation_prints_the_model_beside_the_bigram_baseline(road: tuple[Path, dict[str, Output]]) -> None:
    home, told = road
    values = json.loads(told["json"].out)
    where, model, bigram, _verdict, _next = told["evaluate"].out.splitlines()
    checkpoint = home / "run" / "step-00000006"
    assert (
        where
        == f"{checkpoint} on {home / 'shards/valid'}: {values['targets']:,} tokens (BOS not counted) in windows of "
        "32, weights in fp32"
    )
    bits, loss, baseline = (values[key] for key in ("bits_per_byte", "loss", "bigram_bits_per_byte"))
    assert model == f"  bits per byte  {bits:.4f}   (loss {loss:.4f} nats per token)"
    assert bigram == f"  bigram model   {baseline:.4f}   (counted on {home / 'shards/train'})"


def test_the_json_of_evaluate_has_exactly_these_keys(road: tuple[Path, dict[str, Output]]) -> None:
    home, told = road
    assert told["json"].out.count("\n") == 1
    values = json.loads(told["json"].out)
    kinds = {key: type(value) for key, value in values.items()}
    assert kinds == {
        "checkpoint": str,
        "step": int,
        "precision": str,
        "data": str,
        "bits_per_byte": float,
        "loss": float,
        "targets": int,
        "bigram_bits_per_byte": float,
    }
    assert (values["step"], values["data"]) == (6, str(home / "shards/valid"))


def test_evaluation_finds_what_training_logged(road: tuple[Path, dict[str, Output]]) -> None:
    home, told = road
    rows = [json.loads(line) for line in (home / "run/log.jsonl").read_text(encoding="utf-8").splitlines()]
    logged = [row for row in rows if row["event"] == "Evaluated"][-1]
    values = json.loads(told["json"].out)
    assert logged["step"] == 6
    assert values["bits_per_byte"] == pytest.approx(logged["bits_per_byte"], rel=1e-5)


@pytest.mark.parametrize("precision", ["fp8", "int8", "bf16"])
def test_evaluation_measures_what_a_precision_loses(precision: str, road: tuple[Path, dict[str, Output]]) -> None:
    home, told = road
    exact = json.loads(told["json"].out)
    values = json.loads(typed("evaluate", home / "run", "--precision", precision, "--json").out)
    assert (values["precision"], exact["precision"]) == (precision, "fp32")
    assert values["targets"] == exact["targets"]
    assert values["bits_per_byte"] != exact["bits_per_byte"]
    assert values["bits_per_byte"] == pytest.approx(exact["bits_per_byte"], rel=0.01)


def test_evaluation_takes_one_checkpoint_other_shards_and_a_part_of_them(
    road: tuple[Path, dict[str, Output]],
) -> None:
    home, _ = road
    words = ("evaluate", home / "run/step-00000004", "--data", home / "shards/train", "--tokens", 100, "--json")
    values = json.loads(typed(*words).out)
    assert (values["step"], values["data"]) == (4, str(home / "shards/train"))
    assert 80 < values["targets"] <= 100


def test_without_training_shards_there_is_no_baseline(tmp_path: Path, road: tuple[Path, dict[str, Output]]) -> None:
    home, told = road
    shards = home / "shards/train"
    shards.rename(tmp_path / "away")
    try:
        values = json.loads(typed("evaluate", home / "run", "--json").out)
        lines = typed("evaluate", home / "run").out.splitlines()
    finally:
        (tmp_path / "away").rename(shards)
    assert values["bigram_bits_per_byte"] is None
    assert values["loss"] == json.loads(told["json"].out)["loss"]
    assert len(lines) == 3
    assert not any("bigram" in line for line in lines)


def ask(home: Path, *words: object) -> Output:
    return typed("chat", home / "run", "--prompt", "Kış geldi", "--tokens", 20, *words)


def test_the_same_seed_gives_the_same_text_and_another_seed_another(
    road: tuple[Path, dict[str, Output]],
) -> None:
    answers = [ask(road[0], "--seed", seed) for seed in (1, 1, 2)]
    assert [answer.code for answer in answers] == [0, 0, 0]
    first, again, other = (answer.out for answer in answers)
    assert first.startswith("Kış geldi")
    assert len(first) > len("Kış geldi\n")
    assert first.endswith("\n")
    assert first == again != other
    assert answers[0].err == ""


def test_temperature_zero_does_not_know_the_seed(road: tuple[Path, dict[str, Output]]) -> None:
    first, other = (ask(road[0], "--temperature", 0, "--seed", seed) for seed in (1, 2))
    assert first.out == other.out
    assert first.out != ask(road[0], "--seed", 1).out


def test_a_prompt_is_normalised_to_composed_letters(road: tuple[Path, dict[str, Output]]) -> None:
    words = ("--temperature", 0, "--tokens", 8)
    composed = typed("chat", road[0] / "run", "--prompt", "g\u00fcl\u015f", *words)
    parted = typed("chat", road[0] / "run", "--prompt", "gu\u0308ls\u0327", *words)
    assert parted.out == composed.out


def test_an_interrupted_run_says_how_to_go_on_and_puts_signals_back(tmp_path: Path) -> None:
    fill_home(tmp_path)
    what = load_run(tmp_path / "run.toml", [], lambda folder: Tokenizer.load(folder).size)
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    assert train(what, device="cpu", stop_at=2) == Stopped(2, is_finished=False)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
    assert find_checkpoint(tmp_path / "run")[0].step == 2
    assert train(what, device="cpu") == Stopped(6, is_finished=True)


def test_the_version_is_a_result() -> None:
    assert typed("--version") == Output(0, f"lowvram {lowvram.__version__}\n", "")


def parsers() -> dict[tuple[str, ...], argparse.ArgumentParser]:
    """Every command and action, by the words that lead to it."""
    found: dict[tuple[str, ...], argparse.ArgumentParser] = {}
    pending: list[tuple[tuple[str, ...], argparse.ArgumentParser]] = [((), build_parser())]
    while pending:
        words, parser = pending.pop()
        found[words] = parser
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                pending += [((*words, name), inner) for name, inner in action.choices.items()]
    return found


def test_every_command_is_known_and_every_folder_of_actions_is_walked() -> None:
    assert {words[0] for words in parsers() if words} == set(COMMANDS)
    assert {("tokenizer", "train"), ("data", "pack")} <= parsers().keys()


@pytest.mark.parametrize("words", parsers(), ids=lambda words: " ".join(words) or "lowvram")
def test_help_names_every_option_and_says_what_it_does(words: tuple[str, ...]) -> None:
    answer = typed(*words, "--help")
    assert (answer.code, answer.err) == (0, "")
    for action in parsers()[words]._actions:
        if isinstance(action, argparse._SubParsersAction):
            assert all(name in answer.out for name in action.choices)
            continue
        assert action.help, f"{action.dest} has no help"
        assert (action.option_strings or [action.metavar or action.dest])[0] in answer.out


@pytest.mark.parametrize(
    "words",
    [(), ("trian",), ("train",), ("data",), ("evaluate", "run", "--device", "tpu"), ("chat", "run", "--tokens", "x")],
    ids=lambda words: " ".join(words) or "nothing",
)
def test_wrong_usage_ends_with_two_and_says_so_on_stderr(words: tuple[str, ...]) -> None:
    answer = typed(*words)
    assert (answer.code, answer.out) == (2, "")
    is_of_command = words in ((), ("trian",), ("data",))
    assert answer.err.startswith("lowvram" if is_of_command else f"usage: lowvram {words[0]} ")
    assert "error:" in answer.err


def test_ctrl_c_outside_of_training_ends_with_130(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("lowvram.data.text_files.find_text_files", interrupt)
    assert typed("tokenizer", "train", tmp_path) == Output(130, "", "Interrupted; what was finished before is kept.\n")


def test_help_and_version_answer_without_loading_torch() -> None:
    code = "import sys; from lowvram.cli.app import build_parser; build_parser().format_help(); print(*sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, env=environment())
    assert not {"torch", "numpy", "pydantic", "rich", "tokenizers"} & set(found.stdout.split())


@pytest.mark.parametrize("said", [None, "ACTIVE"], ids=["by default", "as told"])
def test_waiting_threads_sleep_unless_the_user_says_otherwise(said: str | None) -> None:
    script = (
        "import os, contextlib; from lowvram.cli.app import main\n"
        "with contextlib.suppress(SystemExit): main(['--version'])\n"
        "print(os.environ['OMP_WAIT_POLICY'])"
    )
    chosen = {} if said is None else {"OMP_WAIT_POLICY": said}
    bare = {name: value for name, value in environment().items() if name != "OMP_WAIT_POLICY"}
    found = subprocess.run(
        [sys.executable, "-c", script], env=bare | chosen, capture_output=True, text=True, check=True
    )
    assert found.stdout.split()[-1] == (said or "PASSIVE")
