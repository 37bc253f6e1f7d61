"""Tokenizers on the same texts, language by language: names and texts in, a frozen value out; prints nothing."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lowvram.api.arguments import PATH, read_paths, refuse_missing, refuse_type
from lowvram.api.parallel_sentences import ParallelOptions, ParallelSentences, choose_sentences, read_sentences
from lowvram.api.progress import carry_out
from lowvram.api.tasks import Notice, Progress, Task, count_progress
from lowvram.api.texts import OnBadRow, SkippedRows, TextOptions, Texts, find_texts, read_text_options

if TYPE_CHECKING:
    from lowvram.data.any_tokenizer import AnyTokenizer
    from lowvram.evaluate.boundaries import GoldWord
    from lowvram.evaluate.parity import ParityFigures
    from lowvram.evaluate.tokenizer_figures import Figures, Sample

# Of each language, in bytes of UTF-8.
DEFAULT_SIZE = 20 << 20
ONLY = "text"  # the language of text that has none
_LANGUAGE = re.compile(r"[A-Za-z][A-Za-z_-]{0,15}")


@dataclass(frozen=True)
class ComparedTexts:
    """The text of a language on which tokenizers were measured.  is_whole: whether all of it was read."""

    language: str
    documents: int
    lines: int
    words: int
    distinct_words: int
    characters: int
    text_bytes: int
    is_whole: bool


@dataclass(frozen=True)
class ComparedSentences:
    """The same sentences in several languages, of which the first is the one that parity compares with.

    left_out: rows in which a language is empty.  text_bytes: by language.  is_whole: whether all of the file was read.
    """

    path: str
    languages: tuple[str, ...]
    sentences: int
    left_out: int
    text_bytes: Mapping[str, int]
    is_whole: bool


@dataclass(frozen=True)
class ComparedTokenizer:
    """A tokenizer and its figures by language.  name: the shortest that no other one has.  size: its ids.

    parity: of the same sentences, by language, None where none were named.
    """

    name: str
    path: str
    kind: str
    size: int
    figures: Mapping[str, Figures]
    parity: Mapping[str, ParityFigures] | None = None


@dataclass(frozen=True)
class TokenizerComparison:
    """What was measured: the texts, the same sentences, and each tokenizer in the order in which it was named."""

    texts: tuple[ComparedTexts, ...]
    tokenizers: tuple[ComparedTokenizer, ...]
    parallel: ComparedSentences | None = None
    notices: tuple[Notice, ...] = ()

    def as_dict(self) -> dict[str, object]:
        """Return all of it for JSON, notices left out."""
        tokenizers = [
            {
                "name": each.name,
                "path": each.path,
                "kind": each.kind,
                "size": each.size,
                "figures": {language: figures.as_dict() for language, figures in each.figures.items()},
                "parity": each.parity and {name: dataclasses.asdict(found) for name, found in each.parity.items()},
            }
            for each in self.tokenizers
        ]
        texts = [dataclasses.asdict(text) for text in self.texts]
        parallel = dataclasses.asdict(self.parallel) if self.parallel else None
        return {"texts": texts, "parallel": parallel, "tokenizers": tokenizers}

    def save_chart(self, path: str | Path) -> None:
        """Draw the figures as bars into a PNG file; raises MachineError where matplotlib is not installed."""
        from lowvram.api.tokenizer_chart import draw_chart

        parity = {each.name: each.parity for each in self.tokenizers if each.parity}
        draw_chart({each.name: each.figures for each in self.tokenizers}, Path(path), parity)


def compare_tokenizers(
    tokenizers: str | Path | Sequence[str | Path],
    texts: Texts | Mapping[str, Texts] | None = None,
    *,
    gold: Mapping[str, str | Path] | None = None,
    parallel: str | Path | None = None,
    languages: Sequence[str] | None = None,
    size: int = DEFAULT_SIZE,
    field: str = "text",
    on_bad_row: OnBadRow = "stop",
    progress: bool = False,
) -> TokenizerComparison:
    """Measure tokenizers of any kind on the same text in NFC: what a token holds, what is lost, how fast they are.

    tokenizers: folders or files (a tokenizer.json of any kind, a SentencePiece .model, a .tiktoken file), or the name
    of the package turkish-tokenizer.  texts: by language, as {"tr": "tr.txt", "kk": ["a.txt", "b.txt"]}, or of one
    without a name.  gold: files of gold segmentations by language, with the columns form, segmentation and perhaps
    count.  parallel: a table or JSON lines with the same sentences in several languages, whose tokens are compared
    with those of the first one; alone, it needs no texts.  languages: its columns, those of texts where None.
    size: at most so many bytes of each language are read.  field (of texts), on_bad_row: as for `pack`.  progress: show
    a progress bar, in a terminal or a notebook.

    Raises ConfigError for an argument that cannot be meant, TokenizerError for a tokenizer that cannot be opened,
    DataError for text or gold that cannot be read, MachineError where a tokenizer's package is missing.
    """
    names = read_paths("tokenizers", tokenizers)
    refuse_missing("size", size, int)
    by_language = dict(texts) if isinstance(texts, Mapping) else {ONLY: texts} if texts is not None else {}
    options = {language: read_text_options(paths, field, on_bad_row) for language, paths in by_language.items()}
    refuse_type("gold", gold, Mapping)
    for path in (gold or {}).values():
        refuse_missing("gold", path, *PATH)
    gold_paths = {language: Path(path) for language, path in (gold or {}).items()}
    refuse_type("parallel", parallel, *PATH)
    refuse_type("languages", languages, list, tuple)
    for language in languages or ():
        refuse_missing("languages", language, str)
    file = Path(parallel) if parallel is not None else None
    sentences = choose_sentences(file, languages, options, on_bad_row)
    found, notices = carry_out(compare_tokenizers_task(names, options, gold_paths, size, sentences), progress)
    return dataclasses.replace(found, notices=notices)


def compare_tokenizers_task(
    paths: Sequence[Path],
    texts: Mapping[str, TextOptions],
    gold: Mapping[str, Path],
    size: int = DEFAULT_SIZE,
    parallel: ParallelOptions | None = None,
) -> Task[TokenizerComparison]:
    """Do what `compare_tokenizers` does, and yield its notices and its progress."""
    from lowvram.data.any_tokenizer import open_tokenizer
    from lowvram.evaluate.boundaries import read_gold
    from lowvram.evaluate.parity import measure_parity
    from lowvram.evaluate.tokenizer_figures import measure

    _check(paths, texts, gold, size, parallel)
    names = shorten(paths)
    opened: dict[str, AnyTokenizer] = {}
    for name, path in zip(names, paths, strict=True):
        yield Progress(f"Opening {name}")
        opened[name] = open_tokenizer(path)
    gold_words: dict[str, list[GoldWord]] = {language: read_gold(path) for language, path in gold.items()}
    samples = []
    for language, options in texts.items():
        samples.append((yield from _read_sample(language, options, size)))
    same = (yield from read_sentences(parallel, size)) if parallel else None
    compared = []
    for name, path in zip(names, paths, strict=True):
        tokenizer, figures = opened[name], {}
        for sample in samples:
            work = measure(tokenizer, sample, gold_words.get(sample.language))
            figures[sample.language] = yield from count_progress(work, f"Measuring {name} on {sample.language}")
        parity: Mapping[str, ParityFigures] | None = None
        if same:
            encoding = measure_parity(tokenizer, same.sentences)
            parity = yield from count_progress(encoding, f"Measuring {name} on {same.path.name}")
        compared.append(ComparedTokenizer(name, str(path), tokenizer.kind, tokenizer.size, figures, parity))
    yield from map(Notice, _explain(compared))
    described = _describe_sentences(same) if same else None
    return TokenizerComparison(tuple(map(_describe, samples)), tuple(compared), described)


def _check(
    paths: Sequence[Path],
    texts: Mapping[str, TextOptions],
    gold: Mapping[str, Path],
    size: int,
    parallel: ParallelOptions | None,
) -> None:
    """Raise ConfigError for what cannot be meant, before anything is read."""
    from lowvram.errors import ConfigError, argument

    seen: dict[Path, Path] = {}
    for path in paths:
        other = seen.setdefault(path.resolve(), path)
        if other is not path:
            raise ConfigError(
                f"{path} and {other} are the same tokenizer.", "It is measured once.", "Name one of them."
            )
    if not texts and (gold or not parallel):
        instead = "" if gold else f", or sentences with {argument('parallel')}"
        fix = f"Name some, as tr=valid.txt{instead}."
        raise ConfigError("There is no text.", "Tokenizers are measured on text.", fix)
    for language in texts:
        if not _LANGUAGE.fullmatch(language):
            raise ConfigError(f"{language!r} is no language's name.", "It is letters, as tr or kk.", "Name another.")
    for language in gold:
        if language not in texts:
            what = f"The gold segmentations are of {language!r}, of which there is no text."
            raise ConfigError(what, f"There is text of {', '.join(texts)}.", f"Name it as {next(iter(texts))}=FILE.")
    if size < 1:
        raise ConfigError(f"{argument('size')} is {size}.", "At least one byte is read.", "Leave it out.")


def shorten(paths: Sequence[Path]) -> list[str]:
    """Return for each path its last parts, as few as tell it from the others."""
    parts = [path.resolve().parts for path in paths]
    names = []
    for own in parts:
        others = [other for other in parts if other is not own]
        lengths = (n for n in range(1, len(own) + 1) if all(other[-n:] != own[-n:] for other in others))
        names.append("/".join(own[-next(lengths, len(own)) :]))
    return names


def _read_sample(language: str, options: TextOptions, size: int) -> Task[Sample]:
    """Read at most `size` bytes of documents in NFC; one that is longer than what is left is cut at a line's end."""
    from lowvram.data.nfc import nfc
    from lowvram.data.text import documents_of
    from lowvram.errors import DataError
    from lowvram.evaluate.tokenizer_figures import take_sample
    from lowvram.units import show_bytes

    files = yield from find_texts(options)
    skipped = SkippedRows(options.on_bad_row)
    found: list[str] = []
    left = size

    def read() -> Task[bool]:
        nonlocal left
        what = f"Reading {language}"
        yield Progress(what)
        for text in documents_of(files, options.field, bad_rows=skipped.bad_rows):
            document = nfc(text)
            taken = document.encode()[:left].decode(errors="ignore")
            is_cut = len(taken) < len(document)
            taken = taken[: taken.rfind("\n") + 1] or taken if is_cut else taken
            if taken.strip():
                found.append(taken)
            left -= len(document.encode())
            yield Progress(what, size - max(0, left), size)
            if is_cut:
                return False
        skipped.bad_rows.finish()
        return True

    is_whole = yield from skipped.tell_beside(read())
    yield from skipped.summarise()
    if not found:
        raise DataError(f"The text of {language} is empty.", "", "Name files that hold text.")
    if not is_whole:
        yield Notice(f"Of {language} the first {show_bytes(size)} are read; `size` changes that.")
    return take_sample(language, found, is_whole)


