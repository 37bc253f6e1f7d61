"""Bits per byte against sums written out by hand, and the bigram baseline against a dictionary of counts."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import numpy as np
import pytest
import torch

from lowvram.config import ModelConfig
from lowvram.data.shards import ShardSet, pack
from lowvram.data.tokenizer import Tokenizer
from lowvram.evaluate.bits_per_byte import Score, bigram_score, score
from lowvram.model.transformer import Transformer
from tests.model.outside import randomise
from tests.model.variants import VARIANTS

RELATIVE = 2e-6  # fp32 sums of some thousand terms
every_kind = pytest.mark.parametrize("kind", ["gqa-rope", "gqa-alibi-window", "mla-moe", "gqa-moe-untied"])


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory, small_tokenizer: Tokenizer, turkish: tuple[str, ...]) -> ShardSet:
    home = tmp_path_factory.mktemp("shards")
    (home / "text.txt").write_text("\n\n".join(turkish[:9]), encoding="utf-8")
    return pack([home / "text.txt"], small_tokenizer, home / "packed", processes=1)


def model_of(kind: str, vocabulary: int) -> Transformer:
    config: ModelConfig = VARIANTS[kind].model_copy(update={"vocabulary": vocabulary})
    return randomise(Transformer(config))


def measure(model: Transformer, shards: ShardSet, seq_len: int, most: int | None = None, batch: int = 3) -> Score:
    return score(model, shards, Tokenizer.bos_id, seq_len, torch.float32, most, batch)


def summed_by_hand(model: Transformer, token_T: np.ndarray, seq_len: int) -> tuple[float, int]:
    """Walk over windows without overlap, one token after the other, in double precision from the logits on."""
    nats, targets = 0.0, 0
    for start in range(0, len(token_T) - 1, seq_len):
        window = torch.tensor(token_T[start : start + seq_len + 1].astype(np.int64))
        with torch.no_grad():
            logit_TV = model.logits(window[None, :-1])[0].double()
        for place, target in enumerate(window[1:].tolist()):
            if target != Tokenizer.bos_id:
                nats -= logit_TV[place].log_softmax(-1)[target].item()
                targets += 1
    return nats, targets


@every_kind
def test_the_score_is_the_sum_over_windows_of_every_token_but_bos(
    kind: str, shards: ShardSet, small_tokenizer: Tokenizer
) -> None:
    model = model_of(kind, small_tokenizer.size)
    found = measure(model, shards, seq_len=29)
    nats, targets = summed_by_hand(model, shards.read(0, shards.tokens), 29)
    assert found.targets == targets == shards.tokens - shards.documents
    assert found.nats == pytest.approx(nats, rel=RELATIVE)
    assert found.text_bytes == shards.text_bytes
    assert found.loss == pytest.approx(nats / targets, rel=RELATIVE)
    assert found.bits_per_byte == pytest.approx(nats / math.log(2) / shards.text_bytes, rel=RELATIVE)


def test_a_model_that_knows_nothing_needs_log2_of_the_vocabulary_for_each_token(
    shards: ShardSet, small_tokenizer: Tokenizer
) -> None:
    model = model_of("gqa-rope", small_tokenizer.size)
    with torch.no_grad():
        model.embedding.zero_()
    targets = shards.tokens - shards.documents
    bits = math.log2(small_tokenizer.size) * targets / shards.text_bytes
    assert measure(model, shards, seq_len=16).bits_per_byte == pytest.approx(bits, rel=RELATIVE)


@pytest.mark.parametrize("batch", [1, 2, 5, 1000])
def test_the_score_does_not_depend_on_the_batch(batch: int, shards: ShardSet, small_tokenizer: Tokenizer) -> None:
    model = model_of("mla-moe", small_tokenizer.size)
    one, other = measure(model, shards, 17, batch=3), measure(model, shards, 17, batch=batch)
    assert other.targets == one.targets
    assert other.nats == pytest.approx(one.nats, rel=RELATIVE)


@pytest.mark.parametrize("rest", [0, 1, 5, 10], ids=lambda rest: f"{rest} in the last window")
def test_a_partial_last_window_counts_and_its_empty_places_do_not(
    rest: int, shards: ShardSet, small_tokenizer: Tokenizer
) -> None:
    model, seq_len = model_of("gqa-rope", small_tokenizer.size), 11
    most = 3 * seq_len + rest
    found = measure(model, shards, seq_len, most, batch=8)
    nats, targets = summed_by_hand(model, shards.read(0, most + 1), seq_len)
    assert found.targets == targets
    assert found.nats == pytest.approx(nats, rel=RELATIVE)


def test_a_part_is_measured_in_proportion_to_its_tokens(shards: ShardSet, small_tokenizer: Tokenizer) -> None:
    model = model_of("gqa-rope", small_tokenizer.size)
    part = measure(model, shards, 16, most=50)
    token_T = shards.read(0, 51)[1:]
    assert part.targets == np.count_nonzero(token_T != Tokenizer.bos_id) < 51
    assert part.text_bytes == pytest.approx(shards.text_bytes * part.targets / (shards.tokens - shards.documents))
    assert measure(model, shards, 16, most=10 * shards.tokens) == measure(model, shards, 16)


def test_a_window_longer_than_the_text_is_one_window(shards: ShardSet, small_tokenizer: Tokenizer) -> None:
    model = model_of("gqa-rope", small_tokenizer.size)
    nats, _ = summed_by_hand(model, shards.read(0, shards.tokens), shards.tokens)
    assert measure(model, shards, 2 * shards.tokens).nats == pytest.approx(nats, rel=RELATIVE)


def test_a_longer_window_sees_more_and_so_scores_otherwise(shards: ShardSet, small_tokenizer: Tokenizer) -> None:
    model = model_of("gqa-rope", small_tokenizer.size)
    assert abs(measure(model, shards, 8).nats - measure(model, shards, 64).nats) > 0.1


def test_progress_counts_windows_up_to_the_last(shards: ShardSet, small_tokenizer: Tokenizer) -> None:
    told: list[tuple[int, int]] = []
    model = model_of("gqa-rope", small_tokenizer.size)
    score(model, shards, 0, 10, torch.float32, 45, batch=2, progress=lambda *done: told.append(done))
    assert told == [(2, 5), (4, 5), (5, 5)]


class Ids:
    """A shard set of hand-made ids."""

    def __init__(self, *ids: int) -> None:
        self.ids, self.tokens, self.text_bytes = np.array(ids, np.uint16), len(ids), 3 * len(ids)
        self.documents = ids.count(0)

    def read(self, start: int, count: int) -> np.ndarray:
        return self.ids[start : start + count]


def probability_by_counts(train: list[int], vocabulary: int, before: int, after: int) -> float:
    """Witten & Bell's method C, from the definition: T kinds of successors take T / (C + T) of the probability."""
    single, pairs = Counter(train), Counter(itertools.pairwise(train))
    unigram = (single[after] + len(single) / vocabulary) / (len(train) + len(single))
    followers = [second for first, second in pairs if first == before]
    total = sum(count for (first, _), count in pairs.items() if first == before)
    if not followers:
        return unigram
    return (pairs[before, after] + len(followers) * unigram) / (total + len(followers))


