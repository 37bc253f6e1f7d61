"""Text as shards of tokens: texts and a tokenizer in, folders and a frozen value out; prints nothing."""

from __future__ import annotations

import dataclasses
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowvram.api.arguments import PATH, refuse_count, refuse_missing, refuse_type
from lowvram.api.progress import carry_out
from lowvram.api.tasks import KeptWork, Notice, Progress, Task
from lowvram.api.texts import OnBadRow, SkippedRows, TextOptions, Texts, find_texts, read_text_options

if TYPE_CHECKING:
    from lowvram.data.shards import PackProgress, ShardSet

DEFAULT_TOKENIZER, DEFAULT_OUT = Path("tok"), Path("shards")


@dataclass(frozen=True)
class PackedShards:
    """A folder of shards.  text_bytes: of the documents in UTF-8."""

    path: Path
    tokens: int
    documents: int
    text_bytes: int

    @property
    def bytes_per_token(self) -> float:
        """The bytes of text that a token stands for; BOS tokens are left out."""
        return self.text_bytes / max(1, self.tokens - self.documents)


@dataclass(frozen=True)
class Packed:
    """What was packed.

    shards: one folder; with a holdout two, the training data and the documents that are held out.  has_validation:
    whether a folder of held-out documents is among them or beside them.  data: what `fit(data=...)` takes to find these
    shards and their tokenizer; None where they do not lie as it looks for them.
    """

    shards: tuple[PackedShards, ...]
    has_validation: bool
    data: Path | None
    notices: tuple[Notice, ...] = ()


def pack(
    texts: Texts,
    out: str | Path = DEFAULT_OUT,
    *,
    tokenizer: str | Path = DEFAULT_TOKENIZER,
    holdout: float | str | None = None,
    field: str = "text",
    on_bad_row: OnBadRow = "stop",
    exclude: str | Path | None = None,
    leave_out: Texts | None = None,
    replace: bool = False,
    processes: int = 1,
    progress: bool = False,
) -> Packed:
    """Tokenize text into shards in the folder `out`; a packing that was interrupted goes on where it stopped.

    texts: a file (.txt, .jsonl, .ndjson or .parquet, plain, .gz or .zst), a folder, a pattern, or several of them;
    documents end at a blank line, or are `field` of a row.  tokenizer: its folder.  holdout: the share of the documents
    that is held out, as 0.005 or "0.5%": the shards are then in `out/train` and `out/valid`.  on_bad_row: "stop" at the
    first row that is no text, or "skip" a few of them.  exclude: a list of documents that are left out, by the hash of
    their text: part of what `look` writes, or the excluded.json of other shards.  leave_out: files or folders of
    `texts` not to read.  replace: replace shards of another text in `out`.  processes: with more than one, a script
    must guard its entry with `if __name__ == "__main__":`.  progress: show a progress bar, in a terminal or a notebook.

    Raises ConfigError for an argument that cannot be meant, TokenizerError where there is no tokenizer, DataError for
    text that cannot be read or where `out` holds something else, BusyError, DiskFullError.
    """
    options = read_text_options(texts, field, on_bad_row, holdout, leave_out)
    refuse_arguments(out, tokenizer, exclude, replace, processes)
    listed = Path(exclude) if exclude is not None else None
    found, notices = carry_out(pack_task(options, Path(tokenizer), Path(out), replace, processes, listed), progress)
    return dataclasses.replace(found, notices=notices)


def refuse_arguments(out: object, tokenizer: object, exclude: object, replace: object, processes: object) -> None:
    """Raise ConfigError for an argument of `pack` or `mix` that cannot be meant."""
    refuse_missing("out", out, *PATH)
    refuse_missing("tokenizer", tokenizer, *PATH)
    refuse_type("exclude", exclude, *PATH)
    refuse_missing("replace", replace, bool)
    refuse_missing("processes", processes, int)
    refuse_count("processes", processes)


def pack_task(
    options: TextOptions,
    tokenizer: Path = DEFAULT_TOKENIZER,
    out: Path = DEFAULT_OUT,
    replace: bool = False,
    processes: int | None = None,
    exclude: Path | None = None,
) -> Task[Packed]:
    """Do what `pack` does, and yield its notices and its progress.  processes: None for one per core."""
    from lowvram.data.exclusion_list import Exclusion
    from lowvram.data.hf_tokenizer import load_tokenizer
    from lowvram.data.shards import pack_each_shard
    from lowvram.evaluate.verdict import warn_of_few_tokens

    loaded, exclusion = load_tokenizer(tokenizer), Exclusion(read_excluded(exclude)) if exclude is not None else None
    files = yield from find_texts(options)
    skipped, holdout = SkippedRows(options.on_bad_row), options.build_holdout()
    packing = pack_each_shard(
        files,
        loaded,
        out,
        options.field,
        processes,
        holdout=holdout,
        replace=replace,
        bad_rows=skipped.bad_rows,
        exclusion=exclusion,
    )
    sides = yield from skipped.tell_beside(show_packing(packing))
    yield from skipped.summarise()
    if exclusion is not None:
        yield from tell_excluded(len(exclusion.rows), len(exclusion.listed), exclusion.missing)
    is_split = holdout is not None
    if is_split and (warning := warn_of_few_tokens(sides[1].tokens)):
        yield Notice(f"{warning} Give `holdout` a larger share, or pack more text.", "warning")
    has_validation = is_split or out.name == "valid" or (out.parent / "valid").is_dir()
    home = out.parent if not is_split and out.name in ("train", "valid") else out
    return Packed(tuple(map(describe_shards, sides)), has_validation, find_data(home, tokenizer))


def read_excluded(file: Path) -> dict[str, dict[str, Any]]:
    """Return the rows of a list of documents to leave out by their hashes, each with `why`; raises DataError."""
    from lowvram.data.exclusion_list import HASH, read_reasons

    return {row[HASH]: row for row in read_reasons(file)}


def tell_excluded(left_out: int, listed: int, missing: int) -> Iterator[Notice]:
    """Yield how many documents were left out, and how many of the listed texts did not occur."""
    from lowvram.units import count_of

    yield Notice(f"Left out {count_of(left_out, 'listed document')}.")
    if missing:
        yield Notice(f"{missing:,} of {count_of(listed, 'listed text')} do not occur in what was packed.", "warning")


def show_packing(
    packing: Generator[PackProgress, None, tuple[ShardSet, ...]], what: str = "Packing"
) -> Task[Sequence[ShardSet]]:
    """Turn a packing into progress, and a notice of shards that an earlier start has finished.

    what: what is done, in words.
    """
    from lowvram.units import show_count

    yield Progress(what)
    kept = KeptWork("shard")
    while True:
        try:
            found = next(packing)
        except StopIteration as end:
            yield from kept.tell()
            return end.value
        yield from kept.count(found.reused)
        yield Progress(what, found.read_bytes, found.total_bytes or None, f"{show_count(found.tokens)} tokens")


def describe_shards(shards: ShardSet) -> PackedShards:
    """Return what a folder of shards holds."""
    return PackedShards(shards.directory, shards.tokens, shards.documents, shards.text_bytes)


def find_data(home: Path, tokenizer: Path) -> Path | None:
    """Return `home` where `fit` finds shards and this tokenizer from it, else None."""
    from lowvram.errors import ConfigError
    from lowvram.fit.folders import find_folders

    try:
        found = find_folders(home)
    except ConfigError:  # shards in it and others in its folder train
        return None
    is_found = found.is_packed and found.tokenizer is not None and found.tokenizer.resolve() == tokenizer.resolve()
    return home if is_found else None
