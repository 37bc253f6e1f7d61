"""Recomputation keeps less and changes nothing: gradients to the bit, in every form, with dropout and with experts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lowvram.config.model import ModelConfig
from lowvram.model.transformer import Transformer
from lowvram.objective import Batch, causal_loss
from tests.kernels.measures import saved_bytes
from tests.model.variants import VARIANTS, VOCABULARY

every_variant = pytest.mark.parametrize("name", VARIANTS)
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def batch_of(rows: int = 3, length: int = 20) -> Batch:
    generator = torch.Generator().manual_seed(3)
    token_BT = torch.randint(0, VOCABULARY, (rows, length + 1), generator=generator)
    return Batch(token_BT, torch.arange(7, 7 + rows))


def learnt(model: Transformer, **options: Any) -> tuple[Tensor, Tensor | None, dict[str, Tensor]]:
    model.zero_grad()
    loss = causal_loss(model, batch_of(), seed=5, **options)
    loss.total.backward()
    return loss.total.detach(), loss.loads, {name: weight.grad for name, weight in model.named_parameters()}


@every_dtype
@pytest.mark.parametrize("recompute", ["attention", "block"])
@every_variant
def test_recomputed_gradients_are_the_plain_ones_to_the_bit(name: str, recompute: Any, dtype: torch.dtype) -> None:
    model = Transformer(VARIANTS[name], seed=1)
    loss, loads, truth = learnt(model, dtype=dtype, dropout=0.1)
    again, own_loads, own = learnt(model, dtype=dtype, dropout=0.1, recompute=recompute)
    assert torch.equal(again, loss)
    assert loads is None or torch.equal(own_loads, loads)
    assert own.keys() == truth.keys()
    for weight, gradient in truth.items():
        assert gradient.abs().max() > 0, weight
        assert torch.equal(own[weight], gradient), weight


@pytest.mark.parametrize("name", ["gqa-rope", "gqa-alibi", "mla-moe"])
def test_a_recomputed_block_keeps_the_stream_alone(name: str) -> None:
    config: ModelConfig = VARIANTS[name].model_copy(update={"layers": 6})
    model = Transformer(config, seed=1)
    kept = {}
    for recompute in ("none", "attention", "block"):
        stream = {"cache": None, "recompute": recompute}
        kept[recompute] = saved_bytes(lambda: model(batch_of().token_BT[:, 1:], **stream)[0], list(model.parameters()))  # noqa: B023
    one_stream = 3 * 20 * config.dim * 4
    # Beside six streams: the last norm's row scales, ids, the rotary tables.
    assert 6 * one_stream <= kept["block"] <= 7.5 * one_stream
    assert kept["block"] < kept["attention"] < kept["none"]
    # What attention keeps: its row scales, queries, keys, values and result.
    assert kept["none"] - kept["attention"] >= 6 * 3 * 20 * 4 * config.dim


@pytest.mark.parametrize("recompute", ["attention", "block"])
def test_recomputation_runs_once_more_and_not_when_nothing_is_learnt(recompute: Any) -> None:
    model = Transformer(VARIANTS["gqa-rope"], seed=1)
    layer = model.blocks[0] if recompute == "block" else model.blocks[0].attention
    calls: list[bool] = []
    layer.register_forward_pre_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    learnt(model, dtype=torch.float32, recompute=recompute)
    assert len(calls) == 2
    with torch.no_grad():
        causal_loss(model, batch_of(), torch.float32, recompute=recompute)
    assert len(calls) == 3
