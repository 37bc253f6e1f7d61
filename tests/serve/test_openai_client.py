"""The real `openai` client against a real server."""

from __future__ import annotations

from collections.abc import Iterator

import openai
import pytest
import torch

from lowvram.data.tokenizer import Tokenizer
from lowvram.generate.decoder import Decoder
from lowvram.model.transformer import Transformer
from tests.conftest import TURKISH
from tests.serve.place import Place, alone, served, small_model, speak

PROMPT = "Kış geldiğinde köyün"
TURNS = [{"role": "system", "content": "Kısa yaz."}, {"role": "user", "content": "Merhaba"}]
PLAIN = {"model": "small", "temperature": 0.0, "max_tokens": 12}


@pytest.fixture(scope="module")
def model(small_tokenizer: Tokenizer) -> Transformer:
    return small_model(small_tokenizer)


@pytest.fixture(scope="module")
def place(small_tokenizer: Tokenizer, model: Transformer) -> Iterator[Place]:
    with served(small_tokenizer, model) as place:
        yield place


@pytest.fixture
def client(place: Place) -> openai.OpenAI:
    return place.openai()


def text_ids(tokenizer: Tokenizer, text: str = PROMPT) -> list[int]:
    return [tokenizer.bos_id, *tokenizer.encode(text)]


def turn_ids(tokenizer: Tokenizer) -> list[int]:
    return speak(tokenizer, [(turn["role"], turn["content"]) for turn in TURNS])


def test_the_one_model_is_listed_and_found_by_its_name(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["small"]
    assert client.models.retrieve("small").owned_by == "lowvram"
    with pytest.raises(openai.NotFoundError, match="'small' alone"):
        client.models.retrieve("gpt-5")


def test_a_completion_is_the_greedy_text_that_the_engine_writes(
    client: openai.OpenAI, small_tokenizer: Tokenizer, model: Transformer
) -> None:
    ids = text_ids(small_tokenizer)
    answer = client.completions.create(prompt=PROMPT, **PLAIN)
    assert answer.choices[0].text == alone(model, small_tokenizer, ids, 12, 96) != ""
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(ids), 12)
    assert answer.usage.total_tokens == len(ids) + 12


@pytest.mark.parametrize("form", [lambda ids: ids, lambda ids: [ids]], ids=["ids", "a list of ids"])
def test_ids_are_a_prompt_as_good_as_their_text(
    client: openai.OpenAI, small_tokenizer: Tokenizer, form: object
) -> None:
    text = client.completions.create(prompt=[PROMPT], **PLAIN).choices[0].text
    assert client.completions.create(prompt=form(text_ids(small_tokenizer)), **PLAIN).choices[0].text == text


def test_a_conversation_is_answered_through_the_template(
    client: openai.OpenAI, small_tokenizer: Tokenizer, model: Transformer
) -> None:
    expected = alone(model, small_tokenizer, turn_ids(small_tokenizer), 12, 96)
    answer = client.chat.completions.create(messages=TURNS, **PLAIN)
    assert (answer.choices[0].message.role, answer.choices[0].message.content) == ("assistant", expected)
    parts = [
        {"role": "developer", "content": [{"type": "text", "text": "Kısa "}, {"type": "text", "text": "yaz."}]},
        TURNS[1],
    ]
    assert client.chat.completions.create(messages=parts, **PLAIN).choices[0].message.content == expected


