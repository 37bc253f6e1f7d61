"""What is written as GGUF is read again with the package's own reader: keys, tensors to the bit, tokenizer, faults."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lowvram_kernels.quant.quantise import dequantise, quantise_weight

from lowvram.config.architecture import Alibi, Gqa, Mla, Moe, Rope, SwiGlu, Window, Yarn
from lowvram.convert.gguf.llama_cpp import architecture_of
from lowvram.convert.gguf.writer import write_gguf
from lowvram.data.tokenizer import SPECIALS, Tokenizer, train_tokenizer
from lowvram.errors import DiskFullError, ExportError, MachineError
from tests.conftest import TURKISH
from tests.convert.models import FORMS, VOCABULARY, hold, small
from tests.convert.sources import speak
from tests.faulty_disk import FaultyDisk, PowerCut

gguf = pytest.importorskip("gguf")

each_form = pytest.mark.parametrize("form", FORMS)
CONTEXT_LEN = 96


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return train_tokenizer(iter(TURKISH), VOCABULARY, tmp_path_factory.mktemp("tokenizer"))


def read(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray], dict[str, str]]:
    """Return a file's keys, its tensors as numbers, and what each is kept in."""
    reader = gguf.GGUFReader(path)
    keys = {name: field.contents() for name, field in reader.fields.items()}
    tensors = {t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in reader.tensors}
    return keys, tensors, {t.name: t.tensor_type.name for t in reader.tensors}


