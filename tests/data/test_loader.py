"""The loader: every window once an epoch, and nothing but the sample's number decides which."""

from __future__ import annotations

import collections
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lowvram.data import shards
from lowvram.data.loader import BLOCK, Loader, permute
from lowvram.data.shards import ShardSet, pack
from lowvram.data.tokenizer import Tokenizer, train_tokenizer
from lowvram.errors import DataError

SEQ_LEN = 13


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory, small_tokenizer: Tokenizer, turkish: tuple) -> list[ShardSet]:
    """Two corpora of different length in shards of which none is a whole number of windows."""
    folder = tmp_path_factory.mktemp("corpora")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "PART_BYTES", 700)
        made = []
        for name, texts in (("long", turkish * 4), ("short", [text.upper() for text in turkish[:5]])):
            path = folder / f"{name}.txt"
            path.write_text("\n\n".join(texts), encoding="utf-8")
            made.append(pack([path], small_tokenizer, folder / name, processes=1))
        return made


@pytest.fixture
def corpus(corpora: list[ShardSet]) -> ShardSet:
    return corpora[0]


def windows_of(corpus: ShardSet, seq_len: int) -> list[tuple[int, ...]]:
    """All windows, cut out of the whole sequence in the plainest way."""
    whole = corpus.read(0, corpus.tokens).tolist()
    return [tuple(whole[at : at + seq_len + 1]) for at in range(0, len(whole) - seq_len, seq_len)]


def rows_of(batch: torch.Tensor) -> list[tuple[int, ...]]:
    return [tuple(row) for row in batch.tolist()]


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 7, 64, 65, 1000, 4096, 4097])
def test_a_permutation_sends_each_index_to_another_place(size: int) -> None:
    for key in (0, 1, 2**64 - 1):
        assert sorted(permute(np.arange(size), size, key).tolist()) == list(range(size))


@settings(deadline=None)
@given(size=st.integers(1, 2**40), key=st.integers(0, 2**64 - 1), data=st.data())
def test_a_permutation_is_one_of_any_size_and_does_not_depend_on_its_company(
    size: int, key: int, data: st.DataObject
) -> None:
    index = data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=20, unique=True))
    together = permute(np.array(index), size, key)
    assert together.dtype == np.int64
    assert len(set(together.tolist())) == len(index)
    assert ((together >= 0) & (together < size)).all()
    assert [int(permute(np.array(one), size, key)) for one in index] == together.tolist()


def test_a_permutation_mixes_as_chance_would() -> None:
    size, trials = 8, 4000
    counts = np.zeros((size, size))
    for key in range(trials):
        counts[np.arange(size), permute(np.arange(size), size, key)] += 1
    chi_square = ((counts - trials / size) ** 2 / (trials / size)).sum()
    degrees = (size - 1) ** 2
    # Six standard deviations of a chi-square of that many degrees of freedom.
    assert chi_square < degrees + 6 * math.sqrt(2 * degrees)
    moved = permute(np.arange(100_000), 100_000, 5)
    assert abs(np.corrcoef(np.arange(100_000), moved)[0, 1]) < 6 / math.sqrt(100_000)
    assert abs(np.mean(np.diff(moved) > 0) - 0.5) < 6 / math.sqrt(100_000)


@pytest.mark.parametrize("seq_len", [1, SEQ_LEN, 64, 200], ids=lambda n: f"seq_len {n}")
def test_each_epoch_gives_every_window_once_and_in_another_order(corpus: ShardSet, seq_len: int) -> None:
    loader = Loader([(corpus, 1.0)], seq_len, seed=3)
    expected = windows_of(corpus, seq_len)
    assert len(expected) == (corpus.tokens - 1) // seq_len
    orders = [rows_of(loader.batch(epoch * len(expected), len(expected))) for epoch in range(3)]
    for order in orders:
        assert collections.Counter(order) == collections.Counter(expected)
    assert orders[0] != orders[1] != orders[2] != orders[0]
    assert orders[0] != expected


def test_each_target_is_learnt_once_an_epoch(corpus: ShardSet) -> None:
    loader = Loader([(corpus, 1.0)], SEQ_LEN, seed=3)
    windows = (corpus.tokens - 1) // SEQ_LEN
    targets = sorted(loader.batch(0, windows)[:, 1:].flatten().tolist())
    assert targets == sorted(corpus.read(1, windows * SEQ_LEN).tolist())


