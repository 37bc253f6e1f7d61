"""Reads a byte-level BPE of another program and gives it the interface of our tokenizer; knows no model, no template.

Every text in NFC can be decoded again without loss, and no text becomes a special id: the library gets the vocabulary
without the added tokens, of which only the ids are known here.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lowvram.data.library_errors import LibraryErrors
from lowvram.data.tokenizer import SPECIALS, Tokenizer, byte_of_letter, count_bytes, read_files
from lowvram.errors import TokenizerError
from lowvram.storage.json_files import JsonError, parse_object, read_object
from lowvram.units import count_of

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Library

# The key in tokenizer_config.json under which `lowvram import` writes how many rows the model's embedding has, if those
# are more than the tokenizer's ids.  Without it there are as many rows as ids, so nobody needs to write it by hand.
ROWS = "lowvram_rows"
# Sixteen times the largest vocabularies in use.  Without a limit, one wrong id would reserve gigabytes of rows.
MOST_ROWS = 2**22
# The tokens that end a turn in the dialogue formats of Qwen, Llama 3 and Gemma, if that is not the end of the text.
_TURN_ENDS = ("<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|end_of_turn|>")
# GPT-2's older tokenizer_config.json names no special token.
_GPT2_END = "<|endoftext|>"
# Test texts that must survive encoding and decoding.  They are in NFC, like all text that is packed or prompted; some
# tokenizers normalise to NFC themselves.
_PROBES = (
    "Iğdır'ın “çayı” – %20 €\n\tâ î û 🫖 é \u00a0|\u00ad|\u200d",
    "  iki  boşluk,\r\nüç   boşluk \n\n\n son ",
    "I'm 12345 0.5e-3 <|im_end|> </s> <s> [INST] ",
    "中文 日本語 한국어 العربية हिन्दी ไทย \U0001f9d1\u200d\U0001f680\x00\x7f",
)


def load_tokenizer(directory: Path, rows: int | None = None) -> Tokenizer:
    """Read a tokenizer of ours, or a byte-level BPE of another program.

    rows: those of the model's embedding; None takes the number that an import has saved, or one row per id.
    Raises TokenizerError where it is neither; the error names the kind.
    """
    saved_rows = _read_saved_rows(directory)
    if saved_rows is not None:
        return HfTokenizer.read(directory, saved_rows)
    try:
        return Tokenizer.load(directory)
    except TokenizerError:
        if not _is_another_programs(Path(directory)):
            raise
    return HfTokenizer.read(directory, rows)


def _is_another_programs(directory: Path) -> bool:
    """Say whether tokenizer.json is another program's; a damaged file of ours must not be mistaken for one."""
    try:
        table = read_object(directory / "tokenizer.json")
        added = {token["content"] for token in table.get("added_tokens", ())}
    except (OSError, JsonError, KeyError, TypeError):
        return False
    return "model" in table and not added & {*SPECIALS[-24:]}


def _read_saved_rows(directory: Path) -> int | None:
    """Return the number of rows that an import has saved; an unreadable file is reported when it is loaded."""
    try:
        rows = read_object(Path(directory) / "tokenizer_config.json").get(ROWS)
    except (OSError, JsonError):
        return None
    return rows if isinstance(rows, int) and rows > 0 else None


