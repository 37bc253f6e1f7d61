"""Reads and writes this machine's measurements, one JSON file per card and precision; measures nothing."""

from __future__ import annotations

from pathlib import Path

import platformdirs
from pydantic import ValidationError

from lowvram.fit.throughput import Calibration, work_seconds
from lowvram.hardware.detect import find_torch
from lowvram.hardware.profile import Profile
from lowvram.storage.disk import DISK, Disk
from lowvram.storage.json_files import JsonError, read_object


def measurements(home: Path | None = None) -> Path:
    """Return the directory of the measurements: in `home`, or in the user's own data directory."""
    return (home or Path(platformdirs.user_data_dir("lowvram", appauthor=False))) / "measurements"


def store_calibration(measured: Calibration, home: Path | None = None, disk: Disk = DISK) -> Path:
    """Write a measurement, replacing an older one of that card and precision; returns the file."""
    path = _path(measured.profile_id, measured.precision, home)
    path.parent.mkdir(parents=True, exist_ok=True)
    disk.write(path, measured.model_dump_json(indent=1).encode())
    return path


def load_calibration(profile_id: str, precision: str, home: Path | None = None) -> tuple[Calibration | None, str]:
    """Return the measurement of a card and precision (None if there is none), and a sentence if one was ignored."""
    path = _path(profile_id, precision, home)
    ignored, again = f"The measurement {path} is ignored", "measure again with `measure=True`"
    try:
        measured = Calibration.model_validate(read_object(path))
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


def compare_precisions(profile: Profile, home: Path | None = None) -> float | None:
    """Return by what factor a processor's micro-batch takes longer in bf16 than in fp32; None if it is not known.

    Both must have been timed, forward and backward, on the same configuration, with the installed torch and the same
    number of threads.  Only processors are compared: a GPU's profile states which 16-bit format is fast.
    """
    if profile.platform != "cpu":
        return None
    bf16, fp32 = (load_calibration(profile.id, precision, home)[0] for precision in ("bf16", "fp32"))
    if bf16 is None or fp32 is None or _conditions(bf16) != _conditions(fp32):
        return None
    build = find_torch()
    if build is None or build.version != bf16.torch:
        return None
    fp32_s = _micro_seconds(fp32)
    return _micro_seconds(bf16) / fp32_s if fp32_s > 0.0 else None


def _conditions(measured: Calibration) -> tuple[object, ...]:
    # Two run files of one name may differ; the operations of their micro-batches then differ too.
    return measured.timed, measured.torch, measured.threads, measured.micro.flops + measured.micro.attention_flops


def _micro_seconds(measured: Calibration) -> float:
    return work_seconds(measured.micro, measured.rates, "cpu") * measured.micro_ratio


def _path(profile_id: str, precision: str, home: Path | None) -> Path:
    return measurements(home) / f"{profile_id}-{precision}.json"
