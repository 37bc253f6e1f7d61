"""What is exported opens in transformers with no code of ours, and computes and spells the same."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from lowvram.convert.hf.config_out import to_hf_config
from lowvram.convert.hf.writer import ExportOptions, estimate_bytes, write_each_tensor
from lowvram.data.text import documents
from lowvram.data.tokenizer import Tokenizer
from lowvram.errors import CheckpointError, DiskFullError, ExportError
from tests.convert.forms import FORMS, REFUSED
from tests.convert.sources import held, speak, write_directory, written
from tests.faulty_disk import FaultyDisk, PowerCut

ABSOLUTE = 1e-4
APOSTROPHES = (
    "Ankara'da, İstanbul'dan ve Iğdır'a",
    "Türkiye’nin 1923’te kurulan Cumhuriyet’i",
    "İzmir'dekilerin 3'üncü, 15'inci ve 100'üncü günü",
    "'tırnak içinde' ve ''çift'' ve ' boşluklu '",
    "O'nun \"Atatürk'ün\" dediği; Mustafa Kemal'in ta kendisi.",
    "I'm, you're, they've, o'clock, rock'n'roll",
    "TBMM'nin, ABD'yle, NATO'ya, AB'ye, TL'lik",
    "Kur'an, mes'ele, san'at, cüz'i, kat'iyen",
    "‘tek’ ‛ters‛ ʼharfʼ ´aksan´ `eğik`",
    "14.35'te  kalkan\ttrenin\n\nçeyrek'e  kadar   ",
    "%20'si, €5'luk, 3,5'lik, -7'den",
    "ŞİŞLİ'DE ÇAĞDAŞ ÖĞRENCİLERİN ÜÇÜ'NÜ",
)


@pytest.mark.parametrize("name", FORMS)
def test_logits_agree_with_what_transformers_opens(name: str, small_tokenizer: Tokenizer, tmp_path: Path) -> None:
    config, kind = FORMS[name]
    model, out = written(config, small_tokenizer, tmp_path / "out")
    twin = AutoModelForCausalLM.from_pretrained(out)
    assert type(twin).__name__ == kind
    assert twin.dtype == torch.float32
    token_BT = torch.randint(0, config.vocabulary, (2, 200), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ours, theirs = model.logits(token_BT), twin(token_BT).logits
    assert ours.std() > 0.3, "logits that hardly vary would agree with anything"
    torch.testing.assert_close(theirs, ours, atol=ABSOLUTE, rtol=0)


@pytest.mark.parametrize("name", FORMS)
def test_nothing_is_missing_or_left_over_for_transformers(
    name: str, small_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    _, out = written(FORMS[name][0], small_tokenizer, tmp_path / "out")
    _, told = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert {key: value for key, value in told.items() if value} == {}


@pytest.mark.parametrize("name", REFUSED)
def test_a_model_without_a_class_is_refused_and_nothing_is_written(
    name: str, small_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    config, words = REFUSED[name]
    with pytest.raises(ExportError) as caught:
        written(config, small_tokenizer, tmp_path / "out")
    assert words in str(caught.value)
    assert all((caught.value.what, caught.value.why, caught.value.fix))
    assert list(tmp_path.iterdir()) == []


def test_ids_are_ours_on_sentences_full_of_apostrophes(
    small_tokenizer: Tokenizer, turkish: tuple[str, ...], tmp_path: Path
) -> None:
    _, out = written(FORMS["gqa-qk_norm"][0], small_tokenizer, tmp_path / "out")
    theirs = AutoTokenizer.from_pretrained(out)
    for text in (*APOSTROPHES, *turkish):
        ids = small_tokenizer.encode(text)
        assert theirs(text, add_special_tokens=False).input_ids == ids, text
        assert theirs(text).input_ids == ids, "nothing is put before or behind"
        assert theirs.decode(ids) == text


def test_ids_are_ours_on_real_sentences(small_tokenizer: Tokenizer, shared_data: Path, tmp_path: Path) -> None:
    _, out = written(FORMS["mla-moe"][0], small_tokenizer, tmp_path / "out")
    theirs = AutoTokenizer.from_pretrained(out)
    texts = documents(shared_data / "text" / "tr_mix_small.valid.txt.gz")
    lines = [unicodedata.normalize("NFC", line) for text in texts for line in text.splitlines()]
    chosen = [line for line in lines if "'" in line or "’" in line][:1_000]
    assert len(chosen) > 100
    for line in chosen:
        assert theirs(line).input_ids == small_tokenizer.encode(line), line


def test_the_chat_template_and_the_special_tokens_come_along(small_tokenizer: Tokenizer, tmp_path: Path) -> None:
    speaking = speak(small_tokenizer, tmp_path / "speaking")
    _, out = written(FORMS["gqa-rope"][0], speaking, tmp_path / "out")
    theirs = AutoTokenizer.from_pretrained(out)
    said = [{"role": "user", "content": "Ankara'da hava nasıl?"}]
    text = theirs.apply_chat_template(said, tokenize=False, add_generation_prompt=True)
    assert text == "<|bos|><|user|>Ankara'da hava nasıl?<|end_of_turn|><|assistant|>"
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (0, 1, 2)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (out / name).read_bytes() == (speaking.directory / name).read_bytes()
    assert json.loads((out / "tokenizer_config.json").read_bytes())["tokenizer_class"] == "PreTrainedTokenizerFast"


def test_a_base_model_goes_out_without_a_template_that_it_has_not_learnt(
    small_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    _, out = written(FORMS["gqa-rope"][0], small_tokenizer, tmp_path / "out")
    assert AutoTokenizer.from_pretrained(out).chat_template is None
    assert Tokenizer.load(out) == small_tokenizer
    assert "chat_template" in small_tokenizer.settings


def test_answers_end_where_ours_do(small_tokenizer: Tokenizer, tmp_path: Path) -> None:
    _, out = written(FORMS["gqa-rope"][0], small_tokenizer, tmp_path / "out")
    found = GenerationConfig.from_pretrained(out)
    assert found.eos_token_id == [small_tokenizer.bos_id, small_tokenizer.eos_id, small_tokenizer.end_of_turn_id]
    assert json.loads((out / "config.json").read_bytes())["eos_token_id"] == found.eos_token_id
    assert (found.temperature, found.top_k, found.top_p, found.repetition_penalty) == (0.8, 50, 0.95, 1.1)
    twin = AutoModelForCausalLM.from_pretrained(out)
    answer = twin.generate(torch.tensor([[0, 40, 50]]), max_new_tokens=4)
    assert answer.shape[1] > 3


@pytest.mark.parametrize("numbers, dtype", [("fp32", torch.float32), ("bf16", torch.bfloat16)], ids=["fp32", "bf16"])
def test_matrices_have_the_numbers_asked_for_and_the_rest_stays_fp32(
    numbers: str, dtype: torch.dtype, small_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    model, out = written(FORMS["mla-moe"][0], small_tokenizer, tmp_path / "out", numbers=numbers)
    tensors = load_file(out / "model.safetensors")
    for name, tensor in tensors.items():
        is_exact = tensor.dim() == 1 or name.endswith("mlp.gate.weight")
        assert tensor.dtype == (torch.float32 if is_exact else dtype), name
    assert torch.equal(tensors["model.embed_tokens.weight"], model.embedding.to(dtype))
    assert AutoConfig.from_pretrained(out).dtype == dtype
    assert AutoModelForCausalLM.from_pretrained(out).dtype == dtype


def test_mixed_numbers_stay_as_they_are_kept(small_tokenizer: Tokenizer, tmp_path: Path) -> None:
    _, source = held(FORMS["gqa-rope"][0])
    for name, tensor in source.tensors.items():
        if tensor.dim() > 1:
            source.tensors[name] = tensor.to(torch.bfloat16)
    write_directory(source, small_tokenizer, tmp_path / "out", ExportOptions(max_positions=64), {})
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert tensors["model.norm.weight"].dtype == torch.float32
    assert tensors["model.layers.0.mlp.up_proj.weight"].dtype == torch.bfloat16
    assert AutoConfig.from_pretrained(tmp_path / "out").dtype == torch.bfloat16


@pytest.mark.parametrize("name, is_copied", [("mla-rope", True), ("gqa-moe-tied", True), ("gqa-rope", False)])
def test_a_tied_head_is_copied_where_others_ask_for_it(
    name: str, is_copied: bool, small_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    _, out = written(FORMS[name][0], small_tokenizer, tmp_path / "out")
    tensors = load_file(out / "model.safetensors")
    assert ("lm_head.weight" in tensors) == is_copied
    assert json.loads((out / "config.json").read_bytes())["tie_word_embeddings"] is True
    if is_copied:
        assert torch.equal(tensors["lm_head.weight"], tensors["model.embed_tokens.weight"])


def test_large_weights_go_into_parts_with_an_index(small_tokenizer: Tokenizer, tmp_path: Path) -> None:
    config, _ = FORMS["mla-moe"]
    model, out = written(config, small_tokenizer, tmp_path / "out", most_bytes=30_000)
    index = json.loads((out / "model.safetensors.index.json").read_bytes())
    parts = sorted(path.name for path in out.glob("*.safetensors"))
    assert len(parts) > 3
    assert parts == sorted(set(index["weight_map"].values()))
    assert parts[0] == f"model-00001-of-{len(parts):05d}.safetensors"
    tensors = {name: tensor for part in parts for name, tensor in load_file(out / part).items()}
    assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in tensors.values())
    assert {name: part for part in parts for name in load_file(out / part)} == index["weight_map"]
    token_BT = torch.arange(40).view(1, -1)
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(out)(token_BT).logits
        torch.testing.assert_close(theirs, model.logits(token_BT), atol=ABSOLUTE, rtol=0)


def test_nothing_is_written_over(small_tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(CheckpointError, match="exists already"):
        written(FORMS["gqa-rope"][0], small_tokenizer, tmp_path / "out")


@pytest.mark.default_cases("cut")
@pytest.mark.parametrize("fault", ["full", "cut"])
def test_whatever_happens_to_the_disk_the_directory_is_whole_or_not_there(
    fault: str, small_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    _, source = held(FORMS["gqa-rope"][0])
    wish, more = ExportOptions(max_positions=64, most_bytes=60_000), {"README.md": b"x"}
    counting = FaultyDisk()
    write_directory(source, small_tokenizer, tmp_path / "whole", wish, more, disk=counting)
    names = sorted(path.name for path in (tmp_path / "whole").iterdir())
    assert "model-00003-of-00003.safetensors" in names
    for at in range(counting.count):
        out = tmp_path / f"out-{at}"
        with pytest.raises((DiskFullError, PowerCut)):
            write_directory(source, small_tokenizer, out, wish, more, disk=FaultyDisk(fault, at))
        assert not out.exists() or sorted(path.name for path in out.iterdir()) == names
        assert not list(tmp_path.glob("*.tmp")), "what a full disk interrupts is cleared away"


def test_progress_ends_with_all_tensors(small_tokenizer: Tokenizer, tmp_path: Path) -> None:
    _, source = held(FORMS["gqa-rope"][0])
    told = list(write_each_tensor(source, small_tokenizer, tmp_path / "out", ExportOptions(64), {}))
    assert told == [(n + 1, len(source.tensors)) for n in range(len(source.tensors))]


@pytest.mark.parametrize("numbers, each", [("fp32", 4), ("bf16", 2), ("fp8", 1), (None, 4)])
def test_bytes_are_estimated_by_the_numbers(numbers: Any, each: int) -> None:
    config, _ = FORMS["gqa-rope"]
    _, source = held(config)
    assert estimate_bytes(source, numbers) == each * config.num_parameters()


@pytest.mark.parametrize("name", FORMS)
def test_both_forms_of_rope_are_written_and_agree(name: str) -> None:
    settings = to_hf_config(FORMS[name][0], 256)
    rope = settings["rope_parameters"]
    assert settings["rope_theta"] == rope["rope_theta"]
    if rope["rope_type"] == "default":
        assert settings["rope_scaling"] is None
    else:
        apart = {"rope_theta", "partial_rotary_factor"}
        assert settings["rope_scaling"] == {"type": "yarn"} | {k: v for k, v in rope.items() if k not in apart}
        assert settings["max_position_embeddings"] == 256
        assert to_hf_config(FORMS[name][0], 32)["max_position_embeddings"] == 64, "as far as YaRN reaches"


def test_experts_are_one_group_and_no_further_tokens_are_predicted() -> None:
    settings = to_hf_config(FORMS["mla-moe"][0], 256)
    assert (settings["n_group"], settings["topk_group"], settings["num_nextn_predict_layers"]) == (1, 1, 0)
    assert settings["max_position_embeddings"] == 256
