"""Two small files of a run directory: what another terminal asks of the run, and what the run says about itself.

    status.json   written by the process that trains: who it is, what it does, which request it has read last
    control.json  written by `lowvram pause`, `resume` and `stop`, and addressed to one start of the run

A request names the start that it is for, so that one that a crash left behind means nothing to the next start.
"""

from __future__ import annotations

from pathlib import Path
from time import sleep
from typing import Literal, TypeVar

from pydantic import NonNegativeInt, ValidationError

from lowvram.config.base import FrozenConfig
from lowvram.storage.disk import DISK, Disk
from lowvram.storage.json_files import JsonError, read_object

CONTROL, STATUS = "control.json", "status.json"
# Both files take some hundred bytes.
_MOST_BYTES = 1 << 16
_ATTEMPTS, _RETRY_S = 10, 0.05

Asks = Literal["pause", "resume", "stop"]
RunState = Literal["starting", "training", "paused", "ended"]


class Request(FrozenConfig):
    """What is asked of a run.  start: the start that it is for.  id: of the request, which the run repeats."""

    start: str
    asks: Asks
    id: str


class Status(FrozenConfig):
    """What a run says about itself.

    start: of this start.  pid, host: its process.  state, step, why: what it does, after which step, and why it waits.
    is_asked: whether it waits because it was asked to.  heard: the id of the request that it has read last.
    """

    start: str
    pid: int
    host: str
    state: RunState = "starting"
    step: NonNegativeInt = 0
    why: str = ""
    is_asked: bool = False
    heard: str = ""


Kind = TypeVar("Kind", Request, Status)


def read_request(run: Path) -> Request | None:
    """Return what is asked of a run; None where there is no request that can be read."""
    return _read(run / CONTROL, Request)


def read_status(run: Path) -> Status | None:
    """Return what a run said last; None where it never said anything that can be read."""
    return _read(run / STATUS, Status)


def write_request(run: Path, request: Request, disk: Disk = DISK) -> None:
    """Ask something of a run; raises DiskFullError where there is no room for a hundred bytes."""
    for attempt in range(_ATTEMPTS):
        try:
            disk.write(run / CONTROL, request.model_dump_json().encode())
            return
        except PermissionError:  # Windows replaces no file that the run is just reading
            if attempt == _ATTEMPTS - 1:
                raise
            sleep(_RETRY_S)


def write_status(run: Path, status: Status, disk: Disk = DISK) -> None:
    """Say what a run does; raises DiskFullError where there is no room for some hundred bytes."""
    disk.write(run / STATUS, status.model_dump_json().encode())


def withdraw_request(run: Path, request: Request | None = None, disk: Disk = DISK) -> None:
    """Delete a request, unless another one has replaced it; None: whichever there is."""
    if request is None or read_request(run) == request:
        disk.delete_unless_in_use(run / CONTROL)


def _read(path: Path, kind: type[Kind]) -> Kind | None:
    try:
        return kind.model_validate(read_object(path, _MOST_BYTES))
    except (OSError, JsonError, ValidationError):
        return None
