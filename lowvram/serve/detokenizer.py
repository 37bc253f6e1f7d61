"""What one answer's tokens say so far: whole characters, and nothing of a stop string; knows neither slots nor HTTP."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lowvram.data.tokenizer import Tokenizer


@dataclass(frozen=True)
class Logprobs:
    """How likely the model itself, without a sampler, held a token (logprob), and the likeliest ids there (top)."""

    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class TokenLogprob:
    """One token of an answer.  start: how many of the answer's characters were whole before it."""

    id: int
    start: int
    logprobs: Logprobs


@dataclass(frozen=True)
class Piece:
    """Text that is certain by now, and the tokens that it came from where their chances were asked for."""

    text: str
    said: tuple[TokenLogprob, ...] = ()


class _StopString:
    """One stop string and how much of it the text ends with, so that no token is compared with all of it again.

    Source: Knuth, Morris and Pratt 1977, Fast pattern matching in strings.
    """

    def __init__(self, text: str) -> None:
        self.text, self.matched = text, 0
        # Of each beginning of the string, how long the longest shorter one is that it ends with.
        self._borders = [0] * len(text)
        for place in range(1, len(text)):
            self._borders[place] = self._extend(self._borders[place - 1], text[place])

    def find_end(self, new: str) -> int | None:
        """Take the text's next characters; returns behind how many of them the string is there first, or None."""
        for place, character in enumerate(new, 1):
            self.matched = self._extend(self.matched, character)
            if self.matched == len(self.text):
                return place
        return None

    def _extend(self, matched: int, character: str) -> int:
        while self.text[matched] != character:
            if not matched:
                return 0
            matched = self._borders[matched - 1]
        return matched + 1


class Detokenizer:
    """Turns tokens into pieces of text and holds back what may yet be half a character or a stop string."""

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = ()) -> None:
        self.is_stopped = False
        self._stream = tokenizer.stream()
        self._stops = tuple(_StopString(stop) for stop in stops)
        self._held, self._unsaid = "", list[TokenLogprob]()
        self._known = self._released = 0

    def push(self, id: int, logprobs: Logprobs | None = None) -> Piece:
        """Take the next token; returns what is certain now, perhaps nothing.  `is_stopped` says whether to go on."""
        if logprobs is not None:
            self._unsaid.append(TokenLogprob(id, self._known, logprobs))
        return self._release(self._stream.push(id), is_last=False)

    def finish(self) -> Piece:
        """Return what is still held back, when the answer ends for another reason than a stop string."""
        if self.is_stopped:
            return Piece("")
        return self._release(self._stream.finish(), is_last=True)

    def _release(self, new: str, is_last: bool) -> Piece:
        self._known += len(new)
        text = self._held + new
        ends = [(stop, end) for stop in self._stops if (end := stop.find_end(new)) is not None]
        cut = min((len(self._held) + end - len(stop.text) for stop, end in ends), default=None)
        self.is_stopped = cut is not None
        if cut is None:
            doubtful = max((stop.matched for stop in self._stops), default=0)
            cut = len(text) - (0 if is_last else doubtful)
        self._held = text[cut:]
        self._released += cut
        is_all = is_last and not self.is_stopped
        said = tuple(one for one in self._unsaid if is_all or one.start < self._released)
        del self._unsaid[: len(said)]
        return Piece(text[:cut], said)
