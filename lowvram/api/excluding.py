"""Shards without some of their documents: a list in, a new folder of shards out; prints nothing."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowvram.api.packing import DEFAULT_TOKENIZER, PackedShards, describe_shards, find_data
from lowvram.api.tasks import Notice, Task, count_progress

if TYPE_CHECKING:
    from lowvram.data.shard_set import ShardSet
    from lowvram.data.tokenizer import Tokenizer


@dataclass(frozen=True)
class ExcludeOptions:
    """Which documents are left out.

    listed: a list of scored documents, of which are meant: the so many strangest, those above a number of bits per
    byte, the so many most boring, those below.  hashes: hashes of documents, and files of which all are meant.
    """

    listed: Path | None = None
    strangest: int | None = None
    above: float | None = None
    boring: int | None = None
    below: float | None = None
    hashes: tuple[str, ...] = ()


@dataclass(frozen=True)
class ExcludedDocuments:
    """What was left out, and the shards that are left.

    path: the new folder.  shards: in it, one folder or train and valid.  documents, tokens, text_bytes: left out, all
    copies included.  missing: how many listed texts are not in the shards.  data: what `fit(data=...)` takes.
    """

    path: Path
    shards: tuple[PackedShards, ...]
    documents: int
    tokens: int
    text_bytes: int
    missing: int
    data: Path | None
    notices: tuple[Notice, ...] = ()


def exclude(
    shards: str | Path,
    out: str | Path,
    *,
    listed: str | Path | None = None,
    strangest: int | None = None,
    above: float | None = None,
    boring: int | None = None,
    below: float | None = None,
    hashes: str | Path | Sequence[str | Path] = (),
    tokenizer: str | Path | None = None,
    replace: bool = False,
    progress: bool = False,
) -> ExcludedDocuments:
    """Write the folder of shards `out` that has what `shards` has, without some documents; `shards` stays as it is.

    listed: the list that `look` wrote; strangest, above, boring and below say which of its rows are meant.  hashes:
    SHA-256 of documents in NFC and UTF-8, or files that name them, all of which are meant.  Every copy of a listed text
    is left out.  Of a split folder the training data loses documents; what is held out stays.  tokenizer: the folder of
    the one that the shards were packed with; None: the one beside them, or `tok`.  replace: replace other shards in
    `out`.  If it is interrupted, the same call goes on.
    Raises ConfigError, DataError where nothing would be left or none of the documents is there, TokenizerError,
    BusyError, DiskFullError.
    """
    from lowvram.api.arguments import PATH, refuse_count, refuse_missing, refuse_type
    from lowvram.api.progress import carry_out

    for name, path in (("shards", shards), ("out", out)):
        refuse_missing(name, path, *PATH)
    for name, given in (("listed", listed), ("tokenizer", tokenizer)):
        refuse_type(name, given, *PATH)
    refuse_count("strangest", strangest)
    refuse_count("boring", boring)
    refuse_type("above", above, int, float)
    refuse_type("below", below, int, float)
    refuse_missing("replace", replace, bool)
    refuse_missing("hashes", hashes, *PATH, list, tuple)
    words = (hashes,) if isinstance(hashes, PATH) else tuple(hashes)
    chosen = Path(listed) if listed is not None else None
    options = ExcludeOptions(chosen, strangest, above, boring, below, tuple(map(str, words)))
    given_tokenizer = Path(tokenizer) if tokenizer is not None else None
    found, notices = carry_out(exclude_task(Path(shards), Path(out), options, given_tokenizer, replace), progress)
    return dataclasses.replace(found, notices=notices)


def exclude_task(
    path: Path, out: Path, options: ExcludeOptions, tokenizer: Path | None = None, replace: bool = False
) -> Task[ExcludedDocuments]:
    """Do what `exclude` does, and yield its notices and its progress."""
    from lowvram.data.exclusion import find_documents, write_rest
    from lowvram.data.hf_tokenizer import load_tokenizer
    from lowvram.data.shard_folder import holds_shards, holds_split
    from lowvram.data.shards import SIDES, refuse_other_form

    listed = read_exclusion(options)
    is_split = holds_split(path)
    _refuse_same(path, out)
    refuse_other_form(out, is_split)
    folder = tokenizer or _find_tokenizer(path)
    loaded = load_tokenizer(folder)
    # What is held out stays as it is, so that runs can be compared on it.
    sides = [name for name in SIDES if holds_shards(path / name)] if is_split else [""]
    sets = [_open(path / side, loaded) for side in sides]
    found = []
    for side, shards in zip(sides, sets, strict=True):
        finding = find_documents(shards, loaded, {} if is_split and side == "valid" else listed)
        found.append((yield from count_progress(finding, "Finding documents")))
    copies = sum((each.copies for each in found), Counter[str]())
    missing = len(listed) - len(copies)
    yield from _tell_missing(path, listed, missing)
    written = []
    for side, shards, each in zip(sides, sets, found, strict=True):
        work = write_rest(shards, each, loaded, out / side, replace=replace)
        written.append((yield from count_progress(work, f"Writing {out / side}")))
    counts = sum((each.counts for each in found), Counter[str]())
    home = out.parent if not is_split and out.name == "train" else out
    return ExcludedDocuments(
        out,
        tuple(map(describe_shards, written)),
        counts["documents"],
        counts["tokens"],
        counts["text_bytes"],
        missing,
        find_data(home, folder),
    )


def read_exclusion(options: ExcludeOptions) -> dict[str, dict[str, Any]]:
    """Return the rows of the documents to leave out, by hash; raises ConfigError where none is named."""
    from lowvram.data.exclusion_list import HASH, WHY, RowRules, choose, is_hash, read_list, read_reasons
    from lowvram.errors import ConfigError, argument

    options_of_rules = ", ".join(argument(name) for name in ("strangest", "above", "boring", "below"))
    rules = RowRules(options.strangest, options.above, options.boring, options.below)
    if options.listed is None and rules:
        raise ConfigError(f"{argument('listed')} is missing.", f"{options_of_rules} choose from a list.", "Name one.")
    if options.listed is not None and not rules:
        what = f"{argument('listed', options.listed)} names a list, and nothing says which of it are meant."
        fix = f"Give {options_of_rules}, or name the file with {argument('hashes')}, where all of it are meant."
        raise ConfigError(what, "A list has every document that was scored.", fix)
    found: dict[str, dict[str, Any]] = {}
    if options.listed is not None:
        found |= choose(options.listed, read_list(options.listed), rules)
    for word in options.hashes:
        if is_hash(word):
            found.setdefault(word.lower(), {HASH: word.lower(), WHY: "named"})
        else:
            for row in read_reasons(Path(word)):
                found.setdefault(row[HASH], row)
    if not found:
        what = "Nothing says which documents are to be left out."
        fix = f"Give {argument('listed')} with {options_of_rules}, or {argument('hashes')}."
        raise ConfigError(what, "Without a list nothing would change.", fix)
    return found


def _refuse_same(path: Path, out: Path) -> None:
    from lowvram.errors import DataError

    source, target = path.resolve(), out.resolve()
    if source == target or source in target.parents or target in source.parents:
        how = "is the folder of the shards itself" if source == target else f"and {path} lie one in the other"
        why = "The shards that are read stay as they are, because runs that were trained on them resume with them."
        raise DataError(f"{out} {how}.", why, "Name a folder beside it as `out`.")


def _find_tokenizer(path: Path) -> Path:
    from lowvram.fit.folders import find_folders

    found = find_folders(path).tokenizer
    return found if found is not None else DEFAULT_TOKENIZER


def _open(folder: Path, tokenizer: Tokenizer) -> ShardSet:
    from lowvram.data.shard_documents import check_tokenizer
    from lowvram.data.shards import ShardSet

    shards = ShardSet.open(folder, vocabulary=tokenizer.size)
    check_tokenizer(tokenizer.directory, shards, tokenizer)
    return shards


def _tell_missing(path: Path, listed: dict[str, Any], missing: int) -> Task[None]:
    from lowvram.errors import DataError
    from lowvram.units import count_of

    if missing == len(listed):
        what = f"None of {count_of(missing, 'listed document')} is in {path}."
        why = "They are named by the hash of their text, and no text there has one of these."
        raise DataError(what, why, "Name the shards that the list was made of, or a list of these shards.")
    if missing:
        yield Notice(f"{missing:,} of {count_of(len(listed), 'listed document')} are not in {path}.", "warning")
