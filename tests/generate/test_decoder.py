"""Slots of one decoder hold texts that do not see each other; memory is what it says; static steps equal exact ones."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from lowvram_kernels.dispatch import Card, card_of, override_card, simulate_card

from lowvram.config.architecture import Mla
from lowvram.config.model import ModelConfig
from lowvram.generate import decoder as of_decoder
from lowvram.generate.decoder import Decoder
from lowvram.generate.graphs import Graphs, can_capture
from lowvram.model.kv_cache import KvCache
from lowvram.model.transformer import Transformer
from tests.model.outside import randomise
from tests.model.variants import VARIANTS, VOCABULARY

ABSOLUTE = 2e-5
CPU = Card("cpu")
every_variant = pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
each_way = pytest.mark.parametrize("card", [CPU, Card("cuda", (8, 6))], ids=["each text", "static steps"])


def built(model: Transformer, max_context: int, slots: int = 1, card: Card = CPU, **options: object) -> Decoder:
    """A decoder as it would be on a card; what it computes with then is the processor."""
    with override_card(card):
        return Decoder(model, max_context, slots, **options)  # type: ignore[arg-type]


def words(count: int, seed: int) -> list[int]:
    return torch.randint(0, VOCABULARY, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def whole(model: Transformer, token_T: list[int]) -> torch.Tensor:
    """Logits [V] behind a text, by the forward pass without a cache."""
    with torch.no_grad():
        return model.logits(torch.tensor([token_T]))[0, -1]


@each_way
@every_variant
def test_each_slot_answers_as_if_its_text_were_alone(config: ModelConfig, card: Card) -> None:
    model = randomise(Transformer(config))
    decoder = built(model, 64, 4, card, chunk=8)
    texts = {0: words(21, 0), 3: words(5, 1), 1: words(1, 2)}
    for slot, token_T in texts.items():
        torch.testing.assert_close(decoder.prefill(slot, token_T), whole(model, token_T), atol=ABSOLUTE, rtol=0)
    for step in range(12):
        slots = [3, 0, 1][: 1 + step % 3]  # one of them joins and leaves between tokens
        new = words(len(slots), 10 + step)
        logit_NV = decoder.decode_one_token(slots, new)
        for row, slot in enumerate(slots):
            texts[slot].append(new[row])
            expected = whole(model, texts[slot])
            torch.testing.assert_close(logit_NV[row].log_softmax(-1), expected.log_softmax(-1), atol=1e-4, rtol=0)
            assert int(logit_NV[row].argmax()) == int(expected.argmax())
    assert [decoder.length(slot) for slot in range(4)] == [len(texts.get(slot, [])) for slot in range(4)]


@pytest.mark.parametrize("chunk", [1, 2, 7, 20, 512])
@every_variant
def test_reading_in_chunks_equals_reading_at_once(config: ModelConfig, chunk: int) -> None:
    model = randomise(Transformer(config))
    decoder, token_T = Decoder(model, 64, chunk=chunk), words(33, 0)
    torch.testing.assert_close(decoder.prefill(0, token_T), whole(model, token_T), atol=ABSOLUTE, rtol=0)


@each_way
@pytest.mark.parametrize("name", ["mla-moe", "gqa-rope", "gqa-window", "mla-window"])
def test_a_text_that_is_taken_back_goes_on_as_if_it_had_never_been(name: str, card: Card) -> None:
    model = randomise(Transformer(VARIANTS[name]))
    decoder, other = built(model, 64, 2, card, chunk=8), words(9, 5)
    decoder.prefill(1, other)
    decoder.prefill(0, words(50, 0))
    for length in (47, 20, 0):
        kept = decoder.rewind(0, length)
        assert kept in (length, 0)
        new = words(4, length)
        torch.testing.assert_close(
            decoder.prefill(0, words(50, 0)[kept:length] + new),
            whole(model, words(50, 0)[:length] + new),
            atol=ABSOLUTE,
            rtol=0,
        )
    torch.testing.assert_close(decoder.decode_one_token([1], [3])[0], whole(model, [*other, 3]), atol=ABSOLUTE, rtol=0)


@each_way
@every_variant
def test_a_text_may_fill_the_context_while_others_go_on(config: ModelConfig, card: Card) -> None:
    model = randomise(Transformer(config))
    decoder, full, short = built(model, 20, 2, card, chunk=8), words(20, 0), words(2, 1)
    torch.testing.assert_close(decoder.prefill(0, full), whole(model, full), atol=ABSOLUTE, rtol=0)
    decoder.prefill(1, short)
    for token in words(15, 2):
        short.append(token)
        logit_V = decoder.decode_one_token([1], [token])[0]
    torch.testing.assert_close(logit_V, whole(model, short), atol=ABSOLUTE, rtol=0)
    assert decoder.rewind(0, 19) == 19
    torch.testing.assert_close(decoder.prefill(0, full[19:]), whole(model, full), atol=ABSOLUTE, rtol=0)


@each_way
def test_a_text_of_broken_numbers_leaves_nothing_behind(card: Card) -> None:
    model = randomise(Transformer(VARIANTS["gqa-rope"]))
    decoder, token_T = built(model, 64, 2, card), words(9, 0)
    weight = model.blocks[0].attention.v_proj.weight
    before = weight.detach().clone()
    with torch.no_grad():
        weight.fill_(torch.nan)
    assert decoder.prefill(0, words(40, 1)).isnan().all()
    with torch.no_grad():
        weight.copy_(before)
    decoder.rewind(0, 0)
    decoder.prefill(0, token_T)
    torch.testing.assert_close(
        decoder.decode_one_token([0], [5])[0], whole(model, [*token_T, 5]), atol=ABSOLUTE, rtol=0
    )


@each_way
def test_latents_in_8_bits_are_read_in_chunks_as_one_by_one(card: Card) -> None:
    model = randomise(Transformer(VARIANTS["mla-window"]))
    token_T = words(30, 0)
    at_once, in_turn = (built(model, 64, 1, card, cache="e4m3", chunk=8) for _ in range(2))
    found = at_once.prefill(0, token_T)
    in_turn.prefill(0, token_T[:3])
    for token in token_T[3:]:
        one = in_turn.decode_one_token([0], [token])[0]
    torch.testing.assert_close(one, found, atol=ABSOLUTE, rtol=0)
    exact = whole(model, token_T)
    assert 0 < (found - exact).norm() < 0.06 * exact.norm()


def tensors_alive() -> Iterator[torch.Tensor]:
    gc.collect()
    for thing in gc.get_objects():
        if type(thing) in (torch.Tensor, torch.nn.Parameter):
            yield thing


@pytest.mark.parametrize("options", [{}, {"cache": "e4m3"}, {"dtype": torch.bfloat16}], ids=str)
@pytest.mark.parametrize("name", ["mla-moe", "gqa-alibi-window"])
def test_a_decoder_holds_exactly_the_bytes_that_it_says_and_gives_them_back(name: str, options: dict) -> None:
    model = randomise(Transformer(VARIANTS[name]))
    before = {id(tensor) for tensor in tensors_alive()}
    decoder = Decoder(model, 100, 3, **options)
    decoder.prefill(1, words(30, 0))
    decoder.decode_one_token([1, 0], [4, 5])
    decoder.rewind(1, 7)
    new = [tensor for tensor in tensors_alive() if id(tensor) not in before]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in new}
    assert sum(storages.values()) == decoder.cache_bytes > 0
    del decoder, new
    assert {id(tensor) for tensor in tensors_alive()} <= before


def test_latents_in_8_bits_take_six_tenths_of_the_bytes() -> None:
    attention = Mla(heads=2, kv_lora_rank=192, nope_dim=16, rope_dim=32, value_dim=16)
    model = Transformer(VARIANTS["mla-rope"].model_copy(update={"attention": attention}))
    plain, coded = (Decoder(model, 100, dtype=torch.bfloat16, cache=form) for form in ("plain", "e4m3"))
    assert plain.cache_bytes == 2 * 100 * (192 + 32) * 2
    assert coded.cache_bytes <= 0.6 * plain.cache_bytes


def test_many_tokens_in_16_bits_are_read_in_fp32_where_a_processor_has_no_instructions_for_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = randomise(Transformer(VARIANTS["mla-moe"])).to(torch.bfloat16)
    dtypes, true = [], model.forward
    monkeypatch.setattr(model, "forward", lambda *a, **b: dtypes.append(a[1]) or true(*a, **b))
    exact = whole(model.float(), words(30, 0))
    dtypes.clear()
    model.bfloat16()
    for is_slow in (True, False):
        monkeypatch.setattr(of_decoder, "is_slow_in_half", lambda x, is_slow=is_slow: is_slow)
        found = Decoder(model, 40).prefill(0, words(30, 0))
        assert found.dtype == torch.bfloat16
        assert (found.float() - exact).norm() < 0.06 * exact.norm()
    assert dtypes == [torch.float32, torch.bfloat16]


def test_graphs_are_few_whatever_the_slots_and_lengths_are() -> None:
    model = Transformer(VARIANTS["gqa-rope"])
    decoder = built(model, 3000, 6, Card("cuda", (8, 6)))
    graphs = decoder._graphs
    assert isinstance(graphs, Graphs)
    shapes = set()
    for length in range(0, 3000, 7):
        for slot in range(6):
            decoder.cache.lengths[slot] = length
            shapes.add(graphs.shape_of([slot]))
            batch, places = graphs.shape_of([slot])
            assert batch > slot
            assert places > length
    assert shapes == {(b, s) for b in (1, 2, 4, 6) for s in (256, 512, 1024, 2048, 3000)}


def test_only_a_step_that_asks_the_host_nothing_is_captured() -> None:
    assert not can_capture(Transformer(VARIANTS["gqa-rope"])), "there is no card"
    on_card = SimpleNamespace(device=torch.device("cuda"))
    dense = SimpleNamespace(embedding=on_card, moe_layers=list)
    mixed = SimpleNamespace(embedding=on_card, moe_layers=Transformer(VARIANTS["mla-moe"]).moe_layers)
    found = []
    for capability in ((7, 5), (8, 6)):
        with override_card(Card("cuda", capability)):
            found.append((can_capture(dense), can_capture(mixed)))  # type: ignore[arg-type]
    assert found == [(True, False), (True, True)], "a loop over experts waits for the card"


def test_who_asks_for_no_graphs_gets_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lowvram.generate.graphs.can_capture", lambda _: True)
    model = Transformer(VARIANTS["gqa-rope"])
    cache = KvCache(model.config, 1, 300)
    assert [Graphs(model, cache, captures).is_captured for captures in (True, False)] == [True, False]


def test_a_step_can_be_rehearsed_on_paper() -> None:
    model = Transformer(VARIANTS["mla-moe"], seed=None, device="meta")
    with simulate_card(Card("cuda", (8, 9))):
        assert card_of(torch.device("meta")).platform == "cuda"
        decoder = Decoder(model, 300, 2, torch.bfloat16)
        assert decoder.prefill(0, words(9, 0)).shape == (VOCABULARY,)
        assert decoder.decode_one_token([0, 1], [3, 4]).shape == (2, VOCABULARY)


@pytest.fixture
def card_model() -> Transformer:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA card")
    name = "mla-moe"
    return randomise(Transformer(VARIANTS[name])).to("cuda")


@pytest.mark.gpu
@every_variant
def test_a_replayed_graph_equals_the_eager_step(config: ModelConfig) -> None:
    model = randomise(Transformer(config)).to("cuda")
    replayed, eager = Decoder(model, 700, 3, chunk=64), Decoder(model, 700, 3, chunk=64)
    assert replayed._graphs is not None
    assert eager._graphs is not None
    eager._graphs.is_captured = False
    for decoder in (replayed, eager):
        decoder.prefill(2, words(250, 0))
        decoder.prefill(0, words(9, 1))
    for step in range(20):  # beyond 256 places: a second graph
        slots = [2, 0] if step % 3 else [0]
        new = words(len(slots), step)
        a, b = (decoder.decode_one_token(slots, new) for decoder in (replayed, eager))
        torch.testing.assert_close(a, b, atol=1e-5, rtol=0)
    assert len(replayed._graphs.captured) == 3
    assert not eager._graphs.captured


@pytest.mark.gpu
@every_variant
def test_a_card_answers_as_the_whole_forward_pass(config: ModelConfig) -> None:
    model = randomise(Transformer(config)).to("cuda")
    decoder, token_T = Decoder(model, 64, 2, chunk=8), words(20, 0)
    decoder.prefill(1, token_T)
    for token in words(20, 1):
        token_T.append(token)
        found = decoder.decode_one_token([1], [token])[0]
    with torch.no_grad():
        expected = model.logits(torch.tensor([token_T], device="cuda"))[0, -1]
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("form", ["plain", "e4m3"])
def test_replaying_takes_no_memory_and_dropping_a_decoder_gives_it_back(card_model: Transformer, form: str) -> None:
    # Libraries make their workspaces once.
    Decoder(card_model, 600, 4, torch.bfloat16, cache=form).prefill(0, [3])  # type: ignore[arg-type]
    Decoder(card_model, 600, 4, torch.bfloat16, cache=form).prefill(0, [3, 4, 5])  # type: ignore[arg-type]
    torch.cuda.synchronize()
    gc.collect()
    before = torch.cuda.memory_allocated()
    decoder = Decoder(card_model, 600, 4, torch.bfloat16, cache=form)  # type: ignore[arg-type]
    assert torch.cuda.memory_allocated() - before < decoder.cache_bytes + 64 * 512, "rounded up by the allocator"
    decoder.prefill(0, words(5, 0))
    decoder.decode_one_token([0], [3])
    held = torch.cuda.memory_allocated()
    for token in words(200, 1):
        decoder.decode_one_token([0], [token])
    assert torch.cuda.memory_allocated() == held
    del decoder
    gc.collect()
    assert torch.cuda.memory_allocated() == before
