"""Recommends presets for a card: a first run of an hour or so, and a long run; prints nothing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from lowvram.errors import DataError
from lowvram.fit.epochs import ENOUGH_PASSES, OUR_PRESETS, RunText, wanted_tokens
from lowvram.fit.report import FitReport
from lowvram.units import count_of, show_count

# A person waits a few weeks at most: a recommended run ends within this time.
PATIENCE_DAYS = 21.0
# A first run shows within an evening whether the text, the machine and the recipe are right.
FIRST_RUN_S, SHORTENED_S = 2 * 3600.0, 3600.0
# A model trained on fewer tokens than it has parameters writes little more than frequent words: our own judgement.
_LEAST_TOKENS_PER_PARAMETER = 1.0
# A run of more than a year is no plan.
TOO_SLOW_DAYS = 365.0
DENSE_FIRST = (
    "Dense models go before mixtures of experts: in our one comparison by the clock a mixture learnt less in the same "
    "time (1.938 bits per byte after 926 s, dense 1.890 after 882 s; one seed, one CPU thread)."
)


class Advice(NamedTuple):
    """A preset to train, and the reason.  tokens: how many to train on instead of the preset's own, None for those."""

    report: FitReport
    reason: str
    tokens: int | None = None

    @property
    def share(self) -> float:
        """The share of the preset's own tokens on which it is trained."""
        return 1.0 if self.tokens is None else self.tokens / self.report.train.tokens

    @property
    def days(self) -> float | None:
        """How long it takes, None where the speed is not known."""
        return None if self.report.days is None else self.report.days * self.share


def recommend(
    reports: Sequence[FitReport], patience_days: float = PATIENCE_DAYS, text: RunText | None = None
) -> Advice | None:
    """Return the long run: the largest dense preset that is trained within patience_days; None if nothing fits.

    text: the text to train on.  Presets that are too large for it are left out, a run reads it at most ENOUGH_PASSES
    times, and None is returned, too, if it is too little for a single step.  Mixtures, and other projects' models, are
    recommended only if nothing else fits.
    """
    offers = _offer(reports, text)
    if not offers:
        return None
    size = _describe_size(offers[0].report, text)
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
        little = "" if _suits(largest.report, text) else ", which is little for any preset"
        steps = count_of(largest.tokens // largest.report.train.batch_tokens, "step")
        return largest._replace(reason=f"{ENOUGH_PASSES:.0f} passes over this text in {steps}{little}")
    soon_enough = f"is expected to see all of its tokens within {patience_days:g} days"
    return largest._replace(reason=f"the {size} that {soon_enough}")


def recommend_first(reports: Sequence[FitReport], text: RunText | None = None) -> Advice | None:
    """Return a first run of an hour or two; None if nothing fits, or if an hour or the text is too short."""
    offers = _offer(reports, text)
    if not offers:
        return None
    timed = [offer for offer in offers if offer.days is not None]
    if not timed:
        smallest = min(offers, key=lambda offer: offer.report.model.num_parameters())
        return smallest._replace(reason="the smallest that is recommended; how fast this card is, is not known")
    short = [offer for offer in timed if offer.days is not None and offer.days * 86_400 <= FIRST_RUN_S]
    if short:
        return _largest(short)._replace(reason="the largest that ends within about two hours")
    quickest = min(timed, key=lambda offer: offer.days or math.inf)
    tokens = _tokens_within(quickest.report, SHORTENED_S)
    if tokens < _LEAST_TOKENS_PER_PARAMETER * quickest.report.model.active_parameters():
        return None
    return quickest._replace(reason="the quickest, on as many tokens as an hour allows", tokens=tokens)


def _candidates(reports: Sequence[FitReport], text: RunText | None) -> list[FitReport]:
    """Return the presets that may be recommended: dense before mixtures, ours before others, none too large for a text.

    If the text is too little for every one of them, the smallest is returned.
    """
    fitting = [report for report in reports if report.fits]
    fitting = [report for report in fitting if report.name.startswith(OUR_PRESETS)] or fitting
    fitting = [report for report in fitting if report.is_dense] or fitting
    if text is None or not fitting:
        return fitting
    suited = [report for report in fitting if _suits(report, text)]
    return suited or [min(fitting, key=lambda report: report.model.num_parameters())]


def _suits(report: FitReport, text: RunText | None) -> bool:
    return text is None or report.model.num_parameters() <= text.suits()


def _describe_size(report: FitReport, text: RunText | None) -> str:
    """Return the beginning of a recommendation's reason, such as "largest dense preset"."""
    kind = "dense preset" if report.is_dense else "preset"
    if not _suits(report, text):
        return f"smallest {kind}, since this text is little for any, and one"
    return f"largest {kind}" + (" that this text suits and" if text is not None else "")


def _offer(reports: Sequence[FitReport], text: RunText | None) -> list[Advice]:
    """Return the presets that may be recommended, with their tokens; those without a single whole step are left out."""
    offers = [Advice(report, "", limit_tokens(report, text)) for report in _candidates(reports, text)]
    return [offer for offer in offers if offer.tokens != 0]


def limit_tokens(report: FitReport, text: RunText | None) -> int | None:
    """Return the tokens to train on if a text is too little for the preset's own, None if it is enough.

    Returns 0 if the text is not enough for one step: it is shorter than a window, or one step reads it too often.
    """
    if text is None:
        return None
    try:
        if max(text.passes(report.train)) <= ENOUGH_PASSES:
            return None
        return text.most_tokens(report.train)
    except DataError:  # shorter than one window
        return 0


def explain_too_little(reports: Sequence[FitReport], text: RunText) -> tuple[str, str, str]:
    """Return three sentences: a text is too little for one step of the smallest preset that fits; why; what to do."""
    least = min(_candidates(reports, text) or reports, key=lambda report: report.model.num_parameters())
    step, wants = least.train.batch_tokens, wanted_tokens(least.model)
    try:
        often = max(text.passes(least.train.model_copy(update={"tokens": step})))
        why = f"A single step of {least.name} reads {step:,} tokens, which is this text {often:,.0f} times."
    except DataError:
        why = f"One window of {least.name} is {least.train.seq_len + 1:,} tokens long."
    what = f"This text of {count_of(text.tokens, 'token')} is too little for {least.name}."
    return what, why, f"Pack more text: {least.name} wants {show_count(wants)} tokens."


def _largest(offers: Sequence[Advice]) -> Advice:
    """Return the largest by √(parameters · active parameters): a mixture's quality lies between the two sizes."""
    return max(offers, key=lambda offer: offer.report.model.num_parameters() * offer.report.model.active_parameters())


def _tokens_within(report: FitReport, seconds: float) -> int:
    """Return how many tokens are trained on in so many seconds, in whole steps."""
    assert report.speed is not None, "called only where the speed is known"
    step = report.train.batch_tokens
    return int(report.speed.tokens_per_second * seconds) // step * step
