"""Another program's byte-level BPE: the same ids as there, every text survives, nothing in a text is special."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Library
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from lowvram.data.hf_tokenizer import MOST_ROWS, ROWS, HfTokenizer, load_tokenizer
from lowvram.data.shards import pack
from lowvram.data.tokenizer import Tokenizer, TokenStream
from lowvram.errors import TokenizerError
from tests.conftest import TURKISH

# Qwen's, whose numbers and contractions are cut otherwise than ours.
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEXTS = (*TURKISH, "I'm <|im_end|> said <think> 42 times\r\n\n", "çok   boşluk \n", "🫖 日本 \u00a0\u200d", "")


def make(out: Path, bos: str | None = "<|begin|>") -> Path:
    """Train a small tokenizer in the manner of Qwen and Llama 3 and save it as transformers does."""
    library = Library(models.BPE())
    library.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(PATTERN), "isolated")
    library.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    library.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    library.train_from_iterator(TURKISH, trainer)
    library.add_special_tokens(["<|begin|>", "<|endoftext|>", "<|im_end|>"])
    library.add_tokens([AddedToken("<think>", special=False, normalized=False)])
    begin = library.token_to_id("<|begin|>")
    library.post_processor = processors.TemplateProcessing(single="<|begin|> $A", special_tokens=[("<|begin|>", begin)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=library, bos_token=bos, eos_token="<|endoftext|>", clean_up_tokenization_spaces=False
    )
    tokenizer.save_pretrained(out)
    return out


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("outside"))


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return load_tokenizer(folder, rows=450)


def test_ids_are_those_of_transformers_where_a_text_says_nothing_special(folder: Path, tokenizer: Tokenizer) -> None:
    theirs = AutoTokenizer.from_pretrained(folder)
    for text in TURKISH:
        assert tokenizer.encode(text) == theirs(text, add_special_tokens=False).input_ids
        assert np.array_equal(tokenizer.encode_array(text), np.array(tokenizer.encode(text), np.uint32))
    assert (tokenizer.bos_id, tokenizer.eos_id) == (theirs.bos_token_id, theirs.eos_token_id)


def test_every_text_survives(tokenizer: Tokenizer) -> None:
    for text in TEXTS:
        assert tokenizer.decode(tokenizer.encode(text)) == text
        stream = TokenStream(tokenizer)
        assert "".join(stream.push(id) for id in tokenizer.encode(text)) + stream.finish() == text


def test_nothing_in_a_text_becomes_an_added_token(folder: Path, tokenizer: Tokenizer) -> None:
    added = {token["id"] for token in json.loads((folder / "tokenizer.json").read_bytes())["added_tokens"]}
    assert len(added) == 4
    assert set(tokenizer.specials.values()) == added
    assert tokenizer.specials["<|im_end|>"] == tokenizer.end_of_turn_id
    text = "<|im_end|><|begin|> <think>x<|endoftext|>"
    assert not added & set(tokenizer.encode(text))
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_special_ids_are_no_text_and_others_that_were_added_are(folder: Path, tokenizer: Tokenizer) -> None:
    library = Library.from_file(str(folder / "tokenizer.json"))
    assert tokenizer.token_bytes(tokenizer.end_of_turn_id) == b""
    assert tokenizer.end_of_turn_id == library.token_to_id("<|im_end|>")
    assert tokenizer.token_bytes(library.token_to_id("<think>")) == b"<think>"


def test_rows_that_no_text_gives_are_ids_of_nothing(tokenizer: Tokenizer) -> None:
    assert tokenizer.size == 450
    assert tokenizer.token_bytes(449) == b""
    with pytest.raises(TokenizerError, match="450 is not a token id"):
        tokenizer.token_bytes(450)


def test_what_was_saved_is_loaded_with_its_rows_and_still_opens_in_transformers(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    tokenizer.save(tmp_path / "kept")
    again = load_tokenizer(tmp_path / "kept")
    assert isinstance(again, HfTokenizer)
    assert (again, again.size) == (tokenizer, 450)
    theirs = AutoTokenizer.from_pretrained(tmp_path / "kept")
    assert theirs(TURKISH[0], add_special_tokens=False).input_ids == again.encode(TURKISH[0])


def test_without_a_bos_its_eos_opens_texts(tmp_path: Path) -> None:
    found = load_tokenizer(make(tmp_path / "out", bos=None), rows=450)
    assert found.bos_id == found.eos_id == found.pad_id


def test_ours_is_loaded_as_ours_even_where_another_may_be(small_tokenizer: Tokenizer) -> None:
    assert type(load_tokenizer(small_tokenizer.directory, rows=10**6)) is Tokenizer
    assert load_tokenizer(small_tokenizer.directory) == small_tokenizer
    assert small_tokenizer.specials["<|end_of_turn|>"] == small_tokenizer.end_of_turn_id


def test_where_nobody_says_how_many_rows_there_are_as_many_as_ids(folder: Path, tokenizer: Tokenizer) -> None:
    found, library = load_tokenizer(folder), Library.from_file(str(folder / "tokenizer.json"))
    assert found.size == library.get_vocab_size() < tokenizer.size
    assert found == tokenizer
    assert found.encode(TURKISH[0]) == tokenizer.encode(TURKISH[0])


def test_a_damaged_file_of_ours_is_not_taken_for_another_programs(small_tokenizer: Tokenizer, tmp_path: Path) -> None:
    small_tokenizer.save(tmp_path)
    table = json.loads((tmp_path / MODEL).read_bytes())
    table["model"]["merges"].pop()
    (tmp_path / MODEL).write_text(json.dumps(table), encoding="utf-8")
    with pytest.raises(TokenizerError, match="damaged, or not written by lowvram"):
        load_tokenizer(tmp_path)


def save(library: Library, out: Path, config: dict[str, Any] | None = None) -> Path:
    out.mkdir()
    library.save(str(out / MODEL))
    (out / CONFIG).write_text(json.dumps({"eos_token": "</s>"} if config is None else config), encoding="utf-8")
    return out


def gpt2(out: Path, prefix_space: bool = False) -> Path:
    """Train a tokenizer in the manner of GPT-2, whose oldest files name neither the model's type nor an end."""
    library = Library(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)
    library.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=alphabet, special_tokens=["<|endoftext|>"], show_progress=False
    )
    library.train_from_iterator(TURKISH, trainer)
    save(library, out, {"model_max_length": 1024})
    table = json.loads((out / MODEL).read_bytes())
    del table["model"]["type"]
    table["model"]["merges"] = [" ".join(pair) for pair in table["model"]["merges"]]
    (out / MODEL).write_text(json.dumps(table), encoding="utf-8")
    return out


