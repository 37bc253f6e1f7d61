"""Sources of a mix: which they are, how much a cap takes of each, which share each has, and how several are read."""

from __future__ import annotations

import math
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lowvram.api.mix_options import read_caps, read_weights
from lowvram.api.texts import choose_left_out
from lowvram.config.mix import BLOCK, name_folders
from lowvram.data.holdout import Holdout, hash_position
from lowvram.data.loader import _share_out
from lowvram.data.mix.caps import Sizes, apply_caps
from lowvram.data.mix.demo_text import LEAST_BYTES, write_demo_text
from lowvram.data.mix.shares import LEAST_SHARE, Wish, find_shares
from lowvram.data.mix.sources import MOST_SOURCES, find_sources, match
from lowvram.data.sample import write_document
from lowvram.data.shards import ShardSet, pack
from lowvram.data.source_set import Source, SourceSet, share_out
from lowvram.data.tokenizer import Tokenizer
from lowvram.errors import ConfigError, DataError
from tests.data.conftest import follow

ROUNDED = 2e-5
sizes_of_sources = st.lists(st.integers(2, 10**10), min_size=2, max_size=12)
temperatures = st.sampled_from([0.0, 0.3, 0.5, 0.7, 1.0])


@given(sizes_of_sources, temperatures, st.data())
def test_shares_follow_sizes_weights_and_fixed_shares_and_the_loader_keeps_them(
    sizes: list[int], temperature: float, data: st.DataObject
) -> None:
    tokens = {f"{'tr' if number % 2 else 'kk'}/{number}": size for number, size in enumerate(sizes)}
    names = list(tokens)
    factors = {name: data.draw(st.sampled_from([0.5, 1.0, 2.0])) for name in names}
    fixed = data.draw(st.sampled_from([None, names[0], "kk"]))
    wishes = {name: Wish(factor) for name, factor in factors.items()}
    if fixed is not None:
        wishes[fixed] = Wish(wishes.get(fixed, Wish()).factor, share=0.25)
    found = find_shares(tokens, temperature, wishes)
    shares = found.by_name
    assert math.fsum(shares.values()) == pytest.approx(1, abs=ROUNDED)
    inside = [name for name in names if fixed is not None and name.startswith(fixed)]
    if not found.raised:
        assert fixed is None or math.fsum(shares[name] for name in inside) == pytest.approx(0.25, abs=ROUNDED)
        for group in (inside, [name for name in names if name not in inside]):
            weights = [tokens[name] ** temperature * factors[name] for name in group]
            whole = math.fsum(shares[name] for name in group)
            for name, weight in zip(group, weights, strict=True):
                assert shares[name] == pytest.approx(weight / math.fsum(weights) * whole, abs=ROUNDED)
    for name in found.raised:
        assert shares[name] == pytest.approx(LEAST_SHARE, abs=1e-6)
    quotas = _share_out(list(shares.values()))
    assert quotas.min() >= 1
    assert np.abs(quotas / BLOCK - np.array(list(shares.values()))).max() <= 1.01 / BLOCK


def test_temperature_1_reads_all_equally_often_and_0_gives_all_the_same() -> None:
    tokens = {"law": 900_000, "news": 100_000}
    assert find_shares(tokens, 1.0, {}).by_name == {"law": 0.9, "news": 0.1}
    assert find_shares(tokens, 0.0, {}).by_name == {"law": 0.5, "news": 0.5}
    # Conneau et al. 2020, section 3.1, for two languages and alpha = 0.3.
    by_hand = 0.9**0.3 / (0.9**0.3 + 0.1**0.3)
    assert find_shares(tokens, 0.3, {}).by_name["law"] == pytest.approx(by_hand, abs=ROUNDED)


