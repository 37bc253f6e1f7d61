"""Our lossless byte-level BPE tokenizer: training, loading, encoding, decoding; knows no text files."""

from __future__ import annotations

import codecs
import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import tiktoken

from lowvram.data.long_words import without_long_words
from lowvram.data.nfc import nfc
from lowvram.data.tokenizer_folder import refuse_another, refuse_fewer_ids
from lowvram.errors import DataError, TokenizerError
from lowvram.storage.disk import DISK, Disk
from lowvram.storage.json_files import parse_object

_NAMED = ("bos", "eos", "pad", "mask", "system", "user", "assistant", "end_of_turn")
SPECIALS = tuple(f"<|{name}|>" for name in (*_NAMED, *(f"spare_{number}" for number in range(24))))
# llama.cpp knows this regular expression as "ufakzeka"; a model with any other one could not be exported to GGUF.
EXPRESSION = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SMALLEST = len(SPECIALS) + 256
# Four times the largest vocabulary of a published model; an embedding with so many rows fits on no consumer card.
LARGEST = 1_000_000
# Where a rewritten text is cut before merges are learnt: a private-use character, which no text is meant to hold.
MARK = "\ue000"
# Measured by tools/bench/merges.py: 383,248 distinct words in 54.6 MB; memory of the process, tokenizers 0.23.3.
_HEAPS_WORDS, _HEAPS_BYTES, _HEAPS_POWER = 383_248, 54_602_780, 0.63
_MEMORY_AT_REST, _MEMORY_PER_WORD = 130_000_000, 1_300
_FILES = ("tokenizer_config.json", "tokenizer.json")
_CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message.role not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('Unknown role: ' + message.role) }}{% endif %}"
    "{{ '<|' + message.role + '|>' + message.content + '<|end_of_turn|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
_CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    **{f"{name}_token": f"<|{name}|>" for name in ("bos", "eos", "pad", "mask")},
    "clean_up_tokenization_spaces": False,
    "chat_template": _CHAT_TEMPLATE,
}
# tiktoken's regex engine panics on a run of about 10⁶ white spaces, so longer runs are cut at this length.
_LONGEST_RUN = 200_000


def train_tokenizer(
    texts: Iterator[str],
    vocabulary: int,
    out: Path,
    disk: Disk = DISK,
    tell_left_out: Callable[[int], None] | None = None,
    replace: bool = False,
    rewrite: Callable[[str], Iterable[str]] | None = None,
) -> Tokenizer:
    """Train a byte-level BPE on `texts` (converted to NFC here) and write it to the directory `out`.

    vocabulary: special ids and 256 bytes included; a small text may give fewer ids (`Tokenizer.size`).
    tell_left_out: called once with the bytes of words that are too long to learn from, if there were any.
    replace: whether another tokenizer in `out` may be overwritten; the same one is always written anew.
    rewrite: returns what is learnt in place of a text; no merge reaches over a MARK that it sets.
    Raises TokenizerError if `vocabulary` is below SMALLEST or above LARGEST or another tokenizer is in `out`, DataError
    if there is no text.
    """
    check_may_train(out, vocabulary, replace)
    text_bytes = left_out_bytes = 0

    def trainable_parts() -> Iterator[str]:
        nonlocal text_bytes, left_out_bytes
        for text in texts:
            composed = nfc(text)
            parts = without_long_words(composed)
            size = count_bytes(composed)
            text_bytes += size
            left_out_bytes += size - sum(map(count_bytes, parts))
            yield from itertools.chain.from_iterable(map(rewrite, parts)) if rewrite else parts

    learnt = _learn_merges(trainable_parts(), vocabulary, has_marks=rewrite is not None)
    if not text_bytes:
        raise DataError("There is no text to learn a tokenizer from.", "", "Name files that hold text.")
    if tell_left_out and left_out_bytes:
        tell_left_out(left_out_bytes)
    written = (json.dumps(_CONFIG, indent=2), learnt)
    files = dict(zip(_FILES, (text.encode("utf-8") for text in written), strict=True))
    if not replace:
        refuse_another(out, files)
    _write(files, out, disk)
    return Tokenizer.load(out)


