"""Shards without listed documents are what packing the rest would give, whatever happens while they are written."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from lowvram.api import exclude
from lowvram.api import pack as pack_texts
from lowvram.data.exclusion_list import RowRules, choose, hash_document, read_list
from lowvram.data.nfc import nfc
from lowvram.data.places import Place
from lowvram.data.shard_documents import open_documents
from lowvram.data.shards import ShardSet, pack
from lowvram.data.tokenizer import Tokenizer
from lowvram.errors import ConfigError, DataError, LowvramError
from tests.data.test_places import places_of, texts_of
from tests.data.test_shards import bytes_of
from tests.flows.typed import environment

# Of the sixty documents, two in the first shard, all of the third, one in the last, the one in NFD.
OUT = (0, 5, 58)
HAS_LINKS = sys.platform != "win32"  # there shards are copied

# Excludes in children that die, each when it comes to touch the disk for another time; each time the work is then
# finished by a child that does not: SHARDS TOKENIZER LIST HOME [EARLIER].  EARLIER: shards with a list of what was left
# out, which are in the folder before and are replaced by all of the shards.
SCRIPT = """
import os, shutil, sys
from pathlib import Path
from lowvram.data.exclusion import find_documents, write_rest
from lowvram.data.exclusion_list import read_list
from lowvram.data.shards import ShardSet
from lowvram.data.tokenizer import Tokenizer
from lowvram.finish import finish
from lowvram.storage.disk import Disk

# A process that dies loses nothing that the system has; waiting for a slow drive would show no more.
os.fsync = lambda handle: None

class Mortal(Disk):
    left = 0

def dying(name):
    def touch(self, *arguments):
        self.left -= 1
        if self.left == 0:
            os._exit(9)
        return getattr(Disk, name)(self, *arguments)
    return touch

for name in ("preallocate", "write_handle", "sync_handle", "rename", "delete", "link"):
    setattr(Mortal, name, dying(name))

def run(out, die_at):
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    disk = Mortal()
    disk.left = die_at
    finish(write_rest(shards, found, tokenizer, out, disk, replace=bool(earlier)))
    os._exit(0)

shards, tokenizer = ShardSet.open(Path(sys.argv[1])), Tokenizer.load(Path(sys.argv[2]))
earlier = sys.argv[5:]
listed = {} if earlier else {row["hash"]: row for row in read_list(Path(sys.argv[3]))}
found = finish(find_documents(shards, tokenizer, listed))

def prepare(die_at):
    out = Path(sys.argv[4], f"{die_at:03d}")
    if earlier:
        shutil.copytree(earlier[0], out)
    return out

die_at = 1
while run(prepare(die_at), die_at) == 9:
    assert run(Path(sys.argv[4], f"{die_at:03d}"), 0) == 0
    die_at += 1
