"""The options that say how the next token is drawn, and the sampler that they describe."""

from __future__ import annotations

import argparse
from functools import partial
from typing import TYPE_CHECKING

from lowvram.api.models import build_sampler

if TYPE_CHECKING:
    from lowvram.generate.sampling import Sampler

_NAMES = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")


def add_sampler(parser: argparse.ArgumentParser) -> None:
    """Add an option for each setting."""
    add = partial(parser.add_argument, type=float)
    shown = "(default: %(default)s)"
    add(
        "--temperature",
        default=0.8,
        metavar="T",
        help=f"below 1: more predictable text; 0: always the most likely token {shown}",
    )
    add("--top-k", type=int, default=50, metavar="K", help=f"draw from the K most likely tokens; 0: from all {shown}")
    add(
        "--top-p",
        default=0.95,
        metavar="P",
        help=f"and from the most likely tokens that together have this probability {shown}",
    )
    add(
        "--min-p",
        default=0.0,
        metavar="P",
        help=f"and from tokens with at least this share of the most likely token's probability {shown}",
    )
    add("--repetition-penalty", default=1.1, metavar="R", help=f"above 1: fewer repetitions {shown}")
    add("--seed", type=int, default=0, help=f"the same seed gives the same text {shown}")


def sampler_of(arguments: argparse.Namespace) -> Sampler:
    """Return the sampler that the options describe; raises ConfigError naming the option that is out of range."""
    return build_sampler(
        {name: getattr(arguments, name) for name in _NAMES}, lambda name: f"--{name.replace('_', '-')}"
    )
