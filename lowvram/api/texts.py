"""What `train_tokenizer` and `pack` share: which texts are read, and what is found in them that is no text."""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from lowvram.api.arguments import read_paths, read_share, refuse_missing
from lowvram.api.progress import carry_out
from lowvram.api.tasks import Notice, Progress, Result, Task
from lowvram.errors import DataError, argument, refuse_unknown

if TYPE_CHECKING:
    from lowvram.data.bad_rows import BadRow, BadRows
    from lowvram.data.holdout import Holdout

Texts = str | Path | Sequence[str | Path]
OnBadRow = Literal["stop", "skip"]
# As many rows that are skipped are shown.
_SHOWN = 5
_HINT = '`on_bad_row="skip"` leaves such rows out, and `check_texts` lists them all.'
_FILE_HINT = "Such a file is never used in part; `leave_out` leaves it out, and `check_texts` lists all such files."


@dataclass(frozen=True)
class TextOptions:
    """Which texts are read, and how.

    paths: files, folders and patterns.  field: of .jsonl, .ndjson and .parquet.  on_bad_row: "stop" at the first row
    that is no text, or "skip" such rows, up to 10 or 1 % of rows and text, and 10,000 rows.  holdout: the share of the
    documents that is held out for validation, None for none.  leave_out: files and folders of `paths` not to read.
    """

    paths: tuple[Path, ...]
    field: str = "text"
    on_bad_row: OnBadRow = "stop"
    holdout: float | None = None
    leave_out: tuple[Path, ...] = ()

    def build_holdout(self) -> Holdout | None:
        """Return what chooses the documents that are held out, None where none are."""
        from lowvram.data.holdout import Holdout

        return Holdout(self.holdout) if self.holdout is not None else None


def read_text_options(
    texts: Texts,
    field: str,
    on_bad_row: OnBadRow = "stop",
    holdout: float | str | None = None,
    leave_out: Texts | None = None,
) -> TextOptions:
    """Return the options of a caller in Python; raises ConfigError naming the argument that cannot be meant."""
    refuse_missing("field", field, str)
    refuse_missing("on_bad_row", on_bad_row, str)
    refuse_unknown("on_bad_row", on_bad_row, get_args(OnBadRow))
    left_out = read_paths("leave_out", leave_out) if leave_out is not None else ()
    return TextOptions(read_paths("texts", texts), field, on_bad_row, read_share("holdout", holdout), left_out)


@dataclass(frozen=True)
class TextCheck:
    """What is no text in some files.

    files, rows: how many were read.  bad: how many rows are no text, and summary: how many of each kind.
    can_be_skipped: whether `on_bad_row="skip"` accepts them; rest_can_be_skipped: whether it does with `unreadable`,
    the files that cannot be read to their end, in `leave_out`.  bad_rows: each of them, in order.
    """

    files: int
    rows: int
    bad: int
    summary: str
    can_be_skipped: bool
    rest_can_be_skipped: bool = True
    unreadable: tuple[Path, ...] = ()
    bad_rows: tuple[BadRow, ...] = ()
    notices: tuple[Notice, ...] = ()


def check_texts(
    texts: Texts, *, field: str = "text", leave_out: Texts | None = None, progress: bool = False
) -> TextCheck:
    """Read texts to their end and list every row that is no text; nothing is written.

    texts, field, leave_out: as for `pack`.  progress: show a progress bar, in a terminal or a notebook.
    Raises DataError for files that are not there.
    """
    bad_rows: list[BadRow] = []
    found, notices = carry_out(
        check_texts_task(read_text_options(texts, field, leave_out=leave_out), bad_rows.append), progress
    )
    return dataclasses.replace(found, bad_rows=tuple(bad_rows), notices=notices)


def check_texts_task(options: TextOptions, tell: Callable[[BadRow], None]) -> Task[TextCheck]:
    """Do what `check_texts` does, and yield its notices and its progress.  tell: called with each bad row."""
    from lowvram.data.bad_rows import BadRows

    files, bad_rows = (yield from find_texts(options)), BadRows("report", tell)
    yield Progress("Reading")
    for _, progress in read_beside(files, options.field, bad_rows, "Reading"):
        yield progress
    yield from map(Notice, bad_rows.describe_encodings())
    return TextCheck(
        len(files),
        bad_rows.rows,
        bad_rows.count,
        bad_rows.describe(),
        bad_rows.can_be_skipped,
        bad_rows.rest_can_be_skipped,
        tuple(bad_rows.ended_files),
    )


