"""Says what a predicted speed rests on: a measurement here, one of ours on such a card, or published figures."""

from __future__ import annotations

from collections.abc import Sequence

from lowvram.fit.receipts import ReceiptSummary
from lowvram.hardware.profile import Profile
from lowvram.units import count_of


def describe_evidence(
    profile: Profile, measured_ids: Sequence[str], is_measured_here: bool, receipts: ReceiptSummary | None = None
) -> str:
    """Return the phrase that is printed beside every predicted speed.

    receipts: those of the card.  measured_ids: the cards whose measurements ship with the catalogue.
    """
    if is_measured_here:
        return "measured on this machine"
    if profile.platform == "cpu":
        return "estimated from one processor's figures, and processors differ by far"
    if receipts is not None:
        counted = count_of(receipts.receipts, "receipt")
        return f"estimated, and corrected by {counted} of such a card, median error {receipts.error:.0%} before"
    kind = _kind(profile)
    if profile.id in measured_ids:
        return f"estimated; our kernels have been measured on this card (profiles/measured/{profile.id}.md)"
    if any(_kind_of_id(measured) == kind for measured in measured_ids):
        return f"estimated; this card has not been measured by us yet, other {kind} cards have"
    if kind == "Apple":
        return "estimated; no Apple chip has been measured by us yet"
    if kind == "GeForce":
        return "estimated; no GeForce has been measured by us yet"
    return f"estimated; no {profile.name} has been measured by us yet"


def _kind(profile: Profile) -> str:
    if profile.platform == "mps":
        return "Apple"
    return "GeForce" if profile.id.startswith("rtx") or "GeForce" in profile.name else profile.name


def _kind_of_id(profile_id: str) -> str:
    return "GeForce" if profile_id.startswith("rtx") else "Apple" if profile_id.startswith("m") else profile_id
