"""`train_tokenizer`, `pack` and `check_texts`: what the commands write, as values, with errors that name arguments."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lowvram.api import LowvramError, Notice, check_texts, fit, pack, train_tokenizer, write_run_file
from lowvram.api.merge_text import SampleOptions
from lowvram.api.tasks import Progress
from lowvram.api.texts import TextOptions
from lowvram.api.tokenizer_training import MergeOptions, train_tokenizer_task
from lowvram.config.run_file import load_run
from lowvram.data import text
from lowvram.data.mix.portions import Portion
from lowvram.data.tokenizer import Tokenizer
from tests.flows.typed import fill_home, typed, write_home


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the commands make of the texts of `write_home`."""
    folder = tmp_path_factory.mktemp("home")
    fill_home(folder)
    return folder


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.name != "lock"}


def test_the_tokenizer_and_the_shards_are_the_commands_to_the_byte_and_nothing_is_printed(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trained = train_tokenizer(home / "train.txt", tmp_path / "tok", vocabulary="400", progress=True)
    assert (trained.path, trained.size, trained.notices) == (tmp_path / "tok", 400, ())
    assert trained.tokenizer.decode(trained.tokenizer.encode("Kış")) == "Kış"
    assert bytes_of(tmp_path / "tok") == bytes_of(home / "tok")
    for name in ("train", "valid"):
        out = tmp_path / "shards" / name
        # Beside the shards as in the home, because they know where their documents come from.
        text = shutil.copy(home / f"{name}.txt", tmp_path)
        packed = pack([text], out, tokenizer=trained.path, progress=True)
        assert bytes_of(out) == bytes_of(home / "shards" / name)
        [shards] = packed.shards
        assert (shards.path, shards.documents) == (out, 96 if name == "train" else 16)
        assert shards.bytes_per_token == shards.text_bytes / (shards.tokens - shards.documents)
        assert packed.has_validation is (name == "valid")
        assert packed.data == tmp_path / "shards"
    assert capsys.readouterr() == ("", "")


def test_what_is_held_out_is_left_out_by_the_tokenizer_and_packed_apart(home: Path, tmp_path: Path) -> None:
    texts = home / "train.txt"
    train_tokenizer(texts, tmp_path / "tok", vocabulary=400, holdout=0.05)
    whole = train_tokenizer(texts, tmp_path / "whole", vocabulary=400).tokenizer
    packed = pack(str(texts), tmp_path / "data", tokenizer=tmp_path / "tok", holdout="5%")
    assert [shards.path.name for shards in packed.shards] == ["train", "valid"]
    assert sum(shards.documents for shards in packed.shards) == 96
    assert packed.has_validation
    assert (tmp_path / "tok/tokenizer.json").read_bytes() != whole.directory.joinpath("tokenizer.json").read_bytes()
    run_file = write_run_file(fit(gpu="rtx3060", preset="tr-25m", data=packed.data), tmp_path / "run.toml")
    assert load_run(run_file, [], lambda folder: 400).data.valid == packed.shards[1].path.resolve()
    elsewhere = pack(texts, tmp_path / "a/b/c", tokenizer=tmp_path / "tok")
    assert (elsewhere.data, elsewhere.has_validation) == (None, False)


def test_rows_that_are_no_text_stop_are_skipped_or_are_listed(home: Path, tmp_path: Path) -> None:
    rows = [json.dumps({"text": f"Satır {number}."}) for number in range(20)]
    rows[3:9] = ["{"] * 6
    (tmp_path / "rows.jsonl").write_text("\n".join(rows), encoding="utf-8")
    (tmp_path / "notes.pdf").touch()
    passed_over = "1 file in the folders passed over"
    for read in (
        lambda action: pack(tmp_path, home / f"rows-{action}", tokenizer=home / "tok", on_bad_row=action),
        lambda action: train_tokenizer(tmp_path, home / f"tok-{action}", vocabulary=300, on_bad_row=action),
    ):
        with pytest.raises(LowvramError, match=r"^\S+rows\.jsonl:4 is not JSON") as caught:
            read("stop")
        hint = '`on_bad_row="skip"` leaves such rows out, and `check_texts` lists them all. Mend or delete it.'
        assert caught.value.fix == hint
        said = [notice.text for notice in read("skip").notices]
        assert said[0].startswith(passed_over)
        assert [sentence.split(":")[0] for sentence in said[1:6]] == ["Skipped"] * 5, "the first five alone"
        assert said[6:] == [
            "Skipped 6 of 20 rows: 6 not JSON. That is more than 1 %; up to 10 rows are always skipped."
        ]
    found = check_texts(tmp_path, progress=True)
    assert (found.files, found.rows, found.bad, found.summary) == (1, 20, 6, "6 not JSON")
    assert found.can_be_skipped
    assert [row.what[-1 - len("4 is not JSON.") :] for row in found.bad_rows[:1]] == [":4 is not JSON."]
    assert [notice.text[: len(passed_over)] for notice in found.notices] == [passed_over]


def test_a_folder_that_holds_another_tokenizer_or_text_is_named_with_the_arguments(home: Path) -> None:
    for write in (
        lambda **more: train_tokenizer(home / "valid.txt", home / "tok", vocabulary=400, **more),
        lambda **more: pack(home / "valid.txt", home / "shards/train", tokenizer=home / "tok", **more),
    ):
        with pytest.raises(LowvramError, match="Name another `out`, or add `replace=True`") as caught:
            write()
        assert "--" not in str(caught.value)
    with pytest.raises(LowvramError, match=r"^`holdout=.1e-05%.` holds out none of 16.*or leave `holdout` out\.$"):
        pack(home / "valid.txt", home / "none", tokenizer=home / "tok", holdout=1e-7)


@pytest.mark.parametrize(
    "call, says",
    [
        (lambda: pack([]), "`texts` is empty. There is nothing to read. Name files or folders."),
        (lambda: pack([3]), "`texts` is 3. That is of type int. Give a text (str) or a Path."),
        (lambda: pack("a", out=None), "`out` is None. It may not be left out. Give a text (str) or a Path."),
        (lambda: pack("a", tokenizer=3), "`tokenizer` is 3. That is of type int. Give a text (str) or a Path."),
        (lambda: pack("a", holdout=0.0), "`holdout` is 0.0. It is a share of the documents. Write `holdout=0.005` or"),
        (lambda: pack("a", holdout=5), "`holdout` is 5. That is of type int. Give a number (float) or a text (str)."),
        (
            lambda: pack("a", holdout="0.5"),
            "`holdout` is '0.5'. '0.5' is not a share between 0% and 100%; write it like",
        ),
        (lambda: pack("a", on_bad_row="ignore"), "`on_bad_row` is 'ignore'. Known: stop, skip."),
        (lambda: pack("a", on_bad_row=None), "`on_bad_row` is None. It may not be left out. Give a text (str)."),
        (
            lambda: pack("a", processes=0),
            "`processes` is 0. At least one is needed. Give 1 or more.",
        ),
        (lambda: pack("a", field=None), "`field` is None. It may not be left out. Give a text (str)."),
        (lambda: pack("a", replace="yes"), "`replace` is 'yes'. That is of type str. Give True or False."),
        (lambda: train_tokenizer("a", vocabulary="many"), "`vocabulary` is 'many'. 'many' is not a count; write it"),
        (lambda: train_tokenizer("a", vocabulary=True), "`vocabulary` is True. That is of type bool. Give a whole"),
        (lambda: check_texts(None), "`texts` is None. It may not be left out."),
    ],
)
def test_an_argument_that_cannot_be_meant_is_refused_by_name(call: Callable[[], object], says: str) -> None:
    with pytest.raises(LowvramError) as caught:
        call()
    assert str(caught.value).startswith(says)


def test_a_training_that_nobody_waits_for_any_more_writes_no_tokenizer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_home(tmp_path)
    measured = iter([["Kış geldi."]])  # and what is learnt from has no end
    monkeypatch.setattr(text, "documents_of", lambda *_: next(measured, itertools.repeat("Kış geldi.")))
    before = set(threading.enumerate())
    task = train_tokenizer_task(TextOptions((tmp_path / "train.txt",)), tmp_path / "tok", MergeOptions(300))
    while not (begun := set(threading.enumerate()) - before):
        assert isinstance(next(task), Progress)
    [learning] = begun
    task.close()
    learning.join(60)
    assert not learning.is_alive()
    assert not (tmp_path / "tok").exists()


def test_the_command_prints_the_notices_that_the_value_holds(home: Path, tmp_path: Path) -> None:
    (tmp_path / "long.txt").write_text("kış " * 50 + "a" * 3_000, encoding="utf-8")
    found = train_tokenizer(tmp_path / "long.txt", tmp_path / "tok", vocabulary=300)
    [notice] = found.notices
    assert notice == Notice(notice.text, "info")
    assert "were left out" in notice.text
    answer = typed("tokenizer", "train", tmp_path / "long.txt", "--vocab", 300, "--out", tmp_path / "tok")
    assert notice.text in answer.err
    assert (
        train_tokenizer(tmp_path / "long.txt", tmp_path / "tok", vocabulary=300)
        .notices[0]
        .text.endswith("another one is written there only with `replace=True`.")
    )


def test_a_sample_is_what_its_own_hash_takes_and_the_memory_is_said_beforehand(home: Path, tmp_path: Path) -> None:
    whole = (home / "train.txt").read_text(encoding="utf-8")
    documents = whole.split("\n\n")
    task = train_tokenizer_task(
        TextOptions((home / "train.txt",)),
        tmp_path / "tok",
        MergeOptions(330, sample=SampleOptions(len(whole.encode()) // 2)),
    )
    events = list(task)
    told = [event.text for event in events if isinstance(event, Notice)]
    assert told[0] == (
        "About 7.7 KiB of 15.2 KiB of text are learnt from, with about 125.8 MiB of memory: pieces of documents that a "
        "hash of their words chooses. `sample` says how much at most."
    )
    learning = [n for n, event in enumerate(events) if isinstance(event, Progress) and "vocabulary" in event.what]
    assert events.index(Notice(told[0])) < min(learning), "beforehand"
    copies = float(f"{(len(whole.encode()) // 2) / sum(len(text.encode()) for text in documents):.3g}")
    taken = [piece for text in documents for piece in Portion(1.0, copies, 1).take(text)]
    assert 20 < len(taken) < 76
    (tmp_path / "taken.txt").write_text("\n\n".join(taken), encoding="utf-8")
    other = train_tokenizer(tmp_path / "taken.txt", tmp_path / "other", vocabulary=330)
    assert other.tokenizer == Tokenizer.load(tmp_path / "tok")


def test_a_language_is_learnt_from_as_much_as_its_share_says(tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    for name, word, times in (("kk", "балаларымызға", 10), ("tr", "evlerimizdekilerden", 100)):
        (tmp_path / f"texts/{name}.txt").write_text("\n\n".join([f"{word}"] * times), encoding="utf-8")
    few = train_tokenizer(tmp_path / "texts", tmp_path / "few", vocabulary=299)
    # Eleven merges: the more frequent word gets them all, until the other one is half of what is learnt from.
    assert len(few.tokenizer.encode("evlerimizdekilerden")) < 9 < len(few.tokenizer.encode("балаларымызға")) == 26
    many = train_tokenizer(tmp_path / "texts", tmp_path / "many", vocabulary=299, weights={"kk": "80%"})
    assert len(many.tokenizer.encode("балаларымызға")) < 20
    assert "kk 80.0%" in many.notices[-1].text
    with pytest.raises(LowvramError, match="names ru"):
        train_tokenizer(tmp_path / "texts", tmp_path / "no", vocabulary=299, weights={"ru": 2})
    assert not (tmp_path / "no").exists()


def test_merges_respect_morphology_where_the_text_has_words_and_can_be_read_again(home: Path, tmp_path: Path) -> None:
    def train(name: str, **more: Any) -> tuple[bytes, list[str], bool]:
        found = train_tokenizer(more.pop("text", home / "train.txt"), tmp_path / name, vocabulary=400, **more)
        out = tmp_path / name
        return (
            (out / "tokenizer.json").read_bytes(),
            [n.text for n in found.notices],
            (out / "morphology.json").exists(),
        )

    default, soft, none = train("default"), train("soft", morphology="soft"), train("none", morphology="none")
    assert default == soft
    assert (default[2], none[2]) == (True, False)
    assert default[0] != none[0]
    (tmp_path / "numbers.txt").write_text("12 345 67, 12 345!", encoding="utf-8")
    _, [told], has_stems = train("numbers", text=tmp_path / "numbers.txt")
    assert (told.startswith("The text has no words that occur twice, so merges are plain"), has_stems) == (True, False)
    with pytest.raises(LowvramError, match="There are no words to learn stems from"):
        train("asked", text=tmp_path / "numbers.txt", morphology="soft")
    pipe = tmp_path / "pipe.txt"
    os.mkfifo(pipe)
    writing = threading.Thread(target=lambda: pipe.write_bytes((home / "train.txt").read_bytes()))
    writing.start()
    plain, [told], has_stems = train("pipe", text=pipe)
    writing.join()
    assert told.startswith("What is read only once, such as standard input, gives plain merges")
    assert (plain, has_stems) == (none[0], False)
