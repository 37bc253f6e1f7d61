"""A folder that shards are written to: its lock, its existing shards, and what may be replaced; knows no text."""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lowvram.data.exclusion_list import EXCLUDED, LEFT_OUT, Excluded, holds_list
from lowvram.data.shard_set import (
    COUNTS,
    FORMAT,
    INDEX,
    PLACES,
    ShardSet,
    add_up,
    has_counts,
    other_tokenizer,
    read_bytes,
    read_json,
)
from lowvram.errors import BusyError, DataError
from lowvram.storage.disk import Disk, sha256
from lowvram.storage.folder_lock import locked_folder
from lowvram.units import count_of, show_count

_NAME = re.compile(r"([0-9]{5,})\.(bin|json|places)")
_UNFINISHED = re.compile(r"([0-9]{5,}\.(bin|json|places)|(shards|excluded)\.json)\.[0-9]+\.tmp")
# The keys of a sidecar; a file without them is not ours and is never deleted.
_SIDECAR = {"tokenizer", "text", "dtype", "sha256", *COUNTS}
_MOST_NAMES = 3


def holds_shards(folder: Path) -> bool:
    """Return whether a folder itself holds shards: with their index, or left by a packing that was interrupted."""
    if (folder / INDEX).is_file():
        return True
    sidecars = [path for path in folder.glob("*.json") if _NAME.fullmatch(path.name)]
    return any(read_json(path).keys() >= _SIDECAR for path in sidecars)


def holds_split(folder: Path) -> bool:
    """Return whether a folder holds no shards itself, but training shards in `train`."""
    return not holds_shards(folder) and holds_shards(folder / "train")


