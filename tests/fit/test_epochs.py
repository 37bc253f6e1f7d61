"""How often a run reads its text: counted as the loader counts it, judged at the limit, and answered with numbers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from lowvram.config.run import Corpus, DataConfig
from lowvram.config.run_file import load_preset
from lowvram.config.train import TrainConfig
from lowvram.data.loader import Loader
from lowvram.data.shard_set import ShardSet
from lowvram.errors import DataError
from lowvram.fit.epochs import (
    ENOUGH_PASSES,
    TOKENS_PER_PARAMETER,
    Part,
    Remark,
    RunText,
    open_folder,
    open_text,
    remark_on,
    round_down,
    suitable_preset,
)
from lowvram.units import parse_count

MODEL, PRESET = load_preset("tr-25m")
SMALL = TrainConfig(tokens=64 * 16, seq_len=16, batch_tokens=64)


def text(*tokens: int, shares: tuple[float, ...] = (), is_held_out: bool = True) -> RunText:
    shares = shares or (1.0,) * len(tokens)
    names = ("shards/train", "shards/more")
    return RunText(
        tuple(Part(Path(name), n, 4 * n, share) for name, n, share in zip(names, tokens, shares, strict=False)),
        is_held_out,
    )


def pack(folder: Path, tokens: int) -> Path:
    """Write shards of so many tokens, as `lowvram data pack` lays them out."""
    folder.mkdir(parents=True)
    np.zeros(tokens, "<u2").tofile(folder / "00000.bin")
    shard = {"file": "00000.bin", "tokens": tokens, "documents": 1, "text_bytes": 4 * tokens, "sha256": "0"}
    index = {"format": 1, "tokenizer": "t", "dtype": "uint16", "shards": [shard]}
    (folder / "shards.json").write_text(json.dumps(index), encoding="utf-8")
    return folder


def say(text: RunText, train: TrainConfig = SMALL) -> list[Remark]:
    return list(remark_on(text, MODEL, train))


def test_passes_are_those_of_the_loader_for_one_corpus_and_for_several(tmp_path: Path) -> None:
    paths = [pack(tmp_path / "a", 1_000), pack(tmp_path / "b", 3_456)]
    train = SMALL.model_copy(update={"tokens": 64 * 4096})
    for corpora in ([(paths[0], 1.0)], [(paths[0], 3.0), (paths[1], 1.0)]):
        data = DataConfig(train=[Corpus(path=path, weight=weight) for path, weight in corpora], tokenizer=tmp_path)
        loader = Loader([(ShardSet.open(path), weight) for path, weight in corpora], train.seq_len, 0)
        read = open_text(data).passes(train)
        assert read == pytest.approx(loader.epochs(train.steps * train.batch_samples), rel=1e-3)


@pytest.mark.parametrize("windows, is_warned", [(16, False), (15, True), (1, True)], ids=["4", "4.27", "64"])
def test_four_passes_are_enough_and_one_window_more_is_too_often(windows: int, is_warned: bool) -> None:
    """The run reads 64 windows."""
    said = say(text(16 * windows + 1))
    assert f"is read {64 / windows:.2f} times." in said[0].says
    assert [remark.is_warning for remark in said] == [is_warned] * (4 if is_warned else 1)


def test_what_helps_is_named_with_its_numbers() -> None:
    said = [remark.says for remark in say(text(1_600_000), PRESET)]
    assert say(text(65 * 1024 + 1), PRESET)[0].says.endswith("is read 7,512.62 times.")
    assert say(text(10_001), TrainConfig(tokens=64, seq_len=16, batch_tokens=64))[0].says.startswith(
        "64 tokens in 1 step:"
    )
    assert said[0] == "500.0M tokens in 7,630 steps: train has 1.6M tokens and is read 312.62 times."
    assert "Beyond about 4 passes over its text a model memorises it" in said[1]
    assert said[2].startswith(
        'What helps: train.tokens = "6.35M", which is 4 passes; or more text, at least 125.0M tok'
    )
    assert "(477.0 MiB of such text) for this run." in said[2]
    assert "about 20 tokens a parameter (Hoffmann et al. 2022) this text suits 320.0k parameters" in said[3]
    assert "and this model has 25.2M. The smallest recommended preset, tr-25m, wants 125.9M tokens of text." in said[3]


def test_the_tokens_that_are_proposed_are_not_warned_of_and_one_step_more_is() -> None:
    for tokens in (400_000, 1_600_000, 33_333_333):
        most = text(tokens).most_tokens(PRESET)
        for proposed in (most, parse_count(round_down(most))):
            train = PRESET.model_copy(update={"tokens": proposed})
            assert max(text(tokens).passes(train)) <= ENOUGH_PASSES
            assert len(say(text(tokens), train)) == 1
        assert len(say(text(tokens), PRESET.model_copy(update={"tokens": most + 1}))) == 4


def test_where_one_step_reads_too_much_smaller_steps_are_proposed() -> None:
    [_, _, proposed, _] = say(text(2 * 1024 + 1), PRESET)
    assert "lower train.batch_tokens, and train.tokens too." in proposed.says
    assert "train.tokens =" not in proposed.says


@pytest.mark.parametrize(
    "tokens, name",
    [(1_000, None), (125_877_120, "tr-25m"), (125_877_000, None), (309_414_400, "tr-60m"), (10**11, "tr-1b")],
)
def test_the_preset_for_a_text_is_the_largest_dense_one_of_20_tokens_a_parameter(tokens: int, name: str | None) -> None:
    assert suitable_preset(text(tokens)) == name
    if name is not None:
        model, _ = load_preset(name)
        assert model.num_parameters() * TOKENS_PER_PARAMETER <= tokens * ENOUGH_PASSES


def test_a_larger_model_is_told_which_preset_suits_and_one_that_suits_is_told_so() -> None:
    supply, train = text(130_000_000), PRESET.model_copy(update={"tokens": 10**9})
    large, _ = load_preset("tr-125m")
    said = list(remark_on(supply, large, train))
    assert said[-1].says.endswith("and this model has 125.9M. The preset for it is tr-25m.")
    assert list(remark_on(supply, MODEL, train))[-1].says.startswith("The size suits: ")


def test_of_several_corpora_the_one_that_is_read_most_often_is_warned_of() -> None:
    both = text(10_001, 161, shares=(0.5, 0.5))
    assert [remark.is_warning for remark in say(both)] == [False]
    rare = text(10_001, 33, shares=(0.5, 0.5))
    said = say(rare)
    assert "train has 10.0k tokens and is read 0.05 times; more has 33 tokens and is read 16.00 times" in said[0].says
    assert rare.most_tokens(SMALL) == 4 * 64, "four passes over the second one, of which half of each step is"


def test_without_valid_it_is_said_that_overfitting_cannot_be_seen() -> None:
    said = say(text(10_001, is_held_out=False))
    assert said[-1].is_warning
    assert said[-1].says.startswith("Nothing is held out: data.valid is not set, so overfitting cannot be seen.")
    assert "--holdout" in said[-1].says


@pytest.mark.parametrize("tokens, is_read", [(16, False), (17, True)])
def test_a_text_shorter_than_a_window_is_refused_as_training_refuses_it(tokens: int, is_read: bool) -> None:
    if is_read:
        assert text(tokens).passes(SMALL) == [64.0]
        return
    for look in (text(tokens).passes, text(tokens).most_tokens):
        with pytest.raises(DataError, match=r"holds 16 tokens\. A window of seq_len = 16 takes 17\. Pack more text"):
            look(SMALL)


def test_a_folder_is_shards_or_holds_them(tmp_path: Path) -> None:
    pack(tmp_path / "shards/train", 500)
    for folder in ("shards", "shards/train"):
        assert open_folder(tmp_path / folder) == RunText((Part(tmp_path / "shards/train", 500, 2000),), False)
    pack(tmp_path / "shards/valid", 50)
    assert open_folder(tmp_path / "shards").is_held_out
    assert open_folder(tmp_path / "shards/train").is_held_out
    assert open_folder(tmp_path / "shards/valid").tokens == 50
    for folder, said in (("nowhere", "does not exist"), (".", "holds no shards")):
        with pytest.raises(DataError, match=said):
            open_folder(tmp_path / folder)


@pytest.mark.parametrize(
    "count, shown", [(999, "999"), (1000, "1k"), (6_357_991, "6.35M"), (524_288, "524k"), (12_345_678_901, "12.3B")]
)
def test_a_count_is_rounded_down_so_that_a_run_file_takes_it(count: int, shown: str) -> None:
    assert round_down(count) == shown
    assert 0.99 * count <= parse_count(shown) <= count
