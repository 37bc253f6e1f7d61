"""A byte-level BPE that another program trained, with the interface of ours; knows no model and no template.

Every text in NFC survives it, and what a text says never becomes a special id: the library is given its vocabulary
without the added tokens, which are known here by their ids alone.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lowvram.data.tokenizer import Tokenizer, byte_of_letter, count_bytes, read_files
from lowvram.errors import TokenizerError
from lowvram.json_files import JsonError, parse_object, read_object

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Library

# Our key in tokenizer_config.json: how many rows the model has, some of them for ids that no text gives.
ROWS = "lowvram_rows"
# What ends a turn in the dialogue formats of Qwen, Llama 3 and Gemma, where it is not the end of the text.
_TURN_ENDS = ("<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|end_of_turn|>")
# In NFC, which some of them make themselves, and all that we pack or ask is in.
_PROBES = (
    "Iğdır'ın “çayı” – %20 €\n\tâ î û 🫖 é \u00a0|\u00ad|\u200d",
    "  iki  boşluk,\r\nüç   boşluk \n\n\n son ",
    "I'm 12345 0.5e-3 <|im_end|> </s> <s> [INST] ",
    "中文 日本語 한국어 العربية हिन्दी ไทย \U0001f9d1\u200d\U0001f680\x00\x7f",
)


def load_tokenizer(directory: Path, rows: int | None = None) -> Tokenizer:
    """Read a tokenizer of ours, or another program's.

    rows: of the model's embedding; only where they are given, or an import has noted them, may it be another's.
    Raises TokenizerError where it is neither ours nor such a one.
    """
    noted = _noted_rows(directory)
    if noted is not None:
        return OutsideTokenizer.read(directory, noted)
    try:
        return Tokenizer.load(directory)
    except TokenizerError:
        if rows is None or not (Path(directory) / "tokenizer.json").is_file():
            raise
    return OutsideTokenizer.read(directory, rows)


def _noted_rows(directory: Path) -> int | None:
    """Return what an import has noted; a file that cannot be read is complained of by whoever loads it."""
    try:
        found = read_object(Path(directory) / "tokenizer_config.json").get(ROWS)
    except (OSError, JsonError):
        return None
    return found if isinstance(found, int) and found > 0 else None


@dataclass(frozen=True)
class OutsideTokenizer(Tokenizer):
    """Another program's tokenizer; where it has no BOS, its EOS parts texts, and so opens them too."""

    bos_id: int = 0
    eos_id: int = 0
    pad_id: int = 0
    mask_id: int = 0
    end_of_turn_id: int = 0
    _model: str = field(default="", compare=False, repr=False)
    _added: dict[str, int] = field(default_factory=dict, compare=False, repr=False)

    @staticmethod
    def read(directory: Path, rows: int) -> OutsideTokenizer:
        """Read tokenizer.json and tokenizer_config.json for a model of so many rows.

        Raises TokenizerError unless it is a byte-level BPE that every text in NFC survives and the model has its rows.
        """
        try:
            files = read_files(directory)
            config, table = (parse_object(files[name]) for name in ("tokenizer_config.json", "tokenizer.json"))
            _check_kind(table)
            found, added = _read_bytes(table), {token["content"]: token["id"] for token in table["added_tokens"]}
            ids = _name_ids(config, added | table["model"]["vocab"])
        except OSError as error:
            why = f"{error.strerror}: {error.filename}."
            raise TokenizerError(f"There is no tokenizer in {directory}.", why, "Name another folder.") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise _unusable(directory, f"{type(error).__name__}: {error}") from error
        if max(found) >= rows:
            raise _unusable(directory, f"it has the id {max(found)}, and the model only {rows} rows")
        plain = json.dumps(table | {"added_tokens": [], "post_processor": None, "truncation": None, "padding": None})
        noted = json.dumps(config | {ROWS: rows}, indent=2, ensure_ascii=False) + "\n"
        files["tokenizer_config.json"] = noted.encode()
        tokenizer = OutsideTokenizer(
            hash=hashlib.sha256(files["tokenizer.json"]).hexdigest(),
            directory=Path(directory),
            _bytes=tuple(found.get(id, b"") for id in range(rows)),
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
        """The ids of the added tokens by what a template calls them."""
        return self._added

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text`, never a special one; raises TokenizerError on a lone surrogate."""
        count_bytes(text)
        return self._library.encode(text, add_special_tokens=False).ids

    def encode_array(self, text: str) -> np.ndarray:
        """Like `encode`, as uint32 [tokens]."""
        return np.array(self.encode(text), np.uint32)

    def _check_that_texts_survive(self) -> None:
        with _Complaints(self.directory):
            back = {text: self.decode(self.encode(text)) for text in _PROBES}
        lost = next((text for text in _PROBES if back[text] != text), None)
        if lost is not None:
            raise _unusable(self.directory, f"the text {lost!r} comes back as {back[lost]!r}")


class _Complaints:
    """Says whose complaint it is: `tokenizers` raises the bare class Exception; all that is narrower passes."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def __enter__(self) -> None:
        """Begin to listen."""

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        """Raise TokenizerError for a complaint of the library."""
        if kind is Exception:
            raise _unusable(self._directory, f"the library tokenizers says: {error}") from error


def _unusable(directory: Path, why: str) -> TokenizerError:
    return TokenizerError(
        f"The tokenizer in {directory} cannot be used.",
        f"{why[0].upper()}{why[1:]}.",
        "lowvram uses byte-level BPE (tokenizer.json with the decoder ByteLevel), its own or another program's.",
    )


def _check_kind(table: dict[str, Any]) -> None:
    model, normaliser = table["model"], table.get("normalizer")
    if model["type"] != "BPE":
        raise ValueError(f"its model is {model['type']}")
    if normaliser is not None and normaliser["type"] != "NFC":
        raise ValueError(f"its normalizer is {normaliser['type']}, which changes texts")
    if (table.get("decoder") or {}).get("type") != "ByteLevel":
        raise ValueError("its decoder is not ByteLevel")
    missing = sorted(byte_of_letter().keys() - model["vocab"].keys())
    if missing:
        raise ValueError(f"{len(missing)} of the 256 bytes have no token")


def _read_bytes(table: dict[str, Any]) -> dict[int, bytes]:
    """Return the bytes of every id; none for special ones, which are no text."""
    letters = byte_of_letter()
    added = {token["id"]: token for token in table["added_tokens"]}
    found = {
        id: bytes(letters[letter] for letter in token)
        for token, id in table["model"]["vocab"].items()
        if id not in added
    }
    if not all(isinstance(id, int) and id >= 0 for id in (*found, *added)):
        raise ValueError("an id is no number, or below 0")
    return found | {id: b"" if token["special"] else token["content"].encode() for id, token in added.items()}


def _name_ids(config: dict[str, Any], known: dict[str, int]) -> dict[str, int]:
    """Return the ids that texts are opened, parted and ended with."""
    said: dict[str, int] = {}
    for name in ("bos", "eos", "pad", "mask"):
        token = config.get(f"{name}_token")
        token = token.get("content") if isinstance(token, dict) else token
        if token in known:
            said[name] = known[token]
    if "eos" not in said:
        raise ValueError("tokenizer_config.json names no eos_token")
    turn_end = next((known[token] for token in _TURN_ENDS if token in known), said["eos"])
    ids = {f"{name}_id": said.get(name, said["eos"]) for name in ("bos", "eos", "pad", "mask")}
    return {**ids, "end_of_turn_id": turn_end}
