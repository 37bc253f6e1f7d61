"""Which presets to begin with on a card: a first run of an hour or so, and a long one; prints nothing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from lowvram.errors import DataError
from lowvram.fit.epochs import ENOUGH_PASSES, OUR_PRESETS, RunText, wanted_tokens
from lowvram.fit.report import FitReport
from lowvram.units import count_of, show_count

# A person waits a few weeks at most: what is recommended ends within them.
PATIENCE_DAYS = 21.0
# A first run shows within an evening whether the text, the machine and the recipe are right.
FIRST_RUN_S, SHORTENED_S = 2 * 3600.0, 3600.0
# A model that saw fewer tokens than it has parameters writes little more than frequent words: our own judgement.
_LEAST_TOKENS_PER_PARAMETER = 1.0
# A run of more than a year is no plan.
TOO_SLOW_DAYS = 365.0
DENSE_FIRST = (
    "Dense models go before mixtures of experts: in our one comparison by the clock a mixture learnt less in the same "
    "time (1.938 bits per byte after 926 s, dense 1.890 after 882 s; one seed, one CPU thread)."
)


class Advice(NamedTuple):
    """A preset to train and why.  tokens: how many, where the preset's own are too many; None: the preset's own."""

    answer: FitReport
    reason: str
    tokens: int | None = None

    @property
    def share(self) -> float:
        """The part of the preset's own tokens that is trained."""
        return 1.0 if self.tokens is None else self.tokens / self.answer.train.tokens

    @property
    def days(self) -> float | None:
        """How long it takes, None where the speed is not known."""
        return None if self.answer.days is None else self.answer.days * self.share


def recommend(
    answers: Sequence[FitReport], patience_days: float = PATIENCE_DAYS, text: RunText | None = None
) -> Advice | None:
    """Return the long run: the largest dense preset whose tokens are seen in time; None where nothing fits.

    text: what there is to read; presets that it does not suit are left out, and no more tokens are trained than it has
    for; None, too, where it is too little for a single step.  Mixtures, and other projects' models, are taken only
    where nothing else fits.
    """
    offers = _offer(answers, text)
    if not offers:
        return None
    size = _describe_size(offers[0].answer, text)
    if all(offer.days is None for offer in offers):
        return _largest(offers)._replace(reason=f"the {size} that fits; how fast this card is, is not known")
    timed = [offer for offer in offers if offer.days is not None]
    soon = [offer for offer in timed if offer.days is not None and offer.days <= patience_days]
    if not soon:
        quickest = min(timed, key=lambda offer: offer.days or math.inf)
        return quickest._replace(
            reason=f"the quickest; none is expected to see all of its tokens within {patience_days:g} days"
        )
    largest = _largest(soon)
    if largest.tokens is not None:
        little = "" if _suits(largest.answer, text) else ", which is little for any preset"
        steps = count_of(largest.tokens // largest.answer.train.batch_tokens, "step")
        return largest._replace(reason=f"{ENOUGH_PASSES:.0f} passes over this text in {steps}{little}")
    soon_enough = f"is expected to see all of its tokens within {patience_days:g} days"
    return largest._replace(reason=f"the {size} that {soon_enough}")


def recommend_first(answers: Sequence[FitReport], text: RunText | None = None) -> Advice | None:
    """Return a first run of an hour or two; None where nothing fits, or an hour or a text is too short for a preset."""
    offers = _offer(answers, text)
    if not offers:
        return None
    timed = [offer for offer in offers if offer.days is not None]
    if not timed:
        smallest = min(offers, key=lambda offer: offer.answer.model.num_parameters())
        return smallest._replace(reason="the smallest; how fast this card is, is not known")
    short = [offer for offer in timed if offer.days is not None and offer.days * 86_400 <= FIRST_RUN_S]
    if short:
        return _largest(short)._replace(reason="the largest that ends within about two hours")
    quickest = min(timed, key=lambda offer: offer.days or math.inf)
    tokens = _tokens_within(quickest.answer, SHORTENED_S)
    if tokens < _LEAST_TOKENS_PER_PARAMETER * quickest.answer.model.active_parameters():
        return None
    return quickest._replace(reason="the quickest, on as many tokens as an hour allows", tokens=tokens)


def _candidates(answers: Sequence[FitReport], text: RunText | None) -> list[FitReport]:
    """Return the presets that may be recommended: dense before mixtures, ours before others, those that a text suits.

    Where a text is too little for every one of them, the smallest is left.
    """
    fitting = [answer for answer in answers if answer.fits]
    fitting = [answer for answer in fitting if answer.name.startswith(OUR_PRESETS)] or fitting
    fitting = [answer for answer in fitting if answer.is_dense] or fitting
    if text is None or not fitting:
        return fitting
    suited = [answer for answer in fitting if _suits(answer, text)]
    return suited or [min(fitting, key=lambda answer: answer.model.num_parameters())]


def _suits(answer: FitReport, text: RunText | None) -> bool:
    return text is None or answer.model.num_parameters() <= text.suits()


def _describe_size(answer: FitReport, text: RunText | None) -> str:
    """Return which of the presets is recommended, as its reason begins."""
    kind = "dense preset" if answer.is_dense else "preset"
    if not _suits(answer, text):
        return f"smallest {kind}, since this text is little for any, and one"
    return f"largest {kind}" + (" that this text suits and" if text is not None else "")


def _offer(answers: Sequence[FitReport], text: RunText | None) -> list[Advice]:
    """Return what may be recommended with the tokens that a text has for it, without what it gives no step for."""
    offers = [Advice(answer, "", limit_tokens(answer, text)) for answer in _candidates(answers, text)]
    return [offer for offer in offers if offer.tokens != 0]


def limit_tokens(answer: FitReport, text: RunText | None) -> int | None:
    """Return the tokens to train where a text is too little for the preset's own, None where it is not.

    Returns 0 where the text gives not even one step: it is shorter than a window, or one step reads it too often.
    """
    if text is None:
        return None
    try:
        if max(text.passes(answer.train)) <= ENOUGH_PASSES:
            return None
        return text.most_tokens(answer.train)
    except DataError:  # shorter than one window
        return 0


def explain_too_little(answers: Sequence[FitReport], text: RunText) -> tuple[str, str, str]:
    """Say that a text gives not even one step of the smallest preset that fits, or of the only one; why; what to do."""
    least = min(_candidates(answers, text) or answers, key=lambda answer: answer.model.num_parameters())
    step, wants = least.train.batch_tokens, wanted_tokens(least.model)
    try:
        often = max(text.passes(least.train.model_copy(update={"tokens": step})))
        why = f"A single step of {least.name} reads {step:,} tokens, which is this text {often:,.0f} times."
    except DataError:
        why = f"One window of {least.name} is {least.train.seq_len + 1:,} tokens long."
    what = f"This text of {count_of(text.tokens, 'token')} is too little for {least.name}."
    return what, why, f"Pack more text: {least.name} wants {show_count(wants)} tokens."


def _largest(offers: Sequence[Advice]) -> Advice:
    """Return the largest by √(parameters · active parameters): what a mixture is worth lies between the two."""
    return max(offers, key=lambda offer: offer.answer.model.num_parameters() * offer.answer.model.active_parameters())


def _tokens_within(answer: FitReport, seconds: float) -> int:
    """Return how many tokens are seen in so many seconds, in whole steps."""
    assert answer.speed is not None, "only asked where there is a speed"
    step = answer.train.batch_tokens
    return int(answer.speed.tokens_per_second * seconds) // step * step
