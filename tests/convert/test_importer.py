"""A model from outside becomes a checkpoint whose every number is the file's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lowvram_kernels.quant.quantise import QuantTensor, dequantise
from safetensors.torch import load_file, save_file

from lowvram.api.tasks import count_progress, finish
from lowvram.config.run_file import from_portable
from lowvram.convert.hf.importer import import_each_tensor
from lowvram.convert.hf.reader import HfReader, open_hf
from lowvram.data.tokenizer import Tokenizer
from lowvram.errors import CheckpointError
from lowvram.storage.checkpoint import Checkpoint, find_checkpoint
from tests.convert.forms import FORMS, blocky
from tests.convert.sources import written


def import_weights(outside: HfReader, tokenizer: Tokenizer, run: Path) -> Checkpoint:
    """Import a model, and return the checkpoint that it became."""
    return finish(count_progress(import_each_tensor(outside, tokenizer, run), "Reading"))[0]


@pytest.mark.parametrize("name", FORMS)
def test_export_and_import_are_a_round_trip_to_the_bit(name: str, small_tokenizer: Tokenizer, tmp_path: Path) -> None:
    config, _ = FORMS[name]
    model, out = written(config, small_tokenizer, tmp_path / "out")
    import_weights(open_hf(out), small_tokenizer, tmp_path / "run")
    checkpoint, _ = find_checkpoint(tmp_path / "run")
    what = from_portable(checkpoint.config(), checkpoint.directory.parent)
    assert what.model == config
    assert what.train.seq_len == 256
    assert (checkpoint.step, checkpoint.manifest["hashes"]) == (0, {"tokenizer": small_tokenizer.hash})
    weights, own = checkpoint.weights(), model.state_dict()
    assert sorted(weights) == sorted(own)
    assert [key for key in own if not torch.equal(weights[key], own[key])] == []
    assert Tokenizer.load(checkpoint.directory) == small_tokenizer


@pytest.mark.parametrize("kind", ["mla", "moe", "gqa"])
def test_numbers_from_fp8_are_exact(kind: str, small_tokenizer: Tokenizer, tmp_path: Path) -> None:
    _, out = written(blocky(kind), small_tokenizer, tmp_path / "out", numbers="fp8")
    outside = open_hf(out)
    weights = import_weights(outside, small_tokenizer, tmp_path / "run").weights()
    coded = 0
    for name in outside.names():
        found = outside.read(name)
        coded += isinstance(found, QuantTensor)
        exact = dequantise(found, torch.float32) if isinstance(found, QuantTensor) else found.float()
        assert torch.equal(weights[name].float(), exact), name
        if isinstance(found, QuantTensor):
            assert weights[name].dtype == torch.bfloat16, "scales are powers of two, so that bf16 holds it"
    assert coded > 3


def test_scales_that_bf16_cannot_hold_give_fp32(small_tokenizer: Tokenizer, tmp_path: Path) -> None:
    _, out = written(blocky("gqa"), small_tokenizer, tmp_path / "out", numbers="fp8")
    path, scale = out / "model.safetensors", "model.layers.0.self_attn.q_proj.weight_scale_inv"
    save_file(load_file(path) | {scale: torch.tensor([[0.0123]])}, path, {"format": "pt"})
    outside = open_hf(out)
    weight = import_weights(outside, small_tokenizer, tmp_path / "run").weights()["blocks.0.attention.q_proj.weight"]
    found = outside.read("blocks.0.attention.q_proj.weight")
    assert weight.dtype == torch.float32
    assert isinstance(found, QuantTensor)
    assert torch.equal(weight, dequantise(found, torch.float32))


@pytest.mark.parametrize(
    "dtype, kept, said",
    [(torch.float16, torch.float32, "fp32"), (torch.bfloat16, torch.bfloat16, "bf16")],
    ids=["fp16", "bf16"],
)
def test_narrow_numbers_stay_what_they_are(
    dtype: torch.dtype, kept: torch.dtype, said: str, small_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    _, out = written(FORMS["gqa-rope"][0], small_tokenizer, tmp_path / "out")
    path = out / "model.safetensors"
    tensors = {name: tensor.to(dtype) for name, tensor in load_file(path).items()}
    save_file(tensors, path, {"format": "pt"})
    checkpoint = import_weights(open_hf(out), small_tokenizer, tmp_path / "run")
    embedding = checkpoint.weights()["embedding"]
    assert embedding.dtype == kept
    assert torch.equal(embedding.to(dtype), tensors["model.embed_tokens.weight"])
    train = from_portable(checkpoint.config(), tmp_path / "run").train
    assert (train.precision, train.weights) == (said, said)


def test_a_tokenizer_of_another_size_is_refused_and_nothing_is_written(
    small_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    config = FORMS["gqa-rope"][0].model_copy(update={"vocabulary": 600})
    _, out = written(config, small_tokenizer, tmp_path / "out")
    with pytest.raises(CheckpointError, match="has 422 ids, and the model 600 rows"):
        import_weights(open_hf(out), small_tokenizer, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_progress_ends_with_all_tensors(small_tokenizer: Tokenizer, tmp_path: Path) -> None:
    _, out = written(FORMS["gqa-rope"][0], small_tokenizer, tmp_path / "out")
    outside = open_hf(out)
    told = list(import_each_tensor(outside, small_tokenizer, tmp_path / "run"))
    assert told == [(done, len(outside.names())) for done in range(1, len(outside.names()) + 1)]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_no_numbers_are_refused_by_name(
    value: float, small_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    _, out = written(FORMS["gqa-rope"][0], small_tokenizer, tmp_path / "out")
    name = "model.layers.1.self_attn.o_proj.weight"
    tensors = {key: tensor.clone() for key, tensor in load_file(out / "model.safetensors").items()}
    tensors[name].view(-1)[-1] = value
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=rf"{name} holds no numbers\. 1 of [\d,]+ values are infinite or NaN"):
        import_weights(open_hf(out), small_tokenizer, tmp_path / "run")
    assert not (tmp_path / "run").exists()