def read_beside(files: Sequence[Path], field: str, bad_rows: BadRows, doing: str) -> Iterator[tuple[str, Progress]]:
    """Yield each document, and how far the reading is.  doing: what is done, in words."""
    from lowvram.data.text import documents_of

    progress = Progress(doing)

    def keep(done: int, total: int | None) -> None:
        nonlocal progress
        progress = Progress(doing, done, total)

    for text in documents_of(files, field, keep, bad_rows):
        yield text, progress


def find_texts(options: TextOptions) -> Task[list[Path]]:
    """Return the files that are meant, and yield what was passed over or left out."""
    files, left_out = yield from split_texts(options)
    return [file for file in files if file not in left_out]


def split_texts(options: TextOptions) -> Task[tuple[list[Path], frozenset[Path]]]:
    """Return all files, and those of them that are left out; yield what was passed over or left out.

    Raises DataError where `leave_out` names none of them, or all.
    """
    from lowvram.data.text_files import find_text_files

    found = find_text_files(options.paths)
    for sentence in found.describe():
        yield Notice(sentence)
    left_out = choose_left_out(found.files, options.leave_out)
    yield from tell_left_out([file for file in found.files if file in left_out])
    return found.files, left_out


def tell_left_out(files: Sequence[Path]) -> Iterator[Notice]:
    """Yield a notice of the files that `leave_out` names, if there are any."""
    from lowvram.data.text_files import list_few

    if files:
        yield Notice(f"Left out as asked: {list_few(list(map(str, files)))}.")


def choose_left_out(files: Sequence[Path], leave_out: Sequence[Path]) -> frozenset[Path]:
    """Return which of the files are left out; raises DataError where `leave_out` names none of them, or all."""
    if not leave_out:
        return frozenset()
    places = {named.resolve(): named for named in leave_out}
    meant, left_out = set[Path](), set[Path]()
    for file in files:
        place = file.resolve()
        if found := places.keys() & {place, *place.parents}:
            meant |= found
            left_out.add(file)
    for place, named in places.items():
        if place not in meant:
            what = f"{argument('leave_out', named)} names no file that is read."
            raise DataError(what, "", "Name a file or a folder of the text.")
    if len(left_out) == len(files):
        raise DataError("All files are left out.", f"{argument('leave_out')} names every one.", "Name fewer there.")
    return frozenset(left_out)


class SkippedRows:
    """Rows that are no text, while texts are read: `bad_rows` decides what is done with them, notices tell of it."""

    def __init__(self, on_bad_row: OnBadRow) -> None:
        from lowvram.data.bad_rows import BadRows

        self.bad_rows = BadRows(on_bad_row, self._keep, _HINT, _FILE_HINT)
        self._untold: deque[BadRow] = deque()
        self._kept = 0

    def _keep(self, row: BadRow) -> None:
        self._kept += 1
        if self._kept <= _SHOWN:
            self._untold.append(row)

    def tell_beside(self, work: Task[Result]) -> Task[Result]:
        """Do the work that reads texts; yield its progress, and a notice of each of the first rows that it skips."""
        from lowvram.errors import LowvramError

        while True:
            try:
                progress = next(work)
            except StopIteration as end:
                yield from self._tell_new()
                return end.value
            except LowvramError:
                yield from self._tell_new()
                raise
            yield from self._tell_new()
            yield progress

    def _tell_new(self) -> Iterator[Notice]:
        while self._untold:
            yield Notice(f"Skipped: {self._untold.popleft().what}")

    def summarise(self) -> Iterator[Notice]:
        """Yield notices of files in other encodings, and of how many rows were skipped, if any were."""
        from lowvram.data.bad_rows import FEW
        from lowvram.units import count_of

        found = self.bad_rows
        yield from map(Notice, found.describe_encodings())
        if found.count:
            few = (
                f" That is more than 1 %; up to {FEW} rows are always skipped." if found.is_more_than_its_share else ""
            )
            yield Notice(f"Skipped {found.count:,} of {count_of(found.rows, 'row')}: {found.describe()}.{few}")
