"""A tokenizer that is learnt from text: texts in, a folder and a frozen value out; prints nothing."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lowvram.api.arguments import PATH, read_count, refuse_missing
from lowvram.api.progress import carry_out
from lowvram.api.tasks import Notice, Progress, Task
from lowvram.api.texts import OnBadRow, SkippedRows, TextOptions, Texts, find_texts, read_text_options

if TYPE_CHECKING:
    from lowvram.data.bad_rows import BadRows
    from lowvram.data.tokenizer import Tokenizer

DEFAULT_VOCABULARY, DEFAULT_OUT = 32768, Path("tok")
_READING = "Learning the vocabulary"


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
    field: str = "text",
    holdout: float | str | None = None,
    on_bad_row: OnBadRow = "stop",
    leave_out: Texts | None = None,
    replace: bool = False,
    progress: bool = False,
) -> TrainedTokenizer:
    """Learn a byte-level BPE vocabulary from text, and write it to the folder `out`.

    texts: a file (.txt, .jsonl, .ndjson or .parquet, plain, .gz or .zst), a folder, a pattern, or several of them.
    vocabulary: the number of ids, as 32768 or "32k".  field: of .jsonl, .ndjson and .parquet.  holdout: leave out the
    documents that `pack` holds out with the same share, as 0.005 or "0.5%".  on_bad_row: "stop" at the first row that
    is no text, or "skip" a few of them.  leave_out: files or folders of `texts` not to read.  replace: overwrite
    another tokenizer in `out`.  progress: show a progress bar, in a terminal or a notebook.

    Raises ConfigError for an argument that cannot be meant, DataError for text that cannot be read, TokenizerError for
    a vocabulary out of range or where `out` holds another tokenizer.
    """
    options, size = (
        read_text_options(texts, field, on_bad_row, holdout, leave_out),
        read_count("vocabulary", vocabulary),
    )
    refuse_missing("out", out, *PATH)
    refuse_missing("replace", replace, bool)
    found, notices = carry_out(train_tokenizer_task(options, Path(out), size, replace), progress)
    return dataclasses.replace(found, notices=notices)


def train_tokenizer_task(
    options: TextOptions, out: Path = DEFAULT_OUT, vocabulary: int = DEFAULT_VOCABULARY, replace: bool = False
) -> Task[TrainedTokenizer]:
    """Do what `train_tokenizer` does, and yield its notices and its progress."""
    from lowvram.data.long_words import LONGEST_WORD
    from lowvram.units import show_bytes

    files = yield from find_texts(options)
    if not replace and (out / "tokenizer.json").exists():
        yield Notice(f"{out} holds a tokenizer; another one is written there only with `replace=True`.")
    skipped = SkippedRows(options.on_bad_row)
    learning = _learn(files, options, out, vocabulary, replace, skipped.bad_rows)
    tokenizer, left_out_bytes = yield from skipped.tell_beside(learning)
    if left_out_bytes:
        yield Notice(
            f"{show_bytes(left_out_bytes)} of the text were left out: runs of more than {LONGEST_WORD:,} letters, or "
            "of as many other signs, are not words, and merges are learnt from words."
        )
    yield from skipped.summarise()
    return TrainedTokenizer(out, tokenizer.size, tokenizer)


def _learn(
    files: Sequence[Path], options: TextOptions, out: Path, vocabulary: int, replace: bool, bad_rows: BadRows
) -> Generator[Progress, None, tuple[Tokenizer, int]]:
    """Read and merge in a thread, since most of it is native code; yield how far it is.

    Returns the tokenizer, and the bytes of words that are too long to learn from.
    """
    from lowvram.data.interruptible import wait_for
    from lowvram.data.text import documents_of
    from lowvram.data.text_files import size_of
    from lowvram.data.tokenizer import train_tokenizer as learn
    from lowvram.units import show_bytes

    total = sum(map(size_of, files))
    progress, is_left, left_out = Progress(_READING), threading.Event(), [0]

    def keep(done: float, of: float | None, detail: str = "") -> None:
        nonlocal progress
        progress = Progress(_READING, done, of, detail)

    def texts() -> Iterator[str]:
        for text in documents_of(files, options.field, keep, bad_rows):
            if is_left.is_set():  # after Ctrl-C in a notebook nothing may be written any more
                raise KeyboardInterrupt
            yield text
        bad_rows.finish()
        keep(total, total, f"{show_bytes(total)} read; merging")

    holdout = options.build_holdout()
    learnt_from = holdout.leave(texts()) if holdout else texts()
    work = wait_for(lambda: learn(learnt_from, vocabulary, out, tell_left_out=left_out.append, replace=replace))
    try:
        while True:
            yield progress
            next(work)
    except StopIteration as end:
        return end.value, left_out[-1]
    finally:
        is_left.set()
