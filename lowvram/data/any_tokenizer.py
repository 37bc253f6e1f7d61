"""Opens tokenizers of any kind to be measured and shown, also those that lose text; no model is trained with them."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from lowvram.data.library_errors import LibraryErrors
from lowvram.data.text_stream import need
from lowvram.data.tokenizer import Tokenizer, byte_of_letter, count_bytes, cut_long_runs
from lowvram.data.turkish import lower_case
from lowvram.errors import TokenizerError
from lowvram.storage.json_files import JsonError, read_object

PACKAGE = "turkish-tokenizer"
_KINDS = ("tokenizer.json", "a SentencePiece .model", "a .tiktoken file", PACKAGE)
_LIBRARY_KINDS = ("BPE", "Unigram", "WordPiece", "WordLevel")
# Of rank files, which name none: that of GPT-2 (Radford et al. 2019), which r50k_base and p50k_base have too, and that
# of cl100k_base, which Llama 3 has too.
_GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CL100K = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_OLDER_RANKS = ("gpt2", "r50k_base", "p50k_base", "p50k_edit")
# Whose expression is neither of these.
_OTHER_RANKS = ("o200k",)


class TokenPiece(NamedTuple):
    """A token in a text.  data: the bytes of the text that it stands for, as far as the tokenizer tells."""

    id: int
    data: bytes


class AnyTokenizer(Protocol):
    """A tokenizer of any kind.  size: the number of its ids.  blank_ids: tokens that stand for a blank alone."""

    kind: str
    size: int
    blank_ids: frozenset[int]

    def encode(self, text: str) -> Sequence[int] | np.ndarray:
        """Return the ids of a text, no special ones added."""

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Return the text of ids."""

    def split(self, text: str) -> list[TokenPiece]:
        """Return the tokens of a text; where nothing is lost, their bytes add up to it."""


def open_tokenizer(name: str | Path) -> AnyTokenizer:
    """Open a folder or file of a tokenizer, or the package turkish-tokenizer by its name.

    Raises TokenizerError for what is missing, damaged or of another kind, MachineError where a package is missing.
    """
    path = Path(name)
    if not path.exists():
        if str(name).replace("_", "-") == PACKAGE:
            return TurkishPackage()
        raise _explain_missing(str(name))
    file = _find_file(path) if path.is_dir() else path
    if file.suffix == ".json":
        return _open_json(file)
    ranks = _read_ranks(file)
    if ranks:
        return RankFile(file, ranks)
    if file.suffix in (".model", ".spm"):
        return SentencePieceModel(file)
    raise TokenizerError(f"{file} is no tokenizer.", f"Known kinds: {', '.join(_KINDS)}.", "Name one of these.")


def _explain_missing(name: str) -> TokenizerError:
    import tiktoken

    if name in tiktoken.list_encoding_names():
        why = "It is the name of an encoding whose file tiktoken fetches, and lowvram fetches nothing."
        return TokenizerError(f"{name} is no file.", why, f"Fetch {name}.tiktoken and name that file.")
    return TokenizerError(
        f"There is no tokenizer {name}.", f"A folder or file of {', '.join(_KINDS)} is needed.", "Name one that exists."
    )


def _find_file(folder: Path) -> Path:
    """Return the tokenizer's file in a folder."""
    if (folder / "tokenizer.json").is_file():
        return folder / "tokenizer.json"
    others = sorted(path for ending in ("*.model", "*.spm", "*.tiktoken") for path in folder.glob(ending))
    if len(others) == 1:
        return others[0]
    if others:
        why = f"It holds {', '.join(path.name for path in others)}."
        raise TokenizerError(f"The folder {folder} holds several tokenizers.", why, "Name one of these files.")
    why = "It has neither a tokenizer.json nor a .model or .tiktoken file."
    raise TokenizerError(f"There is no tokenizer in {folder}.", why, "Name another folder or file.")


def _open_json(file: Path) -> AnyTokenizer:
    if file.name == "tokenizer.json":
        try:
            return OwnTokenizer(Tokenizer.load(file.parent))
        except TokenizerError:
            pass  # another program's, or damaged: the library tells
    return LibraryTokenizer(file)


