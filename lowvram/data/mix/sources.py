"""Finds the sources of a mix, such as domains or languages, in folders of text; reads no text."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from lowvram.config.mix import BLOCK, MIX
from lowvram.data.nfc import nfc
from lowvram.data.text_files import ENDINGS, NAMED_ENDINGS, find_text_files, is_stream
from lowvram.errors import DataError, name_nearest

DEMO = "demo"
# Each has one sample of a block or more, and most have some.
MOST_SOURCES = BLOCK // 2
# Names that another file or folder of a mix has.
_TAKEN = {MIX: "the mix's own file has", "tok": "the tokenizer beside the shards has", DEMO: "generated text has"}
_SHOWN = 5


class TextSource(NamedTuple):
    """One source.  name: its path below the folder that was named, without the ending of a file; files: its text."""

    name: str
    files: list[Path]


class FoundSources(NamedTuple):
    """The sources in order of their names, a sentence for each reason to pass files over, and the files left out."""

    sources: list[TextSource]
    passed_over: list[str]
    left_out: list[Path]


def find_sources(
    paths: Sequence[Path],
    levels: int,
    out: Path,
    leave_out: Callable[[Sequence[Path]], Collection[Path]] = lambda _: (),
) -> FoundSources:
    """Return the sources that folders hold: each file or folder in them, or with `levels` 2 each in those folders.

    leave_out: returns which of the files that were found are not read.  A file that is named itself is a source too.
    Raises DataError for what is missing or no text, two sources of one name, a source inside another or in `out`, a
    folder among the sources that holds no text.
    """
    for path in paths:
        if is_stream(path):
            fix = "Save it as a file first: lowvram data clean does that."
            raise DataError(f"{path} has no folder and no name.", "A source is called by its file or folder.", fix)
        _refuse_inside(path, out)
    found = find_text_files(paths)
    left_out = leave_out(found.files)
    homes = _find_homes(found.files, paths)
    origins: dict[str, dict[Path, list[Path]]] = {}
    for file, home in zip(found.files, homes, strict=True):
        if file in left_out:
            continue
        origin = file
        if home is not None:
            parts = file.relative_to(home).parts
            origin = home.joinpath(*parts[:levels])
        # A Mac may keep names decomposed.
        name = nfc((origin.relative_to(home) if home is not None else Path(origin.name)).as_posix())
        origins.setdefault(_strip(name) if origin == file else name, {}).setdefault(origin, []).append(file)
    refuse_many(len(origins))
    _refuse_ambiguous(origins, levels)
    _refuse_empty(paths, levels, {parent for file in found.files for parent in file.parents})
    sources = [TextSource(name, next(iter(files.values()))) for name, files in sorted(origins.items())]
    return FoundSources(sources, found.describe(), [file for file in found.files if file in left_out])


def _refuse_inside(path: Path, out: Path) -> None:
    inner, outer = path.resolve(), out.resolve()
    if inner == outer or outer in inner.parents:
        raise DataError(f"{path} lies in {out}.", "There the shards of the mix are written.", "Name another `out`.")
    if inner in outer.parents:
        why = "What is written there would be taken for a source the next time."
        raise DataError(f"{out} lies in {path}, which is read.", why, "Name an `out` beside it.")


def _find_homes(files: Sequence[Path], paths: Sequence[Path]) -> list[Path | None]:
    """Return the folder among `paths` that each file lies in; None for a file that was named itself."""
    folders = {path.resolve(): path for path in paths if path.is_dir()}
    for place, folder in folders.items():
        above = next((parent for parent in place.parents if parent in folders), None)
        if above is not None:
            what, why = f"{folder} lies in {folders[above]}.", "Its text would be there twice."
            raise DataError(what, why, "Name one of them.")
    named = {path for path in paths if path.is_dir()}
    return [next((parent for parent in file.parents if parent in named), None) for file in files]


def _strip(name: str) -> str:
    endings = (ending for ending in (*ENDINGS, *NAMED_ENDINGS) if name.lower().endswith(ending))
    return name[: -len(max(endings, key=len))]


def refuse_many(count: int) -> None:
    """Raise DataError for more sources than a run can take samples from."""
    if count > MOST_SOURCES:
        why = f"A run takes its samples from blocks of {BLOCK}."
        raise DataError(f"There are {count} sources.", why, f"Put them together to at most {MOST_SOURCES}.")


def _refuse_ambiguous(origins: dict[str, dict[Path, list[Path]]], levels: int) -> None:
    """Raise DataError where two sources have one name, or the folders of two would lie in one another."""
    by_folded: dict[str, list[Path]] = {}
    for name, files in origins.items():
        by_folded.setdefault(nfc(name.casefold()), []).extend(files)
    for name, same in by_folded.items():
        if len(same) > 1:
            which = " and ".join(map(str, same[:2]))
            why = "Their shards would get one folder."
            above = "" if levels > 1 else ", or name the folder above them with `levels=2`"
            raise DataError(f"{which} are two sources of the name {name}.", why, f"Rename one{above}.")
        above_it = next((each for each in map(str, PurePosixPath(name).parents) if each in by_folded), None)
        if above_it is not None:
            what = f"{by_folded[above_it][0]} is the source {above_it}, and {same[0]} is the source {name}."
            raise DataError(what, "A name stands for one source, or for all below it.", "Rename one of them.")
        if name in _TAKEN:
            raise DataError(f"{same[0]} is the source {name}.", f"This name {_TAKEN[name]}.", "Rename it.")


def _refuse_empty(paths: Sequence[Path], levels: int, with_text: set[Path]) -> None:
    """Raise DataError for a folder that would be a source but holds no text."""
    folders = [path for path in paths if path.is_dir()]
    for _ in range(levels):
        inside = [
            folder
            for above in folders
            for folder in sorted(above.iterdir())
            if folder.is_dir() and not folder.name.startswith(".") and not folder.is_symlink()
        ]
        for folder in inside:
            if folder not in with_text:
                why = "Each folder in the one that was named is a source."
                raise DataError(f"The folder {folder} holds no text.", why, "Put text into it, or take it away.")
        folders = inside


def match(name: str, names: Sequence[str], argument: str) -> list[str]:
    """Return the sources that a name means: the source itself, or all whose names begin with `name/`.

    argument: where it was given.  Raises DataError with the known names where there is none.
    """
    name = nfc(name)
    found = [each for each in names if each == name or each.startswith(f"{name}/")]
    if not found:
        groups = {each.rpartition("/")[0] for each in names if "/" in each}
        raise DataError(f"{argument} names {name}.", "There is no such source.", name_nearest(name, {*names, *groups}))
    return found
