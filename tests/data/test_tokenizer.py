"""The tokenizer: nothing is lost, and `tokenizers` and `transformers` read the same ids out of its file."""

from __future__ import annotations

import hashlib
import itertools
import json
import random
import re
import unicodedata
from collections.abc import Callable
from pathlib import Path

import pytest
import tiktoken
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lowvram.data import tokenizer as module
from lowvram.data.text import documents
from lowvram.data.tokenizer import LARGEST, SMALLEST, SPECIALS, Tokenizer, TokenStream, train_tokenizer
from lowvram.errors import DataError, DiskFullError, TokenizerError
from lowvram.storage.disk import Disk

any_text = st.text(st.characters(exclude_categories=["Cs"]))
turkish_text = st.text(st.sampled_from("abcçdefgğhıijklmnoöprsştuüvyzİIÂâÎîÛû’“”'-.,;!? \t\r\n01234567😀\u0301\u0306"))
HARD = [
    "",
    " ",
    "İıIi İstanbul ISPARTA ışık I\u0307",
    "Ankara'da, Türkiye’nin, TBMM'yi; it's don't",
    "satır\r\nsatır\rsatır\n\n\n  son  ",
    "👩‍👩‍👧‍👦 🇹🇷 ✌🏽 𝔘𝔫𝔦𝔠𝔬𝔡𝔢",
    unicodedata.normalize("NFD", "çğıöşüÇĞİÖŞÜâîû"),
    "<|bos|>merhaba<|end_of_turn|><|spare_3|><|",
    "\0\x01\x7f\x85\xa0\ufeff\uffff\U0010ffff",
    "1234567890 3,14 %50 14.35'te",
]


def in_tokenizers(tokenizer: Tokenizer) -> Callable[[str], list[int]]:
    """The same file as `tokenizers` reads it; special strings inside text are its own affair, so none are given."""
    file = json.loads((tokenizer.directory / "tokenizer.json").read_text(encoding="utf-8"))
    model = tokenizers.Tokenizer.from_str(json.dumps(file | {"added_tokens": []}))
    return lambda text: model.encode(text, add_special_tokens=False).ids


def edited(tokenizer: Tokenizer, folder: Path, edit: Callable[[dict], object]) -> Path:
    """A copy of a tokenizer whose tokenizer.json went through `edit`."""
    tokenizer.save(folder)
    file = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    edit(file)
    (folder / "tokenizer.json").write_text(json.dumps(file), encoding="utf-8")
    return folder


@settings(deadline=None, max_examples=300)
@given(text=any_text | turkish_text)
@example(text="a" * 5_000 + "ş" * 5_000)
def test_decoding_gives_back_what_was_encoded(small_tokenizer: Tokenizer, text: str) -> None:
    assert small_tokenizer.decode(small_tokenizer.encode(text)) == text


@settings(deadline=None, max_examples=300)
@given(text=any_text | turkish_text)
def test_random_text_gets_the_ids_that_tokenizers_gives(small_tokenizer: Tokenizer, text: str) -> None:
    assert small_tokenizer.encode(text) == in_tokenizers(small_tokenizer)(text)


@pytest.mark.parametrize("text", HARD)
def test_hard_text_is_lossless_and_agrees(small_tokenizer: Tokenizer, text: str) -> None:
    ids = small_tokenizer.encode(text)
    assert small_tokenizer.decode(ids) == text
    assert ids == in_tokenizers(small_tokenizer)(text)
    assert small_tokenizer.encode_array(text).tolist() == ids
    assert all(len(SPECIALS) <= id < small_tokenizer.size for id in ids)


