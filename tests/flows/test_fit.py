"""`lowvram fit` as it is typed: the table of presets, one of them line by line, JSON."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from typing import Any

import pytest
from rich.console import Console

from lowvram.cli import console as show
from lowvram.cli import fit_report as verdict
from lowvram.cli import fit_table
from lowvram.config.run_file import load_preset, preset_names
from lowvram.hardware.detect import Detected
from lowvram.hardware.profile import load_profile
from lowvram.units import show_bytes, show_duration_range, show_energy_range
from tests.flows.typed import Output, environment, typed

GIB = 2**30
COLUMNS = ["preset", "parameters", "fits", "peak", "time", "tokens/s", "energy", "plan", "technique", "tokens"]


def values(*words: object) -> dict[str, Any]:
    answer = typed("fit", *words, "--json")
    assert answer.code == 0, answer.err
    assert answer.out.count("\n") == 1
    return json.loads(answer.out)


def table(answer: Output) -> dict[str, list[str]]:
    """The rows by their first word, cells split where there are two spaces."""
    assert answer.code == 0, answer.err
    lines = [line for line in answer.out.splitlines() if line.split("  ")[0].strip() in preset_names()]
    return {line.split()[0]: re.split(r"\s{2,}", line.strip()) for line in lines}


def refused(*words: object, code: int = 1) -> str:
    """The last line of what is said about a command that cannot be meant."""
    answer = typed("fit", *words)
    assert (answer.code, answer.out) == (code, "")
    assert "Traceback" not in answer.err
    return answer.err.splitlines()[-1]


@pytest.mark.parametrize("gpu", ["rtx5070", "RTX 4060 Laptop", "NVIDIA GeForce RTX 3060", "2060", "m3 max", "cpu"])
def test_every_preset_has_its_row_for_whatever_card_is_typed(gpu: str) -> None:
    answer = typed("fit", "--gpu", gpu, "--desktop", "linux")
    rows = table(answer)
    assert sorted(rows) == preset_names()
    sizes = [load_preset(name)[0].num_parameters() for name in rows]
    assert sizes == sorted(sizes), "the smallest first"
    header = answer.out.splitlines()[0]
    assert re.split(r"\s{2,}", header.strip())[: len(COLUMNS)] == COLUMNS
    for name, row in rows.items():
        assert re.search(r"[█░]", row[3]), name
        assert re.fullmatch(r"\d+ × \d+", next(cell for cell in row if "×" in cell))


def test_a_row_says_everything_about_a_model() -> None:
    answer = typed("fit", "--gpu", "rtx5070", "--desktop", "linux")
    [model] = [
        model for model in values("--gpu", "rtx5070", "--desktop", "linux")["models"] if model["name"] == "tr-60m"
    ]
    row = next(line for line in answer.out.splitlines() if line.startswith("tr-60m "))
    low, high = model["tokens_per_second_range"]
    assert low < model["tokens_per_second"] < high
    plan = model["plan"]
    for word in (
        "61.9M",
        "yes",
        f"{model['peak_bytes'] / GIB:.1f} GiB",
        f"{model['tokens_per_second'] / 1000:.1f}k ({low / 1000:.0f}k–{high / 1000:.0f}k)",
        show_duration_range(*(days * 86_400 for days in model["days_range"])),
        show_energy_range(*model["kwh_range"]),
        f"{plan['micro_batch']} × {plan['accumulate']}",
        "1.20B",
        show_bytes(model["written_bytes_per_day"]),
        show_bytes(model["disk_bytes"]),
    ):
        assert word in row, word
    assert re.search(r"the mark │ stands at the \d+\.\d GiB that are left beside a desktop\.", answer.out)
    assert answer.err == "GeForce RTX 5070.\n"


def test_nothing_is_cut_in_a_pipe_and_no_colour_is_in_it() -> None:
    out = typed("fit", "--gpu", "rtx2060-6gb").out
    assert "…" not in out
    assert "\x1b" not in out
    assert "disk needed" in out.splitlines()[0]
    assert "recompute block, bf16 weights, 8-bit Muon" in out


@pytest.mark.parametrize(
    "width, last, has_bar",
    [(60, "time", False), (80, "time", True), (110, "energy", True), (280, "disk needed", True)],
    ids=str,
)
@pytest.mark.parametrize("words", [(), ("--ram", "1GB"), ("--desktop", "windows", "--memory", "6GB")], ids=str)
def test_a_narrow_window_is_told_which_columns_it_leaves_out(
    monkeypatch: pytest.MonkeyPatch, width: int, last: str, has_bar: bool, words: tuple[str, ...]
) -> None:
    window = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None, soft_wrap=True)
    for module in (show, verdict, fit_table):
        monkeypatch.setattr(module, "out", window)
    typed("fit", "--gpu", "rtx5070", *(words or ("--desktop", "linux")))
    text = window.file.getvalue()
    lines = text.splitlines()
    assert max(map(len, lines[: len(preset_names()) + 1])) <= width
    if not words:
        assert lines[0].rstrip().endswith(last)
        assert ("█" in text) == has_bar
    assert all("GiB" in line for line in lines[2 : len(preset_names()) + 1]), "whether it fits and its peak are shown"
    assert "…" not in text
    assert ("A wider window shows also: " in text) == (not lines[0].rstrip().endswith("disk needed"))


@pytest.mark.parametrize("width", [60, 80])
def test_the_lines_of_a_ledger_keep_to_the_window(monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    window = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None, soft_wrap=True)
    for module in (show, verdict):
        monkeypatch.setattr(module, "out", window)
    typed("fit", "--gpu", "rtx5070", "--desktop", "linux", "--model", "tr-25m")
    bars = [line for line in window.file.getvalue().splitlines() if "█" in line]
    assert len(bars) > 3
    assert max(map(len, bars)) <= width


def test_a_name_is_not_needed_where_the_memory_is_said() -> None:
    answer = typed("fit", "--memory", "8GB", "--desktop", "linux")
    assumed = "Without a name its speed is not known, and it is taken for an RTX 30 or later: name an RTX 20."
    assert answer.err == f"NVIDIA card with 8.0 GiB. {assumed}\n"
    assert table(answer)["tr-25m"][2] == "yes"
    assert "A first run: tr-25m: the smallest that is recommended; how fast this card is, is not known." in answer.out
    assert "A long run: tr-1b: the largest dense preset that fits; how fast this card is, is not known." in answer.out
    assert "Time and energy: " not in answer.out
    found = values("--memory", "8GB", "--desktop", "linux")
    assert {model["tokens_per_second"] for model in found["models"]} == {None}
    assert found["limit_bytes"] < values("--memory", "8GB", "--desktop", "none")["limit_bytes"] < 8 * GIB


def test_an_unknown_card_is_answered_with_the_nearest() -> None:
    said = refused("--gpu", "rtx5071")
    assert said.startswith('Error: The catalogue has no card "rtx5071". Did you mean rtx5070')
    assert said.endswith("Without a name, --memory 8GB works for any NVIDIA card.")


def test_an_unknown_preset_is_answered_with_the_nearest() -> None:
    assert "Did you mean tr-60m" in refused("--gpu", "rtx5070", "--model", "tr-61m")


@pytest.mark.parametrize("option", ["--memory", "--ram"])
@pytest.mark.parametrize("size", ["lots", "-8GB", "0", "8 apples"])
def test_memory_that_is_no_size_is_wrong_usage(option: str, size: str) -> None:
    assert refused(f"{option}={size}", code=2).endswith(
        f'argument {option}: \'{size}\' is not a card\'s memory; write it like "8GB", "8 GiB" or "8192MiB"'
    )


@pytest.mark.parametrize("days", ["0", "-3", "nan", "inf", "soon"])
def test_days_that_are_no_days_are_wrong_usage(days: str) -> None:
    assert "argument --days: " in refused("--gpu", "rtx5070", f"--days={days}", code=2)


def test_the_presets_are_answered_without_torch() -> None:
    cards = [["--gpu", "rtx5070"], ["--gpu", "rtx2060-6gb"], ["--gpu", "m3 max", "--ram", "36GB"], ["--memory", "8GB"]]
    script = (
        "import sys; from lowvram.cli.app import main\n"
        f"for words in {[*cards, ['--gpu', 'cpu'], ['--gpu', 'rtx5070', '--model', 'tr-350m', '--explain']]}:\n"
        "    assert main(['fit', *words]) == 0 and main(['fit', *words, '--json']) == 0\n"
        "sys.exit('torch' in sys.modules)"
    )
    found = subprocess.run(
        [sys.executable, "-c", script], env=environment(), check=False, capture_output=True, text=True, encoding="utf-8"
    )
    assert found.returncode == 0, found.stderr


JSON_KEYS = {
    "gpu": str,
    "gpu_name": str,
    "limit_bytes": int,
    "limit_bytes_without_desktop": int,
    "recommended": str,
    "first_run": str,
    "first_run_tokens": int,
    "evidence": str,
    "text": type(None),
    "models": list,
    "changes": list,
    "faster": list,
    "hours": list,
}
MODEL_KEYS = {
    "name": str,
    "parameters": int,
    "active_parameters": int,
    "fits": bool,
    "fits_without_desktop": bool,
    "plan": dict,
    "reason": str,
    "peak_bytes": int,
    "host_bytes": int,
    "kept_on_host_bytes": int,
    "lacks_host_bytes": int,
    "ledger": dict,
    "tokens_per_second": float,
    "tokens_per_second_range": list,
    "is_measured": bool,
    "days": float,
    "days_range": list,
    "kwh": float,
    "kwh_range": list,
    "passes": type(None),
    "checkpoint_bytes": int,
    "saves_beside_training": type(None),
    "written_bytes_per_day": int,
    "disk_bytes": int,
}
PLAN_KEYS = {
    "micro_batch": int,
    "accumulate": int,
    "recompute": str,
    "loss_chunk": type(None),
    "keep_casts": bool,
    "offload": str,
    "compile": bool,
}
LEDGER_KEYS = dict.fromkeys(("weights", "gradients", "optimizer", "activations", "loss", "temporaries"), int)


def kinds(table: dict[str, Any]) -> dict[str, type]:
    return {key: type(value) for key, value in table.items()}


def test_the_json_has_exactly_these_keys() -> None:
    found = values("--gpu", "rtx5070", "--desktop", "linux")
    assert kinds(found) == JSON_KEYS
    assert (found["gpu"], found["changes"]) == ("rtx5070", [])
    assert sorted(model["name"] for model in found["models"]) == preset_names()
    for model in found["models"]:
        assert kinds(model) == MODEL_KEYS
        assert kinds(model["plan"]) == PLAN_KEYS
        assert kinds(model["ledger"]) == LEDGER_KEYS | {"moment": str}
        assert sum(model["ledger"][line] for line in LEDGER_KEYS) == model["peak_bytes"]
        assert model["fits"] == (model["peak_bytes"] <= found["limit_bytes"])


def test_where_a_speed_is_not_known_json_says_null() -> None:
    [model] = values("--memory", "8GB", "--model", "tr-25m")["models"]
    unknown = {key for key, value in model.items() if value is None}
    speed = {"tokens_per_second", "tokens_per_second_range", "is_measured"}
    assert unknown == speed | {"days", "days_range", "kwh", "kwh_range", "passes", "saves_beside_training"}


@pytest.mark.nightly
def test_too_little_host_memory_is_said_and_such_a_model_is_not_recommended() -> None:
    words = ("--gpu", "rtx5070", "--desktop", "linux", "--ram", "1500MB")
    found = values(*words)
    lacking = [model["name"] for model in found["models"] if model["lacks_host_bytes"]]
    assert set(lacking) == set(preset_names()) - {"tiny-llm-v1", "tiny-llm-v2", "tr-25m", "tr-60m"}
    assert {model["name"] for model in found["models"] if model["fits"]} == set(preset_names()) - set(lacking)
    assert found["recommended"] == "tr-60m"
    answer = typed("fit", *words)
    assert {name: row[2] for name, row in table(answer).items()} == {
        name: "too little RAM" if name in lacking else "yes" for name in preset_names()
    }
    assert "The computer's memory of 1.5 GiB is too small for: tr-125m 1.5 GiB, " in answer.out
    one = typed("fit", *words, "--model", "tr-350m").out
    assert one.startswith("tr-350m fits the card, but not the computer's memory: ")
    assert re.search(r"host +2\.3 GiB  in the computer's memory, which has 1\.5 GiB\n", one)
    assert re.search(r"The computer lacks 8\d\d\.\d MiB of memory for it\.", one)
    assert {model["lacks_host_bytes"] for model in values(*words[:-1], "16GB")["models"]} == {0}


def test_a_mac_has_the_memory_that_is_stated() -> None:
    small, large = (values("--gpu", "m3-max", "--ram", ram) for ram in ("36GB", "128GB"))
    assert 24 * GIB < small["limit_bytes"] == small["limit_bytes_without_desktop"] < 27 * GIB
    assert large["limit_bytes"] > 90 * GIB
    assert {model["kwh"] for model in small["models"]} == {None}, "nobody says what the chip draws"
    assert "36.0 GiB is taken" in typed("fit", "--gpu", "m3-max").err


def test_a_card_that_is_here_has_what_is_free_now(monkeypatch: pytest.MonkeyPatch) -> None:
    profile = load_profile("rtx5070")
    for free_bytes in (5 * GIB, 64 * GIB):
        found = Detected(profile, free_bytes, "A card.")
        monkeypatch.setattr("lowvram.api.target.detect", lambda found=found: found)
        seen = values("--ram", "32GB")
        assert seen["limit_bytes"] == profile.limit_bytes("none", None, free_bytes)
        assert seen["limit_bytes_without_desktop"] == profile.limit_bytes("none")
    monkeypatch.setattr("lowvram.api.target.detect", lambda: Detected(profile, 5 * GIB, "A card."))
    answer = typed("fit")
    assert answer.err == "A card.\n"
    assert table(answer)["tr-350m"][2] == "yes"
    assert "that are left beside other programs." in answer.out
    assert values("--gpu", "rtx5070", "--desktop", "windows")["limit_bytes"] < profile.limit_bytes("none")


def test_one_preset_is_shown_line_by_line_and_the_lines_add_up() -> None:
    words = ("--gpu", "rtx3060-12gb", "--desktop", "linux", "--model", "tr-25m")
    [model] = values(*words)["models"]
    out = typed("fit", *words).out
    assert out.startswith(f"tr-25m fits: {model['plan']['micro_batch']} sequences × ")
    for line in LEDGER_KEYS:
        shown = re.search(rf"^  {line} +([\d.]+) (\S+)", out, re.MULTILINE)
        unit = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30}[shown[2]]
        assert float(shown[1]) * unit == pytest.approx(model["ledger"][line], rel=0.06)
    assert re.search(rf"^  peak +\S+ GiB  during {model['ledger']['moment']}$", out, re.MULTILINE)
    assert re.search(r"\d+\.\dk–\d+\.\dk tokens/s \(estimated; no GeForce has been measured by us yet\)\.", out)
    assert re.search(r"500\.0M tokens in \d\.\d–\d\.\d h, [\d.]+–[\d.]+ k?Wh\.", out)
    assert "A checkpoint has " in out


def test_one_sequence_is_one() -> None:
    out = typed("fit", "--gpu", "rtx2060-6gb", "--desktop", "linux", "--model", "tr-350m").out
    assert out.startswith("tr-350m fits: 1 sequence × 128 a step, attention computed again in backward.")
    assert "1 sequence at a time is the most that fits" in out


def test_why_is_explained_once_for_the_card_and_once_for_each_model() -> None:
    out = typed("fit", "--gpu", "rtx2060-6gb", "--desktop", "linux", "--explain").out
    why = out[out.index("\nlimit: ") :].splitlines()[1:]
    topics = [line.partition(":")[0] for line in why]
    assert topics[:5] == ["limit", "attention", "precision", "speed", "recommendation"]
    assert sorted(topics[5:]) == preset_names()
    assert "fp16, this card has tensor cores for it and none for bf16" in out
    assert "FlashAttention needs an RTX 30 or later" in out
    assert "8-bit Muon, as the recipe says" in next(line for line in why if line.startswith("tr-350m"))
    quiet = typed("fit", "--gpu", "rtx5070", "--explain", "--json")
    assert json.loads(quiet.out)["gpu"] == "rtx5070"
    assert "attention: a fused kernel" in quiet.err


def test_a_presets_values_can_be_set_its_precision_too() -> None:
    plain = values("--gpu", "rtx5070", "--model", "tr-25m", "--micro-batch", "2", "--recompute", "none")["models"][0]
    exact = ("--set", "precision=fp32", "--micro-batch", "2", "--recompute", "none")
    exact = values("--gpu", "rtx5070", "--model", "tr-25m", *exact)["models"][0]
    # A preset's plan comes from the file, in which nothing is spent on longer chunks and kept casts.
    spent = {"loss_chunk", "keep_casts"}
    assert {k: v for k, v in exact["plan"].items() if k not in spent} == {
        k: v for k, v in plain["plan"].items() if k not in spent
    }
    assert exact["peak_bytes"] > plain["peak_bytes"]
    assert exact["tokens_per_second"] < plain["tokens_per_second"]


@pytest.mark.nightly
def test_where_what_was_asked_for_does_not_fit_no_change_of_the_run_is_proposed() -> None:
    answer = typed("fit", "--gpu", "rtx3060", "--model", "tr-350m", "--micro-batch", "64", "--recompute", "none")
    assert "does not fit: 64 sequences × 2" in answer.out
    assert "leave --micro-batch and --recompute out" in answer.out
    assert "--set" not in answer.out


@pytest.mark.parametrize("words, said", [(("--memory", "6144"), "6144MiB"), (("--gpu", "rtx 5070 tı"), "5070 Ti")])
def test_what_people_type_is_understood_or_answered(words: tuple[str, ...], said: str) -> None:
    answer = typed("fit", *words, "--model", "tr-25m")
    assert said in answer.err
    assert answer.code == (2 if "6144" in words else 0)
