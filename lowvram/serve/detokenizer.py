"""Turns one answer's tokens into whole characters, without any stop string; knows neither slots nor HTTP."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lowvram.data.tokenizer import Tokenizer


@dataclass(frozen=True)
class Logprobs:
    """Log-probabilities at one token, of the model itself without a sampler.

    logprob: of the token that was chosen.  top: the likeliest ids and their log-probabilities.
    """

    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class TokenLogprob:
    """One token of an answer.  start: how many characters of the answer were complete before it."""

    id: int
    start: int
    logprobs: Logprobs


@dataclass(frozen=True)
class Piece:
    """Text that can be sent, and the tokens that it came from where their log-probabilities were requested."""

    text: str
    token_logprobs: tuple[TokenLogprob, ...] = ()


class _StopString:
    """One stop string and how much of it the text ends with, so that no character is compared twice.

    Source: Knuth, Morris and Pratt 1977, Fast pattern matching in strings.
    """

    def __init__(self, text: str) -> None:
        self.text, self.matched = text, 0
        # For each prefix of the string: the length of its longest proper prefix that is also its suffix.
        self._borders = [0] * len(text)
        for index in range(1, len(text)):
            self._borders[index] = self._extend(self._borders[index - 1], text[index])

    def find_end(self, new: str) -> int | None:
        """Take the text's next characters; returns after how many of them the stop string is complete, or None."""
        for index, character in enumerate(new, 1):
            self.matched = self._extend(self.matched, character)
            if self.matched == len(self.text):
                return index
        return None

    def _extend(self, matched: int, character: str) -> int:
        while self.text[matched] != character:
            if not matched:
                return 0
            matched = self._borders[matched - 1]
        return matched + 1


class Detokenizer:
    """Turns tokens into pieces of text; holds back what may be part of a character or begin a stop string."""

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = ()) -> None:
        self.is_stopped = False
        self._stream = tokenizer.stream()
        self._stops = tuple(_StopString(stop) for stop in stops)
        self._held, self._pending_logprobs = "", list[TokenLogprob]()
        self._known = self._released = 0

    def push(self, id: int, logprobs: Logprobs | None = None) -> Piece:
        """Take the next token; returns the text that can be sent now, perhaps none.

        `is_stopped` is true afterwards if a stop string ended the answer.
        """
        if logprobs is not None:
            self._pending_logprobs.append(TokenLogprob(id, self._known, logprobs))
        return self._release(self._stream.push(id), is_last=False)

    def finish(self) -> Piece:
        """Return what is still held back, when the answer ends for another reason than a stop string."""
        if self.is_stopped:
            return Piece("")
        return self._release(self._stream.finish(), is_last=True)

    def _release(self, new: str, is_last: bool) -> Piece:
        self._known += len(new)
        text = self._held + new
        matches = [(stop, end) for stop in self._stops if (end := stop.find_end(new)) is not None]
        cut = min((len(self._held) + end - len(stop.text) for stop, end in matches), default=None)
        self.is_stopped = cut is not None
        if cut is None:
            doubtful = max((stop.matched for stop in self._stops), default=0)
            cut = len(text) - (0 if is_last else doubtful)
        self._held = text[cut:]
        self._released += cut
        is_all = is_last and not self.is_stopped
        token_logprobs = tuple(one for one in self._pending_logprobs if is_all or one.start < self._released)
        del self._pending_logprobs[: len(token_logprobs)]
        return Piece(text[:cut], token_logprobs)
