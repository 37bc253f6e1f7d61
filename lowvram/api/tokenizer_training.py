"""A tokenizer that is learnt from text: texts in, a folder and a frozen value out; prints nothing."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from lowvram.api.arguments import PATH, read_count, refuse_missing
from lowvram.api.progress import carry_out
from lowvram.api.tasks import Notice, Progress, Task
from lowvram.api.texts import OnBadRow, SkippedRows, TextOptions, Texts, find_texts, read_text_options
from lowvram.errors import refuse_unknown

if TYPE_CHECKING:
    from lowvram.data.bad_rows import BadRows
    from lowvram.data.morphology.segmenter import Segmenter
    from lowvram.data.tokenizer import Tokenizer

DEFAULT_VOCABULARY, DEFAULT_OUT = 32768, Path("tok")
_READING, _COUNTING = "Learning the vocabulary", "Counting words"
Morphology = Literal["none", "soft", "strict"]
MORPHOLOGIES: tuple[Morphology, ...] = get_args(Morphology)
DEFAULT_MORPHOLOGY: Morphology = "none"
# Beside tokenizer.json: the stems that were learnt for its merges.
STEMS = "morphology.json"


@dataclass(frozen=True)
class MergeOptions:
    """How merges are learnt.

    vocabulary: the number of ids.  morphology: "strict" lets no token reach over the end of a stem or suffix, "soft"
    counts merges inside them twice, "none" knows nothing of them.  language: whose rules cut words: a code such as
    "tr", or a rules file.
    """

    vocabulary: int = DEFAULT_VOCABULARY
    morphology: Morphology = DEFAULT_MORPHOLOGY
    language: str | Path = "tr"


@dataclass(frozen=True)
class TrainedTokenizer:
    """A tokenizer that was trained.

    path: the folder that it was written to.  size: the number of its ids, below the vocabulary that was asked for where
    the text has no more to merge.
    """

    path: Path
    size: int
    tokenizer: Tokenizer
    notices: tuple[Notice, ...] = ()


def train_tokenizer(
    texts: Texts,
    out: str | Path = DEFAULT_OUT,
    *,
    vocabulary: int | str = DEFAULT_VOCABULARY,
    morphology: Morphology = DEFAULT_MORPHOLOGY,
    language: str | Path = "tr",
    field: str = "text",
    holdout: float | str | None = None,
    on_bad_row: OnBadRow = "stop",
    leave_out: Texts | None = None,
    replace: bool = False,
    progress: bool = False,
) -> TrainedTokenizer:
    """Learn a byte-level BPE vocabulary from text, and write it to the folder `out`.

    texts: a file (.txt, .jsonl, .ndjson or .parquet, plain, .gz or .zst), a folder, a pattern, or several of them.
    vocabulary: the number of ids, as 32768 or "32k".  morphology: "strict" lets no token reach over the end of a stem
    or suffix, "soft" counts merges inside them twice, "none" knows nothing of them; with the first two, stems are
    learnt from the text and written to `out/morphology.json`.  language: whose rules cut words, "tr", "kk" or a rules
    file of the same form (docs/morphology.md).  field: of .jsonl, .ndjson and .parquet.  holdout: leave out the
    documents that `pack` holds out with the same share, as 0.005 or "0.5%".  on_bad_row: "stop" at the first row that
    is no text, or "skip" a few of them.  leave_out: files or folders of `texts` not to read.  replace: overwrite
    another tokenizer in `out`.  progress: show a progress bar, in a terminal or a notebook.

    Raises ConfigError for an argument that cannot be meant, DataError for text or rules that cannot be read,
    TokenizerError for a vocabulary out of range or where `out` holds another tokenizer.
    """
    options = read_text_options(texts, field, on_bad_row, holdout, leave_out)
    size = read_count("vocabulary", vocabulary)
    refuse_missing("out", out, *PATH)
    refuse_missing("replace", replace, bool)
    refuse_missing("morphology", morphology, str)
    refuse_unknown("morphology", morphology, MORPHOLOGIES)
    refuse_missing("language", language, *PATH)
    merges = MergeOptions(size, morphology, language)
    found, notices = carry_out(train_tokenizer_task(options, Path(out), merges, replace), progress)
    return dataclasses.replace(found, notices=notices)


def train_tokenizer_task(
    options: TextOptions, out: Path = DEFAULT_OUT, merges: MergeOptions = MergeOptions(), replace: bool = False
) -> Task[TrainedTokenizer]:
    """Do what `train_tokenizer` does, and yield its notices and its progress."""
    from lowvram.data.long_words import LONGEST_WORD
    from lowvram.units import show_bytes

    files = yield from find_texts(options)
    if not replace and (out / "tokenizer.json").exists():
        yield Notice(f"{out} holds a tokenizer; another one is written there only with `replace=True`.")
    skipped = SkippedRows(options.on_bad_row)
    learning = _learn(_Reading(files, options, skipped.bad_rows), out, merges, replace)
    tokenizer, left_out_bytes = yield from skipped.tell_beside(learning)
    if left_out_bytes:
        yield Notice(
            f"{show_bytes(left_out_bytes)} of the text were left out: runs of more than {LONGEST_WORD:,} letters, or "
            "of as many other signs, are not words, and merges are learnt from words."
        )
    yield from skipped.summarise()
    return TrainedTokenizer(out, tokenizer.size, tokenizer)


class _Reading:
    """Reads texts in another thread, one pass after another; `progress` says how far it is."""

    def __init__(self, files: Sequence[Path], options: TextOptions, bad_rows: BadRows) -> None:
        from lowvram.data.text_files import size_of

        self.files, self._options, self._bad_rows = files, options, bad_rows
        self.total, self.progress, self.is_left = sum(map(size_of, files)), Progress(_READING), threading.Event()

    def tell(self, doing: str, done: float, total: float | None, detail: str = "") -> None:
        """Set the progress; raises KeyboardInterrupt where nobody waits any more."""
        self._refuse_to_go_on()
        self.progress = Progress(doing, done, total, detail)

    def _refuse_to_go_on(self) -> None:
        if self.is_left.is_set():  # after Ctrl-C in a notebook nothing may be written any more
            raise KeyboardInterrupt

    def documents(self, doing: str, is_first: bool) -> Iterator[str]:
        """Yield the documents that are not held out.  is_first: whether bad rows are counted in this pass."""
        from lowvram.data.bad_rows import BadRows
        from lowvram.data.text import documents_of

        bad_rows = self._bad_rows if is_first else BadRows(self._bad_rows.action)
        holdout = self._options.build_holdout()

        def texts() -> Iterator[str]:
            for text in documents_of(self.files, self._options.field, keep, bad_rows):
                self._refuse_to_go_on()
                yield text
            bad_rows.finish()

        def keep(done: int, total: int | None) -> None:
            self.tell(doing, done, total)

        yield from holdout.leave(texts()) if holdout else texts()


def _learn(
    reading: _Reading, out: Path, merges: MergeOptions, replace: bool
) -> Generator[Progress, None, tuple[Tokenizer, int]]:
    """Read and merge in a thread, since most of it is native code; yield how far it is.

    Returns the tokenizer, and the bytes of words that are too long to learn from.
    """
    from lowvram.data.interruptible import wait_for
    from lowvram.data.morphology.marking import Marker
    from lowvram.data.tokenizer import check_may_train
    from lowvram.data.tokenizer import train_tokenizer as learn
    from lowvram.units import show_bytes

    left_out = [0]

    def texts(is_first: bool) -> Iterator[str]:
        yield from reading.documents(_READING, is_first)
        reading.tell(_READING, reading.total, reading.total, f"{show_bytes(reading.total)} read; merging")

    def carry_out_learning() -> Tokenizer:
        check_may_train(out, merges.vocabulary, replace)
        segmenter, rewrite = None, None
        if merges.morphology != "none":
            segmenter = _learn_stems(reading, merges.language)
            rewrite = Marker(segmenter, merges.morphology).rewrite
        tokenizer = learn(
            texts(segmenter is None),
            merges.vocabulary,
            out,
            tell_left_out=left_out.append,
            replace=replace,
            rewrite=rewrite,
        )
        if segmenter:
            segmenter.save(out / STEMS)
        else:
            (out / STEMS).unlink(missing_ok=True)
        return tokenizer

    work = wait_for(carry_out_learning)
    try:
        while True:
            yield reading.progress
            next(work)
    except StopIteration as end:
        return end.value, left_out[-1]
    finally:
        reading.is_left.set()


def _learn_stems(reading: _Reading, language: str | Path) -> Segmenter:
    """Count the words of the texts, and learn the language's stems from them."""
    from lowvram.data.morphology.marking import count_words
    from lowvram.data.morphology.rules import read_rules
    from lowvram.data.morphology.segmenter import learn_segmenter
    from lowvram.data.text_files import is_stream
    from lowvram.errors import DataError

    rules = read_rules(language)  # before minutes of reading
    if any(map(is_stream, reading.files)):
        why = "With morphology text is read twice: for its stems, and for the merges."
        raise DataError("Standard input can be read only once.", why, "Save it as a file first.")
    work = learn_segmenter(count_words(reading.documents(_COUNTING, is_first=True)), rules)
    try:
        while True:
            reading.tell(*next(work))
    except StopIteration as end:
        return end.value
