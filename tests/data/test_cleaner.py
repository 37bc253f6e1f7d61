"""A whole cleaning: what is left, in which files, however many processes work and however often they are killed."""

from __future__ import annotations

import gzip
import hashlib
import json
import random
import subprocess
import sys
import time
from pathlib import Path

import filelock
import pytest

from lowvram.api import clean
from lowvram.config.cleaning import load_rules
from lowvram.data.clean import cleaner, pair_buckets
from lowvram.data.clean.cleaner import clean_each_part
from lowvram.errors import BusyError, DataError, LowvramError, MachineError
from lowvram.storage.disk import DISK, Disk
from tests.data.conftest import follow
from tests.flows.typed import environment, typed

WORDS = """
komşu öğretmen balıkçı çiftçi ressam doktor gemici terzi fırıncı yazar avcı bekçi
köyde şehirde limanda tarlada atölyede hastanede gemide dükkânda ormanda evde dağda çölde
ekmek tuz kitap halat boya ilaç kumaş mektup fener tuzluk sepet anahtar kömür yün bal
aradı buldu sakladı sattı yitirdi taşıdı gördü gömdü övdü saydı kırdı onardı
"""
KINDS = [line.split() for line in WORDS.strip().splitlines()]


def write_sentence(generator: random.Random) -> str:
    words = [generator.choice(kind) for kind in KINDS]
    return f"{words[0].capitalize()} {generator.randint(2, 999)} gün boyunca {words[1]} {words[2]} {words[3]}."