@dataclass(frozen=True)
class HfTokenizer(Tokenizer):
    """Another program's tokenizer; where it has no BOS, its EOS separates texts, and so begins them too."""

    bos_id: int = 0
    eos_id: int = 0
    pad_id: int = 0
    mask_id: int = 0
    end_of_turn_id: int = 0
    _model: str = field(default="", compare=False, repr=False)
    _added: dict[str, int] = field(default_factory=dict, compare=False, repr=False)

    @staticmethod
    def read(directory: Path, rows: int | None = None) -> HfTokenizer:
        """Read tokenizer.json and tokenizer_config.json for a model with `rows` rows; None means one row per id.

        Raises TokenizerError unless it is a byte-level BPE, lossless on NFC text, and the model has a row for each id.
        """
        try:
            files = read_files(directory)
            config, table = (parse_object(files[name]) for name in ("tokenizer_config.json", "tokenizer.json"))
            _check_kind(table)
            bytes_of, added = _read_bytes(table), {token["content"]: token["id"] for token in table["added_tokens"]}
            ids = _name_ids(config, added | table["model"]["vocab"])
        except OSError as error:
            why = f"{error.strerror}: {error.filename}."
            raise TokenizerError(f"There is no tokenizer in {directory}.", why, "Name another folder.") from error
        except _OtherKindError as error:
            raise _unusable(directory, str(error)) from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise _unusable(directory, f"its files are damaged ({type(error).__name__}: {error})") from error
        rows = max(bytes_of) + 1 if rows is None else rows
        if max(bytes_of) >= rows:
            raise _unusable(directory, f"it has the id {max(bytes_of)}, and the model only {count_of(rows, 'row')}")
        if rows > MOST_ROWS:
            raise _unusable(directory, f"it asks for {rows:,} rows, and more than {MOST_ROWS:,} are taken for damage")
        plain = json.dumps(table | {"added_tokens": [], "post_processor": None, "truncation": None, "padding": None})
        config_text = json.dumps(config | {ROWS: rows}, indent=2, ensure_ascii=False) + "\n"
        files["tokenizer_config.json"] = config_text.encode()
        tokenizer = HfTokenizer(
            hash=hashlib.sha256(files["tokenizer.json"]).hexdigest(),
            directory=Path(directory),
            _bytes=tuple(bytes_of.get(id, b"") for id in range(rows)),
            _files=files,
            _model=plain,
            _added=added,
            **ids,
        )
        tokenizer._check_that_texts_survive()
        return tokenizer

    @cached_property
    def _library(self) -> Library:
        from tokenizers import Tokenizer as Library

        return Library.from_str(self._model)

    @property
    def specials(self) -> dict[str, int]:
        """The ids of the added tokens, by the names that a template uses."""
        return self._added

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text`, never a special one; raises TokenizerError on a lone surrogate."""
        count_bytes(text)
        return self._library.encode(text, add_special_tokens=False).ids

    def encode_array(self, text: str) -> np.ndarray:
        """Like `encode`, as uint32 [tokens]."""
        return np.array(self.encode(text), np.uint32)

    def _check_that_texts_survive(self) -> None:
        with LibraryErrors(lambda error: _unusable(self.directory, f"the library tokenizers says: {error}")):
            decoded = {text: self.decode(self.encode(text)) for text in _PROBES}
        changed = next((text for text in _PROBES if decoded[text] != text), None)
        if changed is not None:
            raise _unusable(self.directory, f"the text {changed!r} comes back as {decoded[changed]!r}")


def _unusable(directory: Path, why: str) -> TokenizerError:
    return TokenizerError(
        f"The tokenizer in {directory} cannot be used.",
        f"{why[0].upper()}{why[1:]}.",
        "Name a byte-level BPE that leaves texts as they are, as of GPT-2, Llama 3 or Qwen, or learn your own with "
        "`lowvram tokenizer train`.",
    )


class _OtherKindError(ValueError):
    """An undamaged tokenizer of a kind that cannot be used; its text says which."""


# Which models use each kind of tokenizer, so that users recognise theirs.
_KNOWN_FROM = {
    "Unigram": ", as SentencePiece makes it for T5 and XLM-R; it changes texts before it cuts them",
    "WordPiece": ", as BERT has it; it loses upper case, spaces or rare characters",
    "WordLevel": ": whole words, and none for a word that it does not know",
}


def _check_kind(table: dict[str, Any]) -> None:
    model = table["model"]
    # The oldest files name no type: GPT-2's is one.
    kind = model.get("type") or ("BPE" if "merges" in model else "of no type that it names")
    if kind != "BPE":
        raise _OtherKindError(f"its model is {kind}{_KNOWN_FROM.get(kind, '')}")
    if model.get("byte_fallback"):
        raise _OtherKindError("it is SentencePiece's BPE, as Llama 2, Mistral and Gemma have it, which changes spaces")
    changing = [name for name in _normalizers(table.get("normalizer")) if name != "NFC"]
    if changing:
        raise _OtherKindError(f"its normalizer is {' and '.join(changing)}, which changes texts")
    if (table.get("decoder") or {}).get("type") != "ByteLevel":
        raise _OtherKindError("its decoder is not ByteLevel, so its tokens stand for characters and not for bytes")
    missing = sorted(byte_of_letter().keys() - model["vocab"].keys())
    if missing:
        raise _OtherKindError(f"{len(missing)} of the 256 bytes have no token")


def _normalizers(normalizer: dict[str, Any] | None) -> list[str]:
    if normalizer is None:
        return []
    if normalizer["type"] != "Sequence":
        return [normalizer["type"]]
    return [name for part in normalizer["normalizers"] for name in _normalizers(part)]


def _read_bytes(table: dict[str, Any]) -> dict[int, bytes]:
    """Return the bytes of every id; b"" for special ids, which are not text."""
    letters = byte_of_letter()
    added = {token["id"]: token for token in table["added_tokens"]}
    bytes_of = {
        id: bytes(letters[letter] for letter in token)
        for token, id in table["model"]["vocab"].items()
        if id not in added
    }
    if not all(isinstance(id, int) and id >= 0 for id in (*bytes_of, *added)):
        raise ValueError("an id is not a number, or below 0")
    return bytes_of | {id: b"" if token["special"] else token["content"].encode() for id, token in added.items()}


def _name_ids(config: dict[str, Any], known: dict[str, int]) -> dict[str, int]:
    """Return the ids with which texts begin, are separated and end."""
    ids_by_role: dict[str, int] = {}
    for name in ("bos", "eos", "pad", "mask"):
        token = config.get(f"{name}_token")
        token = token.get("content") if isinstance(token, dict) else token
        if token in known:
            ids_by_role[name] = known[token]
    if "eos_token" not in config and _GPT2_END in known:
        ids_by_role["eos"] = known[_GPT2_END]
    if "eos" not in ids_by_role:
        raise _OtherKindError("tokenizer_config.json names no eos_token")
    turn_end = next((known[token] for token in _TURN_ENDS if token in known), ids_by_role["eos"])
    ids = {f"{name}_id": ids_by_role.get(name, ids_by_role["eos"]) for name in ("bos", "eos", "pad", "mask")}
    return {**ids, "end_of_turn_id": turn_end}