def test_samples_do_not_depend_on_the_micro_batch(corpora: list[ShardSet]) -> None:
    loader = Loader([(corpora[0], 2.0), (corpora[1], 1.0)], SEQ_LEN, seed=1)
    whole = loader.batch(0, 24)
    assert (whole.dtype, whole.shape) == (torch.int64, (24, SEQ_LEN + 1))
    for size in (1, 3, 8, 12):
        fresh = Loader([(corpora[0], 2.0), (corpora[1], 1.0)], SEQ_LEN, seed=1)
        assert torch.equal(torch.cat([fresh.batch(at, size) for at in range(0, 24, size)]), whole)
    assert torch.equal(loader.batch(17, 2), whole[17:19])


def test_batches_across_blocks_and_backwards_are_the_same_samples(corpora: list[ShardSet]) -> None:
    loader = Loader([(corpora[0], 1.0), (corpora[1], 3.0)], SEQ_LEN, seed=1)
    across = loader.batch(2 * BLOCK - 5, 10)
    assert loader.batch(9 * BLOCK, 3).shape == (3, SEQ_LEN + 1)
    assert torch.equal(torch.cat([loader.batch(2 * BLOCK - 5 + n, 1) for n in reversed(range(10))]).flip(0), across)
    assert loader.batch(7, 0).shape == (0, SEQ_LEN + 1)


def test_a_batch_may_be_written_to_without_touching_the_shards(corpus: ShardSet) -> None:
    loader = Loader([(corpus, 1.0)], SEQ_LEN, seed=1)
    first = loader.batch(0, 4)
    kept = first.clone()
    first.fill_(-1)
    assert torch.equal(loader.batch(0, 4), kept)


def test_the_seed_decides_the_order(corpus: ShardSet) -> None:
    first, same, other = (Loader([(corpus, 1.0)], SEQ_LEN, seed).batch(0, 50) for seed in (1, 1, 2))
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


def test_a_huge_sample_number_is_answered_at_once(corpus: ShardSet) -> None:
    loader = Loader([(corpus, 1.0)], SEQ_LEN, seed=1)
    assert rows_of(loader.batch(10**15, 1))[0] in windows_of(corpus, SEQ_LEN)


