"""`lowvram compare` and `lowvram.api.compare`: recipes with their seeds, on text of any tokenizer."""

from __future__ import annotations

import gc
import json
import shutil
import weakref
from pathlib import Path
from typing import Any

import pytest

from lowvram.api import LowvramError, compare, comparing, evaluate, loading
from lowvram.data.text import documents
from lowvram.data.tokenizer import Tokenizer
from tests.flows.typed import fill_home, typed


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("home")
    fill_home(folder)
    tuned = ("--set", "optimizer.lr=2e-2")
    runs = {
        "a0": ("--set", "run.save_every_minutes=1e-9", "--set", "run.keep=9"),
        "a1": ("--set", "train.seed=1"),
        "b0": tuned,
    }
    for name, words in runs.items():
        words = ("train", folder / "run.toml", "--set", f"run.dir={folder / name}", *words, "--device", "cpu")
        assert typed(*words).code == 0
    return folder


def test_runs_that_differ_in_their_seed_are_one_recipe(home: Path) -> None:
    runs = [home / name for name in ("a0", "a1", "b0")]
    answer = typed("compare", *runs, "--device", "cpu")
    assert answer.code == 0, answer.err
    lines = answer.out.splitlines()
    assert [line.split()[0] for line in lines[:3]] == ["recipe", str(home / "b0"), str(home / "a0")]
    assert "and 1 more" in lines[2]
    assert lines[-1] == f"Next: lowvram evaluate {home / 'b0'} --device cpu  (measure the best one)"
    assert "Fewer than 3 seeds" in answer.err
    told = json.loads(typed("compare", *runs, "--device", "cpu", "--json").out)
    found = compare(runs, device="cpu")
    assert json.loads(json.dumps(found.as_dict())) == told
    assert [len(recipe["runs"]) for recipe in told["recipes"]] == [1, 2]
    assert told["documents"] == 16
    assert any("Fewer than 3 seeds" in notice.text for notice in found.notices)
    low, high = told["differences"][0]["interval"]
    assert low < told["differences"][0]["bits_per_byte"] < high


def test_held_out_shards_and_their_text_give_the_same(home: Path) -> None:
    runs = [home / "a0", home / "b0"]
    of_shards, of_text = compare(runs, device="cpu"), compare(runs, text=home / "valid.txt", device="cpu")
    assert of_shards.as_dict() == of_text.as_dict()
    ranked = [recipe.runs[0] for recipe in of_shards.comparison.recipes]
    scores = {run: evaluate(run, device="cpu").bits_per_byte for run in runs}
    assert ranked == sorted(scores, key=scores.__getitem__)
    few = compare(runs, items=5, device="cpu").comparison
    assert few.documents == 5
    (home / "old.txt").write_bytes(("Ağaç ışık şeker. " * 20).encode("cp1254"))
    notices = compare(runs, text=home / "old.txt", device="cpu").notices
    assert f"Read as Windows-1254: {home / 'old.txt'}." in [notice.text for notice in notices]


def test_checkpoints_of_one_run_are_no_seeds_of_a_recipe(home: Path) -> None:
    early, late = home / "a0/step-00000003", home / "a0/step-00000006"
    found = compare([early, late, home / "a1"], device="cpu").comparison
    assert {recipe.runs for recipe in found.recipes} == {(early,), (late, home / "a1")}
    assert len(compare([early, late], device="cpu").comparison.recipes) == 2


def test_a_copy_of_a_run_counts_as_no_second_seed(home: Path) -> None:
    if not (home / "copy").exists():
        shutil.copytree(home / "a0", home / "copy")
    with pytest.raises(LowvramError, match=r"copy and .*a0 are of one recipe, of one seed \(train\.seed = 0\), and"):
        compare([home / "a0", home / "copy", home / "b0"], device="cpu")


def test_of_one_recipe_the_spread_of_its_seeds_is_told(home: Path) -> None:
    answer = typed("compare", home / "a0", home / "a1", "--device", "cpu")
    assert answer.code == 0, answer.err
    assert "above the best" not in answer.out
    assert "seeds:" not in answer.err, "there is no interval to warn of"
    found = compare([home / "a0", home / "a1"], device="cpu").comparison
    (recipe,) = found.recipes
    assert found.differences == ()
    low, high = sorted(recipe.of_runs)
    assert low < high
    deviation = (high - low) / 2**0.5
    told = f"its 2 seeds pay from {low:.4f} to {high:.4f} bits per byte, with a standard deviation of {deviation:.4f}"
    assert told in answer.out


def test_one_model_is_in_memory_at_a_time_and_few_documents_are_decoded(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive: list[weakref.ref[object]] = []
    load, decode, decoded = loading.load_model, Tokenizer.decode, []

    def load_alone(*given: Any, **named: Any) -> Any:
        gc.collect()
        assert all(model() is None for model in alive)
        loaded = yield from load(*given, **named)
        alive.append(weakref.ref(loaded.model))
        return loaded

    monkeypatch.setattr(loading, "load_model", load_alone)
    monkeypatch.setattr(Tokenizer, "decode", lambda self, ids: decoded.append(decode(self, ids)) or decoded[-1])
    monkeypatch.setattr(comparing, "_TOKENS_AT_ONCE", 100)
    compare([home / "a0", home / "b0"], items=4, device="cpu")
    assert len(alive) == 2
    texts = list(documents(home / "valid.txt"))
    assert decoded == [texts[number * len(texts) // 4] for number in range(4)]


@pytest.mark.parametrize(
    "names, says",
    [
        (("a0",), "fewer than two runs"),
        (("a0", "a0"), "fewer than two"),
        (("a0", "b0", "a0/step-00000006"), "are the same model"),
    ],
    ids=["one", "twice the same", "one checkpoint"],
)
def test_what_cannot_be_compared_is_told_before_a_model_is_read(
    names: tuple[str, ...], says: str, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "load_model", None)
    with pytest.raises(LowvramError, match=says):
        compare([home / name for name in names], device="cpu")
    assert typed("compare", *(home / name for name in names), "--device", "cpu").code == 1
