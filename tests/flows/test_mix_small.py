"""`lowvram data mix` on two small sources: interruptions, options that cannot be meant, lists of documents, folders."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from lowvram.api import mix
from lowvram.api.mix_options import MixOptions
from lowvram.api.mixing import mix_task
from lowvram.api.tasks import Progress
from lowvram.api.texts import TextOptions
from lowvram.config.mix import read_mix
from lowvram.data import shards as shards_module
from lowvram.data.exclusion_list import hash_document
from lowvram.data.mix import demo_text
from lowvram.data.shard_set import ShardSet
from tests.flows.typed import typed
from tests.tiny import TURKISH


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "lock"
    }


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """Two sources of our own sentences, and a tokenizer."""
    (tmp_path / "texts").mkdir()
    for name, step in (("a", 7), ("b", 5)):
        texts = [f"{name} {TURKISH[i % 16]} {TURKISH[i * step % 16]} {i}" for i in range(80)]
        (tmp_path / f"texts/{name}.txt").write_text("\n\n".join(texts), encoding="utf-8")
    assert typed("tokenizer", "train", tmp_path / "texts", "--vocab", 400, "--out", tmp_path / "tok").code == 0
    return tmp_path


def test_a_mix_that_was_interrupted_anywhere_goes_on_to_the_same_bytes(
    small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards_module, "PART_BYTES", 4_000)
    monkeypatch.setattr(demo_text, "LEAST_BYTES", 3_000)

    def work(out: str) -> Any:
        wanted = MixOptions(small / "tok", small / out, caps={"a": 6_000}, demo=0.1)
        return mix_task(TextOptions((small / "texts",), holdout=0.1), wanted, processes=1)

    events = list(work("whole"))
    whole = bytes_of(small / "whole")
    for stopped_after in (2, len(events) // 3, 2 * len(events) // 3, len(events) - 2):
        shutil.rmtree(small / "parts", ignore_errors=True)
        begun = work("parts")
        for _ in range(stopped_after):
            next(begun)
        begun.close()
        assert not (small / "parts/mix.json").exists()
        kept = {path: path.stat().st_mtime_ns for path in (small / "parts").rglob("*.bin")}
        list(work("parts"))
        assert bytes_of(small / "parts") == whole
        assert all(path.stat().st_mtime_ns == written for path, written in kept.items())
    assert any("Packing demo" in event.what for event in events if isinstance(event, Progress))


def test_python_does_what_the_command_does(small: Path) -> None:
    found = mix(
        small / "texts", small / "one", tokenizer=small / "tok", weights={"a": "25%"}, caps={"b": "5kB"}, tokens="1k"
    )
    command = ("data", "mix", small / "texts", "--tokenizer", small / "tok", "--out", small / "two", "--tokens", "1k")
    assert typed(*command, "--weight", "a=25%", "--cap", "b=5kB").code == 0
    assert bytes_of(small / "one") == bytes_of(small / "two")
    assert [source.share for source in found.sources] == [0.25, 0.75]
    assert found.epochs == tuple(1_000 * source.share / source.tokens for source in found.sources)
    assert found.data == small / "one"


def test_a_source_of_one_document_is_learnt_and_not_held_out(small: Path) -> None:
    (small / "texts/c.txt").write_text(" ".join(TURKISH), encoding="utf-8")
    answer = typed(
        "data", "mix", small / "texts", "--tokenizer", small / "tok", "--out", small / "mix", "--holdout", "10%"
    )
    assert answer.code == 0, answer.err
    assert "Nothing is held out of c: too few documents for that share, and all of them are learnt." in answer.err
    assert "c: at most 1,024 tokens" in answer.err
    assert [name for name, _ in read_mix(small / "mix").valid(small / "mix")] == ["a", "b"]


@pytest.mark.parametrize(
    "more, said",
    [
        (("--weight", "a=-1"), "--weight a=-1 is no weight. It is a number above 0"),
        (("--weight", "a=120%"), "--weight a=120% is no weight."),
        (("--weight", "a=2", "--weight", "a=3"), "--weight a=2 and --weight a=3 are given. a can have one of them."),
        (("--cap", "a=5kB", "--cap", "b=9kB", "--cap", "a=4kB"), "--cap a=5kB and --cap a=4kB are given."),
        (("--exclude", "nowhere"), "nowhere is missing."),
        (("--weight", "c=2"), "--weight c names c. There is no such source. Known: a, b."),
        (("--weight", "a=60%", "--weight", "b=60%"), "The shares that are given add up to 120% of the whole."),
        (("--cap", "a=lots"), "--cap a=lots is no size. A cap is a number of bytes of text, above 0."),
        (("--cap", "d=1MB"), "--cap d names d. There is no such source."),
        (("--cap", "a=3"), "A cap of 3 B leaves nothing of a."),
        (("--temperature", "5"), "--temperature 5.0 is not from 0 to 1."),
        (("--demo", "99.9%", "--weight", "a=1%"), "The shares that are given add up to 100.9% of the whole."),
        (("--demo", "5%", "--weight", "demo=2"), "--demo is generated text. Its share is what --demo says."),
        (("--levels", "2", "--tokenizer", "nowhere"), "nowhere"),
    ],
)
def test_what_cannot_be_meant_is_answered_in_one_paragraph(more: tuple[str, ...], said: str, small: Path) -> None:
    answer = typed("data", "mix", small / "texts", "--tokenizer", small / "tok", "--out", small / "mix", *more)
    assert answer.code == 1
    assert said in answer.err
    assert answer.err.startswith("Error: ")
    assert answer.err.count("\n") == 1
    assert not (small / "mix/mix.json").exists()


def test_one_source_or_an_empty_one_is_no_mix(small: Path) -> None:
    where = ("--tokenizer", small / "tok", "--out", small / "mix")
    alone = typed("data", "mix", small / "texts/a.txt", *where)
    assert (alone.code, "a is the only source." in alone.err) == (1, True)
    assert typed("data", "mix", small / "texts/a.txt", "--demo", "20%", *where).code == 0
    (small / "texts/empty.txt").write_text(" \n\n ", encoding="utf-8")
    empty = typed("data", "mix", small / "texts", *where)
    assert empty.code == 1
    assert "empty.txt holds no document." in empty.err
    (small / "mix/mix.json").write_text('{"format": 1, "sources": []}', encoding="utf-8")
    damaged = typed("fit", "--data", small / "mix")
    assert damaged.code == 1
    assert "mix.json cannot be read. sources: " in damaged.err


def test_a_mix_and_plain_shards_never_share_a_folder(small: Path) -> None:
    def say(*words: object) -> str:
        answer = typed("data", *words, "--tokenizer", small / "tok")
        assert answer.code == 1, answer.out
        return answer.err

    text, tok = small / "texts/a.txt", ("--tokenizer", small / "tok")
    assert typed("data", "mix", small / "texts", *tok, "--out", small / "mix").code == 0
    assert typed("data", "pack", text, *tok, "--out", small / "plain").code == 0
    assert typed("data", "pack", text, *tok, "--out", small / "split", "--holdout", "10%").code == 0
    before = bytes_of(small)
    for out in ("mix", "mix/train", "mix/valid"):
        assert "mix is a mix. A run that is to read" in say("pack", text, "--out", small / out)
    assert "mix is a mix." in say("pack", text, "--out", small / "mix", "--holdout", "10%")
    [one, *_] = text.read_text(encoding="utf-8").split("\n\n")
    assert "mix is a mix." in say("exclude", small / "plain", "--hash", hash_document(one), "--out", small / "mix")
    for out, holds in (("plain", "plain"), ("split", "split/train")):
        assert f"{holds} holds shards already." in say("mix", small / "texts", "--out", small / out)
    assert "mix is a mix. It holds packed text" in say("pack", small / "mix", "--out", small / "other")
    assert bytes_of(small) == before
    shutil.copytree(small / "plain", small / "mix/train")
    both = typed("fit", "--data", small / "mix")
    assert both.code == 1
    assert re.search(r"is a mix, and \S+mix/train holds other shards\.", both.err)


def test_documents_of_a_list_are_left_out_of_every_source_and_of_what_a_cap_counts(small: Path) -> None:
    words = ("data", "mix", small / "texts", "--tokenizer", small / "tok")
    assert typed(*words, "--out", small / "mix").code == 0
    texts = {name: (small / f"texts/{name}.txt").read_text(encoding="utf-8").split("\n\n") for name in "ab"}
    chosen = [hash_document(texts[name][place]) for name, place in (("a", 3), ("a", 50), ("b", 7))]
    where = ("--out", small / "rest", "--tokenizer", small / "tok")
    less = typed("data", "exclude", small / "mix/a/train", "--hash", *chosen, *where)
    assert less.code == 0, less.err
    excluded = small / "rest/excluded.json"
    assert less.out.splitlines()[-1].startswith(
        f"Next: the `lowvram data mix` that made {small / 'mix'}, with --exclude"
    )
    assert f"--exclude {excluded} and another --out" in less.out
    assert typed(*words, "--out", small / "anew", "--exclude", excluded).code == 0
    assert [source.documents for source in read_mix(small / "anew").sources] == [78, 80]
    assert ShardSet.open(small / "anew/a/train").hash == ShardSet.open(small / "rest").hash

    (small / "list").write_text("\n".join([*chosen, "0" * 64]), encoding="utf-8")
    capped = sum(len(text.encode()) for text in texts["a"]) - sum(len(texts["a"][place].encode()) for place in (3, 50))
    more = ("--cap", f"a={capped}", "--holdout", "10%")
    answer = typed(*words, "--out", small / "capped", "--exclude", small / "list", *more)
    assert answer.code == 0, answer.err
    assert "Left out 3 listed documents." in answer.err
    assert "1 of 4 listed texts do not occur in what was packed." in answer.err
    assert [source.left_out_bytes for source in read_mix(small / "capped").sources] == [0, 0]
    rows = json.loads((small / "capped/b/train/excluded.json").read_text(encoding="utf-8"))["left_out"]
    assert [(row["hash"], row["why"]) for row in rows] == [(chosen[2], "in list")]
    found = mix(
        small / "texts",
        small / "python",
        tokenizer=small / "tok",
        exclude=small / "list",
        caps={"a": capped},
        holdout=0.1,
    )
    assert [source.documents for source in found.sources] == [s.documents for s in read_mix(small / "capped").sources]
    assert bytes_of(small / "python") == bytes_of(small / "capped")


def test_what_is_left_out_and_skipped_is_told_once(small: Path) -> None:
    rows = [json.dumps({"text": " ".join(TURKISH)}), '{"text": 5}', '{"text": null}']
    (small / "texts/c.jsonl").write_text("\n".join(rows), encoding="utf-8")
    (small / "texts/d.txt").write_text("x", encoding="utf-8")
    words = ("data", "mix", small / "texts", "--tokenizer", small / "tok", "--out", small / "mix", "--holdout", "10%")
    answer = typed(*words, "--leave-out", small / "texts/d.txt", "--on-bad-row", "skip")
    assert answer.code == 0, answer.err
    assert f"Left out as asked: {small / 'texts/d.txt'}." in answer.err.replace("\n", " ")
    assert answer.err.count("Skipped: ") == 2
    assert answer.err.count("Skipped 2 of 3 rows") == 1
    assert "Nothing is held out of c:" in answer.err
    shutil.copytree(small / "mix/a/valid", small / "mix/c/valid")
    again = typed(*words, "--leave-out", small / "texts/d.txt", "--on-bad-row", "skip")
    assert again.code == 1
    assert "c/valid holds text that was held out. This --holdout holds out nothing of c:" in again.err
    assert "Give the same" not in again.err


def test_a_tokenizer_learns_from_each_source_by_its_share_and_names_the_mix_that_fits_it(small: Path) -> None:
    words = ("tokenizer", "train", small / "texts", "--vocab", 400, "--out", small / "shared")
    answer = typed(*words, "--weight", "a=70%", "--sample", "8kB", "--temperature", "0.3")
    assert answer.code == 0, answer.err
    told = " ".join(answer.err.split())
    assert re.search(r"About 7\.\d KiB of 25\.\d KiB of text are learnt from, with about 12\d\.\d MiB of memory", told)
    assert re.search(r"learnt from: a 70\.0% \(5\.\d KiB, \d\d\.\d% of its text\); b 30\.0% \(2\.\d KiB", told)
    assert "`sample`" not in told
    assert "--sample says how much at most" in told
    assert " mix " in answer.out
    assert not (small / "shared/morphology.json").exists(), "several sources may be several languages"
    for same in (f"data mix {small}/texts", "--temperature 0.3", "--weight a=70%", f"--tokenizer {small}/shared"):
        assert same in " ".join(answer.out.split())
    wrong = typed(*words, "--weight", "c=2")
    assert (wrong.code, wrong.out) == (1, "")
    assert "--weight c names c" in " ".join(wrong.err.split())
    assert typed(*words, "--temperature", "3").err.startswith("Error: --temperature 3.0 is not from 0 to 1.")
