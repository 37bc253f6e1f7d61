"""A tokenizer that is learnt from text: texts in, a folder and a frozen value out; prints nothing."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple, get_args

from lowvram.api.arguments import PATH, read_count, read_size, refuse_missing, refuse_type
from lowvram.api.merge_text import DEFAULT_SAMPLE, SampleOptions, find_merge_sources, plan_portions
from lowvram.api.mix_options import read_weights
from lowvram.api.progress import carry_out
from lowvram.api.tasks import Notice, Progress, Task
from lowvram.api.texts import OnBadRow, SkippedRows, TextOptions, Texts, read_text_options
from lowvram.errors import refuse_unknown

if TYPE_CHECKING:
    from lowvram.data.bad_rows import BadRows
    from lowvram.data.mix.portions import Portion
    from lowvram.data.mix.sources import TextSource
    from lowvram.data.morphology.rules import Rules
    from lowvram.data.morphology.segmenter import Segmenter
    from lowvram.data.tokenizer import Tokenizer

DEFAULT_VOCABULARY, DEFAULT_OUT = 32768, Path("tok")
_READING, _COUNTING = "Learning the vocabulary", "Counting words"
Morphology = Literal["none", "soft", "strict"]
MORPHOLOGIES: tuple[Morphology, ...] = get_args(Morphology)
# With the same compute a small model predicts text better after it than after plain merges (docs/morphology.md).
DEFAULT_MORPHOLOGY: Morphology = "soft"
# Beside tokenizer.json: the stems that were learnt for its merges.
STEMS = "morphology.json"


@dataclass(frozen=True)
class MergeOptions:
    """How merges are learnt.

    vocabulary: the number of ids.  morphology: "strict" lets no token reach over the end of a stem or suffix, "soft"
    counts merges inside them twice, "none" knows nothing of them; None is "soft", and "none" for text that can be read
    only once.  language: whose rules cut words: a code such as "tr", or a rules file.  sample: which text they are
    learnt from.
    """

    vocabulary: int = DEFAULT_VOCABULARY
    morphology: Morphology | None = None
    language: str | Path = "tr"
    sample: SampleOptions = dataclasses.field(default_factory=SampleOptions)


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
    morphology: Morphology | None = None,
    language: str | Path = "tr",
    sample: int | str = DEFAULT_SAMPLE,
    weights: Mapping[str, float | str] | None = None,
    temperature: float | None = None,
    levels: int = 1,
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
    learnt from the text and written to `out/morphology.json`.  None is "soft", and "none" for several sources, for
    standard input and for text without words.  language: whose rules cut words, "tr", "kk" or a rules file of the same
    form (docs/morphology.md).  sample: the most bytes of text that are learnt from, as "1GB"; of more text, pieces of
    documents are taken by a hash of their words.  weights, temperature, levels: how much is learnt from each source in
    a folder, such as each language, as for `mix`; shares are of characters, and a source that is too small for its
    share is read several times.  field: of .jsonl, .ndjson and .parquet.  holdout: leave out the documents that `pack`
    holds out with the same share, as 0.005 or "0.5%".  on_bad_row: "stop" at the first row that is no text, or "skip" a
    few of them.  leave_out: files or folders of `texts` not to read.  replace: overwrite another tokenizer in `out`.
    progress: show a progress bar, in a terminal or a notebook.

    Raises ConfigError for an argument that cannot be meant, DataError for text or rules that cannot be read, and for
    sources and shares that cannot be, TokenizerError for a vocabulary out of range or where `out` holds another
    tokenizer.
    """
    options = read_text_options(texts, field, on_bad_row, holdout, leave_out)
    size = read_count("vocabulary", vocabulary)
    refuse_missing("out", out, *PATH)
    refuse_missing("replace", replace, bool)
    refuse_type("morphology", morphology, str)
    if morphology is not None:
        refuse_unknown("morphology", morphology, MORPHOLOGIES)
    refuse_missing("language", language, *PATH)
    wanted = SampleOptions(read_size("sample", sample), read_weights(weights or {}), temperature, levels)
    merges = MergeOptions(size, morphology, language, wanted)
    found, notices = carry_out(train_tokenizer_task(options, Path(out), merges, replace), progress)
    return dataclasses.replace(found, notices=notices)


def train_tokenizer_task(
    options: TextOptions, out: Path = DEFAULT_OUT, merges: MergeOptions = MergeOptions(), replace: bool = False
) -> Task[TrainedTokenizer]:
    """Do what `train_tokenizer` does, and yield its notices and its progress."""
    from lowvram.data.long_words import LONGEST_WORD
    from lowvram.data.morphology.rules import read_rules
    from lowvram.data.text_files import is_stream
    from lowvram.data.tokenizer import check_may_train
    from lowvram.units import show_bytes

    check_may_train(out, merges.vocabulary, replace)
    sources = yield from find_merge_sources(options, merges.sample, out)
    if not replace and (out / "tokenizer.json").exists():
        yield Notice(f"{out} holds a tokenizer; another one is written there only with `replace=True`.")
    skipped, portions = SkippedRows(options.on_bad_row), None
    has_stream = any(is_stream(file) for source in sources for file in source.files)
    morphology = merges.morphology or ("none" if has_stream or merges.sample.has_sources else DEFAULT_MORPHOLOGY)
    rules = None
    if morphology != "none":
        if has_stream:
            _refuse_stream()
        rules = read_rules(merges.language)  # before minutes of reading
    elif merges.morphology is None and has_stream:
        why = "What is read only once, such as standard input, gives plain merges"
        yield Notice(f"{why}; save it as a file to learn from its stems and suffixes too.")
    if not has_stream:
        plan = plan_portions(sources, options, merges.sample, skipped.bad_rows)
        portions = yield from skipped.tell_beside(plan)
    reading = _Reading(sources, options, portions, merges.sample.most_bytes, skipped.bad_rows)
    marking = _Marking(rules, morphology, is_wished=merges.morphology is not None) if rules else None
    learning = _learn(reading, out, merges.vocabulary, marking, replace)
    tokenizer, left_out_bytes = yield from skipped.tell_beside(learning)
    if marking and not (out / STEMS).exists():
        yield Notice("The text has no words that occur twice, so merges are plain: they know of no stems and suffixes.")
    if left_out_bytes:
        yield Notice(
            f"{show_bytes(left_out_bytes)} of the text were left out: runs of more than {LONGEST_WORD:,} letters, or "
            "of as many other signs, are not words, and merges are learnt from words."
        )
    if reading.is_cut:
        size = show_bytes(merges.sample.most_bytes)
        yield Notice(f"The first {size} of the text were learnt from; `sample` changes that.")
    yield from skipped.summarise()
    return TrainedTokenizer(out, tokenizer.size, tokenizer)


