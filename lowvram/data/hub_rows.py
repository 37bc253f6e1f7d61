"""Reads the rows of a data set of Hugging Face's hub, or of a folder of its form, as they come; knows no file."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lowvram.data.bad_rows import BadRow
from lowvram.data.fields import find_text
from lowvram.data.places import Cursor
from lowvram.data.text_files import DATASET
from lowvram.data.text_stream import need
from lowvram.errors import DataError

_SPLIT = "train"


def hub_documents(name: Path, field: str, cursor: Cursor) -> Iterator[str | BadRow]:
    """Yield the field of each row of `hub_records`.  cursor: told the number of each row."""
    for number, row in hub_records(name):
        cursor.line = number
        yield find_text(f"{name}, row {number}", row, field)


def hub_records(name: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield each row of a data set's split, and before it its number.

    name: `hf:owner/name`, `hf:FOLDER`, each with `@SPLIT` behind it for another split than train.
    Raises DataError where it cannot be opened or read, MachineError where the package datasets is not installed.
    """
    datasets = need("datasets")
    place, _, split = name.as_posix().removeprefix(DATASET).partition("@")
    try:
        yield from enumerate(datasets.load_dataset(place, split=split or _SPLIT, streaming=True))
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        why = f"{type(error).__name__}: {error}."
        fix = "Check its name and the network, or name a folder of files that were fetched before."
        raise DataError(f"The data set {place} cannot be read.", why, fix) from error
