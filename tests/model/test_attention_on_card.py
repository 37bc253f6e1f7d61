"""A layer of attention by the kernels of a card, products joined and not, against the plain form."""

from __future__ import annotations

import pytest
import torch
from lowvram_kernels.dispatch import Card, override_card

from lowvram.model.attention import GqaAttention
from lowvram.model.transformer import Transformer
from tests.kernels.cards import DEVICE, running_on
from tests.kernels.measures import relative_error
from tests.model.outside import randomise
from tests.model.variants import VARIANTS


@pytest.mark.parametrize("is_joined", [False, True], ids=["apart", "joined"])
@pytest.mark.parametrize("name", ["mla-rope", "mla-yarn-q_lora", "gqa-alibi"])
def test_a_layer_on_a_card_gives_the_values_and_gradients_of_the_plain_form(name: str, is_joined: bool) -> None:
    model = randomise(Transformer(VARIANTS[name])).to(DEVICE)
    layer, x_BTD = model.blocks[0].attention, torch.randn(2, 9, 36).half().to(DEVICE)
    dy_BTD = torch.randn(2, 9, 36).half().to(DEVICE)
    results = []
    for card in (override_card(Card(DEVICE)), running_on("sm86")):
        with card:
            model.kept_casts = None
            if is_joined and results:
                model.keep_casts(torch.float16)
                assert model.kept_casts is not None
                assert len(model.kept_casts._joined) == len(model.blocks)
                model.kept_casts.refresh()
            table = model.table(0, 9) if model.table is not None else None
            if isinstance(layer, GqaAttention) and layer.slope_H is not None:
                table = layer.alibi_columns(9, torch.float16)
            leaves = [x_BTD.clone().requires_grad_(), *layer.parameters()]
            casts = model.kept_casts
            with casts.in_use() if casts is not None else torch.enable_grad():
                y_BTD = layer(leaves[0], table)[1]
                results.append([y_BTD, *torch.autograd.grad(y_BTD, leaves, dy_BTD)])
    for own, plain in zip(results[1], results[0], strict=True):
        assert own.dtype == plain.dtype
        assert relative_error(own, plain) < 4e-3