def test_gpt2s_kind_is_used_as_it_is_and_packs(tmp_path: Path) -> None:
    found, library = load_tokenizer(gpt2(tmp_path / "gpt2")), Library.from_file(str(tmp_path / "gpt2" / MODEL))
    assert found.eos_id == found.bos_id == library.token_to_id("<|endoftext|>")
    for text in TEXTS:
        assert found.decode(found.encode(text)) == text
    assert found.encode(TURKISH[0]) == library.encode(TURKISH[0]).ids
    (tmp_path / "text.txt").write_text("\n\n".join(TURKISH), encoding="utf-8")
    shards = pack([tmp_path / "text.txt"], found, tmp_path / "shards", processes=1)
    assert shards.tokenizer_hash == found.hash
    assert shards.text_bytes == sum(len(text.encode()) for text in TURKISH)
    assert found.byte_count_V[shards.read(0, shards.tokens)].sum() == shards.text_bytes
    with pytest.raises(TokenizerError, match="comes back as"):
        load_tokenizer(gpt2(tmp_path / "prefixed", prefix_space=True))


def unigram() -> Library:
    library = Library(models.Unigram([("<unk>", 0.0), *((letter, -1.0) for letter in "abc")], unk_id=0))
    library.pre_tokenizer = pre_tokenizers.Metaspace()
    return library


