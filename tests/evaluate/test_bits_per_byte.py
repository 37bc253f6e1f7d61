"""Bits per byte against sums written out by hand, and the bigram baseline against a dictionary of counts."""

from __future__ import annotations

import itertools
import math
import unicodedata
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from lowvram.config.model import ModelConfig
from lowvram.data.shards import ShardSet, pack
from lowvram.data.tokenizer import Tokenizer
from lowvram.evaluate.bits_per_byte import Score, bigram_score, score
from lowvram.model.transformer import Transformer
from tests.model.outside import randomise
from tests.model.variants import VARIANTS

RELATIVE = 2e-6  # fp32 sums of some thousand terms
# Of hand-made ids every one but the first, BOS, stands for three bytes.
THREE_EACH_V = np.array([0] + [3] * 511)
every_kind = pytest.mark.parametrize("kind", ["gqa-rope", "gqa-alibi-window", "mla-moe", "gqa-moe-untied"])


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory, small_tokenizer: Tokenizer, turkish: tuple[str, ...]) -> ShardSet:
    return packed(tmp_path_factory.mktemp("shards"), small_tokenizer, turkish[:9])


def packed(home: Path, tokenizer: Tokenizer, texts: Sequence[str]) -> ShardSet:
    home.mkdir(exist_ok=True)
    (home / "text.txt").write_text("\n\n".join(texts), encoding="utf-8")
    return pack([home / "text.txt"], tokenizer, home / "packed", processes=1)


def model_of(kind: str, vocabulary: int) -> Transformer:
    config: ModelConfig = VARIANTS[kind].model_copy(update={"vocabulary": vocabulary})
    return randomise(Transformer(config))


def measure(
    model: Transformer, shards: ShardSet, tokenizer: Tokenizer, seq_len: int, most: int | None = None, batch: int = 3
) -> Score:
    return score(model, shards, tokenizer.bos_id, tokenizer.byte_count_V, seq_len, torch.float32, most, batch)


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
    found = measure(model, shards, small_tokenizer, seq_len=29)
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
    assert measure(model, shards, small_tokenizer, seq_len=16).bits_per_byte == pytest.approx(bits, rel=RELATIVE)


@pytest.mark.parametrize("batch", [1, 2, 5, 1000])
def test_the_score_does_not_depend_on_the_batch(batch: int, shards: ShardSet, small_tokenizer: Tokenizer) -> None:
    model = model_of("mla-moe", small_tokenizer.size)
    one, other = (
        measure(model, shards, small_tokenizer, 17, batch=3),
        measure(model, shards, small_tokenizer, 17, batch=batch),
    )
    assert other.targets == one.targets
    assert other.nats == pytest.approx(one.nats, rel=RELATIVE)


@pytest.mark.parametrize("rest", [0, 1, 5, 10], ids=lambda rest: f"{rest} in the last window")
def test_a_partial_last_window_counts_and_its_empty_places_do_not(
    rest: int, shards: ShardSet, small_tokenizer: Tokenizer
) -> None:
    model, seq_len = model_of("gqa-rope", small_tokenizer.size), 11
    most = 3 * seq_len + rest
    found = measure(model, shards, small_tokenizer, seq_len, most, batch=8)
    nats, targets = summed_by_hand(model, shards.read(0, most + 1), seq_len)
    assert found.targets == targets
    assert found.nats == pytest.approx(nats, rel=RELATIVE)


def test_the_same_targets_give_the_same_figure_whatever_stands_behind_them(
    shards: ShardSet, small_tokenizer: Tokenizer, turkish: tuple[str, ...], tmp_path: Path
) -> None:
    model = model_of("gqa-rope", small_tokenizer.size)
    behind = {"nothing": [], "turkish": turkish, "emoji": ["🫖🧿" * 300], "ascii": ["zzzz qqqq " * 300]}
    sets = [packed(tmp_path / name, small_tokenizer, [*turkish[:9], *texts]) for name, texts in behind.items()]
    most, table = shards.tokens - 1, small_tokenizer.byte_count_V
    assert len({found.text_bytes / found.tokens for found in sets}) == len(sets), "each has other bytes to a token"
    assert {measure(model, found, small_tokenizer, 16, most) for found in sets} == {
        measure(model, shards, small_tokenizer, 16)
    }
    assert {bigram_score(shards, found, 0, table, most) for found in sets} == {bigram_score(shards, shards, 0, table)}


def test_the_bytes_of_parts_add_up_to_the_whole(
    shards: ShardSet, small_tokenizer: Tokenizer, turkish: tuple[str, ...]
) -> None:
    model, table = model_of("gqa-rope", small_tokenizer.size), small_tokenizer.byte_count_V
    token_T = shards.read(0, shards.tokens)
    for most in (1, 15, 16, 17, 50, shards.tokens - 2, shards.tokens - 1, shards.tokens, 100 * shards.tokens):
        part = measure(model, shards, small_tokenizer, 16, most)
        text = small_tokenizer.decode([id for id in token_T[1 : most + 1] if id != Tokenizer.bos_id])
        is_whole_text = not text.endswith("\ufffd")  # half a letter decodes as U+FFFD, of three bytes
        assert part.text_bytes == len(text.encode()) or not is_whole_text
        assert part.text_bytes == bigram_score(shards, shards, 0, table, most).text_bytes
        assert part.targets == np.count_nonzero(token_T[1 : most + 1] != Tokenizer.bos_id)
    assert part == measure(model, shards, small_tokenizer, 16)
    assert part.text_bytes == shards.text_bytes == sum(len(text.encode()) for text in turkish[:9])


