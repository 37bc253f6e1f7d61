"""A short run looks into its own text: planted documents stand at both ends, and a run without them resumes."""

from __future__ import annotations

import base64
import gzip
import json
import multiprocessing
import random
import re
import signal
import time
from pathlib import Path

import pytest
import torch

from lowvram.api import exclude, look
from lowvram.data.shards import ShardSet
from lowvram.errors import ConfigError, DataError
from lowvram.storage.checkpoint import find_checkpoint
from tests.faults.children import SlowDisk, train_on
from tests.flows.typed import fill_home, typed
from tests.tiny import tiny_run
from tests.train.test_resume import saving_every_step, tensors_at_the_end

ENGLISH = (
    "The committee will meet again on Thursday to discuss whether the proposed changes should be adopted. Members who "
    "cannot attend are asked to send their written remarks to the secretary before the end of the week."
)
REPEATED = " ".join(["Bu sayfa yapım aşamasındadır, lütfen daha sonra tekrar deneyiniz."] * 8)
RUN_FILE = """\
[model]
layers = 2
dim = 96
attention = { kind = "gqa", heads = 4, kv_heads = 2, head_dim = 24 }
ffn = { kind = "swiglu", hidden = 192 }
[data]
train = "shards/train"
valid = "shards/valid"
tokenizer = "tok"
[train]
tokens = 200000
seq_len = 128
batch_tokens = 2048
precision = "fp32"
optimizer = { name = "adamw", lr = 3e-3 }
[run]
dir = "run"
validate_every = 1000
sample_every = 1000
"""


def noise() -> str:
    return base64.b64encode(random.Random(7).randbytes(400)).decode()


