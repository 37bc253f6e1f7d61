"""Attention against brute force: windows, groups, and the two forms of MLA."""

from __future__ import annotations

import pytest
import torch
from lowvram_kernels.dispatch import Choice

from lowvram.config.model import ModelConfig
from lowvram.model.attention import attend
from lowvram.model.kv_cache import CacheSlot, KvCache
from lowvram.model.transformer import Transformer
from tests.model.outside import randomise
from tests.model.variants import VARIANTS


def brute_force(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int | None) -> torch.Tensor:
    heads, queries, keys = q.shape[1], q.shape[2], k.shape[2]
    k, v = (x.repeat_interleave(heads // x.shape[1], dim=1) for x in (k, v))
    distance = torch.arange(keys - queries, keys)[:, None] - torch.arange(keys)[None]
    hidden = distance < 0 if window is None else (distance < 0) | (distance >= window)
    return (q @ k.mT * 0.3).masked_fill(hidden, -torch.inf).softmax(-1) @ v


@pytest.mark.parametrize("window", [None, 1, 5, 8, 31, 40], ids=lambda w: f"window-{w}")
@pytest.mark.parametrize("queries, keys", [(31, 31), (1, 31), (6, 31), (40, 40)], ids=str)
@pytest.mark.parametrize("heads, groups", [(6, 2), (4, 4), (3, 1)], ids=str)
def test_attention_equals_brute_force(heads: int, groups: int, queries: int, keys: int, window: int | None) -> None:
    generator = torch.Generator().manual_seed(queries)
    q = torch.randn(2, heads, queries, 12, generator=generator, dtype=torch.float64)
    k = torch.randn(2, groups, keys, 12, generator=generator, dtype=torch.float64)
    v = torch.randn(2, groups, keys, 7, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(attend(q, k, v, 0.3, window), brute_force(q, k, v, window))


@pytest.mark.parametrize("window", [None, 6], ids=["full", "window"])
def test_attention_gradients_equal_brute_force(window: int | None) -> None:
    shapes = {"q": (2, 4, 20, 8), "k": (2, 2, 20, 8), "v": (2, 2, 20, 8)}
    leaves = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes.values()]
    weight = torch.randn(2, 4, 20, 8, dtype=torch.float64)
    ours = torch.autograd.grad((attend(*leaves, 0.3, window) * weight).sum(), leaves)
    truth = torch.autograd.grad((brute_force(*leaves, window) * weight).sum(), leaves)
    for name, a, b in zip(shapes, ours, truth, strict=True):
        torch.testing.assert_close(a, b, msg=name)


def test_one_key_value_head_per_query_head_is_multi_head_attention() -> None:
    config = VARIANTS["gqa-rope"]
    grouped = randomise(Transformer(config))
    whole = Transformer(config.model_copy(update={"attention": config.attention.model_copy(update={"kv_heads": 6})}))
    state = grouped.state_dict()
    for name in [n for n in state if "k_proj" in n or "v_proj" in n]:
        state[name] = state[name].unflatten(0, (2, 8)).repeat_interleave(3, dim=0).flatten(0, 1)
    whole.load_state_dict(state)
    token_BT = torch.arange(40).view(2, 20)
    torch.testing.assert_close(whole.logits(token_BT), grouped.logits(token_BT), atol=1e-5, rtol=0)


@pytest.mark.parametrize("count, form", [(24, "_absorbed"), (25, "_expanded_cache")], ids=["few", "many"])
@pytest.mark.parametrize("name", ["mla-rope", "mla-yarn-q_lora", "mla-window"])
def test_what_is_read_through_the_cache_equals_the_expanded_form(
    name: str, count: int, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # To expand a position costs 20 · 22 a head, and saves 2 · 20 − 22 for each of its queries: as much for 24.4.
    config: ModelConfig = VARIANTS[name]
    model = randomise(Transformer(config))
    layer, x_BTD = model.blocks[0].attention, torch.randn(1, 3 + count, config.dim)
    forms = []
    for other in ("_absorbed", "_expanded_cache"):
        true = getattr(layer, other)
        monkeypatch.setattr(layer, other, lambda *a, name=other, true=true: forms.append(name) or true(*a))
    with torch.no_grad():
        expanded = layer(x_BTD, model.table(0, 3 + count))[1]
        slot = CacheSlot(KvCache(config, 1, 40), 0)
        first = layer(x_BTD[:, :3], model.table(0, 3), slot)[1]
        slot.advance(3)
        rest = layer(x_BTD[:, 3:], model.table(3, count), slot)[1]
    assert forms == ["_absorbed", form]
    torch.testing.assert_close(torch.cat([first, rest], dim=1), expanded, atol=1e-5, rtol=0)


def test_a_window_over_layers_follows_its_pattern() -> None:
    config = VARIANTS["gqa-window"].model_copy(update={"layers": 5})
    assert [config.window_of(layer) for layer in range(5)] == [7, None, 7, None, 7]


def test_stacked_windows_see_no_further_than_their_sum() -> None:
    window = VARIANTS["gqa-window"].window.model_copy(update={"pattern": "S"})
    model = randomise(Transformer(VARIANTS["gqa-window"].model_copy(update={"window": window})))
    first = torch.arange(30)[None] % 60
    second = first.clone()
    second[:, 0] = 66
    reach = 2 * (7 - 1)
    difference = (model.logits(first) - model.logits(second)).abs().amax(-1)[0]
    assert difference[: reach + 1].min() > 0
    assert difference[reach + 1 :].max() == 0


@pytest.mark.parametrize("masked", [True, False], ids=["masked", "causal"])
def test_repeating_the_heads_equals_leaving_them_grouped(masked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = torch.randn(2, 6, 9, 8), torch.randn(2, 2, 9, 8), torch.randn(2, 2, 9, 8)
    window = 4 if masked else None
    grouped = attend(q, k, v, 0.3, window)
    choice = Choice("efficient", "as on a card without FlashAttention")
    monkeypatch.setattr("lowvram_kernels.attention.sdpa.choose_attention", lambda *_: choice)
    torch.testing.assert_close(attend(q, k, v, 0.3, window), grouped)
