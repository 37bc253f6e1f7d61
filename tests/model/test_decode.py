"""One token of each text equals the whole forward pass, whether every text attends by itself or all are one batch."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from lowvram_kernels.dispatch import Card, override_card
from lowvram_kernels.layers.rotary import rotate

from lowvram.config.model import ModelConfig
from lowvram.generate.weights import convert, is_matrix, put
from lowvram.model import decode as one_token
from lowvram.model import slot_attention
from lowvram.model import slot_attention as of_rows
from lowvram.model.decode import decode_one_token
from lowvram.model.kv_cache import CacheFormat, KvCache
from lowvram.model.positions import rotate_one, turn_at
from lowvram.model.slot_attention import BatchedAttention, JoinedAttention, PerSlotAttention, SlotAttention
from lowvram.model.transformer import Transformer, lay_by_columns
from tests.kernels.measures import relative_error
from tests.model.outside import randomise
from tests.model.variants import VARIANTS, VOCABULARY

LENGTH = 29
ABSOLUTE = 2e-5

every_variant = pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
MakeRows = Callable[[KvCache], SlotAttention]


def each(cache: KvCache) -> SlotAttention:
    return PerSlotAttention(cache, range(cache.slots))


def together(cache: KvCache) -> SlotAttention:
    lengths, starts = torch.tensor(cache.lengths), torch.tensor(cache.starts)
    return BatchedAttention(cache, lengths, starts, torch.ones(cache.slots, dtype=torch.bool), max(cache.lengths) + 1)


def joined(cache: KvCache) -> SlotAttention:
    return JoinedAttention(cache, range(cache.slots))


ways = pytest.mark.parametrize("make", [each, together, joined], ids=["each text", "all texts", "joined"])


def tokens(texts: int = 2, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (texts, LENGTH), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def decoded(model: Transformer, token_NT: torch.Tensor, cache: KvCache, make: MakeRows) -> torch.Tensor:
    """Logits behind every token, [N, T, V], read one by one."""
    steps = []
    for token_N in token_NT.T:
        for slot in range(cache.slots):
            cache.make_room(slot, 1)
        steps.append(decode_one_token(model, token_N, make(cache), cache.dtype))
        cache.lengths[:] = [length + 1 for length in cache.lengths]
    return torch.stack(steps, dim=1)


@ways
@every_variant
def test_decoding_token_by_token_equals_the_full_forward_at_every_position(config: ModelConfig, make: MakeRows) -> None:
    model = randomise(Transformer(config))
    with torch.no_grad():
        whole = model.logits(tokens())
    found = decoded(model, tokens(), KvCache(config, 2, LENGTH, chunk=4), make)
    torch.testing.assert_close(found, whole, atol=ABSOLUTE, rtol=0)


@every_variant
def test_one_text_alone_decodes_as_beside_another(config: ModelConfig) -> None:
    model = lay_by_columns(randomise(Transformer(config)))
    alone = decoded(model, tokens()[:1], KvCache(config, 1, LENGTH), each)
    beside = decoded(model, tokens(), KvCache(config, 2, LENGTH), each)
    torch.testing.assert_close(beside[:1], alone, atol=ABSOLUTE, rtol=0)


@every_variant
def test_texts_of_any_length_in_any_slots_decode_joined_as_one_by_one(
    config: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, slot_N, read = randomise(Transformer(config)), [5, 0, 3, 1], [3, 17, 1, 4]
    found: list[list[torch.Tensor]] = []
    # One by one, all in one call, and the three short ones in one call.
    for way, cost in ((PerSlotAttention, 0), (JoinedAttention, 400), (JoinedAttention, 15)):
        monkeypatch.setattr(slot_attention, "_PLACES_OF_A_CALL", cost)
        cache, results = KvCache(config, 7, 32, chunk=4), []
        with torch.no_grad():
            for slot, count in zip(slot_N, read, strict=True):
                for token in range(count):
                    cache.make_room(slot, 1)
                    decode_one_token(model, torch.tensor([token + slot]), PerSlotAttention(cache, [slot]), cache.dtype)
                    cache.lengths[slot] += 1
            for part in (part for parts in cache.layers for part in parts):
                part[4] = torch.nan  # a slot between them whose text is broken
            for step in range(3):
                for slot in slot_N:
                    cache.make_room(slot, 1)
                rows = way(cache, slot_N)
                results.append(decode_one_token(model, torch.tensor([7, 8, 9, step]), rows, cache.dtype))
                for slot in slot_N:
                    cache.lengths[slot] += 1
            results.extend(part[[0, 1, 2, 3, 5, 6]] for parts in cache.layers for part in parts)
        found.append(results)
    assert slot_attention.rows_to_join([length + 1 for length in read], slot_N) == [0, 2, 3]
    for results in found[1:]:
        for one, other in zip(found[0], results, strict=True):
            torch.testing.assert_close(other, one, atol=ABSOLUTE, rtol=0)


@pytest.mark.parametrize(
    "lengths, slots, joined",
    [
        ([100, 120, 90], [0, 1, 2], [0, 1, 2]),
        ([100, 5000, 90], [0, 1, 2], [0, 2]),
        ([5000, 4900, 90, 80], [3, 2, 1, 0], [2, 3]),
        ([1000, 1010], [0, 30], []),
        ([100], [0], []),
        ([9, 9, 9], [4, 6, 5], [0, 1, 2]),
    ],
)
def test_rows_are_joined_where_reading_more_places_is_cheaper_than_a_call(
    lengths: list[int], slots: list[int], joined: list[int]
) -> None:
    assert slot_attention.rows_to_join(lengths, slots) == joined


@ways
@every_variant
def test_bf16_stays_near_fp32(config: ModelConfig, make: MakeRows) -> None:
    model = randomise(Transformer(config))
    with torch.no_grad():
        exact = model.logits(tokens())
    found = decoded(model, tokens(), KvCache(config, 2, LENGTH, torch.bfloat16), make)
    assert found.dtype == torch.bfloat16
    assert (found.float() - exact).norm() < 0.06 * exact.norm()


@ways
@pytest.mark.parametrize("name", ["mla-rope", "mla-window", "mla-yarn-q_lora"])
def test_latents_in_8_bits_stay_near_and_both_ways_agree(name: str, make: MakeRows) -> None:
    model = randomise(Transformer(VARIANTS[name]))
    format: CacheFormat = "e4m3"
    with torch.no_grad():
        exact = model.logits(tokens())
    found = decoded(model, tokens(), KvCache(model.config, 2, LENGTH, format=format, chunk=4), make)
    assert 0 < (found - exact).norm() < 0.06 * exact.norm()
    other = decoded(model, tokens(), KvCache(model.config, 2, LENGTH, format=format, chunk=4), each)
    torch.testing.assert_close(found, other, atol=ABSOLUTE, rtol=0)


def test_a_row_that_stands_by_keeps_what_its_slot_holds() -> None:
    model = randomise(Transformer(VARIANTS["gqa-window"]))
    cache = KvCache(model.config, 2, LENGTH)
    decoded(model, tokens()[:, :9], cache, each)
    before = [part.clone() for parts in cache.layers for part in parts]
    rows = BatchedAttention(cache, torch.tensor([9, 0]), torch.tensor([0, 0]), torch.tensor([True, False]), 10)
    with torch.no_grad():
        decode_one_token(model, torch.tensor([3, 4]), rows, torch.float32)
    after = [part for parts in cache.layers for part in parts]
    for old, new in zip(before, after, strict=True):
        assert torch.equal(old[1], new[1])
        assert not torch.equal(old[0], new[0])


@pytest.mark.parametrize("name", ["gqa-moe-untied", "mla-moe"])
def test_one_row_looks_at_its_own_experts_alone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = randomise(Transformer(VARIANTS[name]))
    expected = decoded(model, tokens()[:1], KvCache(model.config, 1, LENGTH), each)
    seen = []
    true = one_token.multiply
    monkeypatch.setattr(one_token, "multiply", lambda x, w: seen.append(w) or true(x, w))
    found = decoded(model, tokens()[:1], KvCache(model.config, 1, LENGTH), each)
    assert torch.equal(found, expected)
    stack = model.blocks[1].ffn.gate_up_EHD
    assert sum(weight.untyped_storage().data_ptr() == stack.data_ptr() for weight in seen) == 2 * LENGTH, "top 2 of 5"
    with torch.no_grad():
        whole = model.logits(tokens()[:1])
    torch.testing.assert_close(found, whole, atol=ABSOLUTE, rtol=0)


def test_rows_share_the_products_of_an_expert_that_several_chose(monkeypatch: pytest.MonkeyPatch) -> None:
    model = randomise(Transformer(VARIANTS["mla-moe"]))
    given = tokens()[:1].expand(6, -1).clone()
    given[5] = tokens()[1]
    sizes = []
    true, stack = one_token.multiply, model.blocks[1].ffn.gate_up_EHD

    def multiply(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        if weight.untyped_storage().data_ptr() == stack.data_ptr():
            sizes.append(len(x))
        return true(x, weight)

    monkeypatch.setattr(one_token, "multiply", multiply)
    found = decoded(model, given, KvCache(model.config, 6, LENGTH), joined)
    with torch.no_grad():
        torch.testing.assert_close(found, model.logits(given), atol=ABSOLUTE, rtol=0)
    assert set(sizes) <= {1, 5, 6}
    assert sum(sizes) == 6 * 2 * LENGTH, "each text has two experts"
    assert len(sizes) <= 4 * LENGTH, "five equal texts choose the same two, in one product each"


@pytest.mark.parametrize("texts", [1, 2])
@every_variant
def test_int8_weights_decode_as_the_whole_forward_pass_reads_them(config: ModelConfig, texts: int) -> None:
    model = randomise(Transformer(config))
    for name, weight in list(model.named_parameters()):
        if is_matrix(name, weight.shape):
            put(model, name, convert(name, weight, "int8", torch.device("cpu"), torch.bfloat16))
    lay_by_columns(model.requires_grad_(False))
    with torch.no_grad():
        whole = model.logits(tokens(texts), torch.float32)
    found = decoded(model, tokens(texts), KvCache(config, texts, LENGTH, torch.bfloat16), each)
    assert (found.float() - whole).norm() < 0.06 * whole.norm()


@pytest.mark.parametrize("interleaved", [True, False], ids=["neighbours", "halves"])
def test_one_token_turns_as_a_row_of_many_does(interleaved: bool) -> None:
    model = Transformer(VARIANTS["gqa-rope-yarn"])
    x_TNHK = torch.randn(9, 2, 3, 8)
    many = rotate(x_TNHK.transpose(0, 1), model.table(5, 9), interleaved)
    for row in range(9):
        turn = turn_at(model.table, torch.tensor([5 + row, 5 + row]), interleaved)
        torch.testing.assert_close(rotate_one(x_TNHK[row], turn), many[:, row], atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", ["mla-rope", "mla-window"])
def test_latents_are_read_by_a_card_s_kernel_as_without_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cards = pytest.importorskip("tests.kernels.cards")
    model = randomise(Transformer(VARIANTS[name])).to(cards.DEVICE)
    cache = KvCache(model.config, 2, 40, torch.float16, cards.DEVICE)
    decoded(model, tokens()[:, :25].to(cards.DEVICE), cache, each)
    calls, true = [], of_rows.latent_attention
    monkeypatch.setattr(of_rows, "latent_attention", lambda *a, **b: calls.append(a) or true(*a, **b))
    last = tokens()[:, 25].to(cards.DEVICE)
    lengths, starts, active = torch.tensor([[25, 25], [0, 0], [1, 1]], device=cards.DEVICE)
    with torch.no_grad():
        with override_card(Card("cpu")):
            plain = decode_one_token(
                model, last, BatchedAttention(cache, lengths, starts, active.bool(), 32), torch.float16
            )
        with cards.running_on("sm86"):
            kernel = decode_one_token(
                model, last, BatchedAttention(cache, lengths, starts, active.bool(), 32), torch.float16
            )
    assert len(calls) == 2 * model.config.layers
    assert relative_error(kernel, plain) < 5e-3  # two layers of scores, weights, sums and outputs rounded to fp16