def llama2() -> Library:
    vocabulary = {"<unk>": 0, **{f"<0x{byte:02X}>": byte + 1 for byte in range(256)}, "▁": 257, "a": 258, "▁a": 259}
    library = Library(models.BPE(vocabulary, [("▁", "a")], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    library.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    library.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return library


def bert() -> Library:
    library = Library(models.WordPiece({"[UNK]": 0, "a": 1, "##a": 2}, unk_token="[UNK]"))
    library.normalizer, library.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    return library


def whole_words() -> Library:
    return Library(models.WordLevel({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))


def letters() -> Library:
    return Library(models.BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")]))


KINDS: dict[str, tuple[Callable[[], Library], str]] = {
    "T5's": (unigram, "Its model is Unigram, as SentencePiece makes it"),
    "Llama 2's": (llama2, "It is SentencePiece's BPE, as Llama 2, Mistral and Gemma have it"),
    "BERT's": (bert, "Its model is WordPiece, as BERT has it"),
    "words": (whole_words, "Its model is WordLevel: whole words"),
    "letters": (letters, "Its decoder is not ByteLevel"),
}


@pytest.mark.parametrize("make_library, words", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("rows", [None, 300])
def test_a_kind_that_cannot_be_used_is_named_and_what_can_be_used_too(
    rows: int | None, make_library: Callable[[], Library], words: str, tmp_path: Path
) -> None:
    with pytest.raises(TokenizerError) as caught:
        load_tokenizer(save(make_library(), tmp_path / "out"), rows)
    assert caught.value.why.startswith(words)
    assert "damaged" not in str(caught.value)
    assert "byte-level BPE" in caught.value.fix


def test_composition_alone_may_be_done_before_cutting_however_it_is_written(folder: Path, tmp_path: Path) -> None:
    def nested(*kinds: str) -> Callable[[dict[str, Any]], Any]:
        parts = [{"type": "Sequence", "normalizers": [{"type": kind}]} for kind in kinds]
        return lambda table: table.update(normalizer={"type": "Sequence", "normalizers": parts})

    assert load_tokenizer(edited(folder, tmp_path / "a", MODEL, nested("NFC", "NFC"))) != load_tokenizer(folder)
    with pytest.raises(TokenizerError, match="Its normalizer is NFD and Strip, which changes texts"):
        load_tokenizer(edited(folder, tmp_path / "b", MODEL, nested("NFC", "NFD", "Strip")))


def test_half_a_character_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(TokenizerError, match="half a character"):
        tokenizer.encode("a\ud800")


def edited(folder: Path, out: Path, file: str, edit: Callable[[dict[str, Any]], Any]) -> Path:
    """Return a copy of a tokenizer whose file was edited in place."""
    out.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        table = json.loads((folder / name).read_bytes())
        if name == file:
            edit(table)
        (out / name).write_text(json.dumps(table), encoding="utf-8")
    return out


MODEL, CONFIG = "tokenizer.json", "tokenizer_config.json"
FAULTS: dict[str, tuple[str, Callable[[dict[str, Any]], Any], str]] = {
    "unigram": (MODEL, lambda table: table["model"].update(type="Unigram"), "Its model is Unigram"),
    "lower case": (MODEL, lambda table: table.update(normalizer={"type": "Lowercase"}), "Its normalizer is Lowercase"),
    "sentencepiece": (MODEL, lambda table: table.update(decoder={"type": "Fuse"}), "Its decoder is not ByteLevel"),
    "no decoder": (MODEL, lambda table: table.update(decoder=None), "Its decoder is not ByteLevel"),
    "a byte without a token": (
        MODEL,
        lambda table: table["model"]["vocab"].pop("Ġ"),
        "1 of the 256 bytes have",
    ),
    "a prefix space": (
        MODEL,
        lambda table: table["pre_tokenizer"]["pretokenizers"][1].update(add_prefix_space=True),
        "comes back as",
    ),
    "no end": (CONFIG, lambda table: table.update(eos_token=None), "names no eos_token"),
    "an end that is no token": (CONFIG, lambda table: table.update(eos_token="</s>"), "names no eos_token"),
    "no vocabulary": (MODEL, lambda table: table["model"].pop("vocab"), "Its files are damaged (KeyError: 'vocab')"),
    "an id that is a word": (MODEL, lambda table: table["model"]["vocab"].update(Ğ="1"), "an id is no number"),
    "an id below 0": (MODEL, lambda table: table["model"]["vocab"].update(a=-1), "an id is no number, or below 0"),
    "a broken pre-tokenizer": (MODEL, lambda table: table.update(pre_tokenizer={"type": "X"}), "tokenizers says"),
}


@pytest.mark.parametrize("file, edit, words", FAULTS.values(), ids=FAULTS)
def test_a_tokenizer_that_cannot_be_used_is_told_why(
    file: str, edit: Callable[[dict[str, Any]], Any], words: str, folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(TokenizerError) as caught:
        load_tokenizer(edited(folder, tmp_path / "out", file, edit), rows=450)
    assert words in str(caught.value)
    assert all((caught.value.what, caught.value.why, caught.value.fix))


def test_a_model_with_too_few_rows_is_told_so(folder: Path) -> None:
    with pytest.raises(TokenizerError, match="and the model only 300 rows"):
        load_tokenizer(folder, rows=300)


@pytest.mark.parametrize("rows", [1_000, 1_001, 100_000, 10**18])
@pytest.mark.parametrize("said", ["an added token", "a token of the text", "rows noted", "rows asked for"])
def test_one_wrong_number_reserves_no_memory_for_ids_that_nothing_has(
    said: str, rows: int, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert 262_144 * 10 < MOST_ROWS < 2**23, "far above the largest in use, and a table of it takes less than 100 MB"
    monkeypatch.setattr("lowvram.data.hf_tokenizer.MOST_ROWS", 1_000)

    def edit(table: dict[str, Any]) -> None:
        if said == "an added token":
            table["added_tokens"][-1]["id"] = rows - 1
        elif said == "a token of the text":
            table["model"]["vocab"][list(table["model"]["vocab"])[-1]] = rows - 1
        elif said == "rows noted":
            table[ROWS] = rows

    place = edited(folder, tmp_path / "out", CONFIG if said == "rows noted" else MODEL, edit)
    asked = rows if said == "rows asked for" else None
    if rows == 1_000:
        assert load_tokenizer(place, asked).size == rows
    else:
        with pytest.raises(TokenizerError, match=f"asks for {rows:,} rows, and more than 1,000"):
            load_tokenizer(place, asked)


@pytest.mark.parametrize("file", [MODEL, CONFIG, "chat_template.jinja"])
def test_files_that_are_deeper_than_any_are_damaged_and_no_crash(file: str, folder: Path, tmp_path: Path) -> None:
    edited(folder, tmp_path / "out", MODEL, lambda table: None)
    deep = "{" + '"a":{' * 99_999
    (tmp_path / "out" / (CONFIG if file.endswith("jinja") else file)).write_text(deep, "utf-8")
    if file.endswith("jinja"):
        (tmp_path / "out" / file).write_text("{{ messages }}", "utf-8")
    with pytest.raises(TokenizerError, match="nested deeper than 64 levels"):
        load_tokenizer(tmp_path / "out", rows=450)


@pytest.mark.parametrize("text", ["[1]", "{", '{"lowvram_rows": "many"}'])
def test_a_damaged_config_is_complained_of_as_ever(text: str, small_tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes((small_tokenizer.directory / "tokenizer.json").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(text, encoding="utf-8")
    if ROWS in text:
        assert type(load_tokenizer(tmp_path)) is Tokenizer
    else:
        with pytest.raises(TokenizerError, match=r"it is not JSON|it holds a list"):
            load_tokenizer(tmp_path)