class ShardFolder:
    """The --out folder of a packing; use it inside `claim`.

    dtype: the type of the stored ids; if the folder has shards of this tokenizer in a wider type, that type is kept.
    replace: whether existing shards of another text or tokenizer may be replaced.
    """

    def __init__(self, out: Path, tokenizer_hash: str, dtype: str, disk: Disk, replace: bool = False) -> None:
        self.out = out
        self.dtype = dtype
        self._tokenizer_hash, self._disk, self._replace = tokenizer_hash, disk, replace
        self._former: set[Path] = set()
        self._index: dict[str, Any] = {}
        self.shards: list[dict[str, Any]] = []

    @contextmanager
    def claim(self) -> Iterator[None]:
        """Lock the folder against other processes, and delete unfinished files of interrupted ones.

        Raises BusyError, and DataError for shards of another tokenizer or where `out` cannot be a folder.
        """
        what, why = f"{self.out} is no folder.", "Shards need one of their own."
        is_no_folder = DataError(what, why, "Name another `out`.")
        why, fix = "Another process is packing into it.", "Wait until it is done, or name another `out`."
        with locked_folder(self.out, "lock", is_no_folder, BusyError(f"{self.out} is in use.", why, fix)):
            try:
                self._delete_unfinished()
                self._refuse_other_tokenizer()
                self._index, self._former = read_json(self.out / INDEX), self._find_ours()
                if (self._index.get("tokenizer"), self._index.get("dtype")) == (self._tokenizer_hash, "uint32"):
                    # Older versions stored 65,536 ids in this type, and runs identify their shards by their bytes.
                    self.dtype = "uint32"
                yield
            finally:
                self._delete_unfinished()

    def _delete_unfinished(self) -> None:
        for path in sorted(self.out.iterdir()):
            if _UNFINISHED.fullmatch(path.name):
                self._disk.delete(path)

    def _find_ours(self) -> set[Path]:
        """Return our shards and sidecars: those that the index lists, or whose sidecar has our keys."""
        rows = read_json(self.out / INDEX).get("shards")
        listed = {str(row.get("file")) for row in rows if isinstance(row, dict)} if isinstance(rows, list) else set()
        named = [path for path in self.out.iterdir() if _NAME.fullmatch(path.name)]
        return {
            path
            for path in named
            if f"{path.stem}.bin" in listed or read_json(path.with_suffix(".json")).keys() >= _SIDECAR
        }

    def _refuse_other_tokenizer(self) -> None:
        for path in [] if self._replace else sorted(self.out.glob("*.json")):
            tokenizer_hash = read_json(path).get("tokenizer", self._tokenizer_hash)
            if tokenizer_hash != self._tokenizer_hash and (path.name == INDEX or _NAME.fullmatch(path.name)):
                fix = "Name another `out`, or add `replace=True` to put this text in the place of those shards."
                raise other_tokenizer(self.out, str(tokenizer_hash), self._tokenizer_hash, fix)

    def path(self, number: int, kind: str = "bin") -> Path:
        """Return the path of a shard (`bin`), of its sidecar (`json`), or of its documents' places (`places`)."""
        return self.out / f"{number:05d}.{kind}"

    def find_done(self, number: int, text_hash: str) -> dict[str, Any] | None:
        """Return the sidecar of a shard that already exists, undamaged, for this text; else None."""
        sidecar, path = read_json(self.path(number, "json")), self.path(number)
        expected = {"tokenizer": self._tokenizer_hash, "text": text_hash, "dtype": self.dtype}
        is_ours = sidecar.keys() >= _SIDECAR and has_counts(sidecar)
        is_expected = is_ours and all(sidecar[key] == value for key, value in expected.items())
        return sidecar if is_expected and path.is_file() and sha256(path) == sidecar["sha256"] else None

    def check_may_write(self, number: int, text_hash: str, documents: int) -> None:
        """Raise DataError where the shard would replace one of another text, or a file that is not a shard."""
        for path in (self.path(number), self.path(number, "json"), self.path(number, "places")):
            if path.exists() and path not in self._former:
                why = "A shard would get that name, and this file is no shard of lowvram's."
                raise DataError(f"{path} is in the way.", why, "Name a folder of its own as `out`, or move that file.")
        sidecar, rows = read_json(self.path(number, "json")), self._rows()
        if sidecar.keys() >= _SIDECAR:
            is_same = sidecar["text"] == text_hash
        elif number < len(rows):
            is_same = rows[number].get("documents") == documents
        else:
            is_same = not rows
        if not is_same:
            self._refuse_other_text()

    def _rows(self) -> list[dict[str, Any]]:
        rows = self._index.get("shards")
        return [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []

    def _refuse_other_text(self) -> None:
        if self._replace:
            return
        fix = "Name another `out`, or add `replace=True` to put this text in its place (shards of equal text are kept)."
        raise DataError(f"{self.out} holds another text: {self._describe_former()}.", "It would be replaced.", fix)

    def _describe_former(self) -> str:
        rows = self._rows()
        try:
            totals = add_up(rows) if rows else None
            packed_at = time.strftime("%Y-%m-%d %H:%M", time.localtime((self.out / INDEX).stat().st_mtime))
        except (KeyError, TypeError, OSError):
            totals = None
        if totals is None:
            count = sum(path.suffix == ".bin" for path in self._former)
            return f"{count_of(count, 'shard')} of a packing that was interrupted"
        sources = self._index.get("sources")
        names = sources.get("first") if isinstance(sources, dict) else None
        origin = ""
        if isinstance(sources, dict) and isinstance(names, list) and names:
            more = sources.get("files", 0) - len(names)
            origin = f" from {', '.join(map(str, names))}" + (f" and {more} more" if more > 0 else "")
        documents = count_of(totals["documents"], "document")
        return f"{show_count(totals['tokens'])} tokens of {documents}{origin}, packed {packed_at}"

    def add(self, number: int, sidecar: dict[str, Any], beside: Path | None, places: bytes | None = None) -> None:
        """Add a shard; one that was just encoded is at `beside` and is renamed here.

        places: of its documents, None where they are not known; also those of a finished shard are brought up to date.
        """
        path = self.path(number, PLACES)
        noted = {} if places is None else {PLACES: hashlib.sha256(places).hexdigest()}
        is_noted = places is None or (sidecar.get(PLACES) == noted[PLACES] and read_bytes(path) == places)
        if beside:
            # From here on, an older index is no longer true of the folder.
            self._disk.delete(self.out / INDEX)
        if beside or not is_noted:
            # The sidecar is written first, so that every file can be recognised as ours.
            self._write_json(self.path(number, "json"), sidecar | noted)
        if places is not None and not is_noted:
            self._disk.write(path, places)
        if beside:
            self._disk.rename(beside, self.path(number))
        row = {key: sidecar[key] for key in (*COUNTS, "sha256")}
        self.shards.append({"file": self.path(number).name} | row)

    def check_end(self) -> None:
        """Raise DataError where the folder has more shards than this text, unless they may be replaced."""
        if any(int(path.stem) >= len(self.shards) for path in self._former):
            self._refuse_other_text()

    def finish(self, files: Sequence[Path], excluded: Excluded | None = None) -> ShardSet:
        """Write the index, delete the surplus shards of an older, longer packing, and open the packed shards.

        files: the sources of the text; their names are recorded for people.  excluded: what was left out.
        """
        names = sorted(file.name for file in files)
        sources: dict[str, Any] = {"files": len(names), "first": names[:_MOST_NAMES]}
        if excluded is not None:
            sources = {key: value for key, value in (excluded.sources or sources).items() if key != LEFT_OUT}
        if excluded is not None and excluded.rows:
            sources[LEFT_OUT] = len(excluded.rows)
            self._disk.write(self.out / EXCLUDED, excluded.encode())
        elif holds_list(self.out / EXCLUDED):
            # Also where an interruption has left the list of a former packing without its index.
            self._disk.delete(self.out / EXCLUDED)
        head = {"format": FORMAT, "tokenizer": self._tokenizer_hash, "dtype": self.dtype}
        index = head | add_up(self.shards) | {"sources": sources, "shards": self.shards}
        self._write_json(self.out / INDEX, index)
        # A shard is deleted before its sidecar, so it is still known as ours after an interruption.
        for path in sorted(self._former | self._find_ours(), key=lambda path: (path.stem, path.suffix == ".json")):
            if int(path.stem) >= len(self.shards):
                self._disk.delete(path)
        return ShardSet.open(self.out, self._tokenizer_hash)

    def _write_json(self, path: Path, record: dict[str, Any]) -> None:
        self._disk.write(path, (json.dumps(record, indent=1) + "\n").encode("utf-8"))
