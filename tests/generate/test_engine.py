"""The engine writes what the model without a cache would, stops where it must, and never splits a character."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from lowvram.config.model import ModelConfig
from lowvram.data.tokenizer import Tokenizer
from lowvram.errors import NumbersError, PromptError
from lowvram.generate.decoder import Decoder
from lowvram.generate.engine import Engine
from lowvram.generate.sampling import Sampler
from lowvram.model.transformer import Transformer
from tests.model.outside import randomise
from tests.model.variants import VARIANTS

GREEDY = Sampler(temperature=0.0, repetition_penalty=1.0)
PROMPT = "Kış geldiğinde köyün"
every_variant = pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)


def engine_of(config: ModelConfig, tokenizer: Tokenizer, max_context: int = 64) -> Engine:
    # Untied and with large weights: a small tied model only repeats its last token, and positions would not matter.
    config = config.model_copy(update={"vocabulary": tokenizer.size, "tied": False})
    model = randomise(Transformer(config), std=0.25)
    return Engine(Decoder(model, max_context), tokenizer)


def recomputed(engine: Engine, ids: list[int], count: int) -> list[int]:
    """Greedy ids by the whole forward pass, again for each token: the truth."""
    stops = {engine.tokenizer.bos_id, engine.tokenizer.eos_id, engine.tokenizer.end_of_turn_id}
    ids = list(ids)
    for _ in range(count):
        with torch.no_grad():
            token = int(engine.decoder.model.logits(torch.tensor([ids]))[0, -1].argmax())
        if token in stops:
            break
        ids.append(token)
    return ids


class Scripted:
    """A decoder that says fixed tokens, one after each reading, and counts what it is given to read."""

    def __init__(self, tokenizer: Tokenizer, script: list[int], max_context: int) -> None:
        self.max_context, self.vocabulary = max_context, tokenizer.size
        self.script, self.read, self.held = list(script), list[int](), 0

    def length(self, slot: int) -> int:
        return self.held

    def rewind(self, slot: int, length: int) -> int:
        self.held = min(self.held, length)
        return self.held

    def prefill(self, slot: int, token_T: list[int]) -> torch.Tensor:
        self.read.append(len(token_T))
        self.held += len(token_T)
        return torch.nn.functional.one_hot(torch.tensor(self.script.pop(0)), self.vocabulary).float()

    def decode_one_token(self, slot_N: list[int], token_N: list[int]) -> torch.Tensor:
        return self.prefill(slot_N[0], token_N)[None]


def scripted(tokenizer: Tokenizer, script: list[int], max_context: int = 64) -> Engine:
    return Engine(Scripted(tokenizer, script, max_context), tokenizer)  # type: ignore[arg-type]


def pieces_behind(engine: Engine, text: str, count: int, sampler: Sampler = GREEDY) -> Iterator[str]:
    """Put `text` behind all that was said; returns the pieces of what is written then."""
    ids = [*(engine.ids or [engine.tokenizer.bos_id]), *engine.tokenizer.encode(text)]
    return engine.generate(ids, sampler, count)


def go_on(engine: Engine, text: str, count: int, sampler: Sampler = GREEDY) -> str:
    return "".join(pieces_behind(engine, text, count, sampler))


def byte_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """One id for each single byte of the text, as a model that knows no merge would write it."""
    id_of = {tokenizer.token_bytes(id): id for id in range(tokenizer.size - 1, -1, -1)}
    return [id_of[bytes([byte])] for byte in text.encode()]


@every_variant
def test_streaming_through_the_cache_writes_what_recomputing_everything_would(
    config: ModelConfig, small_tokenizer: Tokenizer
) -> None:
    engine = engine_of(config, small_tokenizer)
    pieces = list(pieces_behind(engine, PROMPT, 24))
    read = [small_tokenizer.bos_id, *small_tokenizer.encode(PROMPT)]
    assert engine.ids == recomputed(engine, read, 24)
    assert len(set(engine.ids[len(read) :])) > 3
    assert "".join(pieces) == small_tokenizer.decode(engine.ids[len(read) :])


@pytest.mark.parametrize("kind", ["gqa-alibi-window", "mla-yarn-q_lora", "mla-moe"])
def test_a_second_turn_goes_on_as_if_the_conversation_had_been_read_at_once(
    kind: str, small_tokenizer: Tokenizer
) -> None:
    engine = engine_of(VARIANTS[kind], small_tokenizer)
    go_on(engine, PROMPT, 9)
    before = list(engine.ids)
    go_on(engine, "\nEvet, çay.", 9)
    assert engine.ids == recomputed(engine, [*before, *small_tokenizer.encode("\nEvet, çay.")], 9)


def test_the_same_seed_writes_the_same_text_and_another_seed_another(small_tokenizer: Tokenizer) -> None:
    texts = []
    for seed in (3, 3, 4):
        engine = engine_of(VARIANTS["gqa-rope"], small_tokenizer)
        texts.append(go_on(engine, PROMPT, 30, Sampler(seed=seed)))
    assert texts[0] == texts[1]
    assert texts[0] != texts[2]


def test_a_second_turn_reads_only_its_new_tokens(small_tokenizer: Tokenizer) -> None:
    engine = scripted(small_tokenizer, byte_ids(small_tokenizer, "abcdefgh"))
    go_on(engine, PROMPT, 3)
    before = engine.decoder.length(0)
    # The last token that is written is read when the text goes on, if it does.
    assert before == 1 + len(small_tokenizer.encode(PROMPT)) + 2 == len(engine.ids) - 1
    go_on(engine, "Evet!", 2)
    new = len(small_tokenizer.encode("Evet!"))
    assert engine.decoder.read == [before - 2, 1, 1, 1 + new, 1]
    assert engine.decoder.length(0) == before + 1 + new + 1 == len(engine.ids) - 1


def test_only_the_first_turn_begins_a_document(small_tokenizer: Tokenizer) -> None:
    engine = scripted(small_tokenizer, byte_ids(small_tokenizer, "abcd"))
    for text in ("Evet", "Hayır"):
        go_on(engine, text, 1)
    assert engine.ids.count(small_tokenizer.bos_id) == 1
    assert engine.ids[0] == small_tokenizer.bos_id


def test_an_empty_turn_goes_on_writing(small_tokenizer: Tokenizer) -> None:
    engine = engine_of(VARIANTS["mla-moe"], small_tokenizer)
    go_on(engine, PROMPT, 4)
    before = list(engine.ids)
    go_on(engine, "", 4)
    assert engine.ids == recomputed(engine, before, 4)
    assert len(engine.ids) > len(before)


@pytest.mark.parametrize("name", ["bos_id", "eos_id", "end_of_turn_id"])
def test_writing_ends_at_a_document_or_turn_end_which_is_not_kept(small_tokenizer: Tokenizer, name: str) -> None:
    script = [*byte_ids(small_tokenizer, "ab"), getattr(small_tokenizer, name), *byte_ids(small_tokenizer, "cd")]
    engine = scripted(small_tokenizer, script)
    assert go_on(engine, "Evet", 50) == "ab"
    assert small_tokenizer.decode(engine.ids) == "Evetab"
    assert getattr(small_tokenizer, name) not in engine.ids[1:]


@pytest.mark.parametrize("count", [0, 1, 7])
def test_no_more_tokens_are_written_than_were_asked_for(small_tokenizer: Tokenizer, count: int) -> None:
    engine = scripted(small_tokenizer, byte_ids(small_tokenizer, "abcdefghij"))
    assert go_on(engine, "Evet", count) == "abcdefghij"[:count]


@pytest.mark.parametrize("text", ["ğüşıöç", "“çay”", "a€b🫖c"], ids=["two bytes", "three bytes", "four bytes"])
def test_a_character_is_never_split_between_pieces(small_tokenizer: Tokenizer, text: str) -> None:
    script = byte_ids(small_tokenizer, text)
    engine = scripted(small_tokenizer, [*script, small_tokenizer.eos_id])
    assert list(pieces_behind(engine, "Evet", 99)) == list(text)


def test_half_a_character_at_the_end_is_shown_as_one_replacement(small_tokenizer: Tokenizer) -> None:
    engine = scripted(small_tokenizer, byte_ids(small_tokenizer, "aş"))
    assert list(pieces_behind(engine, "Evet", 2)) == ["a", "\ufffd"]


def test_a_special_token_that_ends_nothing_has_no_text(small_tokenizer: Tokenizer) -> None:
    script = [small_tokenizer.pad_id, *byte_ids(small_tokenizer, "a"), small_tokenizer.mask_id, small_tokenizer.eos_id]
    assert list(pieces_behind(scripted(small_tokenizer, script), "Evet", 9)) == ["a"]


def test_a_prompt_that_does_not_fit_is_refused_with_numbers_and_forgets_nothing(small_tokenizer: Tokenizer) -> None:
    engine = engine_of(VARIANTS["gqa-rope"], small_tokenizer, max_context=40)
    go_on(engine, PROMPT, 3)
    before = list(engine.ids)
    text = "ab" * 60
    count = len(before) + len(small_tokenizer.encode(text))
    with pytest.raises(PromptError, match=rf"has {count} tokens.*holds 40.*by at least {count - 39} tokens"):
        pieces_behind(engine, text, 3)
    assert engine.ids == before
    go_on(engine, "\nEvet", 3)
    assert engine.ids == recomputed(engine, [*before, *small_tokenizer.encode("\nEvet")], 3)


@pytest.mark.parametrize("room", [0, 1, 2])
def test_a_prompt_may_fill_the_context_up_to_its_last_token(small_tokenizer: Tokenizer, room: int) -> None:
    count = 1 + len(small_tokenizer.encode(PROMPT))
    engine = scripted(small_tokenizer, byte_ids(small_tokenizer, "abcdef"), max_context=count + room)
    if room == 0:
        with pytest.raises(PromptError, match=rf"has {count} tokens.*at least 1 token\."):
            list(pieces_behind(engine, PROMPT, 9))
    else:
        assert go_on(engine, PROMPT, 9) == "abcdef"[:room]


@pytest.mark.parametrize("kind", ["gqa-rope", "gqa-window", "mla-rope"])
def test_writing_ends_when_the_context_is_full(kind: str, small_tokenizer: Tokenizer) -> None:
    engine = engine_of(VARIANTS[kind], small_tokenizer, max_context=23)
    go_on(engine, PROMPT, 500)
    read = [small_tokenizer.bos_id, *small_tokenizer.encode(PROMPT)]
    assert engine.ids == recomputed(engine, read, 23 - len(read))
    assert len(engine.ids) == engine.decoder.length(0) + 1 == 23
    assert engine.ended == "context"


def test_a_text_that_changed_is_read_from_the_change_on(small_tokenizer: Tokenizer) -> None:
    engine = scripted(small_tokenizer, byte_ids(small_tokenizer, "abcdefgh"))
    go_on(engine, PROMPT, 3)
    changed = [*engine.ids[:4], small_tokenizer.pad_id, *engine.ids[5:]]
    "".join(engine.generate(changed, GREEDY, 1))
    assert engine.decoder.read[3:] == [len(changed) - 4]
    assert engine.ids[:-1] == changed


def test_an_answer_that_is_broken_off_is_part_of_the_conversation(small_tokenizer: Tokenizer) -> None:
    engine = engine_of(VARIANTS["gqa-alibi"], small_tokenizer)
    pieces = pieces_behind(engine, PROMPT, 30)
    for _ in range(3):
        next(pieces)
    pieces.close()
    before = list(engine.ids)
    assert len(before) > 1 + len(small_tokenizer.encode(PROMPT))
    go_on(engine, "\nEvet", 5)
    assert engine.ids == recomputed(engine, [*before, *small_tokenizer.encode("\nEvet")], 5)


def test_the_engine_says_why_it_ended(small_tokenizer: Tokenizer) -> None:
    engine = engine_of(VARIANTS["gqa-moe-untied"], small_tokenizer, max_context=24)
    go_on(engine, "Kış", 3)
    assert engine.ended == "tokens"
    go_on(engine, "Evet", 100)
    assert engine.ended == "context"
    ended = scripted(small_tokenizer, [small_tokenizer.eos_id])
    go_on(ended, "Evet", 100)
    assert ended.ended == "text"


def test_an_empty_text_is_refused(small_tokenizer: Tokenizer) -> None:
    with pytest.raises(PromptError, match="The text is empty"):
        scripted(small_tokenizer, []).generate([], GREEDY, 3)


def test_what_a_window_had_to_forget_is_read_again(small_tokenizer: Tokenizer) -> None:
    config = VARIANTS["gqa-alibi-window"].model_copy(update={"vocabulary": small_tokenizer.size, "tied": False})
    engine = Engine(Decoder(randomise(Transformer(config), std=0.25), 200, chunk=8), small_tokenizer)
    go_on(engine, PROMPT * 5, 3)
    shorter = engine.ids[:20]
    assert engine.decoder.length(0) > 20 + 7 + 8, "the window has moved on"
    "".join(engine.generate(shorter, GREEDY, 9))
    assert engine.counts.reused == 0
    assert engine.counts.read == 20
    assert engine.ids == recomputed(engine, shorter, 9)


def test_the_engine_counts_what_was_there_what_it_read_and_what_it_wrote(small_tokenizer: Tokenizer) -> None:
    engine = scripted(small_tokenizer, [*byte_ids(small_tokenizer, "abcdef"), small_tokenizer.eos_id])
    go_on(engine, PROMPT, 4)
    prompt = 1 + len(small_tokenizer.encode(PROMPT))
    assert engine.counts[:3] == (0, prompt, 4)
    go_on(engine, "Evet", 9)
    new = len(small_tokenizer.encode("Evet"))
    assert engine.counts[:3] == (prompt + 3, 1 + new, 2)
    assert engine.counts.read_s > 0 < engine.counts.written_s


def test_broken_numbers_are_an_error_and_not_a_token(small_tokenizer: Tokenizer) -> None:
    engine = engine_of(VARIANTS["gqa-rope"], small_tokenizer)
    with torch.no_grad():
        engine.decoder.model.norm.weight[0] = torch.nan
    with pytest.raises(NumbersError, match=r"greatest logit is nan\. .*weights are broken.*earlier checkpoint"):
        go_on(engine, PROMPT, 3)
