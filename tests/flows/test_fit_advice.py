"""What `lowvram fit` recommends to begin with, and how it says what is estimated, slow, or little."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from lowvram.config.run_file import load_preset
from tests.flows.test_fit import table, values
from tests.flows.typed import typed


def test_a_long_run_is_recommended_with_the_reason_and_days_move_it() -> None:
    words = ("--gpu", "rtx3060-12gb", "--desktop", "linux")
    names = []
    for days in (0.3, 21, 400):
        found = values(*words, "--days", days)
        days_of = {model["name"]: model["days"] for model in found["models"] if model["fits"]}
        assert days_of[found["recommended"]] <= days
        said = f": the largest dense preset that is expected to see all of its tokens within {days:g} days."
        out = typed("fit", *words, "--days", days).out
        assert any(said in line for line in out.splitlines() if f"un: {found['recommended']}, " in line)
        names.append(load_preset(found["recommended"])[0].num_parameters())
    assert names == sorted(names)
    assert names[0] < names[2]
    late = typed("fit", *words, "--days", 0.001).out
    assert "the quickest; none is expected to see all of its tokens within 0.001 days." in late


def test_a_first_run_of_an_hour_or_two_and_a_long_one_are_named_with_their_commands() -> None:
    out = typed("fit", "--gpu", "RTX 5070", "--desktop", "linux").out
    one, first, begins, other, long, trains = re.search(
        r"A first run: (\S+), \S+ (?:h|min), .*\n  (.+)\n  (.+)\nA long run: (\S+), .*days.*\n  (.+)\n  (.+)\n", out
    ).groups()
    assert one != other
    for name, command in ((one, first), (other, long)):
        said = f"lowvram fit --gpu 'RTX 5070' --desktop linux --model {name} --out {name}.toml"
        assert command == said, "each has a file of its own: nothing is written over"
    assert (begins, trains) == (f"lowvram train {one}.toml", f"lowvram train {other}.toml")
    found = values("--gpu", "RTX 5070", "--desktop", "linux")
    assert f"--model {found['first_run']} " in first
    assert f"--model {found['recommended']} " in long
    [hours] = [model["days"] * 24 for model in found["models"] if model["name"] == found["first_run"]]
    assert hours <= 2
    assert "Dense models go before mixtures of experts: " in out


def test_a_slow_card_begins_with_fewer_tokens_and_a_processor_with_the_demo() -> None:
    slow = typed("fit", "--gpu", "rtx3050-8gb", "--desktop", "linux").out
    tokens = re.search(
        r"A first run: tr-25m, .* an hour allows\.\n.*\n  lowvram train tr-25m\.toml (--set \S+)\n", slow
    )[1]
    _, train = load_preset("tr-25m", [tokens.removeprefix("--set ")])
    found = values("--gpu", "rtx3050-8gb", "--desktop", "linux")
    assert 0.97 * found["first_run_tokens"] <= train.tokens <= found["first_run_tokens"] < 500e6
    cpu = typed("fit", "--gpu", "cpu", "--ram", "16GB").out
    assert "An hour on CPU is too short for every preset: `lowvram demo` trains a smaller model in minutes." in cpu
    assert "A long run: tr-25m, " in cpu
    assert values("--gpu", "cpu", "--ram", "16GB")["first_run"] is None


def test_a_machine_that_would_take_years_says_so_and_names_what_it_can_do() -> None:
    out = typed("fit", "--gpu", "cpu", "--ram", "16GB", "--desktop", "none", "--model", "tr-1b").out
    assert re.search(r"15\.00B tokens in \d+–\d+ years\.", out)
    assert re.search(
        r"CPU is too slow for tr-1b\. What it can do: train tr-25m in \d+–\d+ days \(--model tr-25m\)\.", out
    )
    rows = table(typed("fit", "--gpu", "cpu", "--ram", "16GB", "--desktop", "none"))
    assert "over a year" in rows["tr-1b"]
    assert any(cell.endswith(" days") for cell in rows["tr-25m"])


@pytest.mark.parametrize("card", ["rtx3060-12gb", "rtx4060", "rtx5070", "rtx5060", "rtx4090", "rtx2060-6gb"])
def test_a_larger_desktop_makes_nothing_faster(card: str) -> None:
    linux, windows = (
        {model["name"]: model for model in values("--gpu", card, "--desktop", desktop)["models"]}
        for desktop in ("linux", "windows")
    )
    for name, here in linux.items():
        if here["fits"] and windows[name]["fits"]:
            assert here["days"] <= windows[name]["days"], name
        assert here["fits"] or not windows[name]["fits"], name


def test_each_prediction_says_that_it_is_estimated() -> None:
    for words in ((), ("--model", "tr-25m"), ("--explain",)):
        assert "estimated; no GeForce has been measured by us yet" in typed("fit", "--gpu", "rtx5070", *words).out
    assert values("--gpu", "rtx5070")["evidence"] == "estimated; no GeForce has been measured by us yet"
    assert values("--memory", "8GB")["evidence"] is None


def test_sizes_are_of_one_kind_and_no_energy_is_none() -> None:
    for card in ("rtx5090", "cpu", "m3-max"):
        for words in ((), ("--model", "tr-25m")):
            out = typed("fit", "--gpu", card, *words).out
            assert not re.search(r"\d [MGT]B\b", out)
            assert not re.search(r"(?<![\d.–])0(\.0)? k?Wh", out)


def test_the_micro_batches_that_explain_the_readmes_table_are_those_of_its_cards() -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    sentence = r"an RTX (\d+) computes (\d+) sequences of `([\w-]+)` at once, the others (\d+)"
    special, one, preset, others = re.search(sentence, readme).groups()
    for card in ("rtx4060", "rtx3060-12gb", "rtx5060", "rtx5070"):
        [model] = values("--gpu", card, "--desktop", "linux", "--model", preset)["models"]
        size = one if card == f"rtx{special}" else others
        assert model["plan"]["micro_batch"] == int(size), card
