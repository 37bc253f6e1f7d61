"""What is held out is chosen by the words of each document alone, and shards of another text are not replaced."""

from __future__ import annotations

import hashlib
import json
import os
import tracemalloc
import unicodedata
from pathlib import Path

import numpy as np
import pytest

from lowvram.data.holdout import Holdout, show_share
from lowvram.data.shards import ShardSet, pack, pack_each_shard
from lowvram.data.tokenizer import Tokenizer, train_tokenizer
from lowvram.errors import DataError
from tests.data.conftest import follow

SHARE = 0.3


def split(paths: list[Path], tokenizer: Tokenizer, out: Path, share: float = SHARE, **wishes) -> list[set[str]]:
    """Return the documents that lie on each side, read back from the shards."""
    return [read(shards) for shards in pack_sides(paths, tokenizer, out, share, **wishes)]


def pack_sides(paths: list[Path], tokenizer: Tokenizer, out: Path, share: float = SHARE, **wishes) -> list[ShardSet]:
    """Return the shards of both sides."""
    return list(follow(pack_each_shard(paths, tokenizer, out, holdout=Holdout(share), **wishes))[0])


def read(shards: ShardSet) -> set[str]:
    tokenizer = Tokenizer.load(Path(os.environ["HOLDOUT_TOKENIZER"]))
    documents = np.split(ids := shards.read(0, shards.tokens), np.flatnonzero(ids == tokenizer.bos_id))[1:]
    return {tokenizer.decode(document.tolist()) for document in documents}