def test_the_bigram_baseline_equals_a_dictionary_of_counts(shards: ShardSet, small_tokenizer: Tokenizer) -> None:
    token_T = shards.read(0, shards.tokens).tolist()
    half = len(token_T) // 2
    train, valid = token_T[:half], token_T[half:]
    assert set(valid) - set(train), "some tokens must be new"
    found = bigram_score(Ids(*train), Ids(*valid), 0, small_tokenizer.size)  # type: ignore[arg-type]
    nats = [
        -math.log(probability_by_counts(train, small_tokenizer.size, before, after))
        for before, after in itertools.pairwise(valid)
        if after != 0
    ]
    assert found.targets == len(nats)
    assert found.nats == pytest.approx(math.fsum(nats), rel=1e-12)
    assert found.text_bytes == 3 * len(valid) * found.targets / (len(valid) - valid.count(0))


def test_the_baseline_of_a_part_is_that_of_its_tokens_alone(shards: ShardSet, small_tokenizer: Tokenizer) -> None:
    token_T = shards.read(0, shards.tokens).tolist()
    part = bigram_score(shards, shards, 0, small_tokenizer.size, most_tokens=100)
    alone = bigram_score(shards, Ids(*token_T[:101]), 0, small_tokenizer.size)  # type: ignore[arg-type]
    assert (part.nats, part.targets) == (alone.nats, alone.targets)
    assert part.text_bytes == shards.text_bytes * part.targets / (shards.tokens - shards.documents)


def test_the_baseline_counts_only_so_many_tokens(
    shards: ShardSet, small_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    token_T = shards.read(0, shards.tokens).tolist()
    first = bigram_score(Ids(*token_T[:200]), shards, 0, small_tokenizer.size)  # type: ignore[arg-type]
    monkeypatch.setattr("lowvram.evaluate.bits_per_byte.BIGRAM_TOKENS", 200)
    assert bigram_score(shards, shards, 0, small_tokenizer.size) == first


@pytest.mark.parametrize("before", [0, 1, 2, 5, 6], ids=["bos", "often", "last", "once", "never seen"])
def test_the_baselines_probabilities_sum_to_one(before: int) -> None:
    train = Ids(0, 1, 1, 3, 1, 5, 0, 1, 3, 4, 0, 1, 2)
    # With no id as BOS every successor counts.
    shares = [math.exp(-bigram_score(train, Ids(before, after), -1, 7).nats) for after in range(7)]  # type: ignore[arg-type]
    assert math.fsum(shares) == pytest.approx(1.0, rel=1e-12)
    assert min(shares) > 0.0


def test_the_baseline_beats_a_uniform_guess_on_the_text_that_it_counted(
    shards: ShardSet, small_tokenizer: Tokenizer
) -> None:
    found = bigram_score(shards, shards, 0, small_tokenizer.size)
    assert found.targets == shards.tokens - shards.documents
    assert found.loss < 0.6 * math.log(small_tokenizer.size)
