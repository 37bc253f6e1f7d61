"""Tokenizers of every kind are opened and split texts into what their tokens stand for; others are refused by name."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer as Library
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from lowvram.data.any_tokenizer import AnyTokenizer, TokenPiece, find_parts, open_tokenizer
from lowvram.data.sample import sample_documents
from lowvram.data.tokenizer import train_tokenizer
from lowvram.errors import LowvramError

TEXT = "Kitaplarımızdan çıktı:  Ankara'da\tİki 🫖 <s> 2026\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tokenizers of every kind that needs no package of its own, learnt from the same text."""
    home = tmp_path_factory.mktemp("tokenizers")
    texts = [*sample_documents(3, 40_000), TEXT]
    train_tokenizer(iter(texts), 600, home / "ours")
    byte_level = Library(models.BPE())
    byte_level.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    byte_level.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    learn(byte_level, trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet), texts, home / "bpe.json")
    unigram = Library(models.Unigram())
    unigram.pre_tokenizer, unigram.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    learn(unigram, trainers.UnigramTrainer(vocab_size=300, unk_token="<unk>"), texts, home / "unigram.json")
    pieces = Library(models.WordPiece(unk_token="[UNK]"))
    pieces.normalizer, pieces.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    pieces.decoder = decoders.WordPiece()
    learn(pieces, trainers.WordPieceTrainer(vocab_size=300, special_tokens=["[UNK]"]), texts, home / "wordpiece.json")
    ranks = {bytes([byte]): byte for byte in range(256)} | {b" k": 256, b" ki": 257, b"ta": 258}
    lines = (b"%s %d" % (base64.b64encode(token), rank) for token, rank in ranks.items())
    for name in ("small.tiktoken", "r50k_base.tiktoken", "llama3/tokenizer.model"):
        (home / name).parent.mkdir(exist_ok=True)
        (home / name).write_bytes(
            b"\n".join(lines) if name == "small.tiktoken" else (home / "small.tiktoken").read_bytes()
        )
    return home


def learn(model: Library, trainer: object, texts: list[str], file: Path) -> None:
    trainer.show_progress = False  # type: ignore[attr-defined]
    model.train_from_iterator(texts, trainer)  # type: ignore[arg-type]
    model.save(str(file))


def bytes_of(pieces: list[TokenPiece]) -> bytes:
    return b"".join(piece.data for piece in pieces)


@pytest.mark.parametrize("name", ["ours", "bpe.json", "small.tiktoken", "r50k_base.tiktoken", "llama3"])
def test_a_byte_level_tokenizer_gives_every_text_back_and_its_pieces_are_its_bytes(name: str, folder: Path) -> None:
    tokenizer = open_tokenizer(folder / name)
    for text in (TEXT, " ", "\x00\x7f�", "<|bos|> <s>", "𝕏" * 5, "x" + " " * 300):
        ids = [int(id) for id in tokenizer.encode(text)]
        assert tokenizer.decode(ids) == text
        assert [piece.id for piece in tokenizer.split(text)] == ids
        assert bytes_of(tokenizer.split(text)) == text.encode()
    assert max(tokenizer.encode(TEXT)) < tokenizer.size
    assert list(tokenizer.blank_ids) == list(tokenizer.encode(" "))


def test_ours_is_run_as_packing_runs_it_and_by_the_library_to_the_same_ids(folder: Path) -> None:
    ours = open_tokenizer(folder / "ours")
    assert ours.kind == "lowvram"
    assert ours.library.encode(TEXT) == ours.encode(TEXT).tolist()  # type: ignore[attr-defined, union-attr]
    assert ours.library.split(TEXT) == ours.split(TEXT)  # type: ignore[attr-defined]


@pytest.mark.parametrize("name, kind", [("unigram.json", "Unigram"), ("wordpiece.json", "WordPiece")])
def test_what_loses_text_is_opened_all_the_same_and_its_pieces_cover_the_text(
    name: str, kind: str, folder: Path
) -> None:
    tokenizer = open_tokenizer(folder / name)
    assert tokenizer.kind == kind
    text = "Kitaplarımızdan  Жж ve çıktı"
    assert tokenizer.decode(tokenizer.encode(text)) != text
    assert bytes_of(tokenizer.split(text)) == text.encode()
    assert [piece.id for piece in tokenizer.split(text)] == list(tokenizer.encode(text))
    assert "".join(find_parts(tokenizer.split(" Kitaplarımızdan"), "Kitaplarımızdan") or []) == "Kitaplarımızdan"


