"""The bigram model that a trained one is compared with, counted on the run's own training shards."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lowvram.config.run import RunConfig
    from lowvram.data.shards import ShardSet
    from lowvram.data.tokenizer import Tokenizer
    from lowvram.evaluate.bits_per_byte import Score


def find_baseline(
    what: RunConfig, tokenizer: Tokenizer, valid: ShardSet, most_tokens: int | None
) -> tuple[Score, str] | None:
    """Return the bigram model's score on the first `most_tokens` of `valid`, and what it was counted on.

    None where the training shards cannot be read, which is said.
    """
    from lowvram.cli.console import bar, notice
    from lowvram.data.shards import ShardSet
    from lowvram.errors import DataError
    from lowvram.evaluate.bits_per_byte import BIGRAM_TOKENS, bigram_score
    from lowvram.units import show_count

    path = what.data.train[0].path
    if not path.exists():  # of a model that was imported or moved nobody has it here
        notice("No bigram model to compare with: the shards that the model was trained on are not here.")
        return None
    try:
        train = ShardSet.open(path, tokenizer.hash, tokenizer.size)
    except DataError as error:
        notice(f"No bigram model to compare with: {error}")
        return None
    part = f"the first {show_count(BIGRAM_TOKENS)} tokens of " if train.tokens > BIGRAM_TOKENS else ""
    with bar("Counting bigrams to compare with"):
        return bigram_score(train, valid, tokenizer.bos_id, tokenizer.byte_count_V, most_tokens), f"{part}{path}"
