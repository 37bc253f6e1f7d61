"""A small model with a tokenizer, as what scores texts; and a generator run to its end."""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path
from typing import Any, TypeVar

import torch

from lowvram.data.tokenizer import Tokenizer
from lowvram.evaluate.scorer import Scorer
from lowvram.model.transformer import Transformer
from tests.model.outside import randomise
from tests.model.variants import VARIANTS

Result = TypeVar("Result")


def finish(work: Generator[Any, None, Result]) -> Result:
    """Return what a generator returns."""
    while True:
        try:
            next(work)
        except StopIteration as end:
            return end.value


def scorer_of(tokenizer: Tokenizer, kind: str = "gqa-rope", max_context: int = 256) -> Scorer:
    """Return a model of a kind with random weights."""
    config = VARIANTS[kind].model_copy(update={"vocabulary": tokenizer.size})
    return Scorer(randomise(Transformer(config)), torch.float32, tokenizer, max_context)


def nats_by_hand(scorer: Scorer, text: str, behind: str = "") -> float:
    """Return the nats of a text after another one, from every position's logits."""
    first = [scorer.tokenizer.bos_id, *scorer.tokenizer.encode(behind)]
    ids = [*first, *scorer.tokenizer.encode(text)]
    with torch.no_grad():
        log_TV = scorer.model.logits(torch.tensor([ids[:-1]]))[0].double().log_softmax(-1)
    return -sum(log_TV[place - 1, ids[place]].item() for place in range(len(first), len(ids)))


def write(path: Path, *lines: str) -> Path:
    """Write lines to a file."""
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path
