"""Block-scaled FP8: DeepSeek's names and shapes, and the same numbers here, by hand and in transformers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from lowvram_kernels.quant.quantise import QuantTensor, dequantise, quantise_weight
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from lowvram.convert.fp8 import SCALE, UnquantisedModules, is_divisible, quantise_piece
from lowvram.convert.hf.reader import HfReader, open_hf
from lowvram.convert.hf.tensor_names import name_pieces
from lowvram.data.tokenizer import Tokenizer
from lowvram.generate.weights import load_for_inference
from lowvram.model.transformer import Transformer
from tests.convert.forms import blocky
from tests.convert.sources import written
from tests.model.outside import outside_names

KINDS = ["mla", "moe", "gqa"]


def by_hand(tensors: dict[str, Tensor], name: str) -> Tensor:
    """Return a matrix's numbers: each code times the scale of the block of 128 × 128 that it lies in, in fp32."""
    code = tensors[name].float()
    if name + SCALE not in tensors:
        return code
    scale = tensors[name + SCALE].repeat_interleave(128, 0).repeat_interleave(128, 1)
    return code * scale[: code.shape[0], : code.shape[1]]


def numbers_of(outside: HfReader) -> dict[str, Tensor]:
    """Return all of our tensors as fp32 numbers."""
    found = {name: outside.read(name) for name in outside.names()}
    return {n: dequantise(t, torch.float32) if isinstance(t, QuantTensor) else t.float() for n, t in found.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_files_are_codes_with_a_scale_for_each_block(kind: str, small_tokenizer: Tokenizer, tmp_path: Path) -> None:
    config = blocky(kind)
    model, out = written(config, small_tokenizer, tmp_path / "out", numbers="fp8")
    tensors = load_file(out / "model.safetensors")
    kept = json.loads((out / "config.json").read_bytes())["quantization_config"]["modules_to_not_convert"]
    coded = 0
    for name, tensor in tensors.items():
        if name.endswith(SCALE):
            coded += 1
            assert tensor.dtype == torch.float32
            assert torch.equal(tensor, torch.exp2(tensor.log2().round())), "powers of two"
            code = tensors[name.removesuffix(SCALE)]
            assert code.dtype == torch.float8_e4m3fn
            assert list(tensor.shape) == [-(-side // 128) for side in code.shape]
        elif name + SCALE not in tensors:
            is_exact = tensor.dim() == 1 or name.endswith("mlp.gate.weight")
            assert tensor.dtype == (torch.float32 if is_exact else torch.bfloat16)
            is_block = tensor.dim() == 2 and "layers" in name and not is_exact
            assert (name.removesuffix(".weight") in kept) == (is_block or name == "lm_head.weight")
    assert coded > 5
    assert model.config == config


@pytest.mark.parametrize("kind", KINDS)
def test_numbers_read_here_are_those_of_the_file_by_hand(kind: str, small_tokenizer: Tokenizer, tmp_path: Path) -> None:
    config = blocky(kind)
    _, out = written(config, small_tokenizer, tmp_path / "out", numbers="fp8")
    tensors = load_file(out / "model.safetensors")
    for name, tensor in numbers_of(open_hf(out)).items():
        pieces = [by_hand(tensors, piece) for piece in name_pieces(name, config)]
        assert torch.equal(torch.cat(pieces).reshape(tensor.shape), tensor), name


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_finds_the_same_numbers_to_the_bit(kind: str, small_tokenizer: Tokenizer, tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="transformers reads FP8 with accelerate only")
    config = blocky(kind)
    _, out = written(config, small_tokenizer, tmp_path / "out", numbers="fp8")
    model = Transformer(config, seed=None)
    model.load_state_dict(numbers_of(open_hf(out)))
    twin = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    theirs = twin.state_dict()
    for name, tensor in outside_names(model).items():
        assert torch.equal(theirs[name], tensor), name
    token_BT = torch.arange(60).view(1, -1)
    with torch.no_grad():
        expected = model.logits(token_BT)
        torch.testing.assert_close(twin(token_BT).logits, expected, atol=1e-4, rtol=1e-5)


def test_codes_are_made_from_what_is_kept_and_not_from_bf16(small_tokenizer: Tokenizer, tmp_path: Path) -> None:
    model, out = written(blocky("gqa"), small_tokenizer, tmp_path / "out", numbers="fp8")
    found = open_hf(out).read("blocks.0.attention.q_proj.weight")
    weight = model.state_dict()["blocks.0.attention.q_proj.weight"]
    once, twice = quantise_weight(weight, "e4m3"), quantise_weight(weight.bfloat16(), "e4m3")
    assert isinstance(found, QuantTensor)
    assert torch.equal(found.code, once.code)
    assert not torch.equal(once.code, twice.code), "or the test says nothing"


def test_codes_go_into_a_reading_model_as_they_lie_in_the_file(small_tokenizer: Tokenizer, tmp_path: Path) -> None:
    config = blocky("mla")
    _, out = written(config, small_tokenizer, tmp_path / "out", numbers="fp8")
    outside = open_hf(out)
    own = load_for_inference(outside, "fp8", flow=torch.float32).state_dict()
    stored = {name: found for name in outside.names() if isinstance(found := outside.read(name), QuantTensor)}
    assert len(stored) > 5
    for name, scaled in stored.items():
        assert torch.equal(own[name], scaled.code), name


@pytest.mark.parametrize(
    "rows, columns, expected",
    [(128, 256, True), (52, 128, True), (1, 1, True), (192, 128, False), (128, 224, False), (129, 129, False)],
)
def test_a_side_above_a_block_must_be_blocks(rows: int, columns: int, expected: bool) -> None:
    assert is_divisible(rows, columns) == expected


def test_what_is_kept_is_named_by_module_and_experts_by_their_stack() -> None:
    kept = UnquantisedModules()
    for name in ("model.layers.1.self_attn.kv_a_proj_with_mqa.weight", "model.layers.2.mlp.experts.7.up_proj.weight"):
        ((found, tensor),) = quantise_piece(name, torch.ones(192, 128), kept)
        assert (found, tensor.dtype) == (name, torch.bfloat16)
    settings = kept.settings()
    assert settings["modules_to_not_convert"] == [
        "lm_head",
        "model.layers.1.self_attn.kv_a_proj_with_mqa",
        "model.layers.2.mlp.experts",
    ]
    assert (settings["quant_method"], settings["weight_block_size"]) == ("fp8", [128, 128])
