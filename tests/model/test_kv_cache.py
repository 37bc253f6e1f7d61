"""What the cache keeps, in bytes and places: slots side by side, windows that move on, texts taken back."""

from __future__ import annotations

import pytest
import torch

from lowvram.config.architecture import Mla
from lowvram.config.model import ModelConfig
from lowvram.model.kv_cache import CacheSlot, KvCache
from tests.model.variants import VARIANTS

WINDOWED = VARIANTS["gqa-window"]  # seven tokens, in the first of two layers
WIDE = Mla(heads=4, kv_lora_rank=192, nope_dim=64, rope_dim=32, value_dim=96)  # of the preset tr-130m-moe


def numbers(first: int, count: int) -> torch.Tensor:
    """Keys that tell their positions: [1, T, G, K]."""
    return torch.arange(first, first + count, dtype=torch.float32).view(1, -1, 1, 1).expand(1, count, 2, 8)


def fill(cache: KvCache, slot: int, *counts: int) -> None:
    """Read `counts` tokens in turn, whose keys are their positions."""
    view = CacheSlot(cache, slot)
    for count in counts:
        cache.make_room(slot, count)
        for layer in range(2):
            view.store_keys(layer, numbers(view.length, count), -numbers(view.length, count))
        view.advance(count)


def kept(cache: KvCache, slot: int, layer: int) -> list[int]:
    """The positions whose keys the layer holds, in the order of places."""
    end = cache.lengths[slot] - cache.first(slot, layer)
    keys, values = (part[slot, 0, :end, 0] for part in cache.layers[layer])
    assert torch.equal(keys, -values)
    return [int(position) for position in keys]


def test_the_mla_cache_holds_rank_plus_rope_values_per_token_and_layer() -> None:
    config = VARIANTS["mla-moe"]
    assert KvCache(config, 3, 11).bytes_per_token() == config.layers * (20 + 8) * 4
    assert KvCache(config, 3, 11, torch.bfloat16).bytes_per_token() == config.layers * (20 + 8) * 2


def test_the_gqa_cache_holds_only_the_key_value_heads() -> None:
    config = VARIANTS["gqa-rope"]
    assert KvCache(config, 3, 11).bytes_per_token() == config.layers * 2 * 2 * 8 * 4


def test_codes_of_latents_take_at_most_six_tenths_of_bf16() -> None:
    config = VARIANTS["mla-rope"].model_copy(update={"attention": WIDE})
    plain, coded = (KvCache(config, 2, 50, torch.bfloat16, format=format) for format in ("plain", "e4m3"))
    assert plain.bytes_per_token() == config.layers * (192 + 32) * 2
    assert coded.bytes_per_token() == config.layers * (192 + 2 * 4 + 32 * 2)
    assert coded.bytes <= 0.6 * plain.bytes


def test_bytes_are_what_the_tensors_take() -> None:
    for name, config in VARIANTS.items():
        cache = KvCache(config, 3, 11, torch.float16)
        storages = {part.untyped_storage().data_ptr(): part.untyped_storage().nbytes()
                    for parts in cache.layers for part in parts}  # fmt: skip
        assert cache.bytes == sum(storages.values()), name


def test_a_layer_with_a_window_has_places_for_the_window_and_a_chunk_alone() -> None:
    cache = KvCache(WINDOWED, 1, 1000, chunk=8)
    assert [parts[0].shape[2] for parts in cache.layers] == [7 + 8, 1000]


@pytest.mark.parametrize("counts", [(8, 8, 8, 8), (1,) * 40, (3, 8, 1, 1, 1, 8, 2, 7), (8,) * 12], ids=str)
def test_a_window_that_moves_on_keeps_the_newest_tokens_in_order(counts: tuple[int, ...]) -> None:
    cache = KvCache(WINDOWED, 2, 1000, chunk=8)
    for number in range(len(counts)):
        fill(cache, 1, counts[number])
        length = sum(counts[: number + 1])
        assert cache.lengths == [0, length]
        assert kept(cache, 1, 1) == list(range(length))
        held = kept(cache, 1, 0)
        assert held == list(range(length - len(held), length))
        assert len(held) >= min(7, length)


def test_a_rewound_text_keeps_what_is_before() -> None:
    cache = KvCache(WINDOWED, 1, 100)
    fill(cache, 0, 30)
    assert cache.rewind(0, 21) == 21
    assert cache.rewind(0, 25) == 21, "there are no more"
    assert kept(cache, 0, 0) == kept(cache, 0, 1) == list(range(21))
    fill(cache, 0, 4)
    assert kept(cache, 0, 1) == list(range(25))


@pytest.mark.parametrize("back", range(1, 20))
def test_a_window_that_has_moved_on_is_rewound_as_far_as_it_reaches_or_to_nothing(back: int) -> None:
    cache = KvCache(WINDOWED, 1, 1000, chunk=8)
    fill(cache, 0, 8, 8, 8, 8)
    oldest = kept(cache, 0, 0)[0]
    found = cache.rewind(0, 32 - back)
    # The next query, at 32 - back, sees itself and six before it.
    assert found == (32 - back if 32 - back - 6 >= oldest else 0)
    if found == 0:
        fill(cache, 0, 8)
        assert kept(cache, 0, 0) == kept(cache, 0, 1) == list(range(8))


def test_at_least_half_a_chunk_can_be_taken_back_after_one_token_at_a_time() -> None:
    cache = KvCache(WINDOWED, 1, 1000, chunk=8)
    for length in range(1, 60):
        fill(cache, 0, 1)
        oldest = kept(cache, 0, 0)[0]
        assert length - oldest >= min(length, 7 + 8 // 2), length


def test_what_is_forgotten_becomes_zeros_so_that_no_nan_of_it_is_left() -> None:
    cache = KvCache(WINDOWED, 2, 100, chunk=8)
    fill(cache, 0, 8, 8)
    for layer, parts in enumerate(cache.layers):
        for part in parts:
            part[0, ..., : 16 - cache.first(0, layer), :] = torch.nan
    cache.rewind(0, 0)
    assert all(torch.equal(part, torch.zeros_like(part)) for parts in cache.layers for part in parts)


def test_a_slot_leaves_the_others_alone() -> None:
    cache = KvCache(WINDOWED, 3, 1000, chunk=8)
    fill(cache, 1, 8, 5)
    before = kept(cache, 1, 0), kept(cache, 1, 1)
    fill(cache, 0, 8, 8, 8, 8)
    fill(cache, 2, 3)
    cache.rewind(0, 0)
    assert (kept(cache, 1, 0), kept(cache, 1, 1)) == before
    assert cache.lengths == [0, 13, 3]


def test_latents_come_back_from_codes_as_e4m3_rounds_them() -> None:
    config: ModelConfig = VARIANTS["mla-rope"].model_copy(update={"attention": WIDE})
    cache, new = KvCache(config, 1, 20, torch.bfloat16, format="e4m3"), torch.randn(1, 9, 192 + 32).bfloat16()
    back = CacheSlot(cache, 0).store_latent(0, new)
    assert back.dtype == torch.bfloat16
    assert torch.equal(back[..., 192:], new[..., 192:])
    error = (back - new).abs()[..., :192]
    # Three bits behind the first: half a step of 1/8; the smallest numbers have fewer.
    assert bool((error <= new.abs()[..., :192] / 16 + new.abs().max() / 448 / 2**4).all())
    assert error.max() > 0