@each_form
def test_every_number_of_the_model_is_in_the_file_exactly_once(form: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    architecture, config = FORMS[form]
    model, source = hold(config)
    written = write_gguf(source, tokenizer, tmp_path / "model.gguf", CONTEXT_LEN, "f32")
    keys, tensors, kinds = read(written.path)
    assert keys["general.architecture"] == architecture
    assert keys[f"{architecture}.context_length"] == CONTEXT_LEN
    assert keys[f"{architecture}.block_count"] == config.layers
    assert set(kinds.values()) == {"F32"}
    assert written.tensors == len(tensors)
    assert written.size_bytes == written.path.stat().st_size
    ours = torch.cat([tensor.flatten() for tensor in model.state_dict().values()]).sort().values
    theirs = np.sort(np.concatenate([tensor.ravel() for tensor in tensors.values()]))
    np.testing.assert_array_equal(ours.numpy(), theirs)


def test_an_mla_files_numbers_say_that_one_latent_is_key_and_value(tokenizer: Tokenizer, tmp_path: Path) -> None:
    _, source = hold(FORMS["deepseek-moe-q_lora-yarn-mscale"][1])
    written = write_gguf(source, tokenizer, tmp_path / "model.gguf", CONTEXT_LEN)
    keys, _, _ = read(written.path)
    expected = {
        "attention.head_count": 3,
        "attention.head_count_kv": 1,
        "attention.key_length": 40 + 16,
        "attention.value_length": 40,
        "attention.key_length_mla": 24 + 16,
        "attention.value_length_mla": 20,
        "attention.q_lora_rank": 36,
        "rope.dimension_count": 16,
        "leading_dense_block_count": 1,
        "expert_count": 5,
        "expert_used_count": 2,
        "expert_shared_count": 2,
        "expert_feed_forward_length": 44,
        "expert_weights_scale": 1.5,
        "expert_weights_norm": True,
        "expert_gating_func": int(gguf.ExpertGatingFuncType.SIGMOID),
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": 8.0,
        "rope.scaling.original_context_length": 32,
        "rope.scaling.yarn_log_multiplier": pytest.approx(0.0707),
    }
    assert {key: keys[f"deepseek2.{key}"] for key in expected} == expected


def test_without_q_lora_the_rank_is_written_as_0(tokenizer: Tokenizer, tmp_path: Path) -> None:
    _, source = hold(FORMS["deepseek-dense"][1])
    keys, _, _ = read(write_gguf(source, tokenizer, tmp_path / "model.gguf", CONTEXT_LEN).path)
    assert keys["deepseek2.attention.q_lora_rank"] == 0
    assert keys["deepseek2.leading_dense_block_count"] == 3
    assert "deepseek2.expert_count" not in keys


def test_tensors_are_cut_and_turned_as_llama_cpp_wants_them(tokenizer: Tokenizer, tmp_path: Path) -> None:
    model, source = hold(FORMS["deepseek-moe"][1])
    _, tensors, _ = read(write_gguf(source, tokenizer, tmp_path / "model.gguf", CONTEXT_LEN, "f32").path)
    ours = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    both = ours["blocks.1.attention.kv_b_proj.weight"].reshape(3, 24 + 20, 40)
    np.testing.assert_array_equal(tensors["blk.1.attn_k_b.weight"], both[:, :24].swapaxes(1, 2))
    np.testing.assert_array_equal(tensors["blk.1.attn_v_b.weight"], both[:, 24:])
    np.testing.assert_array_equal(tensors["blk.1.ffn_up_exps.weight"], ours["blocks.1.ffn.gate_up_EHD"][:, 44:])
    np.testing.assert_array_equal(tensors["blk.0.ffn_gate.weight"], ours["blocks.0.ffn.gate_up_proj.weight"][:172])
    np.testing.assert_array_equal(tensors["blk.2.exp_probs_b.bias"], ours["blocks.2.ffn.router.bias_E"])


def test_only_the_architecture_llama_has_its_rotated_rows_reordered(tokenizer: Tokenizer, tmp_path: Path) -> None:
    for form, order in (("llama", np.arange(24).reshape(2, 12).T.ravel()), ("qwen3", np.arange(24))):
        model, source = hold(FORMS[form][1])
        _, tensors, _ = read(write_gguf(source, tokenizer, tmp_path / f"{form}.gguf", CONTEXT_LEN, "f32").path)
        ours = model.state_dict()["blocks.0.attention.k_proj.weight"].numpy()
        np.testing.assert_array_equal(tensors["blk.0.attn_k.weight"][24:], ours[24:][order])
        values = model.state_dict()["blocks.0.attention.v_proj.weight"].numpy()
        np.testing.assert_array_equal(tensors["blk.0.attn_v.weight"], values)


@pytest.mark.parametrize("numbers, relative", [("f16", 2**-11), ("bf16", 2**-8), ("q8_0", 2**-6)])
def test_matrices_are_rounded_and_what_computes_in_fp32_is_not(
    numbers: Any, relative: float, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    mla = Mla(heads=2, kv_lora_rank=64, nope_dim=32, rope_dim=32, value_dim=32)
    config = small(dim=96, attention=mla, ffn=_moe(64))
    model, source = hold(config)
    written = write_gguf(source, tokenizer, tmp_path / "model.gguf", CONTEXT_LEN, numbers)
    keys, tensors, kinds = read(written.path)
    assert written.kept_wider == ()
    assert keys["general.file_type"] == gguf.LlamaFileType[f"MOSTLY_{numbers.upper()}"]
    fp32 = {name for name, kind in kinds.items() if kind == "F32"}
    assert all(tensors[name].ndim == 1 or "ffn_gate_inp" in name for name in fp32)
    assert {kind for name, kind in kinds.items() if name not in fp32} == {numbers.upper()}
    assert "blk.1.ffn_gate_inp.weight" in fp32
    ours = model.state_dict()["embedding"].numpy()
    theirs = tensors["token_embd.weight"]
    assert 0 < np.abs(theirs - ours).max() <= relative * np.abs(ours).max()


def _moe(hidden: int) -> Moe:
    return Moe(hidden=hidden, dense_layers=1, experts=4, top_k=2, shared=1, expert_hidden=32)


def test_rows_that_no_block_of_32_cuts_stay_in_f16_and_are_named(tokenizer: Tokenizer, tmp_path: Path) -> None:
    config = small(dim=64, attention=Gqa(heads=2, kv_heads=1, head_dim=32), ffn=SwiGlu(hidden=40))
    written = write_gguf(hold(config)[1], tokenizer, tmp_path / "model.gguf", CONTEXT_LEN, "q8_0")
    _, _, kinds = read(written.path)
    assert written.kept_wider == tuple(f"blk.{layer}.ffn_down.weight" for layer in range(3))
    assert {name for name, kind in kinds.items() if kind == "F16"} == set(written.kept_wider)


def test_weights_in_8_bits_are_decoded_on_the_way(tokenizer: Tokenizer, tmp_path: Path) -> None:
    _, source = hold(FORMS["llama"][1])
    name = "blocks.0.attention.v_proj.weight"
    scaled = quantise_weight(source.weights[name], "e4m3")
    source.weights[name] = scaled
    _, tensors, _ = read(write_gguf(source, tokenizer, tmp_path / "model.gguf", CONTEXT_LEN, "f32").path)
    np.testing.assert_array_equal(tensors["blk.0.attn_v.weight"], dequantise(scaled, torch.float32).numpy())


def test_the_tokenizer_goes_along_whole(tokenizer: Tokenizer, tmp_path: Path) -> None:
    _, source = hold(FORMS["llama"][1])
    said = {"name": "Küçük", "license": "cc-by-sa-4.0"}
    keys, _, _ = read(write_gguf(source, tokenizer, tmp_path / "model.gguf", CONTEXT_LEN, metadata=said).path)
    model = tokenizer.parsed("tokenizer.json")["model"]
    assert {f"general.{key}": keys[f"general.{key}"] for key in said} == {f"general.{k}": v for k, v in said.items()}
    assert keys["tokenizer.ggml.model"] == "gpt2"
    assert keys["tokenizer.ggml.pre"] == "ufakzeka"
    tokens = keys["tokenizer.ggml.tokens"]
    assert {token: id for id, token in enumerate(tokens)} == model["vocab"]
    assert keys["tokenizer.ggml.merges"] == [f"{first} {second}" for first, second in model["merges"]]
    types = keys["tokenizer.ggml.token_type"]
    control = [token for token, kind in zip(tokens, types, strict=True) if kind == gguf.TokenType.CONTROL]
    assert control == list(SPECIALS)
    ids = {name: tokens[keys[f"tokenizer.ggml.{name}_token_id"]] for name in ("bos", "eos", "padding", "mask")}
    assert ids == {
        "bos": "<|bos|>",
        "eos": "<|bos|>",  # packed texts end where the next one begins
        "padding": "<|pad|>",
        "mask": "<|mask|>",
    }
    assert keys["tokenizer.ggml.add_bos_token"] is True
    assert "tokenizer.ggml.eot_token_id" not in keys
    assert "tokenizer.chat_template" not in keys
    speaking = speak(tokenizer, tmp_path / "speaking")
    keys, _, _ = read(write_gguf(source, speaking, tmp_path / "speaks.gguf", CONTEXT_LEN).path)
    assert tokens[keys["tokenizer.ggml.eot_token_id"]] == "<|end_of_turn|>"
    assert keys["tokenizer.chat_template"] == tokenizer.settings["chat_template"]


_GQA = Gqa(heads=4, kv_heads=2, head_dim=8)
_MLA = Mla(heads=2, kv_lora_rank=16, nope_dim=8, rope_dim=8, value_dim=8, q_lora_rank=12)
REFUSED = {
    "window": ({"attention": _GQA, "window": Window(size=7)}, "model.window lets 3 layers"),
    "mla-window": ({"attention": _MLA, "window": Window(size=7, pattern="FS")}, "model.window lets 1 layers"),
    "gqa-moe": ({"attention": _GQA, "ffn": _moe(64)}, 'attention.kind is "gqa"'),
    "alibi-moe": ({"attention": _GQA, "positions": Alibi(), "ffn": _moe(64)}, 'attention.kind is "gqa"'),
    "alibi-qk_norm": (
        {"attention": _GQA.model_copy(update={"qk_norm": True}), "positions": Alibi()},
        "attention.qk_norm is true",
    ),
    "yarn-betas": (
        {"attention": _GQA, "positions": Rope(yarn=Yarn(factor=4.0, original_len=32, beta_fast=16.0))},
        "beta_fast 16",
    ),
    "q_lora-26": ({"attention": _MLA, "layers": 26}, "a model of 26 layers"),
    "q_lora-27": ({"attention": _MLA, "layers": 27, "ffn": _moe(64)}, "a model of 27 layers"),
    "q_lora-48": ({"attention": _MLA, "layers": 48, "vocabulary": 128_256}, "a model of 48 layers"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_llama_cpp_would_compute_otherwise_is_refused_in_three_parts(case: str) -> None:
    fields, what = REFUSED[case]
    with pytest.raises(ExportError) as caught:
        architecture_of(small(**fields))
    assert what in caught.value.what
    assert caught.value.why
    assert caught.value.fix


def test_a_window_that_no_layer_has_is_none() -> None:
    assert architecture_of(small(attention=_GQA, window=Window(size=7, pattern="F"))) == "llama"


def test_another_tokenizer_is_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    _, source = hold(small(vocabulary=VOCABULARY + 1, attention=_GQA))
    with pytest.raises(ExportError, match="401 ids and the tokenizer 400 ids"):
        write_gguf(source, tokenizer, tmp_path / "model.gguf", CONTEXT_LEN)


@pytest.mark.parametrize(
    "value, numbers, fix",
    [(7e4, "f16", "bf16 or f32"), (7e4, "q8_0", "bf16 or f32"), (float("nan"), "f32", "earlier one")],
)
def test_numbers_that_the_form_cannot_hold_are_refused_and_leave_nothing(
    value: float, numbers: Any, fix: str, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    _, source = hold(small(dim=64, attention=Gqa(heads=2, kv_heads=1, head_dim=32), ffn=SwiGlu(hidden=64)))
    source.weights["blocks.2.ffn.down_proj.weight"][3, 5] = value
    with pytest.raises(ExportError, match=r"blocks\.2\.ffn\.down_proj\.weight holds") as caught:
        write_gguf(source, tokenizer, tmp_path / "model.gguf", CONTEXT_LEN, numbers)
    assert fix in caught.value.fix
    assert list(tmp_path.iterdir()) == []


def test_weights_of_another_model_are_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    _, source = hold(FORMS["llama"][1])
    source.weights["norm.weight"] = torch.ones(107)
    with pytest.raises(ExportError, match=r"makes a output_norm\.weight of \[107\]"):
        write_gguf(source, tokenizer, tmp_path / "model.gguf", CONTEXT_LEN)


@pytest.mark.parametrize("fault", ["full", "cut"])
def test_a_fault_at_any_operation_leaves_the_old_file_or_the_new_one(
    fault: str, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    _, source = hold(small(layers=1, dim=32, attention=_GQA))
    out = tmp_path / "model.gguf"
    old, seen = b"what was there", set()
    for at in itertools.count():
        out.write_bytes(old)
        disk = FaultyDisk(fault, at)
        try:
            written = write_gguf(source, tokenizer, out, CONTEXT_LEN, disk=disk)
            break
        except (PowerCut, DiskFullError) as error:
            seen.add(type(error))
        assert out.read_bytes() == old or read(out)[0]["general.architecture"] == "llama"
        assert [path.name for path in tmp_path.iterdir()] == [out.name]
    assert seen == {PowerCut if fault == "cut" else DiskFullError}
    assert at >= 3, "preallocate, write, rename and their syncs were all tried"
    assert written.size_bytes > len(old)


def test_a_missing_package_is_named(tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, source = hold(FORMS["llama"][1])
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(MachineError, match=r"pip install -e .\.\[export\]"):
        write_gguf(source, tokenizer, tmp_path / "model.gguf", CONTEXT_LEN)
