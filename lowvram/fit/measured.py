"""Where this machine's measurements lie: one JSON file per card and precision; knows no torch and takes no time."""

from __future__ import annotations

from pathlib import Path

import platformdirs
from pydantic import ValidationError

from lowvram.files import DISK, Disk
from lowvram.fit.speed import Measured
from lowvram.json_files import JsonError, read_object


def measurements(home: Path | None = None) -> Path:
    """Return the directory that holds them: in `home`, or in the user's own place for data."""
    return (home or Path(platformdirs.user_data_dir("lowvram", appauthor=False))) / "measurements"


def store_measured(measured: Measured, home: Path | None = None, disk: Disk = DISK) -> Path:
    """Write a measurement, in place of an older one of that card and precision; returns the file."""
    path = _path(measured.profile_id, measured.precision, home)
    path.parent.mkdir(parents=True, exist_ok=True)
    disk.write(path, measured.model_dump_json(indent=1).encode())
    return path


def load_measured(profile_id: str, precision: str, home: Path | None = None) -> tuple[Measured | None, str]:
    """Return the measurement of a card and precision, None where there is none, and a sentence where one is ignored."""
    path = _path(profile_id, precision, home)
    ignored, again = f"The measurement {path} is ignored", "measure again with --measure"
    try:
        measured = Measured.model_validate(read_object(path))
    except FileNotFoundError:
        return None, ""
    except OSError as error:
        return None, f"{ignored}: {error.strerror}; {again}."
    except (JsonError, ValidationError):
        return None, f"{ignored}: it is torn, or another version wrote it; {again}."
    if (measured.profile_id, measured.precision) != (profile_id, precision):
        return (
            None,
            f"{ignored}: it is of {measured.profile_id}, {measured.precision}; {again}.",
        )
    return measured, ""


def _path(profile_id: str, precision: str, home: Path | None) -> Path:
    return measurements(home) / f"{profile_id}-{precision}.json"