@pytest.mark.parametrize("weights", [(1.0, 1.0), (2.0, 1.0), (0.7, 0.3), (1000.0, 1.0)], ids=str)
def test_corpora_take_turns_by_weight_and_each_keeps_its_own_epochs(
    corpora: list[ShardSet], weights: tuple[float, float]
) -> None:
    loader = Loader(list(zip(corpora, weights, strict=True)), SEQ_LEN, seed=5)
    kinds = [set(windows_of(corpus, SEQ_LEN)) for corpus in corpora]
    assert not kinds[0] & kinds[1]
    done = np.array(loader.epochs(3 * BLOCK)) * [(corpus.tokens - 1) // SEQ_LEN for corpus in corpora]
    exact = 3 * BLOCK * np.array(weights) / sum(weights)
    assert round(done.sum()) == 3 * BLOCK
    assert (abs(done - exact) <= 3).all()
    alone = Loader([(corpora[0], 1.0)], SEQ_LEN, seed=5)
    rows, own = rows_of(loader.batch(0, 300)), iter(rows_of(alone.batch(0, 300)))
    steps = np.diff([loader.epochs(n)[0] for n in range(301)]) > 0
    assert [row for row, is_first in zip(rows, steps, strict=True) if is_first] == [
        next(own) for is_first in steps if is_first
    ]
    assert all(row in kinds[1] for row, is_first in zip(rows, steps, strict=True) if not is_first)


def test_later_blocks_go_on_where_each_corpus_stood(corpora: list[ShardSet]) -> None:
    loader = Loader([(corpora[0], 3.0), (corpora[1], 2.0)], SEQ_LEN, seed=5)
    alone = Loader([(corpora[0], 1.0)], SEQ_LEN, seed=5)
    windows = (corpora[0].tokens - 1) // SEQ_LEN
    for sample in (BLOCK - 1, BLOCK, 3 * BLOCK, 7 * BLOCK + 1234):
        turns = [round(loader.epochs(at)[0] * windows) for at in range(sample, sample + 20)]
        firsts = [at for at in range(19) if turns[at + 1] > turns[at]]
        rows = rows_of(loader.batch(sample, 19))
        assert [rows[at] for at in firsts] == rows_of(alone.batch(turns[0], len(firsts)))
        assert firsts


def test_a_corpus_named_twice_is_not_shuffled_twice_alike(corpus: ShardSet) -> None:
    loader = Loader([(corpus, 1.0), (corpus, 1.0)], SEQ_LEN, seed=5)
    turns = np.diff([loader.epochs(n)[0] for n in range(201)]) > 0
    rows = rows_of(loader.batch(0, 200))
    numbered = list(zip(rows, turns, strict=True))
    orders = [[row for row, is_first in numbered if is_first == wanted] for wanted in (True, False)]
    shared = min(map(len, orders))
    assert shared > 50
    assert orders[0][:shared] != orders[1][:shared]


def test_turns_are_spread_over_a_block_and_not_bunched(corpora: list[ShardSet]) -> None:
    loader = Loader([(corpora[0], 3.0), (corpora[1], 1.0)], SEQ_LEN, seed=5)
    windows = (corpora[1].tokens - 1) // SEQ_LEN
    per_stretch = np.diff([loader.epochs(n)[1] * windows for n in range(0, BLOCK + 1, 256)])
    assert per_stretch.sum() == pytest.approx(BLOCK / 4)
    assert (abs(per_stretch - 64) < 6 * math.sqrt(256 * 0.25 * 0.75)).all()


def test_epochs_count_what_was_seen(corpus: ShardSet) -> None:
    loader = Loader([(corpus, 0.5)], SEQ_LEN, seed=5)
    windows = (corpus.tokens - 1) // SEQ_LEN
    assert loader.epochs(0) == [0.0]
    assert loader.epochs(windows) == [1.0]
    assert loader.epochs(5 * windows + 1) == [pytest.approx(5 + 1 / windows, rel=1e-12)]


def test_a_corpus_shorter_than_one_window_is_refused_with_both_numbers(corpora: list[ShardSet]) -> None:
    tokens = corpora[1].tokens
    assert (
        Loader([(corpora[1], 1.0)], tokens - 1, seed=0).batch(0, 2).tolist()
        == [corpora[1].read(0, tokens).tolist()] * 2
    )
    with pytest.raises(DataError, match=rf"short holds {tokens} tokens.*seq_len = {tokens} takes {tokens + 1}"):
        Loader([(corpora[0], 1.0), (corpora[1], 1.0)], tokens, seed=0)


@pytest.mark.parametrize("weights", [(1.0, 0.0), (-1.0, 2.0), (math.nan, 1.0), (math.inf, 1.0), (1.0, 1e-5)], ids=str)
def test_a_weight_that_cannot_be_kept_is_refused(corpora: list[ShardSet], weights: tuple[float, float]) -> None:
    with pytest.raises(DataError, match="corpora weigh"):
        Loader(list(zip(corpora, weights, strict=True)), SEQ_LEN, seed=0)


def test_corpora_of_two_tokenizers_are_refused(corpus: ShardSet, turkish: tuple[str, ...], tmp_path: Path) -> None:
    other = train_tokenizer(iter(turkish), 300, tmp_path / "tok")
    (tmp_path / "a.txt").write_text("\n\n".join(turkish), encoding="utf-8")
    second = pack([tmp_path / "a.txt"], other, tmp_path / "out")
    with pytest.raises(DataError, match="differ in their tokenizer"):
        Loader([(corpus, 1.0), (second, 1.0)], SEQ_LEN, seed=0)


def test_ids_above_32767_keep_their_sign(tmp_path: Path, corpus: ShardSet) -> None:
    ids = np.array([65_534, 40_000, 3, 32_768, 7], "<u2")
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "00000.bin").write_bytes(ids.tobytes())
    row = {"file": "00000.bin", "tokens": 5, "documents": 1, "text_bytes": 9, "sha256": "0"}
    index = {"format": 1, "tokenizer": "x", "dtype": "uint16", "shards": [row]}
    (folder / "shards.json").write_text(json.dumps(index), encoding="utf-8")
    assert Loader([(ShardSet.open(folder), 1.0)], 4, seed=0).batch(0, 1).tolist() == [ids.tolist()]
