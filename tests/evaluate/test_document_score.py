"""Documents scored one by one: exact to the byte, the same sample each time, gone on with where it was broken off."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import pytest
import torch

from lowvram.data.nfc import nfc
from lowvram.data.places import Place
from lowvram.data.shards import ShardSet, pack
from lowvram.errors import BusyError, DataError
from lowvram.evaluate import document_score as module
from lowvram.evaluate.document_score import Choice, DocumentScore, choose_documents, score_documents
from lowvram.evaluate.look_file import LookFile, describe_row, refuse_other_file
from lowvram.evaluate.scorer import Scorer
from lowvram.finish import finish
from lowvram.model.transformer import Transformer
from tests.data.test_shards import PART_BYTES
from tests.tiny import prepare_home, tiny_run

CONTEXT = 16
CLOSE = 2e-4  # bits of a token, as in test_likelihood


@pytest.fixture(scope="module")
def scorer(tmp_path_factory: pytest.TempPathFactory) -> Scorer:
    home = tmp_path_factory.mktemp("home")
    tokenizer = prepare_home(home)
    config = tiny_run(home, vocabulary=tokenizer.size).model
    return Scorer(Transformer(config, 0, torch.device("cpu"), torch.float32), torch.float32, tokenizer, CONTEXT)


@pytest.fixture
def texts(turkish: tuple[str, ...]) -> list[str]:
    """Short documents, documents of many windows, one in NFD, and one that occurs twice."""
    made = [" ".join([f"{n}.", *(turkish[(n + k) % 16] for k in range(n % 5 + 1))]) for n in range(30)]
    return [*made, "kısa", "İĞdır", made[3]]


@pytest.fixture
def shards(texts: list[str], scorer: Scorer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ShardSet:
    monkeypatch.setattr("lowvram.data.shards.PART_BYTES", PART_BYTES)
    (tmp_path / "a.txt").write_text("\n\n".join(texts), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return pack([Path("a.txt")], scorer.tokenizer, Path("shards"), processes=1)


def score_all(scorer: Scorer, shards: ShardSet, choice: Choice, skipped: int = 0) -> list[DocumentScore]:
    return [score for _, scores in score_documents(scorer, shards, choice, skipped) for score in scores]


def bits_of(scorer: Scorer, text: str) -> float:
    """The definition: BOS and the document's ids, in windows without overlap."""
    ids = [scorer.tokenizer.bos_id, *scorer.tokenizer.encode(text)]
    nats = 0.0
    for start in range(0, len(ids) - 1, CONTEXT):
        window = torch.tensor(ids[start : start + CONTEXT + 1])
        with torch.no_grad():
            logit_TV = scorer.model.logits(window[None, :-1])[0].double()
        nats -= logit_TV.log_softmax(-1).gather(1, window[1:, None]).sum().item()
    return nats / math.log(2)


def test_a_document_costs_the_bits_of_its_own_tokens_over_the_bytes_of_its_text(
    scorer: Scorer, shards: ShardSet, texts: list[str]
) -> None:
    choice = finish(choose_documents(shards, scorer.tokenizer, None, 1))
    found = score_all(scorer, shards, choice)
    assert (choice.documents, choice.short, choice.tokens) == (len(texts), 0, shards.tokens - shards.documents)
    assert len(shards.parts()) > 3
    line = 1
    for score, text in zip(found, map(nfc, texts), strict=True):
        assert score.text_bytes == len(text.encode())
        assert score.tokens == len(scorer.tokenizer.encode(text))
        assert score.bits == pytest.approx(bits_of(scorer, text), abs=CLOSE * score.tokens)
        assert score.place == Place("a.txt", line)
        assert text.startswith(score.excerpt)
        line += 2
    assert sum(score.text_bytes for score in found) == shards.text_bytes
    assert found[3].hash == found[-1].hash != found[4].hash


