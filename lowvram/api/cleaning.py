"""Cleaning of text: texts and rules in, a folder and a frozen value out; prints nothing."""

from __future__ import annotations

import dataclasses
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowvram.api.arguments import PATH, read_paths, refuse_count, refuse_missing, refuse_type
from lowvram.api.overrides import assignments
from lowvram.api.progress import carry_out
from lowvram.api.tasks import KeptWork, Notice, Progress, Task
from lowvram.api.texts import OnBadRow, SkippedRows, TextOptions, Texts, read_text_options, split_texts

if TYPE_CHECKING:
    from lowvram.config.cleaning import CleaningRules
    from lowvram.data.clean.cleaner import CleanProgress

DEFAULT_CLEAN_OUT = Path("clean")


@dataclass(frozen=True)
class CleaningOptions:
    """Which rules clean, and where to.

    rules: a TOML file, None for the defaults; overrides: assignments laid over it.  against: evaluation sets.  replace:
    replace the result of other text or rules.
    """

    out: Path = DEFAULT_CLEAN_OUT
    rules: Path | None = None
    overrides: tuple[str, ...] = ()
    against: tuple[Path, ...] = ()
    replace: bool = False

    def load_rules(self) -> CleaningRules:
        """Return the rules; raises ConfigError for a key or value that does not exist."""
        from lowvram.config.cleaning import load_rules

        rules = load_rules(self.rules, self.overrides)
        if not self.against:
            return rules
        named = (*rules.contamination.against, *map(str, self.against))
        return rules.model_copy(update={"contamination": rules.contamination.model_copy(update={"against": named})})


@dataclass(frozen=True)
class Cleaned:
    """What was cleaned.

    path: the folder with a .jsonl for each file that was read.  page: a report to read; report: the same as plain
    tables.  documents_read, documents: before and after; removed: documents by rule.  text_bytes: of the files written.
    """

    path: Path
    page: Path
    documents_read: int
    documents: int
    text_bytes: int
    removed: Mapping[str, int]
    report: Mapping[str, Any]
    notices: tuple[Notice, ...] = ()


def clean(
    texts: Texts,
    out: str | Path = DEFAULT_CLEAN_OUT,
    *,
    rules: str | Path | None = None,
    overrides: Mapping[str, object] | Sequence[str] = (),
    against: Texts | None = None,
    field: str = "text",
    on_bad_row: OnBadRow = "skip",
    leave_out: Texts | None = None,
    replace: bool = False,
    processes: int = 1,
    progress: bool = False,
) -> Cleaned:
    """Clean text into the folder `out`; a cleaning that was interrupted goes on where it stopped.

    texts, field, processes, progress: as for `pack`.  rules: a TOML file of rules; overrides: such as
    {"length.least_words": 5, "near_duplicates.on": False}.  against: evaluation sets; documents that share thirteen
    words in a row with one of them are removed.  on_bad_row: "skip" rows that are no text, up to 10 or 1 % of rows and
    text, and 10,000 rows, or "stop" at the first.  leave_out: files or folders of `texts` not to read.  replace:
    replace the result of other text or other rules in `out`.

    Raises ConfigError for an argument or a rule that cannot be meant, DataError for text that cannot be read, where
    `out` holds something else or nothing is left, MachineError where a package is missing, BusyError, DiskFullError.
    """
    options = read_text_options(texts, field, on_bad_row, leave_out=leave_out)
    refuse_missing("out", out, *PATH)
    refuse_type("rules", rules, *PATH)
    refuse_missing("replace", replace, bool)
    refuse_missing("processes", processes, int)
    refuse_count("processes", processes)
    named = read_paths("against", against) if against is not None else ()
    chosen = Path(rules) if rules is not None else None
    cleaning = CleaningOptions(Path(out), chosen, tuple(assignments(overrides)), named, replace)
    found, notices = carry_out(clean_task(options, cleaning, processes), progress)
    return dataclasses.replace(found, notices=notices)


def clean_task(options: TextOptions, cleaning: CleaningOptions, processes: int | None = None) -> Task[Cleaned]:
    """Do what `clean` does, and yield its notices and its progress.  processes: None for one per core."""
    from lowvram.data.clean.cleaner import clean_each_part
    from lowvram.data.clean.work_folder import refuse_text_inside
    from lowvram.data.text_files import REPORT_PAGE, find_text_files, is_stream

    rules = cleaning.load_rules()
    files, left_out = yield from split_texts(options)
    refuse_text_inside(cleaning.out, [path for path in options.paths if not is_stream(path)])
    against = [Path(name) for name in rules.contamination.against] if rules.contamination.on else []
    for sentence in find_text_files(against).describe():
        yield Notice(f"Of the evaluation sets: {sentence}")
    skipped = SkippedRows(options.on_bad_row)

    def note() -> list[str]:
        left = [f"Left out as asked: {file}." for file in sorted(left_out)]
        return [*left, *(notice.text for notice in skipped.summarise())]

    work = clean_each_part(
        files,
        cleaning.out,
        rules,
        options.field,
        processes,
        replace=cleaning.replace,
        bad_rows=skipped.bad_rows,
        notes=note,
        leave_out=left_out,
    )
    report = yield from skipped.tell_beside(_show(work))
    yield from skipped.summarise()
    return Cleaned(
        cleaning.out,
        cleaning.out / REPORT_PAGE,
        report["documents_read"],
        report["documents"],
        report["bytes"],
        {row["rule"]: row["documents_removed"] for row in report["rules"]},
        report,
    )


def _show(work: Generator[CleanProgress, None, dict[str, Any]]) -> Task[dict[str, Any]]:
    """Yield the progress, and notices of what an earlier start has done."""
    from lowvram.data.clean.cleaner import COMPARING

    yield Progress("Cleaning")
    kept, stage = KeptWork("document"), ""
    while True:
        try:
            found = next(work)
        except StopIteration as end:
            yield from kept.tell()
            if stage == COMPARING:
                yield Notice("The result was finished before; the text is the same, and nothing was written.")
            return end.value
        stage = found.stage
        yield from kept.count(found.reused)
        yield Progress(found.stage, found.done, found.total or None, found.detail)
