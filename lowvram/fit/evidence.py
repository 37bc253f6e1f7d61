"""What speaks for a predicted speed: a measurement here, one of ours on such a card, or published figures."""

from __future__ import annotations

from collections.abc import Sequence

from lowvram.hardware.profile import Profile


def describe_evidence(profile: Profile, measured_ids: Sequence[str], is_measured_here: bool) -> str:
    """Return a phrase that stands beside every predicted speed.

    measured_ids: the cards whose measurements ship with the catalogue.
    """
    if is_measured_here:
        return "measured on this machine"
    if profile.platform == "cpu":
        return "estimated from one processor's figures, and processors differ by far"
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
