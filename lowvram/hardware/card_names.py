"""Explains names of cards that are not in the catalogue: why they do not work, or what to type instead."""

from __future__ import annotations

import re
from collections.abc import Iterable

from lowvram.errors import name_nearest

_RUNS_ON = "lowvram trains on NVIDIA cards from RTX 20 on, on Apple chips from M1 on, and on processors."
_WITHOUT_A_NAME = 'Without a name, `memory="8GB"` works for any NVIDIA card.'

# What to use if a card is too old: one that is free of charge.
TAKE_ANOTHER = "choose another card: on Kaggle and Colab the T4"


def _say_too_old(capability: str, wheels: str = "only those for CUDA 12.6 have") -> str:
    """Return the explanation for a card below capability 7.5.  wheels: torch's wheels with code for it, "" for none.

    Source: torch 2.13, torch/cuda/__init__.py (PYTORCH_RELEASES_CODE_CC): wheels for CUDA 12.6 hold code from 5.0 on,
    all newer ones from 7.5 on.  Triton's README names 8.0 as the minimum; torch.compile refuses Triton below 7.0.
    """
    which = f"of torch's wheels {wheels}" if wheels else "none of torch's wheels has"
    plain = " With the CUDA 12.6 wheels plain PyTorch would compute, far slower; nobody has tried it." if wheels else ""
    return (
        f"It is too old for torch's wheels and for Triton: {which} code for its compute capability ({capability}), and "
        f"lowvram's Triton kernels need 7.5.{plain} {TAKE_ANOTHER[0].upper()}{TAKE_ANOTHER[1:]}; "
        f'`gpu="t4"` shows what fits there. {_RUNS_ON}'
    )


def explain_too_old(capability: tuple[int, int]) -> str:
    """Return why a card below compute capability 7.5 is too old, and what to do."""
    text = f"{capability[0]}.{capability[1]}"
    return _say_too_old(text) if capability >= (5, 0) else _say_too_old(text, wheels="")


_PROCESSOR = '`gpu="cpu"` shows what the processor can do.'

# The first pattern that matches a name decides; names are in lower case, with single blanks.
_FAMILIES = (
    (r"^\d+(\.\d+)? ?g(i?b)?$", f"It is a size of memory and no card's name. {_WITHOUT_A_NAME}"),
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
        "and nobody has tried it. An RTX 20 of the same memory shows what fits: "
        '`gpu="rtx2060-6gb"` with `memory="6GB"`.',
    ),
    (
        # Fermi and Kepler; the GTX 745 and 750 are Maxwell.
        r"\b(gtx|geforce|gt)? ?(6[1-9]0|7[1-46-9]0)(m|ti)?\b|\b(titan (z|black)|(tesla )?k[248]0\w?)\b",
        _say_too_old("3.7 or less", wheels=""),
    ),
    (r"\b(v100s?|titan v|gv100)\b", _say_too_old("7.0")),
    (r"\bp100\b", _say_too_old("6.0")),
    (
        r"\b(gtx|rtx|geforce|gt)? ?(10[1-8]0|750|9[1-9]0)(m|ti)?\b|\b(titan (x|xp)|quadro (?!rtx|t\d)\w+|"
        r"tesla m4|p40|p4|m40|m60|mx ?[1-3]\d0)\b",
        _say_too_old("6.2 or less", wheels="at most those for CUDA 12.6 have"),
    ),
    (
        r"\b(?P<generation>m\d) ?ultra\b",
        'Name the Max of that generation and the memory, such as `gpu="{generation}-max"` with `ram="192GB"`: what '
        "fits is right, and an Ultra is up to twice as fast.",
    ),
    (
        r"^(?=.)(apple ?)?(silicon|mac|macbook( pro| air)?|imac|mac (mini|studio|pro))?"
        r"( (20)?\d\d?(\.\d)? ?(inch|in|inç|gb)?)*$",
        'Name the chip and the memory, such as `gpu="m3-pro"` with `ram="18GB"`.',
    ),
    (
        r"\b(quadro|titan rtx|rtx ?a\d{4}|rtx pro|rtx ?[2-8]000|a(?!100\b)\d{1,3}|l40s?|t\d{3,4}|gh?200|b[123]00)\b",
        'It works where its compute capability is 7.5 or more. Name its memory instead, such as `memory="16GB"`: what '
        "fits is then known, and its speed is not.",
    ),
)


def explain_unknown(name: str, known: Iterable[str]) -> str:
    """Return an explanation for a card that is not in the catalogue, or the nearest names.

    name: as it was typed.  known: the ids of the catalogue.
    """
    plain = " ".join(re.sub(r"[^\w.]+", " ", name.replace("ı", "i").replace("İ", "i").lower()).split())
    for pattern, explanation in _FAMILIES:
        if match := re.search(pattern, plain):
            return explanation.format(**match.groupdict())
    compact = re.sub(r"nvidia|geforce|apple|gpu|\s", "", plain)
    return f"{name_nearest(compact, known)} {_WITHOUT_A_NAME}"