@pytest.mark.parametrize(
    "wishes, said",
    [
        ({"lwa": Wish(2)}, r"`weights=\"lwa\"` names lwa\. There is no such source\. Did you mean law\?"),
        ({"law": Wish(share=0.6), "tr": Wish(share=0.6)}, r"add up to 120%.* Nothing is left for kk"),
        ({"law": Wish(share=0.9), "tr": Wish(share=0.09), "kk": Wish(share=0.005)}, "No source is left for the rest"),
        (
            {"tr": Wish(share=0.2), "tr/news": Wish(share=0.1)},
            r"tr/news has two shares: that of tr and that of tr/news",
        ),
    ],
)
def test_wishes_that_cannot_be_are_refused(wishes: dict[str, Wish], said: str) -> None:
    with pytest.raises(DataError, match=said):
        find_shares({"law": 5, "tr/news": 5, "tr/wiki": 5, "kk": 5}, 1.0, wishes)


def documents(count: int, name: str) -> list[str]:
    return [f"{name} {number} " + "sözcük " * (number * 7 % 23) for number in range(count)]


@settings(max_examples=25)
@given(st.integers(2_000, 50_000), st.integers(2_000, 90_000))
def test_what_is_taken_stays_below_every_cap_and_a_larger_cap_takes_all_of_a_smaller_one(own: int, both: int) -> None:
    texts = {name: documents(200, name) for name in ("tr/a", "tr/b", "kk/c")}
    sizes = {name: Sizes() for name in texts}
    for name, each in texts.items():
        for text in each:
            sizes[name].add(text)

    def taken(caps: dict[str, int]) -> dict[str, set[str]]:
        found = apply_caps(sizes, caps)
        return {name: {t for t in each if name not in found or found[name](t)} for name, each in texts.items()}

    chosen = taken({"tr/a": own, "tr": both})
    size = {name: sum(len(text.encode()) for text in each) for name, each in chosen.items()}
    whole = {name: sum(len(text.encode()) for text in each) for name, each in texts.items()}
    assert size["tr/a"] <= own
    assert size["tr/a"] + size["tr/b"] <= both
    assert chosen["kk/c"] == set(texts["kk/c"])
    longest = max(len(text.encode()) for text in texts["tr/a"])
    before = min(own, whole["tr/a"]) + whole["tr/b"]
    assert size["tr/a"] + size["tr/b"] > min(both, before) - 2 * longest, "a cap takes no less than it must"
    larger = taken({"tr/a": own, "tr": both + 5_000})
    assert all(chosen[name] <= larger[name] for name in texts)