class _Marking(NamedTuple):
    """How merges respect stems and suffixes.  rules: which cut words.  is_wished: whether the user named it."""

    rules: Rules
    morphology: Morphology
    is_wished: bool


class _Reading:
    """Reads texts in another thread, one pass after another; `progress` says how far it is.

    portions: what is learnt from each source; None where text cannot be read twice, and its beginning is learnt from.
    """

    def __init__(
        self,
        sources: Sequence[TextSource],
        options: TextOptions,
        portions: Mapping[str, Portion] | None,
        most_bytes: int,
        bad_rows: BadRows,
    ) -> None:
        from lowvram.data.text_files import size_of

        self._sources, self._options, self._portions, self._most_bytes = sources, options, portions, most_bytes
        self._bad_rows = bad_rows
        self.total = sum(size_of(file) for source in sources for file in source.files)
        self.progress, self.is_left, self.is_cut = Progress(_READING), threading.Event(), False

    def tell(self, doing: str, done: float, total: float | None, detail: str = "") -> None:
        """Set the progress; raises KeyboardInterrupt where nobody waits any more."""
        self._refuse_to_go_on()
        self.progress = Progress(doing, done, total, detail)

    def _refuse_to_go_on(self) -> None:
        if self.is_left.is_set():  # after Ctrl-C in a notebook nothing may be written any more
            raise KeyboardInterrupt

    def documents(self, doing: str) -> Iterator[str]:
        """Yield what is learnt from, without documents that are held out."""
        from lowvram.data.bad_rows import BadRows

        # Bad rows are told in the first pass, which chose the portions.
        bad_rows = BadRows(self._bad_rows.action) if self._portions else self._bad_rows
        holdout, left_bytes = self._options.build_holdout(), self._most_bytes
        for source, text in self._read(doing, bad_rows):
            self._refuse_to_go_on()
            if holdout and holdout.takes(text):
                continue
            if self._portions:
                yield from self._portions[source].take(text)
                continue
            if left_bytes <= 0:
                self.is_cut = True
                return
            left_bytes -= len(text.encode())
            yield text
        bad_rows.finish()
        if holdout:
            holdout.check()

    def _read(self, doing: str, bad_rows: BadRows) -> Iterator[tuple[str, str]]:
        """Yield each document with the name of its source."""
        from lowvram.data.text import documents_of
        from lowvram.data.text_files import size_of

        before = 0
        for source in self._sources:

            def keep(done: int, total: int | None, before: int = before) -> None:
                self.tell(doing, before + done, self.total or None)

            for text in documents_of(source.files, self._options.field, keep, bad_rows):
                yield source.name, text
            before += sum(map(size_of, source.files))


def _learn(
    reading: _Reading, out: Path, vocabulary: int, marking: _Marking | None, replace: bool
) -> Generator[Progress, None, tuple[Tokenizer, int]]:
    """Read and merge in a thread, since most of it is native code; yield how far it is.

    marking: None for plain merges.
    Returns the tokenizer, and the bytes of words that are too long to learn from.
    """
    from lowvram.data.interruptible import wait_for
    from lowvram.data.morphology.marking import Marker
    from lowvram.data.tokenizer import train_tokenizer as learn
    from lowvram.units import show_bytes

    left_out = [0]

    def texts() -> Iterator[str]:
        yield from reading.documents(_READING)
        reading.tell(_READING, reading.total, reading.total, f"{show_bytes(reading.total)} read; merging")

    def carry_out_learning() -> Tokenizer:
        segmenter, rewrite = None, None
        if marking:
            segmenter = _learn_stems(reading, marking)
        if marking and segmenter and marking.morphology != "none":
            rewrite = Marker(segmenter, marking.morphology).rewrite
        tokenizer = learn(texts(), vocabulary, out, tell_left_out=left_out.append, replace=replace, rewrite=rewrite)
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


def _learn_stems(reading: _Reading, marking: _Marking) -> Segmenter | None:
    """Count the words of the texts, and learn stems; None where there are none and the user has not asked for them."""
    from lowvram.data.morphology.learning import NoWordsError
    from lowvram.data.morphology.marking import count_words
    from lowvram.data.morphology.segmenter import learn_segmenter

    work = learn_segmenter(count_words(reading.documents(_COUNTING)), marking.rules)
    try:
        while True:
            reading.tell(*next(work))
    except StopIteration as end:
        return end.value
    except NoWordsError:
        if marking.is_wished:
            raise
        return None


def _refuse_stream() -> None:
    from lowvram.errors import DataError

    why = "With morphology text is read several times: for its stems, and for the merges."
    raise DataError("Standard input can be read only once.", why, "Save it as a file first.")