"""


def write_hashes(file: Path, texts: list[str], numbers: tuple[int, ...]) -> Path:
    file.write_text("\n".join(hash_document(texts[number]) for number in numbers), encoding="utf-8")
    return file


@pytest.fixture
def third(packed: ShardSet, small_tokenizer: Tokenizer) -> list[str]:
    """The documents of the third shard."""
    return [data.decode() for data in open_documents(packed, packed.parts()[2], small_tokenizer).all_bytes()]


@pytest.fixture
def listed(texts: list[str], third: list[str], tmp_path: Path) -> Path:
    file = write_hashes(tmp_path / "listed.txt", texts, OUT)
    with file.open("a", encoding="utf-8") as end:
        end.write("".join(f"\n{hash_document(text)}" for text in third))
    return file


def rest_of(texts: list[str], third: list[str]) -> list[str]:
    return [nfc(text) for number, text in enumerate(texts) if number not in OUT and nfc(text) not in third]


def test_the_rest_is_what_packing_it_gives_and_untouched_shards_are_linked(
    packed: ShardSet, listed: Path, texts: list[str], third: list[str], small_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    before = bytes_of(packed.directory)
    found = exclude(packed.directory, tmp_path / "rest", hashes=listed, tokenizer=small_tokenizer.directory)
    assert (found.documents, found.missing) == (len(OUT) + len(third), 0)
    rest = ShardSet.open(tmp_path / "rest", small_tokenizer.hash)
    rest.verify()
    left = rest_of(texts, third)
    expected = [id for text in left for id in [0, *small_tokenizer.encode(text)]]
    assert rest.read(0, rest.tokens).tolist() == expected
    assert rest.text_bytes == sum(len(text.encode()) for text in left)
    assert (found.tokens, found.text_bytes) == (packed.tokens - rest.tokens, packed.text_bytes - rest.text_bytes)
    assert bytes_of(packed.directory) == before
    # The second shard lost nothing, the third all.
    assert (tmp_path / "rest/00001.bin").samefile(packed.directory / "00001.bin") == HAS_LINKS
    assert (tmp_path / "rest/00002.bin").samefile(packed.directory / "00003.bin") == HAS_LINKS
    old, new = places_of(packed, small_tokenizer), places_of(rest, small_tokenizer)
    assert old is not None
    by_text = dict(zip(texts_of(packed, small_tokenizer), old, strict=True))
    assert new == [by_text[text] for text in left]


def test_what_was_left_out_is_listed_and_packing_with_the_list_gives_the_same_tokens(
    packed: ShardSet, listed: Path, folder: Path, small_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    tok = small_tokenizer.directory
    exclude(packed.directory, tmp_path / "rest", hashes=listed, tokenizer=tok)
    rest = ShardSet.open(tmp_path / "rest")
    packed_anew = pack_texts(folder, tmp_path / "anew", tokenizer=tok, exclude=tmp_path / "rest/excluded.json")
    anew = ShardSet.open(tmp_path / "anew")
    assert anew.read(0, anew.tokens).tolist() == rest.read(0, rest.tokens).tolist()
    assert [notice.text for notice in packed_anew.notices] == [
        f"Left out {packed.documents - rest.documents} listed documents."
    ]
    lists = [json.loads((tmp_path / name / "excluded.json").read_text(encoding="utf-8")) for name in ("rest", "anew")]
    assert [row["hash"] for row in lists[0]["left_out"]] == [row["hash"] for row in lists[1]["left_out"]]
    assert [Path(row["file"]).name for row in lists[0]["left_out"]][-1] == "b.txt"
    assert {row["why"] for row in lists[0]["left_out"]} == {"in listed.txt"}
    # A second exclusion keeps what the first left out, and a packing of the whole text drops the list.
    one = hash_document(texts_of(rest, small_tokenizer)[0])
    exclude(tmp_path / "rest", tmp_path / "less", hashes=one, tokenizer=tok)
    rows = json.loads((tmp_path / "less/excluded.json").read_text(encoding="utf-8"))["left_out"]
    assert [row["hash"] for row in rows] == [*(row["hash"] for row in lists[0]["left_out"]), one]
    assert pack([folder], small_tokenizer, tmp_path / "anew", processes=1, replace=True).hash == packed.hash
    assert bytes_of(tmp_path / "anew") == bytes_of(packed.directory)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
@pytest.mark.parametrize("is_replaced", [False, True], ids=["in a new folder", "over an earlier list"])
def test_killed_at_any_touch_of_the_disk_it_goes_on_to_the_same_files(
    folder: Path,
    texts: list[str],
    small_tokenizer: Tokenizer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    is_replaced: bool,
) -> None:
    monkeypatch.setattr("lowvram.data.shards.PART_BYTES", 3_000)
    packed = pack([folder], small_tokenizer, tmp_path / "out", processes=1)
    *_, middle, end = packed.parts()
    assert middle.start > 0
    # The first shard loses two documents, the last all.
    last = [data.decode() for data in open_documents(packed, end, small_tokenizer).all_bytes()]
    listed = write_hashes(tmp_path / "listed.txt", [*texts[:2], *last], tuple(range(2 + len(last))))
    before = bytes_of(packed.directory)
    (tmp_path / "script.py").write_text(SCRIPT, encoding="utf-8")
    (tmp_path / "home").mkdir()
    words = [tmp_path / "script.py", packed.directory, small_tokenizer.directory, listed, tmp_path / "home"]
    if is_replaced:
        words.append(tmp_path / "earlier")
        exclude(packed.directory, words[-1], hashes=listed, tokenizer=small_tokenizer.directory)
        assert (tmp_path / "earlier/excluded.json").is_file()
    subprocess.run([sys.executable, *map(str, words)], env=environment(), check=True)
    *resumed, whole = sorted((tmp_path / "home").iterdir())
    assert len(resumed) > 20
    expected = bytes_of(whole)
    assert {kind.suffix for kind in map(Path, expected)} == {".bin", ".json", ".places"}
    assert [out.name for out in resumed if bytes_of(out) != expected] == []
    assert bytes_of(packed.directory) == before
    assert is_replaced == ("excluded.json" not in expected)


@pytest.mark.parametrize("platform", ["win32", sys.platform])
def test_where_links_are_refused_or_harm_shards_are_copied(
    packed: ShardSet, listed: Path, small_tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    platform: str,
) -> None:  # fmt: skip
    def refuse(*_: object) -> None:
        raise PermissionError("no links here")

    tok = small_tokenizer.directory
    exclude(packed.directory, tmp_path / "linked", hashes=listed, tokenizer=tok)
    if platform == sys.platform:
        monkeypatch.setattr(os, "link", refuse)
    monkeypatch.setattr("lowvram.storage.disk.sys", SimpleNamespace(platform=platform))
    exclude(packed.directory, tmp_path / "copied", hashes=listed, tokenizer=tok)
    assert bytes_of(tmp_path / "copied") == bytes_of(tmp_path / "linked")
    assert (tmp_path / "copied/00001.bin").stat().st_nlink == 1


def test_held_out_text_of_a_split_stays_and_copies_go_together(
    texts: list[str], small_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    tok = small_tokenizer.directory
    (tmp_path / "a.txt").write_text("\n\n".join([*texts, texts[3], texts[3]]), encoding="utf-8")
    pack_texts(tmp_path / "a.txt", tmp_path / "split", tokenizer=tok, holdout=0.3)
    sides = [texts_of(ShardSet.open(tmp_path / "split" / side), small_tokenizer) for side in ("train", "valid")]
    copied = nfc(texts[3])
    side = sides[0] if copied in sides[0] else sides[1]
    assert side.count(copied) == 3
    other = next(text for text in sides[0] if text != copied)
    hashes = [hash_document(text) for text in (sides[1][0], other, copied)]
    found = exclude(tmp_path / "split", tmp_path / "rest", hashes=hashes, tokenizer=tok)
    assert (tmp_path / "rest/valid/00000.bin").samefile(tmp_path / "split/valid/00000.bin") == HAS_LINKS
    assert not (tmp_path / "rest/valid/excluded.json").exists()
    gone = {other, copied} if side is sides[0] else {other}
    left = texts_of(ShardSet.open(tmp_path / "rest/train"), small_tokenizer)
    assert left == [text for text in sides[0] if text not in gone]
    missing = 1 if side is sides[0] else 2
    assert found.missing == missing
    assert [notice.text for notice in found.notices] == [
        f"{missing} of 3 listed documents {'is' if missing == 1 else 'are'} not in {tmp_path / 'split'}."
    ]
    # The folder of held-out text can be named itself.
    exclude(tmp_path / "split/valid", tmp_path / "valid-rest", hashes=hashes[0], tokenizer=tok)
    assert texts_of(ShardSet.open(tmp_path / "valid-rest"), small_tokenizer) == [
        t for t in sides[1] if t != sides[1][0]
    ]


LOOK = [{"hash": f"{n:064x}", "bits_per_byte": bits} for n, bits in enumerate((0.5, 4.0, 2.0, 4.0, 1.0))]


@pytest.mark.parametrize(
    "options, numbers",
    [
        ({"strangest": 2}, {1, 3}), ({"above": 3.9}, {1, 3}), ({"above": 4.0, "boring": 1}, {0}),
        ({"boring": 2, "below": 2.0}, {0, 4}), ({"strangest": 1, "below": 1.0}, {1, 0}),
        ({"strangest": 99}, {0, 1, 2, 3, 4}),
    ],
)  # fmt: skip
def test_rules_choose_from_a_list(tmp_path: Path, options: dict[str, float], numbers: set[int]) -> None:
    from lowvram.api.excluding import ExcludeOptions, read_exclusion

    rows = [*LOOK, LOOK[1]]
    (tmp_path / "look.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    found = read_exclusion(ExcludeOptions(tmp_path / "look.jsonl", **options))  # type: ignore[arg-type]
    assert {int(name, 16) for name in found} == numbers
    assert all("of look.jsonl" in row["why"] for row in found.values())


def test_the_ends_of_any_list_are_those_of_the_sorted_one_and_excerpts_are_not_kept(tmp_path: Path) -> None:
    lot = random.Random(3)
    for most in range(1, 12):
        rows = [
            {"hash": f"{lot.randrange(9):064x}", "bits_per_byte": lot.randrange(6) / 2, "file": "a", "excerpt": "x"}
            for _ in range(lot.randrange(1, 40))
        ]
        (tmp_path / "look.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
        for rules, sign in ((RowRules(strangest=most), -1), (RowRules(boring=most), 1)):
            by_hash: dict[str, float] = {}
            for row in rows:
                bits = sign * float(str(row["bits_per_byte"]))
                by_hash[str(row["hash"])] = min(bits, by_hash.get(str(row["hash"]), bits))
            found = choose(tmp_path / "look.jsonl", read_list(tmp_path / "look.jsonl"), rules)
            assert sorted(sign * row["bits_per_byte"] for row in found.values()) == sorted(by_hash.values())[:most]
            assert all(sign * row["bits_per_byte"] == by_hash[name] for name, row in found.items())
            assert {tuple(row) for row in found.values()} == {("hash", "bits_per_byte", "file", "why")}


@pytest.mark.parametrize(
    "content, options, error",
    [
        ("", {"strangest": 1}, r"empty.*names no document"),
        ('{"text": "x"}', {"strangest": 1}, r"list:1 names no document.*64 digits.*data look"),
        ("{torn", {"strangest": 1}, r"list:1 is not JSON"),
        ("f" * 64, {"strangest": 1}, r"Row 1 of .* has no bits per byte"),
        (json.dumps(LOOK[0]) + "\n\nabc", {"above": 0.1}, r"list:3 names no document"),
        (json.dumps(LOOK[0]), {"above": 9.0}, r"No document of .* is meant.*1 document there .* 0.500 to 0.500"),
        (json.dumps(LOOK[0]), {"strangest": 1}, r"None of 1 listed document is in .*shards"),
        (json.dumps(LOOK[0]), {}, r"nothing says which.*`hashes`"),
        (json.dumps(LOOK[0] | {"bits_per_byte": "many"}), {"strangest": 1}, r"no bits per byte"),
    ],
)  # fmt: skip
def test_a_list_of_another_form_is_explained(
    packed: ShardSet, small_tokenizer: Tokenizer, tmp_path: Path, content: str, options: dict[str, float], error: str
) -> None:
    (tmp_path / "list").write_text(content, encoding="utf-8")
    given = {"listed": tmp_path / "list", "tokenizer": small_tokenizer.directory, **options}
    (tmp_path / "shards").symlink_to(packed.directory)
    with pytest.raises(LowvramError, match=error):
        exclude(tmp_path / "shards", tmp_path / "rest", **given)  # type: ignore[arg-type]
    assert not (tmp_path / "rest").exists()


def test_what_cannot_be_meant_is_refused_before_anything_is_written(
    packed: ShardSet, texts: list[str], small_tokenizer: Tokenizer, tmp_path: Path, turkish: tuple[str, ...]
) -> None:
    tok, one = small_tokenizer.directory, hash_document(texts[0])
    every = [hash_document(text) for text in texts]
    with pytest.raises(DataError, match=r"Nothing is left of .*Leave fewer"):
        exclude(packed.directory, tmp_path / "rest", hashes=every, tokenizer=tok)
    for out in (packed.directory, packed.directory / "rest", packed.directory.parent):
        with pytest.raises(DataError, match="Name a folder beside it"):
            exclude(packed.directory, out, hashes=one, tokenizer=tok)
    with pytest.raises(ConfigError, match="Nothing says which"):
        exclude(packed.directory, tmp_path / "rest", tokenizer=tok)
    with pytest.raises(DataError, match="nowhere is missing"):
        exclude(packed.directory, tmp_path / "rest", hashes="nowhere", tokenizer=tok)
    from lowvram.data.tokenizer import train_tokenizer

    other = train_tokenizer(iter(turkish), 300, tmp_path / "other")
    with pytest.raises(DataError, match=r"was not packed with the tokenizer in .*other"):
        exclude(packed.directory, tmp_path / "rest", hashes=one, tokenizer=other.directory)
    assert not (tmp_path / "rest").exists()
    pack([tmp_path / "text/b.txt"], small_tokenizer, tmp_path / "full", processes=1)
    with pytest.raises(DataError, match=r"holds another text.*replace"):
        exclude(packed.directory, tmp_path / "full", hashes=one, tokenizer=tok)
    exclude(packed.directory, tmp_path / "full", hashes=one, tokenizer=tok, replace=True)
    assert ShardSet.open(tmp_path / "full").documents == 59
    data = bytearray((packed.directory / "00001.bin").read_bytes())
    data[-2] ^= 1
    (packed.directory / "00001.bin").write_bytes(data)
    with pytest.raises(DataError, match=r"00001.bin is damaged.*pack again"):
        exclude(packed.directory, tmp_path / "rest", hashes=one, tokenizer=tok)


def test_many_documents_at_once_decode_to_their_own_bytes(
    packed: ShardSet, texts: list[str], small_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert texts_of(packed, small_tokenizer) == [nfc(text) for text in texts]
    monkeypatch.setattr("lowvram.data.shard_documents._TOKENS", 40)
    assert texts_of(packed, small_tokenizer) == [nfc(text) for text in texts]
    documents = open_documents(packed, packed.parts()[0], small_tokenizer)
    assert [documents.read_bytes(n) for n in range(documents.part.documents)] == list(documents.all_bytes())
    assert documents.places is not None
    assert documents.places[0] == Place(documents.places[0].file, 1)