def _describe(sample: Sample) -> ComparedTexts:
    return ComparedTexts(
        language=sample.language,
        documents=len(sample.documents),
        lines=sample.lines.total(),
        words=sample.words.total(),
        distinct_words=len(sample.words),
        characters=sample.characters,
        text_bytes=sample.text_bytes,
        is_whole=sample.is_whole,
    )


def _describe_sentences(read: ParallelSentences) -> ComparedSentences:
    return ComparedSentences(
        path=str(read.path),
        languages=tuple(read.sentences),
        sentences=read.rows - read.left_out,
        left_out=read.left_out,
        text_bytes={language: sum(len(text.encode()) for text in texts) for language, texts in read.sentences.items()},
        is_whole=read.is_whole,
    )


def _explain(compared: Sequence[ComparedTokenizer]) -> list[str]:
    """Return a sentence for each tokenizer that loses text, and for the words that nobody knows where they are cut."""
    sentences = []
    for each in compared:
        shares = {language: found.exact for language, found in (each.parity or {}).items() if found.exact < 1}
        if shares:
            where = ", ".join(f"{language} {min(99.9, 100 * share):.1f}%" for language, share in shares.items())
            what = f"{each.name} gives back only a part of the sentences as they were ({where})"
            sentences.append(f"{what}: what is lost costs few tokens, so its parity says little there.")
        lossy = [language for language, figures in each.figures.items() if not figures.is_lossless]
        if lossy:
            where = ", ".join(lossy)
            sentences.append(f"{each.name} does not give every text back ({where}); it is measured all the same.")
        for figures in each.figures.values():
            if figures.boundaries and figures.boundaries.unplaced:
                count = f"{figures.boundaries.unplaced:,}"
                sentences.append(
                    f"{each.name}: the tokens of {count} gold words do not add up to them; taken as uncut."
                )
    return sentences
