"""`lowvram.api.load`: a model that writes what `lowvram chat` writes, speaks in turns, and is exported."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lowvram.api import LowvramError, Model, evaluate, load, train
from lowvram.errors import CheckpointError, ConfigError, PromptError, PromptTooLongError, TokenizerError
from tests.flows.typed import fill_home, typed

SAMPLING = {"temperature": 0.9, "top_k": 20, "seed": 7}
WORDS = ("--temperature", 0.9, "--top-k", 20, "--seed", 7, "--tokens", 12, "--device", "cpu")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("home")
    fill_home(folder)
    assert typed("train", folder / "run.toml", "--device", "cpu").code == 0
    return folder


@pytest.fixture(scope="module")
def model(home: Path) -> Model:
    return load(home / "run", device="cpu")


def test_a_prompt_is_continued_as_the_command_continues_it(
    home: Path, model: Model, capsys: pytest.CaptureFixture[str]
) -> None:
    answer = typed("chat", home / "run", "--prompt", "Kış geldi", "--json", *WORDS)
    text = model.generate("Kış geldi", max_tokens=12, **SAMPLING)
    assert text == json.loads(answer.out)["text"]
    assert model.ended == json.loads(answer.out)["ended"]
    assert model.counts.written == json.loads(answer.out)["tokens_written"]
    assert "".join(model.generate("Kış geldi", max_tokens=12, stream=True, **SAMPLING)) == text
    assert model.generate("Kış geldi", max_tokens=12, **{**SAMPLING, "seed": 8}) != text
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("precision", ["fp8", "bf16"])
def test_a_precision_is_the_one_that_was_asked_for(home: Path, precision: str) -> None:
    low = load(home / "run/step-00000006", precision=precision, device="cpu")  # type: ignore[arg-type]
    answer = typed("chat", home / "run", "--prompt", "Kış", "--json", "--precision", precision, *WORDS)
    assert low.precision == precision
    assert low.max_context == 32
    assert low.generate("Kış", max_tokens=12, **SAMPLING) == json.loads(answer.out)["text"]


def test_turns_are_answered_as_the_command_answers_them(home: Path, tmp_path: Path) -> None:
    model = load(home / "run", device="cpu", max_context=200)
    words = ("--as", "dialogue", "--context", 200, "--system", "Kısa yanıtla.")
    answer = typed("chat", home / "run", "--prompt", "Merhaba", "--json", *words, *WORDS)
    assert answer.code == 0, answer.err
    spoken = model.chat("Merhaba", system="Kısa yanıtla.", max_tokens=12, **SAMPLING)
    assert spoken == json.loads(answer.out)["text"]
    turns = [{"role": "system", "content": "Kısa yanıtla."}, {"role": "user", "content": "Merhaba"}]
    assert "".join(model.chat(turns, max_tokens=12, stream=True, **SAMPLING)) == spoken
    more = [*turns, {"role": "assistant", "content": spoken}, {"role": "user", "content": "Neden?"}]
    assert isinstance(model.chat(more, max_tokens=3, **SAMPLING), str)
    assert any("Quality is untested beyond 32 tokens" in notice.text for notice in model.notices)


def test_what_is_wrong_is_an_error_in_three_parts_and_nothing_is_printed(
    home: Path, model: Model, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ConfigError, match=r"There is no temprature\. .*temperature"):
        model.generate("Kış", temprature=1.0)
    with pytest.raises(ConfigError, match=r"There is no zzz\. Known: .*max_tokens, .*newest, .*stream, "):
        model.generate("Kış", zzz=1.0)
    with pytest.raises(ConfigError, match=r"top_p is 7; it takes 1 or less"):
        model.generate("Kış", top_p=7)
    with pytest.raises(PromptTooLongError, match="The context holds 32"):
        model.generate("uzun " * 50)
    with pytest.raises(PromptError, match="The last message is not the user's"):
        model.chat([{"role": "assistant", "content": "Merhaba"}])
    with pytest.raises(ConfigError, match=r"`precision` is 'zz'\. Known: fp8, int8, bf16, fp32\."):
        load(home / "run", precision="zz", device="cpu")
    with pytest.raises(ConfigError, match="Only MLA"):
        load(home / "run", device="cpu", cache="fp8")
    with pytest.raises(CheckpointError):
        load(home / "nowhere", device="cpu")
    with pytest.raises(LowvramError):
        load(home / "run", device="tpu")
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    "method, given, says",
    [
        ("generate", (123,), "`prompt` is 123. That is of type int. Give a text (str)."),
        ("generate", (None,), "`prompt` is None. It may not be left out. Give a text (str)."),
        ("generate", ("Kış", {"max_tokens": "9"}), "`max_tokens` is '9'."),
        ("generate", ("Kış", {"max_tokens": 0}), "`max_tokens` is 0."),
        ("generate", ("Kış", {"stream": 1}), "`stream` is 1."),
        ("chat", (123,), "`messages` is 123."),
        ("chat", (["Merhaba"],), "Turn 0 of `messages` has no text as role and as content."),
        ("chat", ([{"role": "user", "content": 3}],), "Turn 0 of `messages`"),
        ("chat", ("Merhaba", {"system": 3}), "`system` is 3."),
        ("export", (3,), "`out` is 3."),
        ("export", ("out", {"to": "onnx"}), "`to` is onnx. Known: hf, fp8, gguf."),
        ("export", ("out", {"language": None}), "`language` is None."),
        ("export", ("out", {"license": 3}), "`license` is 3."),
    ],
)
def test_an_argument_of_another_type_is_refused_by_its_name(
    model: Model, method: str, given: tuple[object, ...], says: str
) -> None:
    words, named = [word for word in given if not isinstance(word, dict)], given[-1]
    with pytest.raises(LowvramError) as refused:
        getattr(model, method)(*words, **(named if isinstance(named, dict) else {}))
    assert says in str(refused.value)
    assert refused.value.fix


def test_a_model_and_an_evaluation_are_asked_for_by_a_path(home: Path) -> None:
    for ask in (load, evaluate, train):
        with pytest.raises(ConfigError, match=r"is 123\. That is of type int\. Give a text \(str\) or a Path"):
            ask(123)  # type: ignore[operator]
    with pytest.raises(ConfigError, match=r"`cache` is 'fp4'\. Known: plain, fp8\."):
        load(home / "run", device="cpu", cache="fp4")
    with pytest.raises(ConfigError, match=r"`max_context` is 0\."):
        load(home / "run", device="cpu", max_context=0)
    with pytest.raises(ConfigError, match=r"`compile` is 'on'\. That is of type str\. Give True or False\."):
        train(home / "run.toml", device="cpu", compile="on")
    with pytest.raises(ConfigError, match=r"`tokens` is 0\."):
        evaluate(home / "run", device="cpu", tokens=0)


def test_only_the_newest_part_of_a_prompt_is_read_on_request(model: Model) -> None:
    assert model.generate("uzun " * 50, max_tokens=2, newest=True, temperature=0)
    assert model.counts.read < 32


def test_a_model_is_exported_as_the_command_exports_it_and_read_back(
    home: Path, model: Model, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = model.export(tmp_path / "api" / "hf", license="apache-2.0")
    words = ("--to", "hf", "--out", tmp_path / "command" / "hf", "--license", "apache-2.0")
    assert typed("export", home / "run", *words).code == 0
    names = sorted(path.name for path in out.iterdir())
    assert names == sorted(path.name for path in (tmp_path / "command/hf").iterdir())
    assert [name for name in names if (out / name).read_bytes() != (tmp_path / "command/hf" / name).read_bytes()] == []
    outside = load(out, device="cpu")
    assert outside.generate("Kış", max_tokens=12, **SAMPLING) == model.generate("Kış", max_tokens=12, **SAMPLING)
    with pytest.raises(CheckpointError, match="exists already"):
        model.export(out)
    with pytest.raises(ConfigError, match='`dtype="q8_0"` does not go with `to="hf"`'):
        model.export(tmp_path / "other", dtype="q8_0")
    with pytest.raises(CheckpointError):
        outside.export(tmp_path / "again")
    assert capsys.readouterr() == ("", "")


def test_a_model_of_plain_text_without_a_template_says_what_to_ask_it_for(home: Path, tmp_path: Path) -> None:
    out = load(home / "run", device="cpu").export(tmp_path / "hf")
    with pytest.raises(TokenizerError, match="no chat template"):
        load(out, device="cpu").chat("Merhaba")