def test_a_cap_takes_documents_by_their_words_and_holds_out_as_many_of_them_as_of_all() -> None:
    texts, sizes = documents(4_000, "şey"), Sizes()
    for text in texts:
        sizes.add(text)
    takes = apply_caps({"a": sizes}, {"a": int(sizes.bytes_R.sum()) // 2})["a"]
    again = [unicodedata.normalize("NFD", text).replace(" ", "  ") for text in texts]
    assert [takes(text) for text in texts] == [takes(text) for text in again]
    chosen = [text for text in texts if takes(text)]
    assert 0.4 < len(chosen) / len(texts) < 0.6
    halves = [sum(takes(text) for text in half) for half in (texts[:2_000], texts[2_000:])]
    assert abs(halves[0] - halves[1]) < 200, "not the first of them"
    holdout = Holdout(0.1)
    assert 0.07 < sum(map(holdout.takes, chosen)) / len(chosen) < 0.13
    with pytest.raises(DataError, match=r"A cap of 3 B leaves nothing of a\. Its first document"):
        apply_caps({"a": sizes}, {"a": 3})


def test_a_cap_on_several_that_starves_one_names_it_and_the_cap() -> None:
    sizes = {"tr/long": Sizes(), "tr/short": Sizes()}
    for text in documents(400, "uzun"):
        sizes["tr/long"].add(text)
    last = max(documents(400, "kısa"), key=lambda text: hash_position(text, b"cap"))
    sizes["tr/short"].add(last)
    with pytest.raises(DataError, match=r"A cap of 2\.0 KiB of tr leaves nothing of tr/short\. Documents are taken in"):
        apply_caps(sizes, {"tr": 2_000})
    assert set(apply_caps(sizes, {"tr/long": 2_000})) == {"tr/long"}


def test_names_are_the_same_in_every_form_of_unicode(tmp_path: Path) -> None:
    decomposed, composed = (unicodedata.normalize(form, "söz") for form in ("NFD", "NFC"))
    for name in (f"{decomposed}.txt", "other.txt"):
        (tmp_path / name).write_text("x", encoding="utf-8")
    names = [source.name for source in find_sources([tmp_path], 1, tmp_path.parent / "mix").sources]
    assert names == ["other", composed]
    assert match(decomposed, names, "") == match(composed, names, "") == [composed]
    assert read_caps({decomposed: "1kB"}) == {composed: 1_000}
    with pytest.raises(ConfigError, match="are given"):
        read_weights({decomposed: 2, composed: 3})
    (tmp_path / f"{composed.upper()}.jsonl").write_text("x", encoding="utf-8")
    with pytest.raises(DataError, match="are two sources of the name"):
        find_sources([tmp_path], 1, tmp_path.parent / "mix")


def test_sources_and_files_to_leave_out_are_counted_before_they_are_compared(tmp_path: Path) -> None:
    for number in range(MOST_SOURCES + 1):
        (tmp_path / f"{number}.txt").touch()
    with pytest.raises(DataError, match=rf"There are {MOST_SOURCES + 1} sources\."):
        find_sources([tmp_path], 1, tmp_path.parent / "mix")
    files = sorted(tmp_path.iterdir())
    left_out = choose_left_out(files, files[:-1])  # quadratic in the number of files it would take minutes
    assert left_out == set(files[:-1])
    found = find_sources(files, 1, tmp_path.parent / "mix", lambda files: choose_left_out(files, files[2:]))
    assert [len(found.sources), len(found.left_out)] == [2, MOST_SOURCES - 1]


@pytest.fixture
def texts_folder(tmp_path: Path) -> Path:
    """Sources on two levels: tr/law (a file), tr/news (a folder of two files), kk/wiki, and a file beside them."""
    for name in ("tr/law.txt", "tr/news/a.txt", "tr/news/b.jsonl", "kk/wiki.txt.gz", "code.txt"):
        file = tmp_path / "texts" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("x", encoding="utf-8")
    return tmp_path / "texts"


def test_sources_are_called_by_their_paths(texts_folder: Path, tmp_path: Path) -> None:
    (texts_folder / "kk/readme.md").write_text("x", encoding="utf-8")
    found = find_sources([texts_folder], 2, tmp_path / "mix")
    assert [source.name for source in found.sources] == ["code", "kk/wiki", "tr/law", "tr/news"]
    assert [file.name for file in found.sources[3].files] == ["a.txt", "b.jsonl"]
    assert found.passed_over[0].startswith("1 file in the folders passed over (1 .md).")
    one_level = find_sources([texts_folder], 1, tmp_path / "mix").sources
    assert [(source.name, len(source.files)) for source in one_level] == [("code", 1), ("kk", 1), ("tr", 3)]
    named = find_sources([texts_folder / "tr", texts_folder / "code.txt"], 1, tmp_path / "mix").sources
    assert [source.name for source in named] == ["code", "law", "news"]


@pytest.mark.parametrize(
    "paths, added, out, said",
    [
        (["."], "tr/news.txt", "mix", r"tr/news\.txt and \S+tr/news are two sources of the name tr/news"),
        (["."], "TR/LAW.jsonl", "mix", r"are two sources of the name tr/law"),
        (["."], "tr.txt", "mix", r"tr\.txt is the source tr, and \S+ is the source tr/law"),
        (["."], "tok.txt", "mix", r"tok\.txt is the source tok\. This name the tokenizer beside the shards has"),
        (["."], None, "texts/tr/mix", r"texts/tr/mix lies in \S+texts, which is read"),
        (["tr"], None, "texts", r"texts/tr lies in \S+texts\. There the shards of the mix are written"),
        ([".", "tr"], None, "mix", r"texts/tr lies in \S+texts\. Its text would be there twice"),
        (["none"], None, "mix", r"none does not exist"),
        (["."], "tr/empty/", "mix", r"The folder \S+empty holds no text"),
    ],
)
def test_sources_that_cannot_be_told_apart_or_are_none_are_refused(
    paths: list[str], added: str | None, out: str, said: str, texts_folder: Path
) -> None:
    if added is not None and added.endswith("/"):
        (texts_folder / added).mkdir()
    elif added is not None:
        (texts_folder / added).parent.mkdir(exist_ok=True)
        (texts_folder / added).write_text("x", encoding="utf-8")
    with pytest.raises(DataError, match=said):
        find_sources([texts_folder / path for path in paths], 2, texts_folder.parent / out)


def test_standard_input_is_no_source(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"^- has no folder and no name"):
        find_sources([Path("-")], 1, tmp_path)


@given(st.lists(st.integers(1, 500), min_size=1, max_size=9), st.integers(10, 3_000))
def test_what_a_validation_reads_is_shared_out_evenly_as_far_as_the_text_goes(available: list[int], most: int) -> None:
    shared = share_out(available, most)
    assert sum(shared) == min(most, sum(available))
    assert all(1 <= part <= whole for part, whole in zip(shared, available, strict=True))
    limited = [part for part, whole in zip(shared, available, strict=True) if part < whole]
    assert not limited or max(shared) - min(limited) <= 1, "nobody has more than one that could have more"


def test_several_sources_are_read_as_one_text(tmp_path: Path, texts: list[str], small_tokenizer: Tokenizer) -> None:
    sets = []
    for name, part in (("a", texts[:20]), ("b", texts[20:])):
        (tmp_path / f"{name}.txt").write_text("\n\n".join(part), encoding="utf-8")
        sets.append(pack([tmp_path / f"{name}.txt"], small_tokenizer, tmp_path / name, processes=1))
    both = SourceSet([Source(name, each, each.tokens) for name, each in zip("ab", sets, strict=True)])
    joined = np.concatenate([each.read(0, each.tokens) for each in sets])
    border = sets[0].tokens
    for start, count in ((0, both.tokens), (border - 3, 6), (border, 5), (0, 4), (both.tokens - 1, 1)):
        assert (both.read(start, count) == joined[start : start + count]).all()
    few = both.limit(100)
    assert [source.ids for source in few.sources] == [51, 51]
    assert (few.read(0, few.tokens) == np.concatenate([each.read(0, 51) for each in sets])).all()


def test_generated_text_of_more_bytes_begins_with_that_of_fewer(tmp_path: Path) -> None:
    few, steps = follow(write_demo_text(tmp_path, 1_000))
    text = few.read_text(encoding="utf-8")
    assert LEAST_BYTES <= len(text.encode()) < LEAST_BYTES + 10_000
    assert text.startswith(write_document(1, 0) + "\n\n" + write_document(1, 1))
    assert steps[-1] == (LEAST_BYTES, LEAST_BYTES)
    assert follow(write_demo_text(tmp_path, 1_000)) == (few, []), "what is there is kept"
    (tmp_path / "notes.txt").write_text("the user's", encoding="utf-8")
    more, _ = follow(write_demo_text(tmp_path, LEAST_BYTES + 5_000))
    assert more.read_text(encoding="utf-8").startswith(text)
    assert sorted(path.name for path in tmp_path.iterdir()) == [more.name, "notes.txt"]


@pytest.mark.parametrize(
    "paths, names",
    [
        (["/a/shards/train"], ["train"]),
        (["/a/law", "/b/news"], ["law", "news"]),
        (["/m/tr/law/train", "/m/kk/news/train", "/m/demo/train"], ["tr/law", "kk/news", "demo"]),
        (["/a/one/train", "b/two/train"], ["/a/one", "b/two"]),
    ],
)
def test_folders_of_one_name_are_told_apart_by_the_way_to_them(paths: list[str], names: list[str]) -> None:
    assert name_folders([Path(path) for path in paths]) == names


def test_a_mix_that_is_read_as_shards_is_told_what_it_is(tmp_path: Path) -> None:
    (tmp_path / "mix.json").write_text("{}", encoding="utf-8")
    with pytest.raises(DataError, match=r"is a mix of several sources\. .* Name the shards of one\."):
        ShardSet.open(tmp_path)
