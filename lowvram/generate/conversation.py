"""A conversation as the ids that a model reads: turns, or for a base model one text; knows no terminal."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from lowvram.errors import PromptError, PromptTooLongError
from lowvram.generate.chat_template import ChatTemplate, Message
from lowvram.generate.engine import Counts, Engine
from lowvram.generate.sampling import Sampler
from lowvram.generate.truncation import drop_oldest, find_starts

# A prompt that is cut to its newest part leaves 1/_ANSWER_SHARE of the room for the answer, or max_tokens if less.
_ANSWER_SHARE = 4


@dataclass
class Conversation:
    """All messages of a conversation, and how many of them no longer fit the context.

    template: turns messages into ids; None: a base model, for which the messages are one text, a line for each.
    dropped: how many messages, or tokens for a base model, the context has no room for any more.
    counts: what all answers cost together.
    """

    engine: Engine
    template: ChatTemplate | None = None
    system: str | None = None
    messages: list[Message] = field(default_factory=list)
    dropped: int = 0
    counts: Counts = field(default_factory=Counts)

    def ask(self, text: str, sampler: Sampler, max_tokens: int, newest: bool = False) -> Iterator[str]:
        """Add `text` as a user's message and return the pieces of the answer as they come; close the iterator to stop.

        newest: of a text that does not fit, use the newest part that does.  What was written of the answer stays in the
        conversation, however it ends.  Raises PromptTooLongError, before anything is added or dropped, where the text
        alone does not fit; PromptError where the system message leaves no room for any.
        """
        message = Message("user", text)
        if newest:
            message = self._keep_newest(message, max_tokens)
        ids = self._fit([*self.messages, message])
        self.messages.append(message)
        return self._write(ids, sampler, max_tokens)

    def retry(self, sampler: Sampler, max_tokens: int) -> Iterator[str]:
        """Drop the last answer and return another; raises PromptError where nothing was asked yet."""
        if self.messages and self.messages[-1].role == "assistant":
            self.messages.pop()
        if not self.messages:
            raise PromptError("There is nothing to answer again.", "Nothing was said yet.", "Type something first.")
        return self._write(self._fit(self.messages), sampler, max_tokens)

    def reset(self) -> None:
        """Drop all messages but the system message."""
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
            system_turn = [Message("system", self.system)] if self.system else []
            return self.template.encode(tokenizer, [*system_turn, *messages])
        ids = [tokenizer.bos_id]
        for number, message in enumerate(messages):
            # Each turn gets a line of its own, since a base model knows texts and no speakers.
            text = message.content if number == 0 else f"\n{message.content}"
            ids += tokenizer.encode(text) if message.ids is None else message.ids
        return ids

    def _fit(self, messages: list[Message]) -> list[int]:
        """Return the ids of the newest messages that fit, the last one whole, with room for an answer."""
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
        ids, newest_tokens = self._ids(messages), len(self._ids(messages[-1:]))
        if newest_tokens > most:
            raise _too_long(newest_tokens, self.engine.max_context)
        if len(ids) - self.dropped > most:
            self.dropped = len(ids) - max(newest_tokens, self.engine.max_context // 2)
        # The rest begins with BOS, as every text does.
        return [ids[0], *ids[1 + self.dropped :]]

    def _explain(self, count: int) -> PromptError:
        """Return an error that says whether the system message or the user's message is too long."""
        overhead, max_context = self._count_overhead(), self.engine.max_context
        if not self.system or overhead < max_context - 1:
            return _too_long(count, max_context)
        return PromptError(
            f"The system message has {overhead:,} tokens, and the context holds {max_context:,}.",
            "It leaves no room for a question.",
            "Shorten it, or give more context with `max_context`.",
        )

    def _count_overhead(self) -> int:
        """Return how many tokens a conversation has whose only message is empty."""
        return len(self._ids([Message("user", "")]))

    def _keep_newest(self, message: Message, max_tokens: int) -> Message:
        tokenizer = self.engine.tokenizer
        ids = tokenizer.encode(message.content)
        room = self.engine.max_context - 1 - self._count_overhead()
        if len(ids) <= room:
            return message
        room -= min(max_tokens, room // _ANSWER_SHARE)
        # The cut may be inside a character, whose rest does not decode to text.
        text = tokenizer.decode(ids[len(ids) - max(1, room) :]).lstrip("\ufffd")
        return message._replace(content=text)


def _too_long(count: int, max_context: int) -> PromptTooLongError:
    over = count - max_context + 1
    return PromptTooLongError(
        f"The text has {count:,} tokens, {over:,} too many.",
        f"The context holds {max_context:,}, and the answer needs room in it too.",
        "Shorten it, or let its newest part alone be read: `newest=True`.",
    )
