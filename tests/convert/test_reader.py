"""Directories from elsewhere: read to the bit, whoever wrote them, and refused by name where they are damaged."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lowvram_kernels.quant.quantise import QuantTensor, dequantise
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from lowvram.convert.hf.reader import is_hf_directory, open_hf
from lowvram.data.tokenizer import Tokenizer
from lowvram.errors import CheckpointError, ExportError, LowvramError
from lowvram.generate.weights import load_for_inference
from tests.convert.forms import FORMS, LATENT, SMALL, windowed
from tests.convert.sources import written

YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
FRESH: dict[str, tuple[Callable[[Any], Any], Any]] = {
    "llama": (LlamaForCausalLM, LlamaConfig(**SMALL)),
    "llama-tied": (LlamaForCausalLM, LlamaConfig(**SMALL, tie_word_embeddings=True)),
    "llama-yarn": (LlamaForCausalLM, LlamaConfig(**SMALL, rope_parameters=dict(YARN))),
    "mistral-window": (MistralForCausalLM, MistralConfig(**SMALL, sliding_window=9)),
    "mistral-no-window": (MistralForCausalLM, MistralConfig(**SMALL, sliding_window=None)),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config(**SMALL)),
    "qwen3-window": (
        Qwen3ForCausalLM,
        Qwen3Config(**SMALL, use_sliding_window=True, sliding_window=9, max_window_layers=1),
    ),
    "deepseek": (DeepseekV3ForCausalLM, DeepseekV3Config(**LATENT)),
    "deepseek-yarn": (
        DeepseekV3ForCausalLM,
        DeepseekV3Config(**LATENT, rope_parameters={**YARN, "mscale": 1.0, "mscale_all_dim": 1.0}),
    ),
}


@pytest.mark.parametrize("name", FORMS)
def test_weights_and_form_come_back_to_the_bit(name: str, small_tokenizer: Tokenizer, tmp_path: Path) -> None:
    config, _ = FORMS[name]
    model, out = written(config, small_tokenizer, tmp_path / "out", most_bytes=40_000)
    outside = open_hf(out)
    assert outside.config == config
    assert outside.form.trained_positions == 256
    own = model.state_dict()
    assert sorted(outside.names()) == sorted(own)
    assert [name for name in own if not torch.equal(outside.read(name), own[name])] == []
    assert outside.notices == []


@pytest.mark.parametrize("pattern", ["S", "SF", "SSSF", "F", "FFFS"])
def test_a_window_comes_back_with_its_pattern(pattern: str, small_tokenizer: Tokenizer, tmp_path: Path) -> None:
    config = windowed(pattern).model_copy(update={"vocabulary": small_tokenizer.size})
    _, out = written(config, small_tokenizer, tmp_path / "out")
    assert open_hf(out).config == config


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", FRESH)
def test_what_transformers_wrote_gives_the_logits_of_transformers(
    name: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    kind, settings = FRESH[name]
    torch.manual_seed(0)
    twin = kind(settings).to(dtype).eval()
    with torch.no_grad():
        for key, tensor in twin.state_dict().items():
            tensor.add_(0.05 * torch.randn(tensor.shape).to(tensor.dtype) if "norm" not in key else 0)
    twin.save_pretrained(tmp_path / "out", max_shard_size="30KB")
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    model = load_for_inference(open_hf(tmp_path / "out"), "fp32", compute_dtype=torch.float32)
    # Opened anew: casting a model of transformers to bf16 has rounded its rotary table too.
    twin = kind.from_pretrained(tmp_path / "out", dtype=torch.float32)
    token_BT = torch.randint(0, 90, (1, 50), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ours, theirs = model.logits(token_BT), twin(token_BT).logits
    assert ours.std() > 0.1
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


def test_deepseeks_own_grid_is_read_where_128_does_not_divide_a_side(
    small_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    name = "model.layers.0.self_attn.kv_a_proj_with_mqa.weight"
    config = FORMS["mla-moe"][0].model_copy(update={"dim": 160})
    _, out = written(config, small_tokenizer, tmp_path / "out")
    code = torch.randn(28, 160, generator=torch.Generator().manual_seed(0)).to(torch.float8_e4m3fn)
    scale = torch.tensor([[0.013, 0.4]])
    change(out, lambda tensors: tensors | {name: code, f"{name}_scale_inv": scale})
    say(out, quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128]})
    found = open_hf(out).read("blocks.0.attention.kv_a_proj.weight")
    assert isinstance(found, QuantTensor)
    expected = torch.cat([code[:, :128].float() * scale[0, 0], code[:, 128:].float() * scale[0, 1]], dim=1)
    assert torch.equal(dequantise(found, torch.float32), expected)


def test_scales_that_are_exponents_are_read_as_numbers(small_tokenizer: Tokenizer, tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.o_proj.weight"
    _, out = written(FORMS["gqa-rope"][0], small_tokenizer, tmp_path / "out")
    code = torch.ones(36, 48).to(torch.float8_e4m3fn)
    scale = torch.full((1, 1), 0.25).to(torch.float8_e8m0fnu)
    change(out, lambda tensors: tensors | {name: code, f"{name}_scale_inv": scale})
    say(out, quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128], "scale_fmt": "ue8m0"})
    found = open_hf(out).read("blocks.0.attention.o_proj.weight")
    assert isinstance(found, QuantTensor)
    assert torch.equal(dequantise(found, torch.float32), torch.full((36, 48), 0.25))


def test_layers_that_predict_further_tokens_are_left_aside_and_said(small_tokenizer: Tokenizer, tmp_path: Path) -> None:
    model, out = written(FORMS["mla-moe"][0], small_tokenizer, tmp_path / "out")
    extra = {"model.layers.2.eh_proj.weight": torch.ones(3, 3), "model.layers.2.enorm.weight": torch.ones(3)}
    change(out, lambda tensors: tensors | extra)
    outside = open_hf(out)
    assert outside.notices == ["2 tensors of layers that predict further tokens are left aside (MTP)."]
    assert torch.equal(outside.read("embedding"), model.embedding)


def test_tables_of_old_files_are_passed_over(small_tokenizer: Tokenizer, tmp_path: Path) -> None:
    _, out = written(FORMS["gqa-rope"][0], small_tokenizer, tmp_path / "out")
    change(out, lambda tensors: tensors | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)})
    assert open_hf(out).notices == []


def change(out: Path, edit: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    """Write the weights again, edited."""
    path = out / "model.safetensors"
    tensors = edit({name: tensor.clone() for name, tensor in load_file(path).items()})
    save_file(tensors, path, {"format": "pt"})


def say(out: Path, **values: Any) -> None:
    """Write config.json again with other values."""
    path = out / "config.json"
    path.write_text(json.dumps(json.loads(path.read_bytes()) | values), encoding="utf-8")


def edit_text(out: Path, old: str, new: str) -> None:
    """Write config.json again with other characters."""
    path = out / "config.json"
    text = path.read_text("utf-8")
    assert old in text
    path.write_text(text.replace(old, new), encoding="utf-8")


def without(tensors: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    """Return the others."""
    return {key: tensor for key, tensor in tensors.items() if key != name}


UP = "model.layers.1.mlp.up_proj.weight"
DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a tensor missing": (lambda out: change(out, lambda t: without(t, UP)), f"has no tensor {UP}"),
    "another shape": (lambda out: change(out, lambda t: t | {UP: t[UP][:-1].clone()}), f"{UP} is [51, 36]"),
    "integers": (lambda out: change(out, lambda t: t | {UP: t[UP].int()}), "numbers of the kind I32"),
    "a stranger": (
        lambda out: change(out, lambda t: t | {"model.layers.1.mlp.x.bias": torch.ones(3)}),
        "which our model has not",
    ),
    "codes without a word": (lambda out: change(out, lambda t: t | {UP: t[UP].to(torch.float8_e4m3fn)}), "F8_E4M3"),
    "codes without scales": (
        lambda out: (
            change(out, lambda t: t | {UP: t[UP].to(torch.float8_e4m3fn)}),
            say(out, quantization_config={"quant_method": "fp8"}),
        ),
        f"{UP}_scale_inv is missing",
    ),
    "another head": (
        lambda out: change(out, lambda t: t | {"lm_head.weight": t["model.embed_tokens.weight"] + 1}),
        "tie_word_embeddings is true, but lm_head.weight is another",
    ),
    "half a file": (
        lambda out: (out / "model.safetensors").write_bytes((out / "model.safetensors").read_bytes()[:5000]),
        "cannot be read as safetensors",
    ),
    "no weights": (lambda out: (out / "model.safetensors").unlink(), "neither model.safetensors nor"),
    "no config": (lambda out: (out / "config.json").unlink(), "There is no "),
    "a torn config": (
        lambda out: (out / "config.json").write_text('{"model_type": "ll', encoding="utf-8"),
        "it is not JSON",
    ),
    "a list": (lambda out: (out / "config.json").write_text("[1]"), "it holds a list, not an object"),
    "a deep config": (lambda out: (out / "config.json").write_text('{"a":' * 99_999), "it is nested deeper than 64"),
    "an infinite theta": (lambda out: say(out, rope_parameters={"rope_theta": math.inf}), "Infinity is not a number"),
    "a theta beyond floats": (
        lambda out: edit_text(out, '"rope_theta": 10000.0', '"rope_theta": 1e999'),
        "rope_theta is inf; it takes a finite number",
    ),
    "ten million layers": (
        lambda out: say(out, num_hidden_layers=10_000_000),
        "num_hidden_layers is 10000000; it takes 100,000 or less",
    ),
    "a thousand layers": (
        lambda out: say(out, num_hidden_layers=1_000),
        "more tensors than there are: num_hidden_layers alone for 1,000. The files hold 20 tensors.",
    ),
    "a wide vocabulary": (lambda out: say(out, vocab_size=2**30), "config.json describes a model of 38,"),
    "a number without end": (lambda out: say(out, hidden_size=10**400), "hidden_size is 1000"),
    "positions without end": (lambda out: say(out, max_position_embeddings=10**30), "max_position_embeddings is 1000"),
    "a deep map": (
        lambda out: (out / "model.safetensors.index.json").write_text('{"weight_map":' * 99_999),
        "it is nested deeper than 64",
    ),
    "a header of 2^60 bytes": (
        lambda out: (out / "model.safetensors").write_bytes((2**60).to_bytes(8, "little") + b"{}"),
        "cannot be read as safetensors",
    ),
    "a pickle": (
        lambda out: (out / "model.safetensors").write_bytes(b"\x80\x04\x95" + bytes(99)),
        "cannot be read as safetensors",
    ),
    "a part missing": (
        lambda out: (out / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-1.safetensors"}}'),
        "names the file model-1.safetensors",
    ),
    "a part elsewhere": (
        lambda out: (out / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../model.safetensors"}}'),
        "names the file ../model.safetensors",
    ),
    "no map": (lambda out: (out / "model.safetensors.index.json").write_text('{"weight_map": [1]}'), "no weight_map"),
    "bitsandbytes": (
        lambda out: say(out, quantization_config={"quant_method": "bitsandbytes"}),
        "quantization_config.quant_method is 'bitsandbytes'",
    ),
    "static activations": (
        lambda out: say(out, quantization_config={"quant_method": "fp8", "activation_scheme": "static"}),
        "quantization_config.activation_scheme is 'static'",
    ),
    "other blocks": (
        lambda out: say(out, quantization_config={"quant_method": "fp8", "weight_block_size": [1, 32]}),
        "quantization_config.weight_block_size is [1, 32]",
    ),
    "no method": (lambda out: say(out, quantization_config={}), "quantization_config.quant_method is None"),
    "a word for a table": (lambda out: say(out, quantization_config="fp8"), "quantization_config is 'fp8'"),
}


@pytest.mark.parametrize("damage, words", DAMAGES.values(), ids=DAMAGES)
def test_damage_is_named(damage: Callable[[Path], Any], words: str, small_tokenizer: Tokenizer, tmp_path: Path) -> None:
    _, out = written(FORMS["gqa-rope"][0], small_tokenizer, tmp_path / "out")
    damage(out)
    with pytest.raises(LowvramError) as caught:
        open_hf(out)
    assert isinstance(caught.value, CheckpointError | ExportError)
    assert words in str(caught.value)
    assert caught.value.fix
    assert len(str(caught.value)) < 800


def test_a_checkpoint_of_ours_is_not_taken_for_one_from_outside(small_tokenizer: Tokenizer, tmp_path: Path) -> None:
    _, out = written(FORMS["gqa-rope"][0], small_tokenizer, tmp_path / "out")
    assert is_hf_directory(out)
    (out / "manifest.json").write_text("{}", encoding="utf-8")
    assert not is_hf_directory(out)
    assert not is_hf_directory(tmp_path)
