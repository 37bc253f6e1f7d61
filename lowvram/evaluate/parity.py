"""Measures how many tokens the same sentences take in several languages; opens no file.

Parity is the tokens of a language over those of the first one, all sentences together; 1 is a fair tokenizer.
Source: Petrov et al. 2023, "Language Model Tokenizers Introduce Unfairness Between Languages", who call it premium.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass

from lowvram.data.any_tokenizer import AnyTokenizer


@dataclass(frozen=True)
class ParityFigures:
    """What the sentences of one language take.  parity: tokens over those of the first language.

    exact: the share of the sentences that come back as they were; where it is small, parity says nothing.
    """

    tokens: int
    parity: float
    bytes_per_token: float
    exact: float


def measure_parity(
    tokenizer: AnyTokenizer, sentences: Mapping[str, Sequence[str]]
) -> Generator[tuple[int, int], None, dict[str, ParityFigures]]:
    """Measure; yield how many sentences are encoded, of how many.  sentences: by language, each with as many."""
    total, done = sum(map(len, sentences.values())), 0
    found: dict[str, ParityFigures] = {}
    of_first = 0
    for language, texts in sentences.items():
        tokens = exact = size = 0
        for text in texts:
            ids = tokenizer.encode(text)
            tokens += len(ids)
            exact += tokenizer.decode(ids) == text
            size += len(text.encode())
            done += 1
            yield done, total
        of_first = of_first or max(1, tokens)
        found[language] = ParityFigures(tokens, tokens / of_first, size / max(1, tokens), exact / len(texts))
    return found
