"""`lowvram import`, as it is typed: a foreign directory becomes a run to start from or to talk to."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, DeepseekV3Config, DeepseekV3ForCausalLM, LlamaConfig, LlamaForCausalLM

from lowvram.storage.checkpoint import find_checkpoint
from tests.convert.forms import LATENT, SMALL
from tests.data.test_hf_tokenizer import make
from tests.flows.typed import RUN_FILE, fill_home, typed

SCHEDULE = 'tokens = 1536\nseq_len = 32\nbatch_tokens = 256\nprecision = "fp32"'
# The further stage: the imported weights, a schedule of its own.
FURTHER = RUN_FILE.replace('dir = "run"', 'dir = "further"').replace("[train]", '[train]\nstart_from = "imported"')


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("home")
    fill_home(folder)
    (folder / "further.toml").write_text(FURTHER, encoding="utf-8")
    assert typed("train", folder / "run.toml", "--device", "cpu").code == 0
    assert typed("export", folder / "run", "--to", "hf", "--out", folder / "hf").code == 0
    answer = typed("import", folder / "hf", "--out", folder / "imported")
    assert (answer.code, answer.err) == (0, "")
    assert f"{folder / 'imported' / 'step-00000000'}: 31,392 parameters, GQA" in answer.out
    return folder


def test_there_and_back_is_the_same_to_the_bit(home: Path) -> None:
    original, imported = (find_checkpoint(home / name)[0] for name in ("run", "imported"))
    before, after = original.weights(), imported.weights()
    assert sorted(before) == sorted(after)
    assert [name for name in before if not torch.equal(before[name], after[name])] == []
    assert original.config()["model"] == imported.config()["model"]
    assert imported.numbers()["imported_from"] == "hf"


def test_what_was_imported_speaks_like_the_original(home: Path) -> None:
    words = ("--prompt", "Kış", "--temperature", 0, "--tokens", 7, "--device", "cpu")
    found, expected = typed("chat", home / "imported", *words), typed("chat", home / "run", *words)
    assert found.code == 0
    assert found.out == expected.out


def test_a_run_starts_from_what_was_imported(home: Path) -> None:
    answer = typed("train", home / "further.toml", "--device", "cpu")
    assert answer.code == 0
    assert "Beginning with the weights of" in answer.err
    assert find_checkpoint(home / "further")[0].step == 6


def test_what_was_imported_is_exported_again_to_the_byte(home: Path) -> None:
    assert typed("export", home / "imported", "--to", "hf", "--out", home / "again").code == 0
    for name in ("model.safetensors", "config.json", "generation_config.json", "tokenizer.json"):
        assert (home / "again" / name).read_bytes() == (home / "hf" / name).read_bytes(), name


def test_deepseek_as_transformers_writes_it_is_imported_with_a_tokenizer_of_ours(home: Path, tmp_path: Path) -> None:
    config = DeepseekV3Config(**(LATENT | {"vocab_size": 400}))
    torch.manual_seed(0)
    DeepseekV3ForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "theirs", max_shard_size="100KB")
    answer = typed("import", tmp_path / "theirs", "--out", tmp_path / "run", "--tokenizer", home / "tok")
    assert answer.code == 0
    assert "parameters, MLA" in answer.out
    for cache in ("plain", "fp8"):
        answer = typed("chat", tmp_path / "run", "--prompt", "Kış", "--tokens", 3, "--cache", cache, "--device", "cpu")
        assert answer.code == 0
        assert answer.out.startswith("Kış")


def test_a_dialogue_model_speaks_through_the_template_that_lies_with_it(home: Path, tmp_path: Path) -> None:
    theirs = make(tmp_path / "theirs")
    tokenizer = AutoTokenizer.from_pretrained(theirs)
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    tokenizer.save_pretrained(theirs)
    assert (theirs / "chat_template.jinja").is_file(), "beside tokenizer_config.json, as newer transformers keep it"
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**(SMALL | {"vocab_size": 450}))).eval()
    model.save_pretrained(theirs)
    said = typed("import", theirs, "--out", tmp_path / "run")
    assert said.code == 0
    assert f"lowvram chat {tmp_path / 'run'}  (--as dialogue: in turns, it has a chat template)" in said.out
    (theirs / "chat_template.jinja").write_text("{{ 9 ** (9 ** 9) }}{{ messages[0].content }}", "utf-8")
    hostile = typed("import", theirs, "--out", tmp_path / "hostile")
    assert hostile.code == 0
    assert "its chat template cannot be used: The chat template does more than a template may." in hostile.err
    assert "--as dialogue" not in hostile.out
    refused = typed("chat", tmp_path / "hostile", "--as", "dialogue", "--prompt", "Kış", "--device", "cpu")
    assert (refused.code, refused.out) == (1, "")
    assert "It computes an integer of more than 1,024 bits." in refused.err
    tokenizer.save_pretrained(theirs)
    given = [{"role": "system", "content": "Kısa."}, {"role": "user", "content": "Kış geldi mi?"}]
    text = tokenizer.apply_chat_template(given, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")
    found = model.generate(**ids, max_new_tokens=9, do_sample=False, eos_token_id=tokenizer.eos_token_id)
    expected = tokenizer.decode(found[0, ids.input_ids.shape[1] :])
    words = ("--as", "dialogue", "--system", "Kısa.", "--prompt", "Kış geldi mi?", "--json", "--precision", "fp32")
    greedy = ("--temperature", 0, "--repetition-penalty", 1, "--tokens", 9, "--device", "cpu")
    for place in (theirs, tmp_path / "run"):
        answer = typed("chat", place, *words, *greedy)
        assert answer.code == 0
        assert json.loads(answer.out)["text"] == expected


def test_a_model_with_a_tokenizer_of_its_own_is_talked_to_and_trained_further(home: Path, tmp_path: Path) -> None:
    theirs = make(tmp_path / "theirs")
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**(SMALL | {"vocab_size": 450}))).save_pretrained(theirs)
    words = ("--prompt", "Kış", "--temperature", 0, "--tokens", 5, "--device", "cpu")
    direct = typed("chat", theirs, *words)
    assert (direct.code, direct.out[:3]) == (0, "Kış")
    run = tmp_path / "run"
    imported = typed("import", theirs, "--out", run)
    assert imported.code == 0
    assert typed("chat", run, *words).out == direct.out
    for name in ("train", "valid"):
        shards = ("--tokenizer", run / "tokenizer", "--out", tmp_path / "shards" / name)
        assert typed("data", "pack", home / f"{name}.txt", *shards).code == 0
    form = find_checkpoint(run)[0].config()["model"]
    # The tables that the command prints, and what a run file must choose for itself.
    tables = imported.out[imported.out.index("[model]") :]
    for head, below in (("[data]", 'train = "shards/train"\nvalid = "shards/valid"'), ("[train]", SCHEDULE)):
        tables = tables.replace(f"{head}\n", f"{head}\n{below}\n")
    (tmp_path / "further.toml").write_text(f'{tables}\n[run]\ndir = "further"\n', encoding="utf-8")
    answer = typed("train", tmp_path / "further.toml", "--device", "cpu")
    assert (answer.code, form["vocabulary"]) == (0, 450)
    assert typed("export", tmp_path / "further", "--to", "hf", "--out", tmp_path / "again").code == 0
    assert (tmp_path / "again" / "tokenizer.json").read_bytes() == (theirs / "tokenizer.json").read_bytes()


@pytest.mark.parametrize(
    "key, value, said",
    [
        ("n_group", 8, "n_group is 8."),
        ("hidden_act", "gelu", "hidden_act is 'gelu'."),
        ("attention_bias", True, "attention_bias is True."),
        ("rope_scaling", {"rope_type": "llama3", "factor": 8.0}, "rope_type is 'llama3'."),
        ("hidden_size", "wide", "hidden_size is 'wide'"),
        ("hidden_size", 64, "is [400, 32]. config.json asks for [400, 64]"),
        ("model_type", "mamba", "model_type is 'mamba'."),
    ],
)
def test_what_cannot_be_imported_is_named_by_key_and_value(
    home: Path, tmp_path: Path, key: str, value: object, said: str
) -> None:
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    for path in (home / "hf").iterdir():
        (theirs / path.name).write_bytes(path.read_bytes())
    table = json.loads((theirs / "config.json").read_bytes()) | {key: value}
    (theirs / "config.json").write_text(json.dumps(table), encoding="utf-8")
    answer = typed("import", theirs, "--out", tmp_path / "run")
    assert (answer.code, answer.out) == (1, "")
    assert said in answer.err
    assert not (tmp_path / "run").exists()


def test_nothing_is_overwritten(home: Path) -> None:
    answer = typed("import", home / "hf", "--out", home / "run")
    assert answer.code == 1
    assert "exists already. It is not overwritten." in answer.err


def test_a_directory_without_a_tokenizer_is_told_to_name_one(home: Path, tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir()
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "theirs" / name).write_bytes((home / "hf" / name).read_bytes())
    answer = typed("import", tmp_path / "theirs", "--out", tmp_path / "run")
    assert answer.code == 1
    assert "There is no tokenizer in" in answer.err


def test_what_is_no_model_is_named(home: Path, tmp_path: Path) -> None:
    answer = typed("import", home / "shards", "--out", tmp_path / "run")
    assert answer.code == 1
    assert f"There is no {home / 'shards' / 'config.json'}." in answer.err
