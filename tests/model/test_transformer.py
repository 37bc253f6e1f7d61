"""What must hold for every variant: causality, gradients, casts, initialisation, counted parameters."""

from __future__ import annotations

import math

import pytest
import torch

from lowvram.config.model import ModelConfig
from lowvram.model.transformer import Dropout, Transformer, lay_by_columns
from lowvram.objective import Batch, causal_loss
from tests.model.outside import randomise
from tests.model.variants import VARIANTS, VOCABULARY

LENGTH = 29
ABSOLUTE = 2e-5

every_variant = pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)


def tokens(batch: int = 2, length: int = LENGTH, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


@every_variant
def test_num_parameters_is_what_is_built(config: ModelConfig) -> None:
    assert sum(weight.numel() for weight in Transformer(config).parameters()) == config.num_parameters()
    assert config.active_parameters() <= config.num_parameters()


@every_variant
def test_no_position_sees_a_later_token(config: ModelConfig) -> None:
    model = randomise(Transformer(config))
    first, second = tokens(), tokens()
    place = 17
    second[:, place:] = (second[:, place:] + 1) % VOCABULARY
    with torch.no_grad():
        a, b = model.logits(first), model.logits(second)
    torch.testing.assert_close(a[:, :place], b[:, :place], atol=1e-6, rtol=0)
    assert (a[:, place] - b[:, place]).abs().max() > 1e-3


@every_variant
def test_every_parameter_gets_a_finite_gradient_that_is_not_zero(config: ModelConfig) -> None:
    model = randomise(Transformer(config))
    loss = causal_loss(model, Batch(tokens(batch=4, length=41), torch.arange(4)), torch.float32)
    (loss.total / (4 * 40)).backward()
    for name, weight in model.named_parameters():
        assert weight.grad is not None, name
        assert weight.grad.isfinite().all(), name
        # Each expert and each matrix separately: one that learns nothing must not hide in a stack.
        parts = weight.grad if name.endswith(("_EHD", "_EDI")) else weight.grad[None]
        assert all(part.abs().max() > 0 for part in parts), name


@every_variant
def test_bf16_weights_and_bf16_computation_stay_near_fp32(config: ModelConfig) -> None:
    model = randomise(Transformer(config))
    with torch.no_grad():
        exact = model.logits(tokens())
        computed = model.logits(tokens(), torch.bfloat16)
        cast = model.to(torch.bfloat16).logits(tokens())
    for rough in (computed, cast):
        assert rough.dtype == torch.bfloat16
        assert (rough.float() - exact).norm() < 0.06 * exact.norm()


@every_variant
def test_a_model_laid_by_columns_is_the_same_model(config: ModelConfig) -> None:
    model = randomise(Transformer(config))
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    with torch.no_grad():
        expected = model.logits(tokens())
        laid = lay_by_columns(model)
        torch.testing.assert_close(laid.logits(tokens()), expected, atol=ABSOLUTE, rtol=0)
    assert all(torch.equal(weight, before[name]) for name, weight in laid.state_dict().items())
    assert laid.embedding.stride() == (1, VOCABULARY), "there are more tokens than dimensions"
    if config.attention.kind == "gqa":
        layer = laid.blocks[1].attention
        for projection in (layer.q_proj, layer.k_proj, layer.v_proj):
            assert projection.weight.untyped_storage().data_ptr() == layer.qkv.untyped_storage().data_ptr()
    assert laid.blocks[0].ffn.down_proj.weight.is_contiguous(), "36 x 52 is not taller than wide"


def test_heads_parts_of_a_16_bit_matrix_lie_in_fp32_without_changing() -> None:
    model = randomise(Transformer(VARIANTS["mla-moe"])).to(torch.bfloat16)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    laid = lay_by_columns(model.requires_grad_(False))
    for name, weight in laid.state_dict().items():
        assert weight.dtype == (torch.float32 if name.endswith("kv_b_proj.weight") else before[name].dtype)
        assert torch.equal(weight.to(before[name].dtype), before[name])


def test_a_model_without_seed_is_left_for_a_load_to_fill() -> None:
    config = VARIANTS["mla-moe"]
    model = randomise(Transformer(config))
    empty = Transformer(config, seed=None)
    empty.load_state_dict(model.state_dict())
    assert torch.equal(empty.logits(tokens()), model.logits(tokens()))


@every_variant
def test_fp16_computation_is_finite(config: ModelConfig) -> None:
    model = Transformer(config)
    loss = causal_loss(model, Batch(tokens(), torch.arange(2)), torch.float16)
    loss.total.backward()
    assert loss.total.isfinite()
    assert all(weight.grad.isfinite().all() for weight in model.parameters() if weight.grad is not None)


def test_an_untrained_model_is_about_as_sure_as_a_uniform_guess() -> None:
    for config in VARIANTS.values():
        loss = causal_loss(Transformer(config), Batch(tokens(8), torch.arange(8)), torch.float32)
        assert loss.total.item() / (8 * (LENGTH - 1)) == pytest.approx(math.log(VOCABULARY), rel=0.05)


def test_weights_depend_on_the_seed_and_on_nothing_else() -> None:
    config = VARIANTS["mla-moe"]
    torch.manual_seed(1)
    first = Transformer(config, seed=3)
    torch.manual_seed(2)
    again, other = Transformer(config, seed=3), Transformer(config, seed=4)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    assert not torch.equal(first.embedding, other.embedding)


def test_output_projections_start_smaller_by_the_root_of_twice_the_layers() -> None:
    config = VARIANTS["gqa-rope"].model_copy(update={"dim": 256, "layers": 8})
    model = Transformer(config)
    assert model.blocks[0].attention.q_proj.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert model.blocks[0].attention.o_proj.weight.std().item() == pytest.approx(0.02 / 4, rel=0.05)
    assert model.blocks[0].ffn.down_proj.weight.std().item() == pytest.approx(0.02 / 4, rel=0.05)


def test_tied_models_have_one_matrix_and_untied_two() -> None:
    tied, untied = Transformer(VARIANTS["gqa-rope"]), Transformer(VARIANTS["gqa-moe-untied"])
    assert tied.head_VD is tied.embedding
    assert untied.head_VD is not untied.embedding
    assert "head" not in tied.state_dict()


@every_variant
def test_a_block_whose_output_matrices_are_zero_changes_nothing(config: ModelConfig) -> None:
    model = randomise(Transformer(config))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight", "down_EDI")):
                weight.zero_()
        x_BTD = torch.randn(2, LENGTH, config.dim)
        table = model.table(0, LENGTH) if model.table else None
        for block in model.blocks:
            assert torch.equal(block(x_BTD, table, None, None)[0], x_BTD)


def test_dropout_depends_on_the_sample_and_not_on_its_neighbours() -> None:
    model = randomise(Transformer(VARIANTS["gqa-rope"]))
    token_BT = tokens(4)
    key_B = torch.tensor([11, 12, 13, 14])
    with torch.no_grad():
        together, _ = model(token_BT, drop=Dropout(0.3, key_B))
        alone, _ = model(token_BT[2:3], drop=Dropout(0.3, key_B[2:3]))
        plain, _ = model(token_BT)
    torch.testing.assert_close(together[2:3], alone, atol=1e-5, rtol=0)
    assert (together - plain).abs().max() > 0.1


def test_dropout_of_zero_is_no_dropout() -> None:
    model = randomise(Transformer(VARIANTS["gqa-rope"]))
    with torch.no_grad():
        assert torch.equal(model(tokens(), drop=Dropout(0.0, torch.arange(2)))[0], model(tokens())[0])


def test_the_model_is_built_where_it_is_asked_to_be() -> None:
    for config in VARIANTS.values():
        for tensor in Transformer(config, device="cpu").state_dict().values():
            assert tensor.device.type == "cpu"


@pytest.mark.gpu
@every_variant
def test_a_cuda_model_computes_what_the_cpu_model_does(config: ModelConfig) -> None:
    model = randomise(Transformer(config))
    with torch.no_grad():
        here = model.logits(tokens())
        there = model.to("cuda").logits(tokens().to("cuda"))
    torch.testing.assert_close(there.cpu(), here, atol=2e-3, rtol=0)