def _learn_merges(texts: Iterator[str], vocabulary: int, has_marks: bool) -> str:
    """Return the contents of tokenizer.json, which knows no marks."""
    from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
    from tokenizers import Tokenizer as Model

    model = Model(models.BPE())
    split = pre_tokenizers.Split(Regex(EXPRESSION), "isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    cut_at_marks = [pre_tokenizers.Split(MARK, "removed")] if has_marks else []
    model.pre_tokenizer = pre_tokenizers.Sequence([*cut_at_marks, split, to_bytes])
    model.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        min_frequency=2,
        special_tokens=list(SPECIALS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    model.train_from_iterator(texts, trainer)
    model.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
    return model.to_str(pretty=True)


def estimate_memory(text_bytes: Iterable[int]) -> int:
    """Return about how many bytes of memory it takes to learn merges.

    text_bytes: of the text of each language, read once.  Distinct words take the memory, and they grow more slowly
    than a text (Heaps 1978): here with its 0.63rd power, as counted in 5 to 55 MB of Turkish.
    """
    words = sum(_HEAPS_WORDS * (size / _HEAPS_BYTES) ** _HEAPS_POWER for size in text_bytes)
    return round(_MEMORY_AT_REST + _MEMORY_PER_WORD * words)


def check_may_train(out: Path, size: int, replace: bool) -> None:
    """Raise TokenizerError for a vocabulary out of range, or smaller than what `out` has without `replace`."""
    if size < SMALLEST:
        raise TokenizerError(
            f"A vocabulary of {size} is too small.",
            f"{len(SPECIALS)} special ids and 256 bytes need {SMALLEST}.",
            "Try 8192 or more.",
        )
    if size > LARGEST:
        raise TokenizerError(
            f"A vocabulary of {size} is too large.",
            f"At most {LARGEST:,} ids can be learnt; the largest models in use have about 260,000.",
            "Try 32768, or 65536 for hundreds of megabytes of text.",
        )
    if not replace:
        refuse_fewer_ids(out, size)


def read_files(directory: Path) -> dict[str, bytes]:
    """Return tokenizer.json and tokenizer_config.json, by name; raises OSError where one is missing.

    A chat_template.jinja beside them, as newer versions of transformers write it, is put into tokenizer_config.json.
    """
    files = {name: (Path(directory) / name).read_bytes() for name in _FILES}
    template = Path(directory) / "chat_template.jinja"
    if template.is_file():
        config = parse_object(files["tokenizer_config.json"]) | {"chat_template": template.read_text(encoding="utf-8")}
        files["tokenizer_config.json"] = json.dumps(config, indent=2, ensure_ascii=False).encode()
    return files


def _write(files: dict[str, bytes], directory: Path, disk: Disk) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    for name in _FILES:
        disk.write(directory / name, files[name])


def count_bytes(text: str) -> int:
    """Return the length of a text in UTF-8; raises TokenizerError on a lone surrogate, which has no encoding."""
    try:
        return len(text.encode("utf-8"))
    except UnicodeEncodeError as error:
        raise TokenizerError(
            f"The text holds half a character: \\u{ord(text[error.start]):04x} at position {error.start}.",
            "A lone surrogate is no Unicode text and has no bytes.",
            "Remove it.",
        ) from error


@dataclass(frozen=True)
class Tokenizer:
    """A loaded tokenizer; two with the same hash are equal.  hash: SHA-256 of tokenizer.json."""

    hash: str
    directory: Path = field(compare=False)
    _bytes: tuple[bytes, ...] = field(compare=False, repr=False)
    _files: dict[str, bytes] = field(compare=False, repr=False)

    bos_id, eos_id, pad_id, mask_id = range(4)
    end_of_turn_id = SPECIALS.index("<|end_of_turn|>")

    @staticmethod
    def load(directory: Path) -> Tokenizer:
        """Read tokenizer.json and tokenizer_config.json; raises TokenizerError unless they are ours."""
        try:
            files = read_files(directory)
            parse_object(files["tokenizer_config.json"])
            table = _read_table(parse_object(files["tokenizer.json"]))
        except OSError as error:
            raise TokenizerError(
                f"There is no tokenizer in {directory}.",
                f"{error.strerror}: {error.filename}.",
                "Train one with `lowvram tokenizer train`, or name another folder.",
            ) from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise TokenizerError(
                f"The tokenizer in {directory} cannot be used.",
                f"Its files are damaged, or not written by lowvram ({type(error).__name__}: {error}).",
                "Copy or train it anew.",
            ) from error
        digest = hashlib.sha256(files["tokenizer.json"]).hexdigest()
        return Tokenizer(digest, Path(directory), table, files)

    @cached_property
    def _encoding(self) -> tiktoken.Encoding:
        ranks = {token: id for id, token in enumerate(self._bytes) if id >= len(SPECIALS)}
        return tiktoken.Encoding(self.hash, pat_str=EXPRESSION, mergeable_ranks=ranks, special_tokens=self.specials)

    @property
    def size(self) -> int:
        """The number of ids, specials included."""
        return len(self._bytes)

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """The ids at which a text or a turn has ended.

        BOS is one of them: packed texts have no EOS, so a model learns to write the next text's BOS where a text ends.
        """
        return tuple(dict.fromkeys((self.bos_id, self.eos_id, self.end_of_turn_id)))

    @cached_property
    def settings(self) -> dict[str, Any]:
        """The contents of tokenizer_config.json, with the names of special tokens and the chat template."""
        return self.parsed("tokenizer_config.json")

    @property
    def specials(self) -> dict[str, int]:
        """The ids of the special tokens, by the names that a template uses."""
        return {name: id for id, name in enumerate(SPECIALS)}

    @cached_property
    def byte_count_V(self) -> np.ndarray:
        """How many bytes of text each id stands for, int64 [size]; 0 for special ids."""
        return np.array([len(token) for token in self._bytes], np.int64)

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text`, never a special one; raises TokenizerError on a lone surrogate."""
        count_bytes(text)
        return [id for piece in cut_long_runs(text) for id in self._encoding.encode_ordinary(piece)]

    def encode_array(self, text: str) -> np.ndarray:
        """Like `encode`, as uint32 [tokens]; faster where an array is wanted."""
        count_bytes(text)
        arrays = [self._encoding.encode_to_numpy(piece, disallowed_special=()) for piece in cut_long_runs(text)]
        return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)

    def token_bytes(self, id: int) -> bytes:
        """Return the UTF-8 bytes that `id` stands for, perhaps only part of a character; b"" for a special id."""
        if not 0 <= id < len(self._bytes):
            raise TokenizerError(
                f"{id} is not a token id.",
                f"This tokenizer has the ids 0 to {len(self._bytes) - 1}.",
                "Use the tokenizer that the ids were made with.",
            )
        return self._bytes[id]

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of `ids`; bytes that are not valid UTF-8 become U+FFFD."""
        return b"".join(map(self.token_bytes, ids)).decode("utf-8", "replace")

    @cached_property
    def _byte_table(self) -> tuple[np.ndarray, np.ndarray]:
        """The bytes of all ids one after the other, uint8, and where those of each id begin, int64 [size]."""
        return np.frombuffer(b"".join(self._bytes), np.uint8), np.cumsum(self.byte_count_V) - self.byte_count_V

    def decode_bytes(self, id_T: np.ndarray) -> bytes:
        """Return the UTF-8 bytes that an array of ids stands for; much faster than `decode` for thousands of them.

        It takes some 30 bytes of memory for each byte of text.
        """
        table, begin_V = self._byte_table
        length_T = self.byte_count_V[id_T]
        end_T = np.cumsum(length_T)
        place = np.arange(int(end_T[-1]) if len(end_T) else 0)
        place += np.repeat(begin_V[id_T] - (end_T - length_T), length_T)
        return table[place].tobytes()

    def stream(self) -> TokenStream:
        """Return a decoder for ids that come one at a time."""
        return TokenStream(self)

    def parsed(self, name: str) -> dict[str, Any]:
        """Return the contents of tokenizer.json or tokenizer_config.json as they were loaded."""
        return json.loads(self._files[name])

    def save(self, directory: Path, disk: Disk = DISK) -> None:
        """Write both files, as they were loaded, to another directory."""
        _write(self._files, directory, disk)


def cut_long_runs(text: str) -> list[str]:
    """Return the parts of a text, cut inside runs of white space on which tiktoken's regex engine would panic."""
    if len(text) < 2 * _LONGEST_RUN:
        return [text]
    cuts = [0]
    for start, end in _long_runs(text):
        cuts.extend(range(start + _LONGEST_RUN, end + 1, _LONGEST_RUN))
    return [text[start:end] for start, end in itertools.pairwise([*cuts, len(text)])]


def _long_runs(text: str) -> Iterator[tuple[int, int]]:
    """Yield start and end of each run of at least `_LONGEST_RUN` white spaces; takes time linear in the text.

    A run of that length covers a position that is a multiple of it, so the text is read only around such positions.
    """
    end = 0
    for position in range(0, len(text), _LONGEST_RUN):
        if position < end or not text[position].isspace():
            continue
        before = text[max(end, position - _LONGEST_RUN) : position]
        start = position - len(before) + len(before.rstrip())
        end = position
        while chunk := text[end : end + _LONGEST_RUN]:
            white = len(chunk) - len(chunk.lstrip())
            end += white
            if white < len(chunk):
                break
        if end - start >= _LONGEST_RUN:
            yield start, end


def _read_table(model: dict[str, Any]) -> tuple[bytes, ...]:
    """Return the bytes of each id; raises ValueError unless `train_tokenizer` could have written the file.

    tiktoken merges by the id of the result, `tokenizers` by the order of the merges, so the two orders must agree.
    """
    vocabulary, merges = model["model"]["vocab"], model["model"]["merges"]
    split = model["pre_tokenizer"]["pretokenizers"][0]
    if model["normalizer"] is not None or split.get("pattern") != {"Regex": EXPRESSION}:
        raise ValueError("other normalizer or pre-tokenizer")
    if tuple(token["content"] for token in model["added_tokens"]) != SPECIALS:
        raise ValueError("other special tokens")
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    if [vocabulary[token] for token in tokens] != list(range(len(SPECIALS) + 256 + len(merges))):
        raise ValueError("ids are missing or double")
    if tuple(tokens[: len(SPECIALS)]) != SPECIALS or ["".join(pair) for pair in merges] != tokens[SMALLEST:]:
        raise ValueError("ids are not in the order of the merges")
    byte_of = byte_of_letter()
    rest = [bytes(byte_of[letter] for letter in token) for token in tokens[len(SPECIALS) :]]
    return (*(b"" for _ in SPECIALS), *rest)


def byte_of_letter() -> dict[str, int]:
    """Return the byte for each letter of a byte-level vocabulary; printable Latin-1 stands for itself."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


class TokenStream:
    """Decodes ids one at a time and holds back the bytes of a character until it is complete."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, id: int) -> str:
        """Return the text that is complete after `id`, perhaps none."""
        return self._decoder.decode(self._tokenizer.token_bytes(id))

    def finish(self) -> str:
        """Return what is still held back: U+FFFD for half a character."""
        return self._decoder.decode(b"", final=True)
