"""`lowvram data mix`: real languages packed, fitted, trained and resumed, with the loss of each source."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lowvram.api.mix_options import MixOptions
from lowvram.api.mixing import mix_task
from lowvram.api.texts import TextOptions
from lowvram.config.mix import Mix, read_mix
from lowvram.config.run_file import load_run
from lowvram.data.shard_set import ShardSet
from lowvram.data.tokenizer import Tokenizer
from lowvram.evaluate.bits_per_byte import score
from lowvram.evaluate.by_source import add_up
from lowvram.generate.saved_run import saved_config
from lowvram.storage.checkpoint import find_checkpoint
from lowvram.train.events import Evaluated, StepDone
from tests.flows.test_mix_small import bytes_of
from tests.flows.typed import RUN_FILE, typed
from tests.tiny import TURKISH, tensors_of, trainer_of, unequal

SOURCES = ("kk/news", "kk/wiki", "tr/reviews", "tr/treebank")
CAP = 60_000


def prepare(home: Path, shared_data: Path) -> None:
    """Lay the real text out as languages with domains, and train a tokenizer on it."""
    for name in SOURCES:
        file = home / "texts" / f"{name}.txt.gz"
        file.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(shared_data / "text" / f"{name.replace('/', '_')}.valid.txt.gz", file)
    small = home / "small.txt"
    small.write_text("\n\n".join(TURKISH), encoding="utf-8")
    assert typed("tokenizer", "train", small, "--vocab", 400, "--out", home / "tok").code == 0


def words(home: Path, *more: object) -> tuple[object, ...]:
    where = ("data", "mix", home / "texts", "--tokenizer", home / "tok", "--out", home / "mix")
    return (*where, "--levels", 2, "--holdout", "20%", "--cap", f"kk={CAP}", "--cap", "tr=60kB", *more)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, shared_data: Path) -> Path:
    place = tmp_path_factory.mktemp("mix")
    prepare(place, shared_data)
    answer = typed(
        *words(place, "--temperature", 0.5, "--tokens", "500k", "--demo", "10%", "--weight", "tr/treebank=2")
    )
    assert answer.code == 0, answer.err
    (place / "answer.txt").write_text(answer.out, encoding="utf-8")
    (place / "warning.txt").write_text(answer.err, encoding="utf-8")
    run_file = RUN_FILE.replace('train = "shards/train"\nvalid = "shards/valid"', 'train = "mix"')
    options = "validate_tokens = 900\nvalidate_every = 2\n"
    (place / "run.toml").write_text(run_file.replace("validate_every = 4\n", options), encoding="utf-8")
    return place


def test_each_source_is_packed_within_its_cap_and_has_the_share_that_follows_from_its_size(home: Path) -> None:
    found = read_mix(home / "mix")
    assert [source.name for source in found.sources] == ["demo", *SOURCES]
    for source in found.sources:
        train, valid = (ShardSet.open(home / "mix" / source.name / side) for side in ("train", "valid"))
        assert (source.tokens, source.documents, source.text_bytes) == (train.tokens, train.documents, train.text_bytes)
        assert source.held_out_tokens == valid.tokens
    by_name = {source.name: source for source in found.sources}
    for language in ("kk", "tr"):
        taken = [
            ShardSet.open(home / "mix" / name / side).text_bytes
            for name in SOURCES
            if name.startswith(language)
            for side in ("train", "valid")
        ]
        assert 0.95 * CAP < sum(taken) <= CAP
    weights = {name: by_name[name].tokens ** 0.5 * (2 if name == "tr/treebank" else 1) for name in SOURCES}
    for name, weight in weights.items():
        assert by_name[name].share == pytest.approx(0.9 * weight / sum(weights.values()), abs=2e-5)
    assert by_name["demo"].share == pytest.approx(0.1, abs=2e-5)


def test_the_table_says_beforehand_how_often_each_source_is_read(home: Path) -> None:
    told = (home / "answer.txt").read_text(encoding="utf-8").splitlines()
    found = read_mix(home / "mix")
    assert told[0].split() == ["source", "text", "tokens", "held", "out", "share", "epochs", "left", "out"]
    for line, source in zip(told[1:], found.sources, strict=False):
        assert line.startswith(source.name)
        _, behind = line.split(f" {source.share:.2%} ")
        assert behind.split()[0] == f"{5e5 * source.share / source.tokens:,.2f}"
    assert all(len(line) <= 80 for line in told[: len(found.sources) + 1])
    assert re.match(r"Next: lowvram fit --data \S+mix --out run\.toml", told[-1])
    most = min(4 * source.tokens / source.share for source in found.sources)
    warning = (home / "warning.txt").read_text(encoding="utf-8")
    assert "500.0k tokens read" in warning
    assert "(Muennighoff et al. 2023)" in warning
    for source in found.sources:
        times = 5e5 * source.share / source.tokens
        assert (f"{source.name} {times:,.1f} times" in warning) is (times > 4)
    assert f"read at most {most / 1000:.1f}k tokens" in warning


def test_other_weights_pack_nothing_again_and_another_text_is_not_replaced_unasked(home: Path, tmp_path: Path) -> None:
    shutil.copytree(home, tmp_path / "copy")
    place = tmp_path / "copy"
    files = sorted((place / "mix").rglob("*.bin"))
    before = [file.stat().st_mtime_ns for file in files]
    assert typed(*words(place, "--weight", "kk=30%", "--demo", "10%", "--tokens", "500k")).code == 0
    assert [file.stat().st_mtime_ns for file in files] == before
    shares = {source.name: source.share for source in read_mix(place / "mix").sources}
    assert shares["kk/news"] + shares["kk/wiki"] == pytest.approx(0.3, abs=1e-5)
    refused = typed(*words(place, "--cap", "tr/treebank=8kB"))
    assert refused.code == 1
    assert re.search(r"mix/tr/\w+/\w+ holds another text: .* add --replace", refused.err)
    assert [source.name for source in read_mix(place / "mix").sources] == ["demo", *SOURCES], "nothing was replaced"
    blind = typed("data", "mix", place / "texts", "--tokenizer", place / "tok", "--out", place / "mix", "--levels", 2)
    assert blind.code == 1
    assert "kk/news/valid holds text that was held out." in blind.err
    replacing = mix_task(
        TextOptions((place / "texts",), holdout=0.2),
        MixOptions(place / "tok", place / "mix", caps={"tr/treebank": 8_000}, levels=2, replace=True),
        processes=1,
    )
    treebank = place / "mix/tr/treebank/train"
    packed = bytes_of(treebank)
    while (place / "mix/mix.json").exists():  # until a source may get another text, whose shares the file does not know
        next(replacing)
    assert bytes_of(treebank) == packed, "the file goes first"
    while bytes_of(treebank) == packed:
        next(replacing)
    assert not (place / "mix/mix.json").exists()
    replacing.close()
    assert typed(*words(place, "--cap", "tr/treebank=8kB", "--replace")).code == 0
    assert [source.name for source in read_mix(place / "mix").sources] == list(SOURCES)


def test_a_run_file_names_every_source_and_a_folder_alone_means_the_same(home: Path) -> None:
    def data(file: str) -> Any:
        return load_run(home / file, [], lambda tokenizer: Tokenizer.load(tokenizer).size).data

    answer = typed(
        "fit", "--data", home / "mix", "--out", home / "written.toml", "--model", "tr-25m", "--gpu", "rtx4060"
    )
    assert answer.code == 0, answer.err
    assert data("written.toml") == data("run.toml")
    mixed = read_mix(home / "mix")
    assert [(c.path, c.weight) for c in data("run.toml").train] == mixed.train(home / "mix")
    assert list(data("run.toml").held_out) == mixed.valid(home / "mix")
    text = (home / "written.toml").read_text(encoding="utf-8")
    assert f'    {{path = "mix/tr/treebank/train", weight = {mixed.sources[-1].share}}},\n' in text
    nested = (home / "run.toml").read_text(encoding="utf-8").replace('"mix"', '[{ path = "mix", weight = 3 }, "other"]')
    (home / "nested.toml").write_text(nested, encoding="utf-8")
    weights = [corpus.weight for corpus in data("nested.toml").train]
    assert weights == pytest.approx([3 * source.share for source in mixed.sources] + [1.0])
    valid = 'valid = ["mix", { source = "kk", path = "mix" }, "other/valid"]\ntokenizer'
    (home / "listed.toml").write_text(nested.replace("tokenizer", valid, 1), encoding="utf-8")
    held_out = [name for name, _ in mixed.valid(home / "mix")]
    names = [name for name, _ in data("listed.toml").held_out]
    assert names == [*held_out, *(f"kk/{name}" for name in held_out), "other"]
    assert "the source that they read most often, of 5 with" in typed("fit", "--data", home / "mix").out


@pytest.fixture(scope="module")
def trained(home: Path) -> Path:
    """The home with a finished run."""
    run = ("train", home / "run.toml", "--device", "cpu", "--set")
    told = typed(*run, f"run.dir={home / 'whole'}")
    assert told.code == 0, told.err
    (home / "training.txt").write_text(told.err, encoding="utf-8")
    return home


def looks(run: Path) -> Iterator[dict[str, Any]]:
    for line in (run / "log.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if row["event"] == "Evaluated":
            yield row


def test_the_log_has_the_loss_of_each_source_and_the_whole_is_their_sum_to_the_byte(trained: Path) -> None:
    rows = list(looks(trained / "whole"))
    assert [row["step"] for row in rows] == [2, 4, 6]
    for row in rows:
        assert list(row["by_source"]) == ["demo", *SOURCES]
        sources = row["by_source"].values()
        bits = math.fsum(each["bits_per_byte"] * each["text_bytes"] for each in sources)
        assert row["bits_per_byte"] == pytest.approx(bits / sum(each["text_bytes"] for each in sources), rel=1e-12)
        shown = ", ".join(f"{name} {each['bits_per_byte']:.3f}" for name, each in row["by_source"].items())
        assert f"by source: {shown}\n" in (trained / "training.txt").read_text(encoding="utf-8")


def test_each_source_s_loss_is_that_of_its_own_shards(trained: Path) -> None:
    checkpoint, _ = find_checkpoint(trained / "whole")
    what = saved_config(checkpoint)
    trainer = trainer_of(what)
    list(trainer.run())  # finished: it only reads the checkpoint
    model, tokenizer = trainer.state.model, trainer.tokenizer
    row = list(looks(trained / "whole"))[-1]
    scores = {}
    for name, path in what.data.held_out:
        given = (tokenizer.bos_id, tokenizer.byte_count_V, 32, torch.float32, 900 // 5)
        scores[name] = score(model, ShardSet.open(path), *given)
        assert row["by_source"][name]["bits_per_byte"] == pytest.approx(scores[name].bits_per_byte, rel=1e-6)
        assert row["by_source"][name]["text_bytes"] == scores[name].text_bytes
    whole = add_up(scores.values())
    assert (row["loss"], row["bits_per_byte"]) == pytest.approx((whole.loss, whole.bits_per_byte), rel=1e-6)


def test_a_run_over_a_mix_resumes_to_the_bit(trained: Path) -> None:
    what = load_run(trained / "run.toml", [], lambda tokenizer: Tokenizer.load(tokenizer).size)
    told: list[list[Any]] = []
    for name, stops in (("plain", False), ("parts", True)):
        what = what.model_copy(update={"run": what.run.model_copy(update={"dir": trained / name})})
        if stops:
            first = trainer_of(what)
            for event in first.run():
                if isinstance(event, StepDone) and event.step == 3:
                    first.stop()
            assert find_checkpoint(trained / name)[0].step == 3
        trainer = trainer_of(what)
        told.append([event for event in trainer.run() if isinstance(event, Evaluated)])
        told[-1].append(tensors_of(trainer))
    assert [look.step for look in told[0][:-1]] == [2, 4, 6]
    assert told[0][1:-1] == told[1][:-1]
    assert unequal(told[0][-1], told[1][-1]) == []
    compared = typed("compare", trained / "plain", trained / "parts/step-00000003", "--items", 20)
    assert compared.code == 0, compared.err
    runs = ("compare", trained / "plain", trained / "parts/step-00000003", "--items", 20, "--json")
    assert typed(*runs, "--text", trained / "mix").out == typed(*runs).out
    remixed = Mix.model_validate_json((trained / "mix/mix.json").read_bytes())
    other = tuple(source.model_copy(update={"share": 1 / 5}) for source in remixed.sources)
    kept = (trained / "mix/mix.json").read_bytes()
    (trained / "mix/mix.json").write_text(remixed.model_copy(update={"sources": other}).model_dump_json())
    answer = typed("train", trained / "run.toml", "--device", "cpu", "--set", f"run.dir={trained / 'parts'}")
    (trained / "mix/mix.json").write_bytes(kept)
    assert answer.code == 1
    assert "the weights in data.train were" in answer.err


def test_evaluate_measures_the_sources_of_a_run_or_of_a_mix(trained: Path) -> None:
    found = json.loads(typed("evaluate", trained / "whole", "--tokens", 900, "--json").out)
    row = list(looks(trained / "whole"))[-1]
    assert found["data"] == str(trained / "mix")
    assert found["bits_per_byte"] == pytest.approx(row["bits_per_byte"], rel=1e-6)
    assert {name: each["text_bytes"] for name, each in found["by_source"].items()} == {
        name: each["text_bytes"] for name, each in row["by_source"].items()
    }
    again = json.loads(typed("evaluate", trained / "whole", "--tokens", 900, "--data", trained / "mix", "--json").out)
    assert again == found
    as_text = json.loads(typed("evaluate", trained / "whole", "--text", trained / "mix", "--json").out)["text"]
    held_out = [str(path) for _, path in read_mix(trained / "mix").valid(trained / "mix")]
    assert [row["name"] for row in as_text] == [*held_out, "all"]
    told = typed("evaluate", trained / "whole", "--tokens", 900).out
    for name, each in found["by_source"].items():
        assert f"    {name}  {each['bits_per_byte']:.4f}   ({each['targets']:,} tokens, " in told
    assert re.search(r"bigram model   \S+   \(counted on \S+ tokens of 5 corpora, by their shares\)", told)