class OwnTokenizer:
    """A tokenizer of ours, run as `data pack` runs it.  library: the same one, run by the package tokenizers."""

    kind = "lowvram"

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer, self.size = tokenizer, tokenizer.size
        self.library = LibraryTokenizer(tokenizer.directory / "tokenizer.json")
        self.blank_ids = frozenset(tokenizer.encode(" "))

    def encode(self, text: str) -> np.ndarray:
        """Return the ids of a text."""
        return self._tokenizer.encode_array(text)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Return the text of ids."""
        return self._tokenizer.decode(ids)

    def split(self, text: str) -> list[TokenPiece]:
        """Return the tokens of a text with their bytes."""
        return [TokenPiece(id, self._tokenizer.token_bytes(id)) for id in self._tokenizer.encode(text)]


class LibraryTokenizer:
    """A tokenizer.json that the package tokenizers runs; names of special tokens in a text stay text."""

    def __init__(self, file: Path) -> None:
        from tokenizers import Tokenizer as Library

        try:
            table = read_object(file)
            model = table["model"]
            kind = model.get("type") or ("BPE" if "merges" in model else None)
        except (OSError, JsonError, KeyError, TypeError, AttributeError) as error:
            why = "It has no model, as a tokenizer.json has one."
            raise TokenizerError(f"{file} is no tokenizer.json.", why, "Name another file.") from error
        if kind not in _LIBRARY_KINDS:
            raise TokenizerError(
                f"The tokenizer {file} is of an unknown kind: its model is {kind!r}.",
                f"The package tokenizers knows {', '.join(_LIBRARY_KINDS)}.",
                "Name another one.",
            )
        with LibraryErrors(lambda error: _unusable(file, error)):
            self._model = Library.from_file(str(file))
            self._model.no_truncation()
            self._model.no_padding()
            self._model.encode_special_tokens = True
        is_byte_level = (table.get("decoder") or {}).get("type") == "ByteLevel"
        self._letters = byte_of_letter() if is_byte_level and table.get("normalizer") is None else {}
        self.kind = f"{'byte-level ' if is_byte_level else ''}{kind}"
        self.size = self._model.get_vocab_size()
        blanks = map(self._model.token_to_id, ("Ġ", "▁"))
        self.blank_ids = frozenset(id for id in blanks if id is not None)

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, without the positions that cost the library time."""
        return self._model.encode_batch_fast([text], add_special_tokens=False)[0].ids

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Return the text of ids, those of unknown words included."""
        return self._model.decode(list(ids), skip_special_tokens=False)

    def split(self, text: str) -> list[TokenPiece]:
        """Return the tokens of a text, with what a tokenizer passes over before a token as a part of it."""
        found = self._model.encode(text, add_special_tokens=False)
        if self._letters and all(letter in self._letters for token in found.tokens for letter in token):
            spelt = (bytes(map(self._letters.__getitem__, token)) for token in found.tokens)
            return [TokenPiece(*pair) for pair in zip(found.ids, spelt, strict=True)]
        pieces, start = [], 0
        ends = [end for _, end in found.offsets]
        for place, (id, end) in enumerate(zip(found.ids, ends, strict=True)):
            # Tokens that are bytes of one character all end where it ends: the last of them has it.
            is_inside = place + 1 < len(ends) and ends[place + 1] == end
            pieces.append(TokenPiece(id, b"" if is_inside else text[start:end].encode()))
            start = start if is_inside else max(start, end)
        return pieces


class SentencePieceModel:
    """A SentencePiece model, run by its own package."""

    kind = "SentencePiece"

    def __init__(self, file: Path) -> None:
        package = need("sentencepiece")
        try:
            self._model: Any = package.SentencePieceProcessor(model_file=str(file))
        except (OSError, RuntimeError) as error:
            why = f"The package sentencepiece says: {str(error).strip() or type(error).__name__}."
            raise TokenizerError(f"{file} is no SentencePiece model.", why, "Copy it anew, or name another.") from error
        self.size = int(self._model.get_piece_size())
        blank = self._model.piece_to_id("▁")
        self.blank_ids = frozenset() if blank == self._model.unk_id() else frozenset([blank])

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text."""
        return self._model.encode(text, out_type=int)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Return the text of ids."""
        return self._model.decode([int(id) for id in ids])

    def split(self, text: str) -> list[TokenPiece]:
        """Return the tokens of a text with the part of it that each covers."""
        # Renamed between releases of the package.
        encode = getattr(self._model, "encode_as_proto", None) or self._model.encode_as_immutable_proto
        pieces = encode(text).pieces
        return [TokenPiece(piece.id, piece.surface.encode()) for piece in pieces]


class RankFile:
    """Ranks of byte-level tokens as tiktoken and Llama 3 have them, run by tiktoken."""

    def __init__(self, file: Path, ranks: dict[bytes, int]) -> None:
        import tiktoken

        if file.stem.startswith(_OTHER_RANKS):
            why = "A rank file names no expression, and that of o200k is not known here."
            raise TokenizerError(f"{file} cannot be measured.", why, "Name its tokenizer.json.")
        is_older = file.stem in _OLDER_RANKS
        missing = 256 - sum(bytes([byte]) in ranks for byte in range(256))
        if missing:
            raise TokenizerError(
                f"{file} cannot be used.", f"{missing} of the 256 bytes have no rank.", "Copy it anew."
            )
        self.kind = f"ranks, expression of {'GPT-2' if is_older else 'cl100k'}"
        pattern = _GPT2 if is_older else _CL100K
        self._model = tiktoken.Encoding(file.stem, pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
        self.size = len(ranks)
        self.blank_ids = frozenset([ranks[b" "]])

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text."""
        return [id for part in cut_long_runs(text) for id in self._model.encode_ordinary(part)]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Return the text of ids."""
        return self._model.decode([int(id) for id in ids])

    def split(self, text: str) -> list[TokenPiece]:
        """Return the tokens of a text with their bytes."""
        return [TokenPiece(id, self._model.decode_single_token_bytes(id)) for id in self.encode(text)]


class TurkishPackage:
    """The package turkish-tokenizer: stems and suffixes from lists, and a mark before a capital."""

    kind = PACKAGE
    _CAPITAL, _UNKNOWN = "<uppercase>", "<unknown>"

    def __init__(self) -> None:
        self._model: Any = need("turkish_tokenizer", PACKAGE).TurkishTokenizer()
        self.size = int(self._model.vocab_size)
        self.blank_ids = frozenset(self._model.encode(" "))

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text."""
        return list(self._model.encode(text))

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Return the text of ids, which is not always the one that was encoded."""
        return str(self._model.decode([int(id) for id in ids]))

    def split(self, text: str) -> list[TokenPiece]:
        """Return the tokens of a text; from where a token differs from the text on, as the package spells them."""
        pieces, start, is_same = [], 0, True
        for id, token in zip(self._model.encode(text), self._model.tokenize(text), strict=True):
            letters = "" if token == self._CAPITAL else token
            end = start + (1 if token == self._UNKNOWN else len(letters))
            is_same = is_same and (token == self._UNKNOWN or lower_case(text[start:end]) == letters)
            pieces.append(TokenPiece(id, (text[start:end] if is_same else letters).encode()))
            start = end
        return pieces


def _read_ranks(file: Path) -> dict[bytes, int]:
    """Return the rank of each token in a file with lines of base64 and rank; empty where it is none."""
    ranks = {}
    try:
        for line in file.read_bytes().splitlines():
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
    except (ValueError, binascii.Error):
        return {}
    except OSError as error:
        raise TokenizerError(f"{file} cannot be read.", f"{error.strerror}.", "Name another file.") from error
    return ranks


def _unusable(file: Path, error: BaseException) -> TokenizerError:
    why = f"The package tokenizers says: {error}."
    return TokenizerError(f"The tokenizer {file} cannot be used.", why, "Name another one.")


def find_parts(pieces: Sequence[TokenPiece], word: str) -> list[str] | None:
    """Return the parts of a word that was split behind a blank; a part ends where a token and a character end.

    None where the tokens do not add up to the word, so that nobody knows where they cut it.
    """
    parts, rest = [], b""
    for piece in pieces:
        rest += piece.data
        try:
            text = rest.decode()
        except UnicodeDecodeError:  # a token ends inside a character, where no word can be cut
            continue
        rest = b""
        if text:
            parts.append(text)
    if rest or not parts:
        return None
    if parts[0].startswith(" "):
        parts[0] = parts[0][1:]
    found = [part for part in parts if part]
    return found if "".join(found) == word else None


def check_text(text: str) -> None:
    """Raise TokenizerError on half a character, which no tokenizer can encode."""
    count_bytes(text)