@pytest.fixture(autouse=True)
def known_tokenizer(small_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOLDOUT_TOKENIZER", str(small_tokenizer.directory))


def test_a_document_is_on_the_same_side_whatever_file_format_order_or_number_of_processes_it_comes_in(
    folder: Path, texts: list[str], small_tokenizer: Tokenizer, tmp_path: Path, small_parts: None
) -> None:
    expected = split([folder], small_tokenizer, tmp_path / "one", processes=1)
    assert expected[0] | expected[1] == {unicodedata.normalize("NFC", text) for text in texts}
    assert not expected[0] & expected[1]
    assert 5 <= len(expected[1]) <= 35
    assert split([folder], small_tokenizer, tmp_path / "two", processes=2) == expected
    for name in ("train", "valid"):
        assert bytes_of(tmp_path / "two" / name) == bytes_of(tmp_path / "one" / name)
    rows = [{"text": text} for text in [*reversed(texts), *texts[:20]]]  # copies fall where their originals are
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    assert split([tmp_path / "a.jsonl"], small_tokenizer, tmp_path / "three", processes=1) == expected


def bytes_of(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.name != "lock"}


@pytest.mark.parametrize("text", ["İki satır\nvar.", "şu  e\u0301t", "tek"])
def test_line_ends_white_space_and_unicode_form_move_no_document(text: str) -> None:
    variants = {
        text,
        text.replace("\n", "\r\n"),
        f" {text}\n",
        unicodedata.normalize("NFD", text),
        unicodedata.normalize("NFC", text),
    }
    places = set()
    for variant in variants:
        holdout = Holdout(0.5)
        holdout.takes(variant)
        places.add(holdout._lowest)
    assert len(places) == 1


def test_the_place_is_the_hash_of_the_words_wherever_a_document_is_cut_into_pieces(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for text in ("  İki satır\n\n var.\u3000 ", " \t ", "", "tek", "a b", "şu bir\u00a0\u2028iki \x1c üç"):
        digest = hashlib.blake2b(" ".join(text.split()).encode(), digest_size=8).digest()
        for size in (1, 2, 3, 5, 1 << 16):
            monkeypatch.setattr("lowvram.data.holdout._PIECE_CHARACTERS", size)
            holdout = Holdout(0.5)
            holdout.takes(text)
            assert holdout._lowest == int.from_bytes(digest, "big") / 2**64


def test_a_long_document_is_not_taken_apart_into_all_its_words_at_once() -> None:
    text = "ev " * 1_000_000
    tracemalloc.start()
    Holdout(0.5).takes(text)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak_bytes < len(text)


def test_the_share_is_kept_and_a_larger_one_holds_out_all_of_a_smaller_one() -> None:
    texts = [f"belge {number}" for number in range(4000)]
    small, large = Holdout(0.05), Holdout(0.1)
    held = {text for text in texts if small.takes(text)}
    assert held < {text for text in texts if large.takes(text)}
    assert (small.documents, small.held_out) == (4000, len(held))
    assert abs(small.held_out - 200) < 60  # four standard deviations; the hash, and so the verdict, never changes
    assert list(Holdout(0.05).leave(texts)) == [text for text in texts if text not in held]


def test_a_share_that_holds_out_nothing_is_said_with_one_that_does(
    folder: Path, small_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=r"`holdout=.0\.001%.` holds out none of 60 documents") as caught:
        pack_sides([folder], small_tokenizer, tmp_path / "out", 1e-5)
    assert not list(tmp_path.glob("out/*/shards.json"))
    share = float(caught.value.fix.split("out is ")[1].split("%")[0]) / 100
    assert len(split([folder], small_tokenizer, tmp_path / "out", share)[1]) == 1
    with pytest.raises(DataError, match="holds out all 60 documents"):
        pack_sides([folder], small_tokenizer, tmp_path / "all", 1 - 1e-12)
    (tmp_path / "one.txt").write_text("tek belge")
    with pytest.raises(DataError, match="out of one document"):
        pack_sides([tmp_path / "one.txt"], small_tokenizer, tmp_path / "single")
    with pytest.raises(DataError, match="holds out none of 2 documents"):
        train_tokenizer(Holdout(1e-9).leave(["bir", "iki"]), 300, tmp_path / "tok")
    assert not (tmp_path / "tok").exists()
    assert [show_share(share) for share in (0.005, 0.1, 1e-5)] == ["0.5%", "10%", "0.001%"]


def test_a_split_and_shards_of_all_of_a_text_never_lie_beside_each_other(
    folder: Path, small_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    flat, both, alone = (tmp_path / name for name in ("flat", "both", "alone"))
    pack([folder], small_tokenizer, flat, processes=1)
    pack_sides([folder], small_tokenizer, both, processes=1)
    pack([folder], small_tokenizer, alone / "valid", processes=1)
    for replace in (False, True):
        with pytest.raises(DataError, match=f"^{flat} itself holds shards.*another `out`, or delete the shards in"):
            pack_sides([folder], small_tokenizer, flat, processes=1, replace=replace)
        with pytest.raises(DataError, match=f"^{both}/train and {both}/valid hold shards already.*add `holdout`"):
            pack([folder], small_tokenizer, both, processes=1, replace=replace)
        with pytest.raises(DataError, match=f"^{alone}/valid holds shards already"):
            pack([folder], small_tokenizer, alone, processes=1, replace=replace)
    assert not (flat / "train").exists()
    assert {path.name for path in both.iterdir()} == {"train", "valid"}
    pack([folder], small_tokenizer, flat / "valid", processes=1)
    assert pack([folder], small_tokenizer, flat, processes=1).documents == 60, "as it was laid out by hand"
    (flat / "shards.json").unlink()  # as where a packing was interrupted
    with pytest.raises(DataError, match="itself holds shards"):
        pack_sides([folder], small_tokenizer, flat, processes=1)


def test_a_split_that_was_interrupted_goes_on_where_it_stopped(
    folder: Path, small_tokenizer: Tokenizer, tmp_path: Path, small_parts: None
) -> None:
    expected = split([folder], small_tokenizer, tmp_path / "whole", processes=1)
    words = ([folder], small_tokenizer, tmp_path / "out")
    stopped = pack_each_shard(*words, processes=1, holdout=Holdout(SHARE))
    assert [next(stopped).shards for _ in range(3)] == [1, 2, 3]
    stopped.close()
    sides, seen = follow(pack_each_shard(*words, processes=1, holdout=Holdout(SHARE)))
    assert [read(shards) for shards in sides] == expected
    assert seen[-1].reused == 3 < seen[-1].shards
    for name in ("train", "valid"):
        assert bytes_of(tmp_path / "out" / name) == bytes_of(tmp_path / "whole" / name)


def other_texts(folder: Path, change: str) -> None:
    lines = (folder / "b.txt").read_text(encoding="utf-8")
    if change == "another text":
        (folder / "a.txt").write_text("bambaşka\n\n" * 90, encoding="utf-8")
    elif change == "longer":
        (folder / "c.txt").write_text("yeni belge", encoding="utf-8")
    elif change == "shorter by a shard":
        (folder / "b.txt").unlink()
    else:
        (folder / "b.txt").write_text(lines.replace("Doktor", "Doktör").replace("ekmek", "ekmel"), encoding="utf-8")


@pytest.mark.parametrize("change", ["another text", "longer", "shorter by a shard", "a letter"])
@pytest.mark.parametrize("processes", [1, 2])
def test_shards_of_another_text_are_replaced_only_when_that_is_asked_for(
    packed: ShardSet, folder: Path, small_tokenizer: Tokenizer, change: str, processes: int
) -> None:
    before = bytes_of(packed.directory)
    other_texts(folder, change)
    with pytest.raises(
        DataError, match=r"out holds another text.*60 documents from a\.txt, b\.txt, packed 2\d"
    ) as caught:
        pack([folder], small_tokenizer, packed.directory, processes=processes)
    assert "another `out`, or add `replace=True`" in caught.value.fix
    assert bytes_of(packed.directory) == before
    replaced = pack([folder], small_tokenizer, packed.directory, processes=1, replace=True)
    assert replaced.hash != packed.hash
    pack([folder], small_tokenizer, packed.directory, processes=1).verify()


def test_an_interrupted_packing_of_another_text_is_not_replaced_either(
    packed: ShardSet, folder: Path, small_tokenizer: Tokenizer
) -> None:
    (packed.directory / "shards.json").unlink()
    before = bytes_of(packed.directory)
    other_texts(folder, "another text")
    with pytest.raises(DataError, match=r"holds another text: \d+ shards of a packing that was interrupted"):
        pack([folder], small_tokenizer, packed.directory, processes=1)
    assert bytes_of(packed.directory) == before


def test_shards_packed_before_sources_were_noted_still_open_and_are_described_without_them(
    packed: ShardSet, folder: Path, small_tokenizer: Tokenizer
) -> None:
    index = json.loads((packed.directory / "shards.json").read_text(encoding="utf-8"))
    del index["sources"]
    (packed.directory / "shards.json").write_text(json.dumps(index), encoding="utf-8")
    assert ShardSet.open(packed.directory).hash == packed.hash
    other_texts(folder, "longer")
    with pytest.raises(DataError, match=r"60 documents, packed 2\d"):
        pack([folder], small_tokenizer, packed.directory, processes=1)


def test_shards_of_another_tokenizer_are_replaced_when_that_is_asked_for(
    packed: ShardSet, folder: Path, turkish: tuple[str, ...], tmp_path: Path
) -> None:
    other = train_tokenizer(iter(turkish), 300, tmp_path / "other")
    with pytest.raises(DataError, match=r"another tokenizer.*another `out`, or add `replace=True`"):
        pack([folder], other, packed.directory, processes=1)
    assert pack([folder], other, packed.directory, processes=1, replace=True).tokenizer_hash == other.hash