def write_document(generator: random.Random, sentences: int = 12) -> str:
    return "\n".join(write_sentence(generator) for _ in range(sentences))


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """Two folders of three files, with copies, near copies, a line that all have, and rows to remove."""
    generator = random.Random(11)
    made = [write_document(generator) for _ in range(120)]
    folder = tmp_path / "in"
    for name in ("law", "news"):
        (folder / name).mkdir(parents=True)
    shared = "Bu sayfadaki bütün yazılar yazarının özel izniyle yayımlanmıştır."
    with_line = [f"{text}\n{shared}" for text in made[:20]]
    (folder / "law/a.txt").write_text(
        "\n\n".join([*with_line, made[20].replace("i", "İ").upper(), made[20]]), encoding="utf-8"
    )
    words = made[21].split(" ")
    words[10] = words[30] = "BAMBAŞKA"
    rows = [{"text": text} for text in [*made[21:70], " ".join(words), made[3], "kısa", "ali@ornek.com.tr " + made[70]]]
    lines = [json.dumps(row) for row in rows]
    lines[5] += "\n{torn"
    (folder / "law/a.jsonl").write_text("\n".join(lines), encoding="utf-8")
    with gzip.open(folder / "news/b.csv.gz", "wt", encoding="utf-8", newline="") as file:
        file.write("text\n" + "".join(f'"{text}"\n' for text in made[71:]))
    return folder


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of some documents, and buckets of some pairs, written now and then."""
    monkeypatch.setattr(cleaner, "PART_BYTES", 4_000)
    monkeypatch.setattr(pair_buckets, "_WAITING_PAIRS", 40)
    monkeypatch.setattr(pair_buckets, "_BUCKET_PAIRS", 16)


def seen(folder: Path) -> dict[str, str]:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != ".lock"]
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def run(texts: Path, out: Path, sets: tuple[str, ...] = (), processes: int = 1, disk: Disk = DISK) -> dict:
    """Clean, and return the report."""
    return follow(clean_each_part([texts], out, load_rules(sets=sets), processes=processes, disk=disk))[0]


def test_what_is_no_good_is_removed_and_what_is_read_stays_as_it_is(texts: Path, tmp_path: Path, small: None) -> None:
    before = seen(texts)
    result = clean(texts, tmp_path / "out")
    assert seen(texts) == before
    assert sorted(seen(tmp_path / "out")) == [
        "law/a.jsonl.jsonl",
        "law/a.txt.jsonl",
        "news/b.jsonl",
        "report.json",
        "report.md",
    ]
    law, rows = rows_of(tmp_path / "out/law/a.txt.jsonl"), rows_of(tmp_path / "out/law/a.jsonl.jsonl")
    removed = {rule: count for rule, count in result.removed.items() if count}
    assert removed == {"length": 1, "duplicate_documents": 1, "near_duplicates": 2}
    assert (result.documents_read, result.documents) == (22 + 53 + 49, 120)
    # a.jsonl is read before a.txt, so that its copy of the third document stays.
    assert [row["document"] for row in rows] == [*range(1, 50), 51, 53]
    assert [row["document"] for row in law] == [1, 2, 3, *range(5, 22)]
    assert sum("özel izniyle" in row["text"] for row in law + rows) == 1
    assert rows[-1]["text"].startswith("[E-POSTA] ")
    assert len(rows_of(tmp_path / "out/news/b.jsonl")) == 49
    assert [notice.text for notice in result.notices][-1] == "Skipped 1 of 125 rows: 1 not JSON."
    by_rule = {row["rule"]: row for row in result.report["rules"]}
    assert by_rule["duplicate_lines"]["lines_removed"] == 18
    assert by_rule["private"]["replaced"] == {"email": 1}
    near, other = by_rule["near_duplicates"]["examples"]
    assert (near["document"], near["like"]["document"], near["like"]["file"][-7:]) == (50, 1, "a.jsonl")
    assert (other["file"][-5:], other["document"], other["like"]["document"]) == ("a.txt", 4, 51)
    page = result.page.read_text(encoding="utf-8")
    shown = (
        "| `near_duplicates` | 2 | 0 |",
        "Skipped 1 of 125 rows",
        "BAMBAŞKA",
        "law/a.txt.jsonl`",
        "`email = true, ",
    )
    for words in shown:
        assert words in page, words


def test_the_result_does_not_depend_on_processes_parts_of_memory_or_interruptions(
    texts: Path, tmp_path: Path, small: None
) -> None:
    run(texts, tmp_path / "one")
    run(texts, tmp_path / "two", processes=2)
    expected = seen(tmp_path / "one")
    assert seen(tmp_path / "two") == expected

    class TornError(Exception):
        """Stands for a kill at the n-th time that something is about to change on the disk."""

    class Failing(Disk):
        left = 0

        def rename(self, source: Path, target: Path) -> None:
            self.left -= 1
            if self.left < 0:
                raise TornError
            super().rename(source, target)

    stops = 0
    for attempt in range(60):
        disk = Failing()
        disk.left = 3 + attempt % 4
        try:
            run(texts, tmp_path / "torn", disk=disk)
            break
        except TornError:
            stops += 1
            assert seen(texts)
    assert stops > 5
    assert seen(tmp_path / "torn") == expected


@pytest.mark.nightly
@pytest.mark.skipif(sys.platform == "win32", reason="sends POSIX signals")
@pytest.mark.parametrize("seed", range(3))
def test_a_command_that_is_killed_at_any_moment_goes_on_to_the_same_bytes(
    texts: Path, tmp_path: Path, seed: int
) -> None:
    script = (
        "import sys; from lowvram.data.clean import cleaner, pair_buckets\n"
        "cleaner.PART_BYTES, pair_buckets._BUCKET_PAIRS, pair_buckets._WAITING_PAIRS = 2_000, 16, 40\n"
        "from lowvram.cli.app import main\nif __name__ == '__main__': sys.exit(main(sys.argv[1:]))"
    )
    (tmp_path / "run.py").write_text(script, encoding="utf-8")
    words = [sys.executable, str(tmp_path / "run.py"), "data", "clean", str(texts), "--processes", "2", "--out"]

    def begin(out: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen([*words, str(tmp_path / out)], env=environment(), stderr=subprocess.DEVNULL)

    def wait_for_work(child: subprocess.Popen[bytes], out: str) -> float:
        deadline = time.monotonic() + 60
        while child.poll() is None and not list((tmp_path / out / ".cleaning").glob("*.bin*")):
            assert time.monotonic() < deadline
            time.sleep(0.002)
        return time.monotonic()

    whole = begin("whole")
    began_s = wait_for_work(whole, "whole")
    assert whole.wait(120) == 0
    took_s = time.monotonic() - began_s
    generator, kills = random.Random(seed), 0
    for attempt in range(8):
        child = begin("out")
        wait_for_work(child, "out")
        # Spread over the whole work, for what is finished is not done again.
        time.sleep(took_s * generator.random() * (attempt + 1) / 8)
        kills += child.poll() is None
        child.kill()
        child.wait()
    assert kills >= 4
    assert begin("out").wait(120) == 0
    assert seen(tmp_path / "out") == seen(tmp_path / "whole")


def test_finished_parts_are_kept_and_damaged_ones_are_cleaned_again(texts: Path, tmp_path: Path, small: None) -> None:
    run(texts, tmp_path / "whole")
    work = clean_each_part([texts], tmp_path / "out", load_rules(), processes=1)
    for step in work:
        if step.stage != "Cleaning":
            break
    work.close()
    folder = tmp_path / "out/.cleaning"
    parts = sorted(folder.glob("*.bin"))
    assert len(parts) > 8
    times = {path: path.stat().st_mtime_ns for path in parts}
    data = bytearray(parts[2].read_bytes())
    data[len(data) // 2] ^= 1
    parts[2].write_bytes(data)
    parts[3].with_suffix(".json").write_text("{torn", encoding="utf-8")
    again = clean_each_part([texts], tmp_path / "out", load_rules(), processes=1)
    for step in again:
        if step.stage != "Cleaning":
            break
    changed = [path for path in parts if path.stat().st_mtime_ns != times[path]]
    assert changed == parts[2:4]
    follow(again)
    assert seen(tmp_path / "out") == seen(tmp_path / "whole")


def test_a_finished_result_is_recognised_and_other_text_or_rules_never_replace_it_unasked(
    texts: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    first = clean(texts, out)
    before = seen(out)
    second = clean(texts, out)
    assert second.report == first.report
    assert "The result was finished before" in second.notices[-2].text
    with pytest.raises(DataError, match=r"text cleaned by other rules.*`replace=True`"):
        clean(texts, out, overrides={"length.least_words": 9})
    more = texts / "law/a.txt"
    more.write_text(more.read_text(encoding="utf-8") + "\n\nBir belge daha geldi, hem de uzunca.", encoding="utf-8")
    with pytest.raises(DataError, match=r"holds another cleaned text.*`replace=True`"):
        clean(texts, out)
    assert seen(out) == before
    replaced = clean(texts, out, overrides={"length.least_words": 2}, replace=True)
    assert replaced.documents == first.documents + 1
    (out / "news/b.jsonl").write_text("", encoding="utf-8")
    with pytest.raises(DataError, match="holds a result that was changed"):
        clean(texts, out, overrides={"length.least_words": 2})


def test_work_of_other_rules_or_text_is_not_mixed_in(texts: Path, tmp_path: Path, small: None) -> None:
    for sets, add in (((), ""), (("length.least_words=9",), ""), (("length.least_words=9",), "\n\nBir tane daha.")):
        work = clean_each_part([texts], tmp_path / "out", load_rules(sets=sets), processes=1)
        for step in work:
            if step.stage == "Writing" and step.done > 8:
                break
        work.close()
        file = texts / "law/a.txt"
        file.write_text(f"Çok başka bir başlangıç.\n\n{file.read_text(encoding='utf-8')}{add}", encoding="utf-8")
    run(texts, tmp_path / "out", ("length.least_words=9",))
    run(texts, tmp_path / "whole", ("length.least_words=9",))
    assert seen(tmp_path / "out") == seen(tmp_path / "whole")


def test_what_is_not_ours_is_never_written_over(texts: Path, tmp_path: Path) -> None:
    (tmp_path / "out/news").mkdir(parents=True)
    (tmp_path / "out/news/b.jsonl").write_text("precious", encoding="utf-8")
    with pytest.raises(DataError, match=r"news.b\.jsonl is in the way"):
        clean(texts, tmp_path / "out")
    assert (tmp_path / "out/news/b.jsonl").read_text(encoding="utf-8") == "precious"
    for out in (texts, tmp_path):
        with pytest.raises(DataError, match="holds text that is to be cleaned"):
            clean(texts, out)
    for _ in range(2):
        with pytest.raises(DataError, match=r"in.new lies in .*in, which is to be cleaned"):
            clean(texts, texts / "new")
    with pytest.raises(DataError, match="is no folder"):
        clean(texts, tmp_path / "out/news/b.jsonl")
    (tmp_path / "busy").mkdir()
    with filelock.FileLock(tmp_path / "busy/.lock"), pytest.raises(BusyError, match="Another process is cleaning"):
        clean(texts, tmp_path / "busy")


def test_where_nothing_is_left_it_says_which_rules_ate_it(texts: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"Nothing is left of 124 documents\. .*by: length 124\.") as caught:
        clean(texts, tmp_path / "out", overrides={"length.least_characters": 1_000_000})
    assert "length.on=false" in str(caught.value)
    assert not (tmp_path / "out").exists()
    (tmp_path / "short.txt").write_text("kısa\n\n1 2\n\n\u200b", encoding="utf-8")
    with pytest.raises(DataError, match=r"Nothing is left of 3 documents"):
        clean(tmp_path / "short.txt", tmp_path / "none")
    (tmp_path / "rows.jsonl").write_text("{torn\n", encoding="utf-8")
    with pytest.raises(DataError, match="There is no text to clean"):
        clean(tmp_path / "rows.jsonl", tmp_path / "none")


def test_dirty_rows_are_skipped_by_default_but_not_many(texts: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a\.jsonl:7 is not JSON"):
        clean(texts, tmp_path / "out", on_bad_row="stop")
    file = texts / "law/a.jsonl"
    file.write_text(file.read_text(encoding="utf-8") + "\n{torn" * 30, encoding="utf-8")
    with pytest.raises(DataError, match=r"more than 1%"):
        clean(texts, tmp_path / "out")
    with gzip.open(tmp_path / "a.txt.gz", "wb") as packed:
        packed.write("\n\n".join(write_document(random.Random(n)) for n in range(500)).encode())
    (tmp_path / "a.txt.gz").write_bytes((tmp_path / "a.txt.gz").read_bytes()[:9_000])
    with pytest.raises(DataError, match=r"a\.txt\.gz cannot be read to its end\. It was cut short"):
        clean(tmp_path / "a.txt.gz", tmp_path / "torn")
    assert not (tmp_path / "torn").exists(), "nothing was finished"


def test_a_file_that_is_left_out_costs_no_part_of_the_others(texts: Path, tmp_path: Path, small: None) -> None:
    torn = texts / "law/b.txt.gz"
    torn.write_bytes(gzip.compress("\n\n".join(write_document(random.Random(n)) for n in range(600)).encode())[:-100])
    with pytest.raises(DataError, match=r"b\.txt\.gz cannot be read to its end.*`leave_out` leaves it out"):
        clean(texts, tmp_path / "out")
    parts = {path: path.stat().st_mtime_ns for path in (tmp_path / "out/.cleaning").glob("*.bin")}
    assert len(parts) > 4
    work = clean_each_part([texts], tmp_path / "out", load_rules(), leave_out=[torn], processes=1)
    for step in work:
        if step.stage != "Cleaning":
            break
    again = [path for path, before in parts.items() if path.exists() and path.stat().st_mtime_ns != before]
    assert len(again) < len(parts) // 2, "those of the file that is left out"
    work.close()
    found = clean(texts, tmp_path / "out", leave_out=torn)
    assert f"Left out as asked: {torn}." in found.report["notes"]
    assert "Going on: 124 documents kept" in " ".join(notice.text for notice in found.notices)
    torn.unlink()
    plain = clean(texts, tmp_path / "plain")
    assert {row["output"]: row["bytes"] for row in found.report["files"] if row["output"]} == {
        row["output"]: row["bytes"] for row in plain.report["files"]
    }


def test_evaluation_sets_are_named_by_file_and_by_rules(texts: Path, tmp_path: Path) -> None:
    item = " ".join(rows_text(texts).split()[:14])
    (tmp_path / "eval.jsonl").write_text(json.dumps({"question": item}), encoding="utf-8")
    (tmp_path / "rules.toml").write_text('[contamination]\nagainst = "eval.jsonl"\n', encoding="utf-8")
    found = clean(texts, tmp_path / "a", against=tmp_path / "eval.jsonl")
    assert found.removed["contamination"] == 1
    assert found.report["evaluation_sets"] == [(tmp_path / "eval.jsonl").as_posix()]
    (tmp_path / "sets").mkdir()
    (tmp_path / "sets/eval.jsonl").write_text(json.dumps({"question": item}), encoding="utf-8")
    (tmp_path / "sets/eval.xml").write_text(item, encoding="utf-8")
    notices = clean(texts, tmp_path / "d", against=tmp_path / "sets").notices
    [notice] = [each.text for each in notices if each.text.startswith("Of the evaluation sets")]
    assert notice.startswith("Of the evaluation sets: 1 file in the folders passed over (1 .xml)")
    other = clean(texts, tmp_path / "b", rules=tmp_path / "rules.toml")
    assert seen(tmp_path / "b")["news/b.jsonl"] == seen(tmp_path / "a")["news/b.jsonl"]
    assert other.removed == found.removed
    assert (
        clean(texts, tmp_path / "c", overrides={"contamination.on": False}, against=tmp_path / "eval.jsonl").documents
        == 120
    )


def rows_text(texts: Path) -> str:
    with gzip.open(texts / "news/b.csv.gz", "rt", encoding="utf-8") as file:
        return file.read().partition("\n")[2].strip('"')


def test_other_languages_are_removed_where_some_are_named(tmp_path: Path) -> None:
    english = "The old fisherman walked slowly down to the harbour, because the boats had not come back since morning."
    turkish = "Yaşlı balıkçı yavaş yavaş limana doğru yürüdü, çünkü tekneler sabahtan beri geri dönmemişti."
    kazakh = "Қарт балықшы баяу ғана айлаққа қарай жүрді, өйткені қайықтар таңертеңнен бері қайтып келмеді."
    (tmp_path / "a.txt").write_text("\n\n".join((english, turkish, kazakh)), encoding="utf-8")
    try:
        found = clean(tmp_path / "a.txt", tmp_path / "out", overrides={"language.keep": ["tr", "kk"]})
    except MachineError as error:
        pytest.skip(f"needs lingua: {error}")
    assert [row["text"] for row in rows_of(tmp_path / "out/a.jsonl")] == [turkish, kazakh]
    assert found.removed["language"] == 1
    assert next(row for row in found.report["rules"] if row["rule"] == "language")["examples"][0]["why"] == "en"
    with pytest.raises(LowvramError, match=r"language\.keep=xx.*names no language"):
        clean(tmp_path / "a.txt", tmp_path / "other", overrides={"language.keep": "xx"})


def test_the_command_shows_what_it_did_and_what_comes_next(texts: Path, tmp_path: Path) -> None:
    answer = typed("data", "clean", texts, "--out", tmp_path / "out", "--set", "near_duplicates.on=false")
    assert answer.code == 0, answer.err
    assert "duplicate_documents: 1 document removed, 0 changed" in answer.out
    assert f"{tmp_path / 'out'}: 122 of 124 documents (1.61% removed)" in answer.out
    assert answer.out.splitlines()[-2].startswith(f"Next: lowvram tokenizer train {tmp_path / 'out'} ")
    assert answer.out.splitlines()[-1].startswith(f"or:   lowvram data pack {tmp_path / 'out'} ")
    packing = typed("tokenizer", "train", tmp_path / "out", "--vocab", 300, "--out", tmp_path / "tok")
    assert (packing.code, "passed over" in packing.err) == (0, False), "the report beside the text is no text"
    wrong = typed("data", "clean", texts, "--out", tmp_path / "other", "--set", "lenght.on=false")
    assert (wrong.code, wrong.out) == (1, "")
    assert "Error: --set lenght.on=false: there is no rule lenght. Did you mean length?" in wrong.err
    report = typed("data", "clean", texts, "--on-bad-row", "report")
    assert (report.code, "a.jsonl:7 is not JSON" in report.out) == (1, True)
