"""Every tensor has its names outside, and is put together from its pieces as it was."""

from __future__ import annotations

import pytest
import torch
from lowvram_kernels.quant.quantise import QuantTensor, dequantise, quantise_weight

from lowvram.convert.hf.tensor_names import cut, join, join_scaled, name_pieces, shapes_of
from lowvram.model.transformer import Transformer
from tests.convert.forms import FORMS, blocky
from tests.model.outside import outside_class, randomise
from tests.model.variants import VARIANTS

CLASSED = ["gqa-rope", "gqa-qk_norm", "mla-yarn-q_lora", "mla-moe"]


@pytest.mark.parametrize("name", VARIANTS)
def test_shapes_are_those_of_the_built_model(name: str) -> None:
    config = VARIANTS[name]
    built = {key: tensor.shape for key, tensor in Transformer(config).state_dict().items()}
    assert shapes_of(config) == built


@pytest.mark.parametrize("name", VARIANTS)
def test_no_two_tensors_share_a_name_outside(name: str) -> None:
    config = VARIANTS[name]
    pieces = [piece for ours in shapes_of(config) for piece in name_pieces(ours, config)]
    assert len(set(pieces)) == len(pieces)


@pytest.mark.parametrize("name", CLASSED)
def test_names_are_those_of_transformers_class_where_it_keeps_them_so(name: str) -> None:
    config = VARIANTS[name]
    kind, settings = outside_class(config)
    with torch.device("meta"):
        theirs = set(kind(settings).state_dict())
    ours = {piece for tensor in shapes_of(config) for piece in name_pieces(tensor, config)}
    # transformers keeps experts as a stack and writes them one by one.
    ours = {piece for piece in ours if ".experts." not in piece}
    theirs = {piece for piece in theirs if ".experts." not in piece}
    assert theirs - ours <= {"lm_head.weight"}
    assert ours - theirs == set()


@pytest.mark.parametrize("name", ["gqa-moe-untied", "mla-moe", "gqa-rope"])
def test_what_is_cut_and_joined_is_the_same_to_the_bit(name: str) -> None:
    config = VARIANTS[name]
    for ours, tensor in randomise(Transformer(config)).state_dict().items():
        pieces = cut(tensor, len(name_pieces(ours, config)))
        assert all(piece.is_contiguous() for piece in pieces)
        assert torch.equal(join(pieces, tensor.shape), tensor)


def test_gate_lies_above_up_and_experts_follow_each_other() -> None:
    config = VARIANTS["mla-moe"]
    stack = torch.arange(5 * 40 * 36).view(5, 40, 36)
    names = name_pieces("blocks.1.ffn.gate_up_EHD", config)
    pieces = dict(zip(names, cut(stack, len(names)), strict=True))
    assert len(names) == 10
    assert torch.equal(pieces["model.layers.1.mlp.experts.3.gate_proj.weight"], stack[3, :20])
    assert torch.equal(pieces["model.layers.1.mlp.experts.3.up_proj.weight"], stack[3, 20:])
    assert name_pieces("blocks.1.ffn.down_EDI", config)[4] == "model.layers.1.mlp.experts.4.down_proj.weight"


def test_a_tensor_that_lies_crosswise_is_cut_like_its_copy() -> None:
    tensor = torch.arange(48).view(6, 8)
    assert all(map(torch.equal, cut(tensor.T, 2), cut(tensor.T.contiguous(), 2)))


@pytest.mark.parametrize(
    "rows, is_joined", [(128, True), (256, True), (52, False), (320, False)], ids=["128", "256", "52", "320"]
)
def test_codes_are_joined_where_no_block_straddles_two_pieces(rows: int, is_joined: bool) -> None:
    tensor = torch.randn(2 * rows, 200, generator=torch.Generator().manual_seed(0))
    pieces = [quantise_weight(piece, "e4m3") for piece in cut(tensor, 2)]
    joined = join_scaled(pieces, tensor.shape)
    assert (joined is not None) == is_joined
    if joined is not None:
        apart = torch.cat([dequantise(piece, torch.float32) for piece in pieces])
        assert torch.equal(dequantise(joined, torch.float32), apart)


def test_stacks_of_codes_are_joined_with_a_grid_for_each_matrix() -> None:
    config = blocky("mla")
    stack = torch.randn(3, 256, 256, generator=torch.Generator().manual_seed(0))
    names = name_pieces("blocks.1.ffn.gate_up_EHD", config)
    joined = join_scaled([quantise_weight(piece, "e4m3") for piece in cut(stack, len(names))], stack.shape)
    whole = quantise_weight(stack, "e4m3")
    assert isinstance(joined, QuantTensor)
    assert torch.equal(joined.code, whole.code)
    assert torch.equal(joined.scale, whole.scale)


def test_one_piece_of_any_height_is_joined_as_it_is() -> None:
    scaled = quantise_weight(torch.randn(52, 36, generator=torch.Generator().manual_seed(0)), "e4m3")
    joined = join_scaled([scaled], (52, 36))
    assert joined is not None
    assert torch.equal(joined.code, scaled.code)


def test_every_form_that_is_exported_has_all_its_names() -> None:
    for config, _ in FORMS.values():
        assert all(name_pieces(ours, config) for ours in shapes_of(config))