def test_a_word_is_cut_where_a_token_and_a_character_end() -> None:
    halves = [TokenPiece(1, b" k"), TokenPiece(2, b"\xc4"), TokenPiece(3, b"\xb1s"), TokenPiece(4, b"a")]
    assert find_parts(halves, "kısa") == ["k", "ıs", "a"]
    assert find_parts([TokenPiece(1, b" "), TokenPiece(2, b"su")], "su") == ["su"]
    assert find_parts([TokenPiece(1, b"s")], "su") is None
    assert find_parts([], "su") is None
    assert find_parts(halves[:2], "k") is None


@pytest.mark.parametrize(
    "name, contents, says",
    [
        ("none", None, r"There is no tokenizer .*none.*turkish-tokenizer"),
        ("cl100k_base", None, "encoding whose file tiktoken fetches"),
        ("new.json", {"model": {"type": "Neural", "vocab": {}}}, "of an unknown kind: its model is 'Neural'"),
        ("vocab.json", {"a": 1}, "is no tokenizer.json"),
        ("list.json", [1], "is no tokenizer.json"),
        ("tokenizer.json", {"model": {"type": "BPE", "vocab": 3}}, "cannot be used. The package tokenizers says"),
        ("a.bin", "x", "Known kinds: tokenizer.json"),
        ("few.tiktoken", "YQ== 0", "255 of the 256 bytes have no rank"),
        ("o200k_base.tiktoken", "YQ== 0", "names no expression"),
    ],
)
def test_what_is_no_known_tokenizer_is_refused_by_its_name(
    name: str, contents: object, says: str, tmp_path: Path
) -> None:
    if contents is not None:
        text = contents if isinstance(contents, str) else json.dumps(contents)
        (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(LowvramError, match=says):
        open_tokenizer(tmp_path / name if contents is not None else name)


def test_a_folder_with_none_or_with_several_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(LowvramError, match=r"neither a tokenizer\.json nor"):
        open_tokenizer(tmp_path)
    for name in ("a.tiktoken", "b.tiktoken"):
        (tmp_path / name).write_bytes((folder / "small.tiktoken").read_bytes())
    with pytest.raises(LowvramError, match=r"holds several tokenizers\. It holds a\.tiktoken, b\.tiktoken"):
        open_tokenizer(tmp_path)


def test_a_sentencepiece_model_is_run_by_its_package(tmp_path: Path) -> None:
    package = pytest.importorskip("sentencepiece")
    package.SentencePieceTrainer.train(
        sentence_iterator=iter([*sample_documents(3, 40_000), TEXT]),
        model_prefix=str(tmp_path / "small"),
        vocab_size=400,
        byte_fallback=True,
        minloglevel=2,
        hard_vocab_limit=False,
    )
    tokenizer = open_tokenizer(tmp_path)
    assert tokenizer.decode(tokenizer.encode("Kış geldi 🫖.")) == "Kış geldi 🫖."
    assert [piece.id for piece in tokenizer.split("Kış 🫖.")] == tokenizer.encode("Kış 🫖.")
    assert bytes_of(tokenizer.split("Kış 🫖.")) == "Kış 🫖.".encode()
    assert tokenizer.decode(tokenizer.encode("a  b")) == "a b"
    (tmp_path / "broken.model").write_bytes(b"\x00\x01 nothing")
    with pytest.raises(LowvramError, match=r"no SentencePiece model\. The package sentencepiece says"):
        open_tokenizer(tmp_path / "broken.model")


def test_the_turkish_package_is_opened_by_its_name() -> None:
    pytest.importorskip("turkish_tokenizer")
    tokenizer: AnyTokenizer = open_tokenizer("turkish-tokenizer")
    assert find_parts(tokenizer.split(" kitaplarımızdan"), "kitaplarımızdan") == ["kitap", "lar", "ım", "ız", "dan"]
    assert bytes_of(tokenizer.split("Ankara 🫖")) == "Ankara 🫖".encode()
    assert tokenizer.decode(tokenizer.encode("🫖")) != "🫖"
