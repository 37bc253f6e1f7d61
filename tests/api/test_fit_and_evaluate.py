"""`lowvram.api.fit` and `evaluate`: the values that the commands print, and nothing printed."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import pytest

from lowvram.api import FitResult, LowvramError, evaluate, fit, write_run_file
from lowvram.errors import ConfigError, DataError
from tests.flows.typed import fill_home, typed

NAMED = {"gpu": "rtx5070", "ram": "32GB", "desktop": "linux"}
NAMED_WORDS = ("--gpu", "rtx5070", "--ram", "32GB", "--desktop", "linux")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("home")
    fill_home(folder)
    assert typed("train", folder / "run.toml", "--device", "cpu").code == 0
    return folder


def of_command(*words: object) -> dict[str, object]:
    answer = typed("fit", *words, "--json")
    assert answer.code == 0, answer.err
    found: dict[str, object] = json.loads(answer.out)
    return found


def test_all_presets_are_judged_as_the_command_judges_them(capsys: pytest.CaptureFixture[str]) -> None:
    found = fit(**NAMED)  # type: ignore[arg-type]
    assert isinstance(found, FitResult)
    assert json.loads(json.dumps(found.as_dict())) == of_command(*NAMED_WORDS)
    assert [answer.name for answer in found] == [model["name"] for model in found.as_dict()["models"]]
    assert found.notices[0].text.startswith("GeForce RTX 5070")
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("memory", ["8GB", 8 * 2**30])
def test_a_card_is_named_by_its_memory_too(memory: str | int) -> None:
    assert json.loads(json.dumps(fit(memory=memory, preset="tr-25m", desktop="none").as_dict())) == of_command(
        "--memory", "8GB", "--model", "tr-25m", "--desktop", "none"
    )


@pytest.mark.parametrize("name", ["memory", "ram"])
def test_a_size_that_is_no_bytes_of_any_machine_is_refused_with_the_size_that_was_meant(name: str) -> None:
    with pytest.raises(ConfigError, match=f'`{name}` is 12. A number is a size in bytes.*`{name}="12GB"`'):
        fit(gpu="rtx5070", **{name: 12})  # type: ignore[arg-type]


def test_a_run_file_is_judged_as_the_command_judges_it(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = fit(home / "run.toml", overrides={"optimizer.bits": 8}, micro_batch=2, **NAMED)  # type: ignore[arg-type]
    words = ("--set", "optimizer.bits=8", "--micro-batch", 2, *NAMED_WORDS)
    assert json.loads(json.dumps(found.as_dict())) == of_command(home / "run.toml", *words)
    assert found.models[0].search_result.plan.micro_batch == 2
    assert capsys.readouterr() == ("", "")


def test_what_is_recommended_is_written_as_the_command_writes_it(tmp_path: Path) -> None:
    found = fit(**NAMED)  # type: ignore[arg-type]
    path = write_run_file(found, tmp_path / "api.toml")
    assert typed("fit", *NAMED_WORDS, "--out", tmp_path / "command.toml").code == 0
    assert path.read_bytes() == (tmp_path / "command.toml").read_bytes()
    assert found.recommended is not None
    assert tomllib.loads(path.read_text(encoding="utf-8"))["model"]["preset"] == found.recommended.report.name
    with pytest.raises(ConfigError, match="exists"):
        write_run_file(found, path)


@pytest.mark.parametrize(
    "asked, says",
    [
        ({"gpu": "rtx9999"}, "rtx9999"),
        ({"preset": "tr-9b"}, "tr-9b"),
        ({"memory": "much"}, "`memory` is 'much'"),
        ({"gpu": "rtx5070", "desktop": "abc"}, "`desktop` is 'abc'"),
        ({"overrides": ["layers=2"]}, r"\(`overrides`\) of one run"),
        ({"gpu": "rtx5070", "measure": True}, "`measure` times this machine"),
        ({"data": "nowhere"}, "nowhere"),
        ({"run": 1}, r"`run` is 1\. That is of type int\. Give a text \(str\) or a Path\."),
        ({"gpu": 4060}, r"`gpu` is 4060\."),
        ({"memory": True}, r"`memory` is True\."),
        ({"ram": -1}, r"`ram` is -1\."),
        ({"days": "21"}, r"`days` is '21'\."),
        ({"preset": "tr-25m", "micro_batch": 0}, r"`micro_batch` is 0\."),
        ({"preset": "tr-25m", "recompute": "all"}, r"`recompute` is 'all'\. Known: none, attention, block\."),
        ({"preset": "tr-25m", "overrides": "layers=2"}, r"`overrides` is 'layers=2'\."),
        ({"preset": "tr-25m", "overrides": [2]}, r"`overrides` is 2\."),
    ],
    ids=lambda value: "" if isinstance(value, str) else "-".join(value),
)
def test_what_cannot_be_meant_is_an_error_and_nothing_is_printed(
    asked: dict[str, object], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(LowvramError, match=says):
        fit(**asked)  # type: ignore[arg-type]
    assert capsys.readouterr() == ("", "")


def test_evaluation_finds_what_the_command_finds(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = evaluate(home / "run", device="cpu")
    assert found.as_dict() == json.loads(typed("evaluate", home / "run", "--device", "cpu", "--json").out)
    assert found.bits_per_byte > 0
    assert any("tokens of held-out text are few" in notice.text for notice in found.notices)
    assert (found.step, found.seq_len, found.bigrams_of) == (6, 32, str(home / "shards/train"))
    part = evaluate(home / "run", data=home / "shards/train", tokens=100, precision="bf16", device="cpu", progress=True)
    words = ("--data", home / "shards/train", "--tokens", 100, "--precision", "bf16", "--device", "cpu", "--json")
    assert part.as_dict() == json.loads(typed("evaluate", home / "run", *words).out)
    assert capsys.readouterr() == ("", "")


def test_evaluation_without_held_out_text_says_what_to_give(home: Path, tmp_path: Path) -> None:
    assert typed("export", home / "run", "--to", "hf", "--out", tmp_path / "hf").code == 0
    with pytest.raises(DataError, match=r"names no data\.valid"):
        evaluate(tmp_path / "hf", device="cpu")
