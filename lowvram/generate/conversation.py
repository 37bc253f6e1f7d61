"""What was said so far, as the ids that a model reads: a text that goes on, or turns; knows no terminal."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from lowvram.errors import PromptError, PromptTooLongError
from lowvram.generate.chat_template import ChatTemplate, Message
from lowvram.generate.engine import Counts, Engine
from lowvram.generate.sampling import Sampler
from lowvram.generate.truncation import drop_oldest, find_starts

# Of the context, what a prompt that is cut to its newest part leaves for the answer at least.
_ANSWER_SHARE = 4


@dataclass
class Conversation:
    """All that was said, and what of it the context holds.

    template: how turns become ids; None: a base model, for which what is said is one text, a line for each turn.
    dropped: messages, of a base model tokens, that the context has no room for any more.
    counts: what all answers cost.
    """

    engine: Engine
    template: ChatTemplate | None = None
    system: str | None = None
    messages: list[Message] = field(default_factory=list)
    dropped: int = 0
    counts: Counts = field(default_factory=Counts)

    def ask(self, text: str, sampler: Sampler, max_tokens: int, newest: bool = False) -> Iterator[str]:
        """Say `text` and return the pieces of the answer as they come; close the iterator to stop it.

        newest: of a text that does not fit the newest part that does is said.  What was written stays said, however
        the answer ends.  Raises PromptTooLongError, with nothing said or dropped, where the text alone does not fit;
        PromptError where what the system says leaves no room for any.
        """
        said = Message("user", text)
        if newest:
            said = self._newest_of(said, max_tokens)
        ids = self._fit([*self.messages, said])
        self.messages.append(said)
        return self._write(ids, sampler, max_tokens)

    def retry(self, sampler: Sampler, max_tokens: int) -> Iterator[str]:
        """Forget the last answer and return another; raises PromptError where nothing was asked yet."""
        if self.messages and self.messages[-1].role == "assistant":
            self.messages.pop()
        if not self.messages:
            raise PromptError("There is nothing to answer again.", "Nothing was said yet.", "Type something first.")
        return self._write(self._fit(self.messages), sampler, max_tokens)

    def reset(self) -> None:
        """Forget all that was said; what the system said stays."""
        self.messages.clear()
        self.dropped = 0

    def _write(self, ids: list[int], sampler: Sampler, max_tokens: int) -> Iterator[str]:
        engine, text = self.engine, ""
        pieces = engine.generate(ids, sampler, max_tokens)
        try:
            for piece in pieces:
                text += piece
                yield piece
        finally:
            self.counts = self.counts.add(engine.counts)
            self.messages.append(Message("assistant", text, tuple(engine.ids[len(ids) :])))

    def _ids(self, messages: list[Message]) -> list[int]:
        tokenizer = self.engine.tokenizer
        if self.template is not None:
            spoken = [Message("system", self.system)] if self.system else []
            return self.template.encode(tokenizer, [*spoken, *messages])
        ids = [tokenizer.bos_id]
        for number, message in enumerate(messages):
            # A line of its own for each turn: a base model knows texts, not speakers.
            text = message.content if number == 0 else f"\n{message.content}"
            ids += tokenizer.encode(text) if message.ids is None else message.ids
        return ids

    def _fit(self, messages: list[Message]) -> list[int]:
        """Return the ids of as much as fits, the last message whole, and leave room for an answer."""
        most = self.engine.max_context - 1
        if self.template is None:
            return self._fit_text(messages, most)
        starts = find_starts([message.role for message in messages], self.dropped)
        dropped, ids = drop_oldest(starts, lambda start: self._ids(messages[start:]), most)
        if len(ids) > most:
            raise self._explain(len(ids))
        self.dropped = dropped
        return ids

    def _fit_text(self, messages: list[Message], most: int) -> list[int]:
        ids, alone = self._ids(messages), len(self._ids(messages[-1:]))
        if alone > most:
            raise _too_long(alone, self.engine.max_context)
        if len(ids) - self.dropped > most:
            self.dropped = len(ids) - max(alone, self.engine.max_context // 2)
        # What is left begins as every text does.
        return [ids[0], *ids[1 + self.dropped :]]

    def _explain(self, count: int) -> PromptError:
        """Return why so many tokens do not fit: what the system says, or what is asked."""
        around, holds = self._around(), self.engine.max_context
        if not self.system or around < holds - 1:
            return _too_long(count, holds)
        return PromptError(
            f"What the system says has {around:,} tokens, and the context holds {holds:,}.",
            "Nothing that is asked has room beside it.",
            "Shorten it, or give more context with --context.",
        )

    def _around(self) -> int:
        """Return the tokens of a conversation in which nothing is asked yet."""
        return len(self._ids([Message("user", "")]))

    def _newest_of(self, said: Message, max_tokens: int) -> Message:
        tokenizer = self.engine.tokenizer
        ids = tokenizer.encode(said.content)
        room = self.engine.max_context - 1 - self._around()
        if len(ids) <= room:
            return said
        room -= min(max_tokens, room // _ANSWER_SHARE)
        # The cut may lie inside a character, of which the rest is no text.
        text = tokenizer.decode(ids[len(ids) - max(1, room) :]).lstrip("\ufffd")
        return said._replace(content=text)


def _too_long(count: int, max_context: int) -> PromptTooLongError:
    over = count - max_context + 1
    return PromptTooLongError(
        f"The text has {count:,} tokens, {over:,} too many.",
        f"The context holds {max_context:,}, and the answer needs room in it too.",
        "Shorten it, or let its newest part alone be read: --newest.",
    )
