"""Names of cards that the catalogue does not have, and what is true of each; knows no card that it does have."""

from __future__ import annotations

import re
from collections.abc import Iterable

from lowvram.errors import name_nearest

_RUNS_ON = "lowvram trains on NVIDIA cards from RTX 20 on, on Apple chips from M1 on, and on processors."
_WITHOUT_A_NAME = "Without a name, --memory 8GB works for any NVIDIA card."

_PROCESSOR = "`--gpu cpu` shows what the processor can do."

# The first pattern that is found in a name decides; names are in lower case, with single blanks.
_FAMILIES = (
    (
        r"\b(amd|radeon|rx ?\d{3,4}|vega|instinct|mi ?\d{2,3}x?|ryzen|strix|firepro)",
        f"AMD cards are not supported. {_RUNS_ON} {_PROCESSOR}",
    ),
    (
        r"\b(intel|arc|iris|uhd|xe|gaudi|[ab](310|380|570|580|750|770))\b",
        f"Intel's graphics are not supported. {_RUNS_ON} {_PROCESSOR}",
    ),
    (
        r"\b(gtx|rtx|geforce)? ?16[356]0|\bmx ?[45]50\b",
        "A GTX 16 or MX450 has CUDA compute capability 7.5, as an RTX 20 has, but no tensor cores: it is far slower, "
        "and nobody has tried it.  An RTX 20 of the same memory shows what fits: --gpu rtx2060-6gb --memory 6GB.",
    ),
    (
        r"\b(gtx|rtx|geforce|gt)? ?(10[1-8]0|[6-9][1-9]0)(m|ti)?\b|\b(titan (x|xp|v|z|black)|gt ?[67]\d0|"
        r"quadro (?!rtx|t\d)\w+|(tesla )?(v100|p100|p40|p4|m40|m60|k40|k80)|mx ?[1-3]\d0)\b",
        "It is too old: its compute capability is below the 7.5 that our kernels need, so only plain PyTorch, as built "
        f"for CUDA 12.6, could compute on it, far slower. {_RUNS_ON}",
    ),
    (
        r"\b(?P<generation>m\d) ?ultra\b",
        "Name the Max of that generation and the memory, such as --gpu {generation}-max --ram 192GB: what fits is "
        "right, and an Ultra is up to twice as fast.",
    ),
    (
        r"^(?=.)(apple ?)?(silicon|mac|macbook( pro| air)?|imac|mac (mini|studio|pro))?"
        r"( (20)?\d\d?(\.\d)? ?(inch|in|inç|gb)?)*$",
        "Name the chip and the memory, such as --gpu m3-pro --ram 18GB.",
    ),
    (
        r"\b(quadro|titan rtx|rtx ?a\d{4}|rtx pro|rtx ?[2-8]000|a\d{1,3}|l4|l40s?|t4|t\d{3,4}|gh?200|b[123]00)\b",
        "It works where its compute capability is 7.5 or more.  Name its memory instead, such as --memory 16GB: what "
        "fits is then known, and its speed is not.",
    ),
)


def explain_unknown(name: str, known: Iterable[str]) -> str:
    """Return what is true of a card that the catalogue does not have, or the nearest names.

    name: as it was typed.  known: the ids of the catalogue.
    """
    plain = " ".join(re.sub(r"[^\w.]+", " ", name.replace("ı", "i").replace("İ", "i").lower()).split())
    for pattern, answer in _FAMILIES:
        if found := re.search(pattern, plain):
            return answer.format(**found.groupdict())
    spelt = re.sub(r"nvidia|geforce|apple|gpu|\s", "", plain)
    return f"{name_nearest(spelt, known)} {_WITHOUT_A_NAME}"