def test_a_sample_is_the_same_each_time_and_part_of_every_larger_one(
    scorer: Scorer, shards: ShardSet, texts: list[str]
) -> None:
    def names(tokens: int | None, least: int = 1) -> set[tuple[str, int]]:
        choice = finish(choose_documents(shards, scorer.tokenizer, tokens, least))
        found = {(part.path.name, number) for part, picked in choice.by_part for number in picked.tolist()}
        assert len(found) == choice.documents
        return found

    samples = [names(shards.tokens * tenths // 10) for tenths in range(1, 11)]
    assert samples == [names(shards.tokens * tenths // 10) for tenths in range(1, 11)]
    assert all(small <= large for small, large in itertools.pairwise(samples))
    assert len(samples[-1]) == len(texts)
    assert 5 < len(samples[4]) < 28
    assert len({part for part, _ in samples[4]}) > 2
    long = names(None, 200)
    assert len(long) == sum(len(nfc(text).encode()) >= 200 for text in texts)
    assert names(shards.tokens // 2, 200) == samples[4] & long


def write_list(
    scorer: Scorer, shards: ShardSet, out: Path, key: str = "k", pieces: int | None = None, replace: bool = False
) -> list[int]:
    """Score into a file, or only so many pieces; return how many rows of each piece were scored now."""
    choice = finish(choose_documents(shards, scorer.tokenizer, None, 1))
    done: list[int] = []
    with LookFile(out, key, replace=replace) as file:
        kept = list(file.read_kept())
        for _, scores in score_documents(scorer, shards, choice, len(kept)):
            if scores:
                file.add([describe_row(score) for score in scores])
                done.append(len(scores))
            if len(done) == pieces:
                return done
        file.finish()
    return done


def test_a_list_that_was_broken_off_is_gone_on_with_to_the_same_bytes(
    scorer: Scorer, shards: ShardSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PIECE_TOKENS", 150)
    whole = write_list(scorer, shards, tmp_path / "whole.jsonl")
    assert len(whole) > len(shards.parts())
    rows = [json.loads(line) for line in (tmp_path / "whole.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["bits_per_byte"] for row in rows] == sorted((row["bits_per_byte"] for row in rows), reverse=True)
    out, unfinished = tmp_path / "look.jsonl", tmp_path / "look.jsonl.k.unfinished"
    assert write_list(scorer, shards, out, pieces=3) == whole[:3]
    with unfinished.open("ab") as file:
        file.write(json.dumps(rows[0]).encode() + b'\n{"hash": "to')  # a piece that was being written
    assert write_list(scorer, shards, out, pieces=1) == whole[3:4]
    assert write_list(scorer, shards, out) == whole[4:]
    assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert not unfinished.exists()
    # Other work begins anew and leaves it alone, until it is finished; it replaces no list that it was not told to.
    assert write_list(scorer, shards, out, pieces=2) == whole[:2]
    with pytest.raises(DataError, match=r"list of another look.*replace=True"):
        write_list(scorer, shards, out, key="other")
    assert write_list(scorer, shards, out, key="other", pieces=2, replace=True) == whole[:2]
    assert write_list(scorer, shards, out, pieces=1) == whole[2:3]
    (tmp_path / "look.jsonl.of.mine.unfinished").touch()
    assert write_list(scorer, shards, out, key="other", replace=True) == whole[2:]
    assert {path.name for path in tmp_path.glob("look.jsonl*")} == {"look.jsonl", "look.jsonl.of.mine.unfinished"}
    first, *others = map(json.loads, out.read_text(encoding="utf-8").splitlines())
    assert first == rows[0] | {"look": "other"}
    assert others == rows[1:]


def test_a_list_is_written_by_one_process_at_a_time(tmp_path: Path) -> None:
    out = tmp_path / "look.jsonl"
    for before, key in enumerate(("k", "other")):
        with LookFile(out, "k") as file:
            assert len(list(file.read_kept())) == before
            file.add([describe_row(DocumentScore("00000.bin", 0, "0" * 64, 8.0, 1, 8, None, ""))])
            with pytest.raises(BusyError, match=r"look.jsonl is in use.*another file"), LookFile(out, key):
                pass
    with LookFile(out, "k") as file:
        assert len(list(file.read_kept())) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["look.jsonl.k.unfinished"]


def test_both_ends_name_each_text_once_and_no_text_stands_at_both(tmp_path: Path) -> None:
    scores = [DocumentScore("00000.bin", n, f"{n % 5:064d}", 8.0 * (n % 5), 1, 8, None, "") for n in range(10)]
    with LookFile(tmp_path / "look.jsonl", "k") as file:
        file.add([describe_row(score) for score in scores])
        strangest, boring = file.extremes(2)
        everything = file.extremes(99)
    assert [row["bits_per_byte"] for row in strangest] == [4.0, 3.0]
    assert [row["bits_per_byte"] for row in boring] == [0.0, 1.0]
    assert [len(rows) for rows in everything] == [3, 3]


def test_a_file_that_is_no_list_is_never_replaced(tmp_path: Path) -> None:
    for content in ('{"text": "benim"}\n', "benim\n", "[3]"):
        (tmp_path / "look.jsonl").write_text(content, encoding="utf-8")
        with pytest.raises(DataError, match=r"look.jsonl is in the way.*another file"):
            refuse_other_file(tmp_path / "look.jsonl")
    (tmp_path / "look.jsonl").write_text('{"hash": "", "bits_per_byte": 1}\n' * 3, encoding="utf-8")
    refuse_other_file(tmp_path / "look.jsonl")
    with pytest.raises(DataError, match="is a folder"):
        refuse_other_file(tmp_path)


def test_a_shard_that_does_not_begin_with_a_document_is_damaged(shards: ShardSet, scorer: Scorer) -> None:
    (shards.directory / "00000.bin").write_bytes(b"\1\0" + (shards.directory / "00000.bin").read_bytes()[2:])
    shards = ShardSet.open(shards.directory)
    with pytest.raises(DataError, match=r"00000.bin holds \d+ beginnings of documents, and not \d+"):
        finish(choose_documents(shards, scorer.tokenizer, None, 1))