@pytest.mark.nightly
@pytest.mark.parametrize("unit", ["a", "ş", " ", "\n", " \n", "\t", "^", "\u3000", "<|bos|>"], ids=ascii)
def test_a_million_repeats_are_encoded(small_tokenizer: Tokenizer, unit: str) -> None:
    text = "x" + unit * (1_200_000 // len(unit)) + "y"
    ids = small_tokenizer.encode_array(text)
    assert small_tokenizer.decode(ids.tolist()) == text


def test_a_long_text_without_long_runs_is_encoded_in_one_piece(small_tokenizer: Tokenizer) -> None:
    text = "Sabah erkenden yola çıktık; hava serindi.   \n" * 12_000
    assert small_tokenizer.encode(text) == in_tokenizers(small_tokenizer)(text)


@settings(deadline=None, max_examples=200)
@given(
    text=st.text(st.sampled_from("aş1. \t\n\r\x1c\x85\u3000"), max_size=60) | any_text,
    longest=st.integers(1, 7),
)
@example(text=" " * 12, longest=4)
@example(text="a" + " " * 4 + "b" + " " * 3 + "c" + "\n" * 9, longest=4)
def test_long_white_space_is_cut_where_it_always_was(small_tokenizer: Tokenizer, text: str, longest: int) -> None:
    ranks = {small_tokenizer.token_bytes(id): id for id in range(len(SPECIALS), small_tokenizer.size)}
    encoding = tiktoken.Encoding("", pat_str=module.EXPRESSION, mergeable_ranks=ranks, special_tokens={})
    cuts = [0, *(run.end() for run in re.finditer(rf"\s{{{longest}}}", text)), len(text)]
    pieces = [text[start:end] for start, end in itertools.pairwise(cuts)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_LONGEST_RUN", longest)
        ids = small_tokenizer.encode(text)
    pieces = [text] if len(text) < 2 * longest else pieces
    assert ids == [id for piece in pieces for id in encoding.encode_ordinary(piece)]
    assert small_tokenizer.decode(ids) == text


class CountedText(str):
    """Counts the characters that are read out of it by index or slice."""

    read = 0

    def __getitem__(self, key: object) -> str:
        part = super().__getitem__(key)  # type: ignore[index]
        self.read += len(part)
        return part


@pytest.mark.parametrize("run", [1, 999, 150_000, 199_999, 200_000, 200_001, 700_000])
def test_cutting_long_white_space_reads_each_character_a_few_times(run: int) -> None:
    text = CountedText(("a" + " " * run) * (1_500_000 // run))
    pieces = module.cut_long_runs(text)
    assert "".join(pieces) == text
    looked_at = text.read - len(text)  # the pieces themselves are read once
    assert len(text) // 200_000 <= looked_at <= 4 * len(text)


@pytest.mark.nightly
def test_real_turkish_gets_the_ids_that_tokenizers_gives(shared_data: Path, tmp_path: Path) -> None:
    texts = list(documents(shared_data / "text" / "tr_mix_small.train.txt.gz"))
    tokenizer = train_tokenizer(iter(texts), 16_384, tmp_path)
    assert tokenizer.size == 16_384
    oracle = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    expected = oracle.encode_batch_fast(texts, add_special_tokens=False)
    for text, found in zip(texts, expected, strict=True):
        ids = tokenizer.encode_array(text).tolist()
        assert ids == found.ids
        assert tokenizer.decode(ids) == text
    # Tokens glued in orders that no text has are where two readings of the merges would part.
    source = random.Random(0)
    table = [tokenizer.token_bytes(id) for id in range(SMALLEST, tokenizer.size)]
    words = [token.decode("utf-8") for token in table if token.decode("utf-8", "ignore").encode() == token]
    for _ in range(20_000):
        text = "".join(source.choices(words, k=3)).replace(" ", "")
        assert tokenizer.encode(text) == oracle.encode(text, add_special_tokens=False).ids


def test_transformers_loads_the_folder_and_agrees(small_tokenizer: Tokenizer, turkish: tuple[str, ...]) -> None:
    from transformers import AutoTokenizer

    other = AutoTokenizer.from_pretrained(small_tokenizer.directory)
    for text in (*turkish, "Ankara'da ne var? İıIi", "satır\r\n\r\n  son ,. ?"):
        assert other.encode(text) == small_tokenizer.encode(text)
        assert other.decode(small_tokenizer.encode(text)) == text
    assert len(other) == small_tokenizer.size
    assert [other.bos_token_id, other.eos_token_id, other.pad_token_id, other.mask_token_id] == [0, 1, 2, 3]
    talk = [{"role": "system", "content": "Kısa yaz."}, {"role": "user", "content": "Selam"}]
    shown = other.apply_chat_template(talk, add_generation_prompt=True, tokenize=False)
    assert shown == "<|bos|><|system|>Kısa yaz.<|end_of_turn|><|user|>Selam<|end_of_turn|><|assistant|>"
    prompt = other.encode(shown)
    assert prompt[:2] == [small_tokenizer.bos_id, SPECIALS.index("<|system|>")]
    assert prompt.count(small_tokenizer.end_of_turn_id) == 2
    with pytest.raises(Exception, match="Unknown role: araç"):
        other.apply_chat_template([{"role": "araç", "content": ""}], tokenize=False)


def test_the_special_ids_are_fixed(small_tokenizer: Tokenizer) -> None:
    head = ["bos", "eos", "pad", "mask", "system", "user", "assistant", "end_of_turn", "spare_0"]
    assert SPECIALS[:9] == tuple(f"<|{name}|>" for name in head)
    assert (len(SPECIALS), SPECIALS[-1]) == (32, "<|spare_23|>")
    ids = [small_tokenizer.bos_id, small_tokenizer.eos_id, small_tokenizer.pad_id, small_tokenizer.mask_id]
    assert [*ids, small_tokenizer.end_of_turn_id] == [0, 1, 2, 3, 7]
    file = json.loads((small_tokenizer.directory / "tokenizer.json").read_text(encoding="utf-8"))
    assert [(token["id"], token["content"], token["special"]) for token in file["added_tokens"]] == [
        (id, name, True) for id, name in enumerate(SPECIALS)
    ]


def test_special_strings_in_text_stay_text(small_tokenizer: Tokenizer) -> None:
    for name in SPECIALS:
        assert min(small_tokenizer.encode(name)) >= len(SPECIALS)
        assert min(small_tokenizer.encode_array(name)) >= len(SPECIALS)
    assert {small_tokenizer.token_bytes(id) for id in range(len(SPECIALS))} == {b""}
    assert small_tokenizer.decode([0, *small_tokenizer.encode("ev"), 7]) == "ev"


def test_the_first_ids_after_the_specials_are_the_bytes(small_tokenizer: Tokenizer) -> None:
    alphabet = {small_tokenizer.token_bytes(id) for id in range(len(SPECIALS), SMALLEST)}
    assert alphabet == {bytes([byte]) for byte in range(256)}


@pytest.mark.parametrize("text, position", [("ab\ud800c", 2), ("\udfff", 0)])
def test_a_lone_surrogate_is_refused_with_its_position(small_tokenizer: Tokenizer, text: str, position: int) -> None:
    for encode in (small_tokenizer.encode, small_tokenizer.encode_array):
        with pytest.raises(TokenizerError, match=f"at position {position}"):
            encode(text)


@settings(deadline=None, max_examples=200)
@given(text=any_text | turkish_text, data=st.data())
def test_a_stream_gives_whole_characters_and_in_the_end_the_text(
    small_tokenizer: Tokenizer, text: str, data: st.DataObject
) -> None:
    whole = small_tokenizer.encode(text)
    ids = data.draw(st.just(whole) | st.lists(st.integers(0, small_tokenizer.size - 1), max_size=30))
    stream = small_tokenizer.stream()
    pieces = [stream.push(id) for id in ids]
    assert "".join(pieces) + stream.finish() == small_tokenizer.decode(ids)
    if ids == whole:
        assert "".join(pieces) == text
        assert "\ufffd" in text or not any("\ufffd" in piece for piece in pieces)


def test_a_letter_of_two_tokens_is_held_back_until_it_is_whole(small_tokenizer: Tokenizer) -> None:
    by_byte = {small_tokenizer.token_bytes(id): id for id in range(32, SMALLEST)}
    stream = TokenStream(small_tokenizer)
    first, second = (by_byte[bytes([byte])] for byte in "ş".encode())
    assert [stream.push(first), stream.push(small_tokenizer.bos_id), stream.push(second)] == ["", "", "ş"]
    assert stream.push(first) == ""
    assert stream.finish() == "\ufffd"


@pytest.mark.parametrize("id", [-1, 10**6])
def test_an_id_that_is_none_is_refused(small_tokenizer: Tokenizer, id: int) -> None:
    with pytest.raises(TokenizerError, match=f"{id} is not a token id"):
        small_tokenizer.decode([id])


def test_training_text_is_made_nfc_but_encoding_leaves_text_alone(tmp_path: Path) -> None:
    composed, parted = "gül şölen " * 9, unicodedata.normalize("NFD", "gül şölen " * 9)
    from_composed = train_tokenizer(iter([composed]), 400, tmp_path / "c")
    from_parted = train_tokenizer(iter([parted]), 400, tmp_path / "d")
    assert from_composed == from_parted
    assert from_composed.encode(parted) != from_composed.encode(composed)


def test_a_vocabulary_with_room_for_bytes_only_has_just_them(tmp_path: Path, turkish: tuple[str, ...]) -> None:
    tokenizer = train_tokenizer(iter(turkish), SMALLEST, tmp_path)
    assert tokenizer.size == SMALLEST == 288
    assert len(tokenizer.encode("ığdır")) == len("ığdır".encode())


@pytest.mark.parametrize("size", [-5, 0, SMALLEST - 1, LARGEST + 1, 100 * LARGEST, 2**63, 10**30])
def test_a_vocabulary_out_of_range_is_refused_before_a_text_is_read(size: int, tmp_path: Path) -> None:
    unread = iter(["bir iki bir iki"])
    with pytest.raises(TokenizerError, match=f"vocabulary of {size} is too (small|large)"):
        train_tokenizer(unread, size, tmp_path)
    assert list(unread)
    assert not list(tmp_path.iterdir())
    assert SMALLEST < train_tokenizer(iter(["bir iki bir iki"]), LARGEST, tmp_path).size < SMALLEST + 10


def test_more_vocabulary_than_the_text_can_fill_is_no_error(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(iter(["kar kar kar"]), 5_000, tmp_path)
    assert SMALLEST < tokenizer.size < SMALLEST + 10
    assert tokenizer.decode(tokenizer.encode("kar yağdı")) == "kar yağdı"


def test_what_the_text_holds_only_once_is_not_learnt(tmp_path: Path) -> None:
    assert train_tokenizer(iter(["bir çok gün"]), 5_000, tmp_path).size == SMALLEST


@pytest.mark.parametrize("texts", [[], ["", ""]], ids=["none", "empty ones"])
def test_training_without_text_is_refused_and_writes_nothing(tmp_path: Path, texts: list[str]) -> None:
    with pytest.raises(DataError, match="no text"):
        train_tokenizer(iter(texts), 512, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_training_twice_gives_the_same_bytes(tmp_path: Path, small_tokenizer: Tokenizer, turkish: tuple) -> None:
    again = train_tokenizer(iter(turkish), 512, tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / name).read_bytes() == (small_tokenizer.directory / name).read_bytes()
    assert again == small_tokenizer
    assert again.hash == hashlib.sha256((tmp_path / "tokenizer.json").read_bytes()).hexdigest()


def test_a_saved_copy_is_the_same_tokenizer_even_when_the_first_is_gone(
    tmp_path: Path, small_tokenizer: Tokenizer
) -> None:
    small_tokenizer.save(tmp_path / "a" / "b")
    second = Tokenizer.load(tmp_path / "a" / "b")
    (tmp_path / "a" / "b" / "tokenizer.json").unlink()
    second.save(tmp_path / "c")
    assert Tokenizer.load(tmp_path / "c") == small_tokenizer
    assert sorted(path.name for path in (tmp_path / "c").iterdir()) == ["tokenizer.json", "tokenizer_config.json"]


def test_a_full_disk_leaves_no_half_tokenizer(tmp_path: Path, small_tokenizer: Tokenizer) -> None:
    class FullDisk(Disk):
        def write_handle(self, file, data: bytes | memoryview) -> None:
            super().write_handle(file, data[:100])
            raise OSError(28, "No space left on device")

    with pytest.raises(DiskFullError, match="No space left"):
        small_tokenizer.save(tmp_path, FullDisk())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_missing_or_torn_file_is_refused(tmp_path: Path, small_tokenizer: Tokenizer, name: str) -> None:
    small_tokenizer.save(tmp_path)
    data = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(data[: len(data) // 2])
    with pytest.raises(TokenizerError, match="cannot be used"):
        Tokenizer.load(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(TokenizerError, match=f"no tokenizer in .*{name}"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize(
    "edit",
    [
        pytest.param(lambda file: file.update(normalizer={"type": "NFC"}), id="a normaliser"),
        pytest.param(lambda file: file["pre_tokenizer"]["pretokenizers"][0].update(pattern={"Regex": "."}), id="regex"),
        pytest.param(lambda file: file["added_tokens"].pop(), id="a special less"),
        pytest.param(lambda file: file["model"]["merges"].pop(), id="a merge less"),
        pytest.param(lambda file: file["model"]["merges"].reverse(), id="merges in another order"),
        pytest.param(lambda file: file["model"]["vocab"].update({"ee": 40}), id="a double id"),
        pytest.param(lambda file: file.update(model=None), id="no model"),
        pytest.param(lambda file: file.clear(), id="an empty object"),
    ],
)
def test_a_file_that_lowvram_did_not_write_is_refused(tmp_path: Path, small_tokenizer: Tokenizer, edit) -> None:
    with pytest.raises(TokenizerError, match="damaged, or not written by lowvram"):
        Tokenizer.load(edited(small_tokenizer, tmp_path, edit))