def test_an_answer_of_the_client_can_be_sent_back_as_it_came(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(messages=TURNS, **PLAIN).choices[0].message
    again = client.chat.completions.create(
        messages=[*TURNS, answer.model_dump(), {"role": "user", "content": "Sonra?"}], **PLAIN
    )
    assert again.usage is not None
    assert again.usage.prompt_tokens_details is not None
    assert again.usage.prompt_tokens_details.cached_tokens > len("Merhaba") // 4


def test_a_stream_says_the_same_in_pieces_and_counts_at_its_end(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(messages=TURNS, **PLAIN)
    chunks = list(
        client.chat.completions.create(
            messages=TURNS, stream=True, stream_options={"include_usage": True}, logprobs=True, **PLAIN
        )
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    said = [chunk for chunk in chunks if chunk.choices]
    assert "".join(chunk.choices[0].delta.content or "" for chunk in said) == whole.choices[0].message.content
    assert [chunk.choices[0].finish_reason for chunk in said if chunk.choices[0].finish_reason] == ["length"]
    assert sum(len(chunk.choices[0].logprobs.content) for chunk in said if chunk.choices[0].logprobs) == 12
    assert len(chunks) > 5
    assert [chunk.usage for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1].usage is not None
    assert whole.usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert len({chunk.id for chunk in chunks}) == 1


def test_a_stream_of_a_completion_says_the_same(client: openai.OpenAI) -> None:
    whole = client.completions.create(prompt=PROMPT, **PLAIN).choices[0].text
    chunks = list(client.completions.create(prompt=PROMPT, stream=True, **PLAIN))
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole
    assert chunks[-1].choices[0].finish_reason == "length"


@pytest.mark.parametrize("streams", [False, True], ids=["whole", "stream"])
def test_a_stop_string_ends_the_answer_before_itself(client: openai.OpenAI, streams: bool) -> None:
    whole = client.completions.create(prompt=PROMPT, **PLAIN).choices[0].text
    stop = whole[len(whole) // 2 : len(whole) // 2 + 4]
    answer = client.completions.create(prompt=PROMPT, stop=[stop, "never said"], stream=streams, **PLAIN)
    choices = [chunk.choices[0] for chunk in answer] if streams else answer.choices
    assert "".join(choice.text for choice in choices) == whole[: whole.index(stop)]
    assert choices[-1].finish_reason == "stop"


def test_the_same_seed_gives_the_same_text_and_another_seed_another(client: openai.OpenAI) -> None:
    def write(**asked: object) -> str:
        answer = client.completions.create(model="small", prompt=PROMPT, max_tokens=16, temperature=1.0, **asked)
        return answer.choices[0].text

    assert write(seed=7) == write(seed=7)
    assert len({write(seed=seed) for seed in range(5)}) > 1
    assert len({write() for _ in range(5)}) > 1, "no seed is another seed each time"
    likeliest = client.completions.create(prompt=PROMPT, **(PLAIN | {"max_tokens": 16})).choices[0].text
    assert write(extra_body={"top_k": 1}) == likeliest
    assert write(extra_body={"min_p": 1.0}) == likeliest
    assert write(top_p=1e-9) == likeliest
    assert write(extra_body={"top_k": 1, "repetition_penalty": 50.0}) != likeliest


def test_log_probabilities_are_the_models_own_to_1e_4(
    client: openai.OpenAI, small_tokenizer: Tokenizer, model: Transformer
) -> None:
    answer = client.chat.completions.create(messages=TURNS, logprobs=True, top_logprobs=3, **PLAIN)
    assert answer.choices[0].logprobs is not None
    content = answer.choices[0].logprobs.content
    assert content is not None
    assert len(content) == 12
    ids = turn_ids(small_tokenizer)
    for one in content:
        logprob_V = model.logits(torch.tensor([ids]))[0, -1].detach().log_softmax(-1)
        value, index = logprob_V.topk(3)
        assert bytes(one.bytes or []) == small_tokenizer.token_bytes(int(index[0]))
        assert one.logprob == pytest.approx(float(value[0]), abs=1e-4)
        assert [top.logprob for top in one.top_logprobs] == pytest.approx(value.tolist(), abs=1e-4)
        ids.append(int(index[0]))
    assert b"".join(bytes(one.bytes or []) for one in content).decode(errors="replace") == (
        answer.choices[0].message.content
    )


def test_a_completion_has_log_probabilities_in_its_own_form(client: openai.OpenAI) -> None:
    answer = client.completions.create(prompt=PROMPT, logprobs=2, **PLAIN).choices[0]
    assert answer.logprobs is not None
    assert len(answer.logprobs.tokens) == len(answer.logprobs.token_logprobs) == len(answer.logprobs.text_offset) == 12
    for token, logprob, top, start in zip(
        answer.logprobs.tokens,
        answer.logprobs.token_logprobs,
        answer.logprobs.top_logprobs,
        answer.logprobs.text_offset,
        strict=True,
    ):
        assert max(top.values()) == logprob == top[token]
        assert token.startswith("bytes:") or token in answer.text[start:]
    plain = client.completions.create(prompt=PROMPT, **PLAIN).choices[0]
    assert plain.logprobs is None


def test_an_answer_ends_where_the_context_does(client: openai.OpenAI, small_tokenizer: Tokenizer) -> None:
    ids, filled = text_ids(small_tokenizer, " ".join(TURKISH)), []
    for length in range(84, 95):
        answer = client.completions.create(model="small", prompt=ids[:length], temperature=0.0, max_tokens=95)
        assert answer.usage is not None
        if answer.choices[0].finish_reason == "length":
            filled.append(answer.usage.total_tokens)
    assert filled
    assert set(filled) == {96}


def test_a_prompt_longer_than_the_context_says_by_how_much_and_can_be_cut(
    client: openai.OpenAI, small_tokenizer: Tokenizer, model: Transformer
) -> None:
    ids = text_ids(small_tokenizer, PROMPT * 20)
    size, over = len(ids), len(ids) - 95
    with pytest.raises(openai.BadRequestError, match=rf"{size} tokens.*Shorten it by {over} tokens") as got:
        client.completions.create(prompt=ids, **PLAIN)
    assert (got.value.code, got.value.param) == ("context_length_exceeded", "prompt")
    cut = client.completions.create(prompt=PROMPT * 20, extra_body={"truncation": "auto"}, **PLAIN)
    assert cut.usage is not None
    assert cut.usage.prompt_tokens == 96 - 12
    assert cut.choices[0].text == alone(model, small_tokenizer, [ids[0], *ids[-83:]], 12, 96)


def test_a_conversation_longer_than_the_context_loses_its_oldest_turns(
    client: openai.OpenAI, small_tokenizer: Tokenizer, model: Transformer
) -> None:
    long = [TURNS[0]]
    for number in range(12):
        long += [{"role": "user", "content": f"Soru {number}"}, {"role": "assistant", "content": "Evet."}]
    long.append(TURNS[1])
    with pytest.raises(openai.BadRequestError, match='truncation: "auto"'):
        client.chat.completions.create(messages=long, **PLAIN)
    answer = client.chat.completions.create(messages=long, extra_body={"truncation": "auto"}, **PLAIN)

    def ids_of(first: int) -> list[int]:
        return speak(small_tokenizer, [(turn["role"], turn["content"]) for turn in (long[0], *long[first:])])

    kept = next(ids_of(first) for first in range(1, len(long), 2) if len(ids_of(first)) <= 96 - 12)
    assert answer.choices[0].message.content == alone(model, small_tokenizer, kept, 12, 96)


def test_a_base_model_says_where_it_answers(small_tokenizer: Tokenizer) -> None:
    with served(small_tokenizer, speaks=False) as place:
        with pytest.raises(openai.BadRequestError, match=r"/v1/completions.*--as dialogue"):
            place.openai().chat.completions.create(messages=TURNS, **PLAIN)
        assert place.openai().completions.create(prompt=PROMPT, **PLAIN).choices[0].text


def test_a_key_is_asked_for_where_there_is_one(small_tokenizer: Tokenizer) -> None:
    with served(small_tokenizer, api_key="gizli", own_names_only=False) as place:
        assert place.openai().completions.create(prompt=PROMPT, **PLAIN).choices[0].text
        for wrong in ("gizl", "gizli2", "GIZLI", "gizli gizli"):
            with pytest.raises(openai.AuthenticationError):
                place.openai().with_options(api_key=wrong).models.list()


def test_a_decoder_of_one_slot_serves_too(small_tokenizer: Tokenizer, model: Transformer) -> None:
    with served(small_tokenizer, decoder=Decoder(model, 96, 1)) as place:
        texts = {place.openai().completions.create(prompt=PROMPT, **PLAIN).choices[0].text for _ in range(3)}
    assert texts == {alone(model, small_tokenizer, text_ids(small_tokenizer), 12, 96)}
