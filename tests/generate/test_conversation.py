"""What a conversation gives the model to read: all of it, its newest part where it grows, and nothing twice."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest

from lowvram.data.tokenizer import Tokenizer
from lowvram.errors import PromptError, PromptTooLongError
from lowvram.generate.chat_template import Message, load_chat_template
from lowvram.generate.conversation import Conversation
from lowvram.generate.engine import Counts
from lowvram.generate.sampling import Sampler

GREEDY = Sampler(temperature=0.0)


class Parrot:
    """An engine that answers each text with the same words, one token a piece, and remembers what it was given."""

    def __init__(self, tokenizer: Tokenizer, max_context: int, words: str = " evet olur") -> None:
        self.tokenizer, self.max_context, self.words = tokenizer, max_context, words
        self.ids, self.given = list[int](), list[list[int]]()
        self.ended, self.counts = "text", Counts()

    def generate(self, id_T: Sequence[int], _sampler: Sampler, max_tokens: int) -> Iterator[str]:
        assert len(id_T) < self.max_context
        held = self.ids
        same = next((i for i, (a, b) in enumerate(zip(held, id_T, strict=False)) if a != b), min(len(held), len(id_T)))
        reused = min(same, len(id_T) - 1)
        self.ids, self.counts = list(id_T), Counts(reused, len(id_T) - reused)
        self.given.append(self.ids[:])
        return self._write(max_tokens)

    def _write(self, max_tokens: int) -> Iterator[str]:
        for id in self.tokenizer.encode(self.words)[:max_tokens]:
            if len(self.ids) >= self.max_context:
                return
            self.ids.append(id)
            self.counts = self.counts._replace(written=self.counts.written + 1)
            yield self.tokenizer.decode([id])


def base(tokenizer: Tokenizer, max_context: int = 200) -> Conversation:
    return Conversation(Parrot(tokenizer, max_context))  # type: ignore[arg-type]


def dialogue(tokenizer: Tokenizer, max_context: int = 200, system: str | None = None) -> Conversation:
    engine = Parrot(tokenizer, max_context)
    return Conversation(engine, load_chat_template(tokenizer), system)  # type: ignore[arg-type]


def say(talk: Conversation, text: str, tokens: int = 99, **options: bool) -> str:
    return "".join(talk.ask(text, GREEDY, tokens, **options))


def test_a_base_model_reads_one_text_in_which_each_turn_is_a_line(small_tokenizer: Tokenizer) -> None:
    talk = base(small_tokenizer)
    assert say(talk, "Kış") == " evet olur"
    say(talk, "Yaz")
    assert small_tokenizer.decode(talk.engine.given[1]) == "Kış evet olur\nYaz"
    assert talk.engine.given[1][0] == small_tokenizer.bos_id
    assert talk.messages[1] == Message("assistant", " evet olur", tuple(small_tokenizer.encode(" evet olur")))


def test_a_second_turn_reads_only_what_is_new(small_tokenizer: Tokenizer) -> None:
    for talk in (base(small_tokenizer), dialogue(small_tokenizer, system="Kısa.")):
        say(talk, "Kış")
        first = len(talk.engine.given[0])
        assert (talk.counts.read, talk.counts.reused) == (first, 0)
        written = talk.counts.written
        say(talk, "Yaz")
        assert talk.counts.reused == first + written
        assert talk.counts.read == len(talk.engine.given[1]) - written
        assert talk.engine.given[1][: first + written] == talk.engine.given[0] + list(talk.messages[1].ids or ())


def test_a_dialogue_is_what_the_template_makes_of_it(small_tokenizer: Tokenizer) -> None:
    talk = dialogue(small_tokenizer, system="Kısa yanıt ver.")
    say(talk, "Merhaba")
    say(talk, "Peki?")
    template = load_chat_template(small_tokenizer)
    assert template is not None
    whole = [Message("system", "Kısa yanıt ver."), *talk.messages[:3]]
    assert talk.engine.given[1] == template.encode(small_tokenizer, whole)


def test_an_answer_that_is_stopped_stays_said_as_far_as_it_was_written(small_tokenizer: Tokenizer) -> None:
    talk = dialogue(small_tokenizer)
    pieces = talk.ask("Merhaba", GREEDY, 99)
    first = next(pieces)
    pieces.close()  # type: ignore[attr-defined]
    assert talk.messages[-1] == Message("assistant", first, (small_tokenizer.encode(first)[0],))
    say(talk, "Devam")
    assert first in small_tokenizer.decode(talk.engine.given[1])


def test_retry_forgets_the_last_answer_alone(small_tokenizer: Tokenizer) -> None:
    talk = base(small_tokenizer)
    with pytest.raises(PromptError, match="nothing to answer again"):
        talk.retry(GREEDY, 9)
    say(talk, "Kış")
    list(talk.retry(GREEDY, 9))
    assert talk.engine.given[0] == talk.engine.given[1]
    assert [message.role for message in talk.messages] == ["user", "assistant"]
    talk.reset()
    assert talk.messages == []


def test_a_dialogue_that_outgrows_the_context_forgets_whole_turns_and_keeps_its_system(
    small_tokenizer: Tokenizer,
) -> None:
    talk = dialogue(small_tokenizer, 64, "Kısa.")
    for number in range(12):
        say(talk, f"Soru {number}")
        ids = talk.engine.given[-1]
        assert len(ids) < 64
        text = small_tokenizer.decode(ids)
        assert text.startswith("Kısa.Soru ")
        assert text.endswith(f"Soru {number}")
    assert talk.dropped > 0
    assert talk.messages[talk.dropped].role == "user"


def test_a_text_that_outgrows_the_context_keeps_its_newest_half(small_tokenizer: Tokenizer) -> None:
    talk = base(small_tokenizer, 48)
    lengths = []
    for number in range(12):
        say(talk, f"Satır {number}")
        lengths.append(len(talk.engine.given[-1]))
    assert max(lengths) < 48
    falls = [n for n in range(1, 12) if lengths[n] < lengths[n - 1]]
    assert falls
    assert lengths[falls[0]] == 24
    assert all(ids[0] == small_tokenizer.bos_id for ids in talk.engine.given)
    # Between two cuts the beginning stays, so that it is not read again.
    assert len(falls) < 6


@pytest.mark.parametrize("make", [base, dialogue])
def test_a_text_that_alone_is_too_long_is_refused_by_how_much_and_nothing_is_said(make, small_tokenizer) -> None:
    talk = make(small_tokenizer, 64)
    say(talk, "Kış")
    count = len(small_tokenizer.encode("uzun " * 80))
    with pytest.raises(
        PromptTooLongError, match=r"tokens, \d+ too many\. The context holds 64.*`newest=True`"
    ) as error:
        talk.ask("uzun " * 80, GREEDY, 9)
    said, over = (
        int(word.replace(",", "")) for word in str(error.value).split() if word[0].isdigit() and word != "64,"
    )
    assert over == said - 63
    assert said >= count
    assert len(talk.messages) == 2
    assert talk.dropped == 0
    assert say(talk, "Yaz") == " evet olur"


@pytest.mark.parametrize("newest", [False, True])
def test_a_system_that_leaves_no_room_is_told_and_nothing_is_said(newest: bool, small_tokenizer: Tokenizer) -> None:
    talk = dialogue(small_tokenizer, 64, system="uzun " * 80)
    with pytest.raises(PromptError, match=r"The system message has \d{3} tokens, and the context holds 64\.") as error:
        talk.ask("Kış", GREEDY, 9, newest)
    assert not isinstance(error.value, PromptTooLongError), "no part of the question would fit"
    assert talk.messages == []
    talk.system = "Kısa."
    assert say(talk, "Kış", newest=newest) == " evet olur"


@pytest.mark.parametrize("make", [base, dialogue])
def test_its_newest_part_fits_and_leaves_room_for_an_answer(make, small_tokenizer) -> None:
    talk = make(small_tokenizer, 64)
    text = "".join(f"çğış {number} " for number in range(80)) + "son söz"
    say(talk, text, 16, newest=True)
    kept = talk.messages[0].content
    assert text.endswith(kept)
    assert len(kept) > 20
    assert len(talk.engine.given[0]) <= 64 - 1 - 15 + 1
    say(talk, "kısa", newest=True)
    assert talk.messages[2].content == "kısa"