def test_a_text_gives_one_figure_whichever_way_its_letters_were_composed(
    shards: ShardSet, small_tokenizer: Tokenizer, turkish: tuple[str, ...], tmp_path: Path
) -> None:
    parted = packed(tmp_path, small_tokenizer, [unicodedata.normalize("NFD", text) for text in turkish[:9]])
    assert (parted.directory.parent / "text.txt").stat().st_size > 1.05 * shards.text_bytes
    assert (parted.text_bytes, parted.hash) == (shards.text_bytes, shards.hash)
    # Packed before this was so, the index still tells the bytes of the text as it was read.
    parted.text_bytes = 2 * shards.text_bytes
    model = model_of("gqa-rope", small_tokenizer.size)
    assert measure(model, parted, small_tokenizer, 16) == measure(model, shards, small_tokenizer, 16)


def test_a_window_longer_than_the_text_is_one_window(shards: ShardSet, small_tokenizer: Tokenizer) -> None:
    model = model_of("gqa-rope", small_tokenizer.size)
    nats, _ = summed_by_hand(model, shards.read(0, shards.tokens), shards.tokens)
    assert measure(model, shards, small_tokenizer, 2 * shards.tokens).nats == pytest.approx(nats, rel=RELATIVE)


def test_a_longer_window_sees_more_and_so_scores_otherwise(shards: ShardSet, small_tokenizer: Tokenizer) -> None:
    model = model_of("gqa-rope", small_tokenizer.size)
    assert abs(measure(model, shards, small_tokenizer, 8).nats - measure(model, shards, small_tokenizer, 64).nats) > 0.1


def test_progress_counts_windows_up_to_the_last(shards: ShardSet, small_tokenizer: Tokenizer) -> None:
    told: list[tuple[int, int]] = []
    model = model_of("gqa-rope", small_tokenizer.size)
    score(
        model,
        shards,
        0,
        small_tokenizer.byte_count_V,
        10,
        torch.float32,
        45,
        batch=2,
        progress=lambda *done: told.append(done),
    )
    assert told == [(2, 5), (4, 5), (5, 5)]


class Ids:
    """A shard set of hand-made ids."""

    def __init__(self, *ids: int) -> None:
        self.ids, self.tokens = np.array(ids, np.uint16), len(ids)

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
    found = bigram_score(Ids(*train), Ids(*valid), 0, THREE_EACH_V[: small_tokenizer.size])  # type: ignore[arg-type]
    nats = [
        -math.log(probability_by_counts(train, small_tokenizer.size, before, after))
        for before, after in itertools.pairwise(valid)
        if after != 0
    ]
    assert found.targets == len(nats)
    assert found.nats == pytest.approx(math.fsum(nats), rel=1e-12)
    assert found.text_bytes == 3 * found.targets


def test_the_baseline_of_a_part_is_that_of_its_tokens_alone(shards: ShardSet, small_tokenizer: Tokenizer) -> None:
    token_T = shards.read(0, shards.tokens).tolist()
    part = bigram_score(shards, shards, 0, small_tokenizer.byte_count_V, most_tokens=100)
    alone = bigram_score(shards, Ids(*token_T[:101]), 0, small_tokenizer.byte_count_V)  # type: ignore[arg-type]
    assert part == alone


def test_the_baseline_counts_only_so_many_tokens(
    shards: ShardSet, small_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    token_T = shards.read(0, shards.tokens).tolist()
    first = bigram_score(Ids(*token_T[:200]), shards, 0, small_tokenizer.byte_count_V)  # type: ignore[arg-type]
    monkeypatch.setattr("lowvram.evaluate.bits_per_byte.BIGRAM_TOKENS", 200)
    assert bigram_score(shards, shards, 0, small_tokenizer.byte_count_V) == first


@pytest.mark.parametrize("before", [0, 1, 2, 5, 6], ids=["bos", "often", "last", "once", "never seen"])
def test_the_baselines_probabilities_sum_to_one(before: int) -> None:
    train = Ids(0, 1, 1, 3, 1, 5, 0, 1, 3, 4, 0, 1, 2)
    # With no id as BOS every successor counts.
    shares = [math.exp(-bigram_score(train, Ids(before, after), -1, THREE_EACH_V[:7]).nats) for after in range(7)]  # type: ignore[arg-type]
    assert math.fsum(shares) == pytest.approx(1.0, rel=1e-12)
    assert min(shares) > 0.0


def test_the_baseline_beats_a_uniform_guess_on_the_text_that_it_counted(
    shards: ShardSet, small_tokenizer: Tokenizer
) -> None:
    found = bigram_score(shards, shards, 0, small_tokenizer.byte_count_V)
    assert found.targets == shards.tokens - shards.documents
    assert found.loss < 0.6 * math.log(small_tokenizer.size)