@pytest.fixture(scope="module")
def planted(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Paragraphs of encyclopaedic Turkish in two files, with noise, English, and one sentence over and over again."""
    home = tmp_path_factory.mktemp("planted")
    with gzip.open(shared_data / "text/tr_wiki.train.txt.gz", "rt", encoding="utf-8") as file:
        lines = [line.strip() for line in file.read().split("\n")]
    paragraphs = [line for line in lines if 250 < len(line) < 900][:400]
    (home / "in").mkdir()
    first, second = paragraphs[:200], paragraphs[200:]
    first[50], second[100] = noise(), ENGLISH
    for place in range(10, 200, 20):
        second[place] = REPEATED
    (home / "in/a.txt").write_text("\n\n".join(first), encoding="utf-8")
    rows = [json.dumps({"text": text}, ensure_ascii=False) for text in second]
    (home / "in/b.jsonl").write_text("\n".join(rows), encoding="utf-8")
    (home / "run.toml").write_text(RUN_FILE, encoding="utf-8")
    answers = [
        typed("tokenizer", "train", home / "in", "--vocab", 1024, "--out", home / "tok"),
        typed("data", "pack", home / "in", "--tokenizer", home / "tok", "--out", home / "shards", "--holdout", "5%"),
        typed("train", home / "run.toml", "--device", "cpu"),
    ]
    assert [answer.err for answer in answers if answer.code] == []
    return home


@pytest.mark.nightly
def test_planted_documents_stand_at_the_ends_and_are_named_by_file_and_line(
    planted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(planted)
    words = ("data", "look", "shards", "--with", "run", "--all", "--device", "cpu", "--most", 4)
    answer = typed(*words, "--json")
    assert answer.code == 0, answer.err
    found = json.loads(answer.out)
    assert found["scored"] + found["short"] == found["documents"] == ShardSet.open(planted / "shards/train").documents
    strange = [(row["file"], row["line"]) for row in found["strangest"]]
    assert strange[0] == ("in/a.txt", 101)
    assert ("in/b.jsonl", 101) in strange[1:3]
    assert found["boring"][0]["excerpt"].startswith(REPEATED[:60])
    assert found["boring"][0]["file"] == "in/b.jsonl"
    assert found["strangest"][0]["bits_per_byte"] > 5.0 > found["bits_per_byte"] > found["boring"][0]["bits_per_byte"]
    sources = {row["source"]: row for row in found["sources"]}
    assert sources.keys() == {"in/a.txt", "in/b.jsonl"}
    assert sum(row["documents"] for row in sources.values()) == found["scored"]
    total = sum(row["bits_per_byte"] * row["text_bytes"] for row in sources.values())
    assert total / found["text_bytes"] == pytest.approx(found["bits_per_byte"])
    rows = [json.loads(line) for line in (planted / "look.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(rows) == found["scored"]
    assert (rows[0]["hash"], rows[0]["line"]) == (found["strangest"][0]["hash"], 101)
    # In words: the sources of the extremes, each with its documents.
    answer = typed(*words)
    assert "Held-out text in shards/valid stays as it is" in answer.err
    assert re.search(r"Strangest, in bits per byte\n  in/a\.txt\n +[5-9]\.\d+ +\d+ B  line 101  \S{40}", answer.out)
    boring = r"Most boring, in bits per byte\n  in/b\.jsonl\n +[01]\.\d+ +\d+ B  line \d+  Bu sayfa"
    assert re.search(boring, answer.out)
    assert re.search(
        r"\nNext: lowvram data exclude shards --listed look.jsonl --strangest 4 --out shards-rest", answer.out
    )


@pytest.mark.nightly
def test_they_are_left_out_by_command_and_the_rest_is_data_for_a_run(
    planted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(planted)
    assert typed("data", "look", "shards", "--with", "run", "--all", "--device", "cpu").code == 0
    rows = [json.loads(line) for line in (planted / "look.jsonl").read_text(encoding="utf-8").splitlines()[:2]]
    above = round(sum(row["bits_per_byte"] for row in rows) / 2, 1)  # between the noise and the next
    words = ("--listed", "look.jsonl", "--above", above, "--boring", 1, "--out", "shards-rest")
    answer = typed("data", "exclude", "shards", *words)
    assert answer.code == 0, answer.err
    before, rest = ShardSet.open(planted / "shards/train"), ShardSet.open(planted / "shards-rest/train")
    copies = sum(REPEATED[:50] in row for row in (planted / "in/b.jsonl").read_text(encoding="utf-8").split("\n"))
    assert before.documents - rest.documents == copies + 1
    assert re.match(rf"Left out: {copies + 1} documents, ", answer.out)
    assert "\nNext: lowvram fit --data shards-rest --out run.toml" in answer.out
    excluded = json.loads((planted / "shards-rest/train/excluded.json").read_text(encoding="utf-8"))["left_out"]
    assert {f"above {above:g} bits per byte of look.jsonl", "one of the 1 most boring of look.jsonl"} == {
        row["why"] for row in excluded
    }
    again = typed("data", "exclude", "shards", *words)
    assert (again.code, again.out) == (0, answer.out)
    pack = ("data", "pack", "in", "--holdout", "5%", "--exclude", "shards-rest/train/excluded.json", "--out", "anew")
    assert typed(*pack).code == 0
    anew = ShardSet.open(planted / "anew/train")
    assert anew.read(0, anew.tokens).tolist() == rest.read(0, rest.tokens).tolist()


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny run of six steps, and the shards without its three strangest documents."""
    place = tmp_path_factory.mktemp("home")
    fill_home(place)
    assert typed("train", place / "run.toml", "--device", "cpu").code == 0
    out = place / "look.jsonl"
    look(place / "shards/train", place / "run", all_documents=True, least_bytes=1, out=out, device="cpu")
    exclude(place / "shards/train", place / "rest", listed=out, strangest=3, tokenizer=place / "tok")
    return place


@pytest.mark.nightly
def test_a_run_on_the_rest_that_is_killed_resumes_to_the_bit(home: Path) -> None:
    what = tiny_run(home, tokens=9 * 256)
    data = what.data.model_copy(update={"train": (what.data.train[0].model_copy(update={"path": home / "rest"}),)})
    whole, killed = (
        what.model_copy(update={"data": data, "run": what.run.model_copy(update={"dir": home / name})})
        for name in ("whole", "killed")
    )
    whole, killed = saving_every_step(whole), saving_every_step(killed)
    train_on(whole, SlowDisk())
    child = multiprocessing.get_context("spawn").Process(target=train_on, args=(killed, SlowDisk()))
    child.start()
    until_s = time.monotonic() + 60
    while not (killed.run.dir / "step-00000003").exists():
        assert child.is_alive()
        assert time.monotonic() < until_s
        time.sleep(0.001)
    child.kill()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    assert find_checkpoint(killed.run.dir)[0].step < 9
    train_on(killed, SlowDisk())
    truth, found = tensors_at_the_end(whole.run.dir, 9), tensors_at_the_end(killed.run.dir, 9)
    assert truth.keys() == found.keys()
    assert [name for name in truth if not torch.equal(truth[name], found[name])] == []
    assert ShardSet.open(home / "rest").documents == ShardSet.open(home / "shards/train").documents - 3


def test_what_cannot_be_looked_at_is_said_before_a_model_is_read(home: Path, tmp_path: Path) -> None:
    out = tmp_path / "look.jsonl"
    with pytest.raises(DataError, match=r"None of 96 documents has 100,000 bytes.*`least_bytes`"):
        look(home / "shards/train", home / "run", least_bytes=100_000, out=out, device="cpu")
    with pytest.raises(DataError, match=r"holds no document.*`tokens`"):
        look(home / "shards/train", home / "run", tokens=1, least_bytes=150, out=out, device="cpu")
    with pytest.raises(ConfigError, match="`most` is 0"):
        look(home / "shards/train", home / "run", most=0)
    with pytest.raises(DataError, match="is text, not shards"):
        look(home / "train.txt", home / "run", out=out)
    assert not out.exists()
    answer = typed("tokenizer", "train", home / "valid.txt", "--vocab", 300, "--out", tmp_path / "tok")
    assert answer.code == 0, answer.err
    words = ("--tokenizer", tmp_path / "tok", "--out", tmp_path / "shards")
    assert typed("data", "pack", home / "valid.txt", *words).code == 0
    answer = typed("data", "look", tmp_path / "shards", "--with", home / "run", "--out", out, "--device", "cpu")
    assert answer.code == 1
    assert re.search(r"shards was not packed with the tokenizer in .*belong together", answer.err)


def test_an_unknown_place_is_said_with_how_to_note_it_and_the_folder_may_be_the_working_directory(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert typed("data", "pack", home / "train.txt", "--tokenizer", home / "tok", "--out", tmp_path / "old").code == 0
    (tmp_path / "old/00000.places").unlink()
    monkeypatch.chdir(tmp_path / "old")
    answer = typed(
        "data", "look", ".", "--with", home / "run", "--least", 1, "--most", 2,
        "--out", tmp_path / "look.jsonl", "--device", "cpu",
    )  # fmt: skip
    assert answer.code == 0, answer.err
    assert re.search(r"\(not noted\)\n +\d+\.\d+ +\d+ B  00000\.bin, document \d+  \w+", answer.out)
    assert "Packing the same text into that folder again notes it, and keeps the shards." in answer.err
    assert f"Next: lowvram data exclude . --listed {tmp_path / 'look.jsonl'} --strangest 2 --out " in answer.out
    assert f" --out {tmp_path / 'old-rest'}  (" in answer.out
