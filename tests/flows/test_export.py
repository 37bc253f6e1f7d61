"""`lowvram export`, as it is typed: what it writes, where it refuses, and what opens it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from lowvram.storage.checkpoint import find_checkpoint
from tests.flows.typed import RUN_FILE, fill_home, typed
from tests.loaded import load_model
from tests.resign import sign_anew

ALIBI = RUN_FILE.replace("[data]", '[model.positions]\nkind = "alibi"\n[data]').replace('dir = "run"', 'dir = "alibi"')


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("home")
    fill_home(folder)
    (folder / "alibi.toml").write_text(ALIBI, encoding="utf-8")
    for name in ("run.toml", "alibi.toml"):
        assert typed("train", folder / name, "--device", "cpu").code == 0
    return folder


@pytest.fixture
def out(home: Path) -> Iterator[Path]:
    yield home / "out"
    shutil.rmtree(home / "out", ignore_errors=True)


def test_a_run_is_exported_with_its_card_and_opens_in_transformers(home: Path, out: Path) -> None:
    answer = typed("export", home / "run", "--to", "hf", "--out", out, "--license", "apache-2.0", "--language", "tr,en")
    assert (answer.code, answer.err) == (0, "")
    assert answer.out.startswith(f"{out}: step 6, ")
    assert f"Next: lowvram chat {out}" in answer.out
    names = {path.name for path in out.iterdir()}
    assert names == {
        "README.md", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
        "tokenizer_config.json", "training.svg",
    }  # fmt: skip
    card = (out / "README.md").read_text(encoding="utf-8")
    assert card.startswith("---\nlicense: apache-2.0\nlanguage:\n- tr\n- en\n")
    assert "| 6 | " in card, "the curve ends at the step that was exported"
    ours, tokenizer = load_model(home / "run", "cpu", "fp32"), AutoTokenizer.from_pretrained(out)
    token_BT = torch.tensor([tokenizer(tokenizer.bos_token + "Ankara'da kış").input_ids])
    assert token_BT[0].tolist() == [0, *ours.tokenizer.encode("Ankara'da kış")]
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(out)(token_BT).logits
        torch.testing.assert_close(theirs, ours.model.logits(token_BT, torch.float32), atol=1e-4, rtol=0)


def test_the_masters_are_exported_to_the_bit(home: Path, out: Path) -> None:
    checkpoint, _ = find_checkpoint(home / "run")
    assert typed("export", checkpoint.directory, "--to", "hf", "--out", out).code == 0
    tensors, weights = load_file(out / "model.safetensors"), checkpoint.weights()
    assert torch.equal(tensors["model.embed_tokens.weight"], weights["embedding"])
    gate_up = torch.cat([tensors[f"model.layers.1.mlp.{half}_proj.weight"] for half in ("gate", "up")])
    assert torch.equal(gate_up, weights["blocks.1.ffn.gate_up_proj.weight"])


def test_bf16_halves_the_weights(home: Path, out: Path) -> None:
    assert typed("export", home / "run", "--to", "hf", "--out", out, "--dtype", "bf16").code == 0
    assert json.loads((out / "config.json").read_bytes())["dtype"] == "bfloat16"
    kept = find_checkpoint(home / "run")[0].directory / "weights.safetensors"
    assert (out / "model.safetensors").stat().st_size < 0.6 * kept.stat().st_size
    assert "Weights: bf16" in (out / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("to", ["hf", "fp8"])
def test_chat_opens_what_was_exported_without_the_original(home: Path, out: Path, to: str, tmp_path: Path) -> None:
    assert typed("export", home / "run", "--to", to, "--out", out).code == 0
    moved = tmp_path / "elsewhere"
    out.rename(moved)
    words = ("--prompt", "Kış", "--temperature", 0, "--tokens", 7, "--device", "cpu", "--precision", "fp32")
    words = words if "--precision" in typed("chat", "--help").out else words[:-2]
    answer = typed("chat", moved, *words)
    assert answer.code == 0
    assert answer.out.startswith("Kış")
    if to == "hf":
        assert answer.out == typed("chat", home / "run", *words).out


def test_evaluate_reads_what_was_exported(home: Path, out: Path) -> None:
    assert typed("export", home / "run", "--to", "fp8", "--out", out).code == 0
    answer = typed("evaluate", out, "--data", home / "shards/valid", "--json", "--device", "cpu")
    found = json.loads(answer.out)
    exact = json.loads(typed("evaluate", home / "run", "--json", "--device", "cpu").out)
    assert found["step"] is None
    assert found["bits_per_byte"] == pytest.approx(exact["bits_per_byte"], rel=0.01)
    answer = typed("evaluate", out, "--device", "cpu")
    assert (answer.code, "Name shards with --data" in answer.err) == (1, True)


def test_nothing_is_overwritten(home: Path, out: Path) -> None:
    out.mkdir()
    answer = typed("export", home / "run", "--to", "hf", "--out", out)
    assert answer.code == 1
    assert "exists already. It is not overwritten. Give --out another name" in answer.err


def test_alibi_is_sent_to_gguf(home: Path, out: Path) -> None:
    for to in ("hf", "fp8"):
        answer = typed("export", home / "alibi", "--to", to, "--out", out)
        assert answer.code == 1
        assert 'positions.kind is "alibi". transformers has no class' in answer.err
        assert "--to gguf" in answer.err
        assert not out.exists()


@pytest.mark.parametrize(
    "words, said",
    [
        (("--to", "fp8", "--dtype", "bf16"), "--dtype bf16 does not go with --to fp8. Leave --dtype out."),
        (("--to", "hf", "--dtype", "q8_0"), "--dtype q8_0 does not go with --to hf. Take one of fp32, bf16"),
        (("--to", "hf", "--license", "mine: all\nmine"), "is no identifier"),
        (("--to", "hf", "--language", "tr: x"), "names no languages"),
    ],
    ids=["fp8", "hf", "license", "language"],
)
def test_options_that_cannot_be_meant_are_named(home: Path, out: Path, words: tuple[str, ...], said: str) -> None:
    answer = typed("export", home / "run", "--out", out, *words)
    assert answer.code == 1
    assert said in answer.err
    assert not out.exists()


def test_what_is_no_run_is_named(home: Path, out: Path) -> None:
    answer = typed("export", home / "shards", "--to", "hf", "--out", out)
    assert (answer.code, answer.out) == (1, "")
    assert f"There is no checkpoint in {home / 'shards'}." in answer.err


def test_a_corrupt_checkpoint_is_passed_over(home: Path, out: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(home / "run", run)
    shutil.copytree(run / "step-00000006", run / "step-00000007")
    (run / "step-00000007" / "weights.safetensors").write_bytes(b"")
    answer = typed("export", run, "--to", "hf", "--out", out)
    assert answer.code == 0
    assert "Passed over a corrupt checkpoint" in answer.err
    assert ": step 6, " in answer.out


def test_a_format_and_a_place_must_be_named(home: Path) -> None:
    assert typed("export", home / "run", "--to", "onnx", "--out", home / "out").code == 2
    assert typed("export", home / "run", "--to", "hf").code == 2


@pytest.mark.parametrize("name", ["run", "alibi"])
@pytest.mark.parametrize("dtype", [(), ("--dtype", "q8_0")], ids=["bf16", "q8_0"])
def test_one_file_for_llama_cpp_is_written_of_either_kind(
    home: Path, name: str, dtype: tuple[str, ...], tmp_path: Path
) -> None:
    gguf = pytest.importorskip("gguf")
    file = tmp_path / "model.gguf"
    answer = typed("export", home / name, "--to", "gguf", "--out", file, *dtype)
    assert (answer.code, answer.err) == (0, "")
    assert answer.out.startswith(f"{file}: ")
    read = gguf.GGUFReader(file)
    assert read.fields["general.architecture"].contents() == ("refact" if name == "alibi" else "llama")
    assert read.fields["tokenizer.ggml.pre"].contents() == "ufakzeka"


def test_a_run_of_an_unknown_kind_is_one_paragraph(home: Path, out: Path, tmp_path: Path) -> None:
    shutil.copytree(home / "run", tmp_path / "run")
    step = tmp_path / "run" / "step-00000006"
    table = json.loads((step / "config.json").read_bytes())
    table["model"]["attention"]["kind"] = "linear"
    (step / "config.json").write_text(json.dumps(table), encoding="utf-8")
    sign_anew(step)
    answer = typed("export", tmp_path / "run", "--to", "hf", "--out", out)
    assert answer.code == 1
    assert "describes a run that this lowvram does not know" in answer.err
