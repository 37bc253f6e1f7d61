"""Finds the text files for names, folders and patterns, and notes what it skips; does not open the files."""

from __future__ import annotations

import glob
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lowvram.config.mix import is_mix
from lowvram.errors import DataError
from lowvram.units import count_of

KINDS = (".txt", ".jsonl", ".ndjson", ".parquet", ".csv", ".tsv")
# Of these most files are no texts to learn from, so that they are read where they are named and not where a folder is.
NAMED_KINDS = (".json", ".pdf", ".docx")
_PACKINGS = ("", ".gz", ".zst")
ENDINGS = tuple(kind + packing for kind in KINDS for packing in _PACKINGS)
NAMED_ENDINGS = tuple(kind + packing for kind in NAMED_KINDS for packing in _PACKINGS)
LOOKED_FOR = (
    f"lowvram reads {', '.join(KINDS)}, each plain or with .gz or .zst at the end; where they are named, also "
    f"{', '.join(NAMED_KINDS)}."
)
# What `data clean` writes beside cleaned text, which needs no notice when that is read.
REPORT, REPORT_PAGE = "report.json", "report.md"
# A data set of Hugging Face's package, by its name or folder: `hf:owner/name`.
DATASET = "hf:"
STANDARD_INPUT = Path("-")
_SHOWN = 5


@dataclass
class TextFiles:
    """The files to read, in order, each once; and what was skipped in folders or named twice."""

    files: list[Path] = field(default_factory=list)
    other_endings: Counter[str] = field(default_factory=Counter)
    broken_links: list[Path] = field(default_factory=list)
    linked_folders: list[Path] = field(default_factory=list)
    unreadable: list[Path] = field(default_factory=list)
    mixes: list[Path] = field(default_factory=list)
    repeats: list[tuple[Path, Path]] = field(default_factory=list)

    def describe(self) -> list[str]:
        """Return one sentence for each reason why something was skipped; empty where nothing was."""
        sentences = []
        if self.other_endings:
            endings = [f"{count:,} {ending or 'without ending'}" for ending, count in self.other_endings.most_common()]
            count = self.other_endings.total()
            sentences.append(
                f"{count_of(count, 'file')} in the folders passed over ({list_few(endings)}). {LOOKED_FOR}"
            )
        for paths, noun, why in (
            (self.broken_links, "broken link", "passed over"),
            (self.linked_folders, "linked folder", "not followed (it is read where it is named)"),
            (self.unreadable, "folder", "passed over for want of permission"),
            (self.mixes, "mixed folder", "passed over (its text is packed already, or generated)"),
        ):
            if paths:
                sentences.append(f"{count_of(len(paths), noun)} {why}: {list_few([str(path) for path in paths])}.")
        if self.repeats:
            pairs = [f"{again} is {first}" for again, first in self.repeats]
            sentences.append(f"{count_of(len(self.repeats), 'name')} of the same file read once: {list_few(pairs)}.")
        return sentences


def name_unpacked(file: Path) -> str:
    """Return the name of a file in lower case, without the ending of what it is packed with."""
    name = file.name.lower()
    for packing in filter(None, _PACKINGS):
        name = name.removesuffix(packing)
    return name


def list_few(words: list[str]) -> str:
    """Return the first words, and how many more there are."""
    return ", ".join(words[:_SHOWN]) + (f" and {len(words) - _SHOWN:,} more" if len(words) > _SHOWN else "")


def find_files(paths: Sequence[Path]) -> list[Path]:
    """Return the files of `find_text_files`."""
    return find_text_files(paths).files


def find_text_files(paths: Sequence[Path]) -> TextFiles:
    """Return the text files that `paths` name: files, folders, patterns that no shell expanded, `-`; sorted.

    A file that several names or links lead to is included once.  Hidden files in a folder are skipped without notice.
    A mix in a folder is passed over.  Raises DataError for a mix that is named, for a path that is missing or has
    another ending, and for a folder without a text file.
    """
    found = TextFiles()
    named: set[Path] = set()
    for path in [match for pattern in paths for match in _expand(Path(pattern))]:
        if is_stream(path):
            named.add(path)
        elif path.is_dir() and is_mix(path):
            why = "It holds packed text, and perhaps some that was generated."
            raise DataError(f"{path} is a mix.", why, "Name the text that it was made of.")
        elif path.is_dir():
            inside = list(_walk(path, found))
            if not inside:
                what = f"The folder {path} holds no text files."
                raise DataError(what, " ".join(found.describe() or [LOOKED_FOR]), "Name another.")
            named.update(inside)
        elif not path.exists():
            what = f"{path} is a link that leads nowhere." if path.is_symlink() else f"{path} does not exist."
            raise DataError(what, LOOKED_FOR, "Name a file or a folder that exists.")
        elif not path.name.lower().endswith(ENDINGS + NAMED_ENDINGS):
            raise unknown_ending(path)
        else:
            named.add(path)
    first: dict[tuple[int, int] | Path, Path] = {}
    for path in sorted(named, key=Path.as_posix):
        same = first.setdefault(_identify(path), path)
        if same is path:
            found.files.append(path)
        else:
            found.repeats.append((path, same))
    return found


def _expand(path: Path) -> list[Path]:
    """Return the files that a pattern matches (cmd.exe does not expand patterns), or a plain name unchanged."""
    if path.exists() or is_dataset(path) or not glob.has_magic(str(path)):
        return [path]
    found = sorted(Path(match) for match in glob.glob(str(path), recursive=True))
    if not found:
        raise DataError(f"No file matches {path}.", "", "Name files or folders that exist.")
    return found


def _walk(folder: Path, found: TextFiles) -> Iterator[Path]:
    def note(error: OSError) -> None:
        found.unreadable.append(Path(error.filename))

    for parent, folders, names in os.walk(folder, onerror=note):
        folders[:] = [name for name in folders if not name.startswith(".")]
        mixes = [name for name in folders if is_mix(Path(parent, name))]
        found.mixes += [Path(parent, name) for name in mixes]
        folders[:] = [name for name in folders if name not in mixes]
        found.linked_folders += [Path(parent, name) for name in folders if os.path.islink(os.path.join(parent, name))]
        for path in (Path(parent, name) for name in names if not name.startswith(".")):
            if path.name in (REPORT, REPORT_PAGE):
                continue
            if not path.exists():
                found.broken_links.append(path)
            elif path.name.lower().endswith(ENDINGS) and path.is_file():
                yield path
            else:
                found.other_endings[path.suffix.lower()] += 1


def unknown_ending(path: Path) -> DataError:
    """Return the error for a file whose ending is not one that lowvram reads."""
    return DataError(f"{path} has an unknown ending.", LOOKED_FOR, "Rename or convert the file.")


def is_stream(path: Path) -> bool:
    """Return whether a path is standard input, a pipe, a device or a data set: its size is not known."""
    return path == STANDARD_INPUT or is_dataset(path) or (path.exists() and not path.is_file() and not path.is_dir())


def is_dataset(path: Path) -> bool:
    """Return whether a path names a data set of Hugging Face's package."""
    return str(path).startswith(DATASET)


def size_of(path: Path) -> int:
    """Return the size in bytes of a file on disk, 0 for a stream."""
    return 0 if is_stream(path) else path.stat().st_size


def _identify(path: Path) -> tuple[int, int] | Path:
    if path == STANDARD_INPUT or is_dataset(path):
        return path
    status = path.stat()
    # A few file systems on Windows have no inode numbers.
    return (status.st_dev, status.st_ino) if status.st_ino else path.resolve()
