"""Writes the events of a run to a JSONL file, and to TensorBoard or Weights & Biases on request; draws nothing."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import importlib
import json
import math
import os
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from lowvram.errors import DiskFullError, MachineError
from lowvram.storage.disk import explain_full_disk
from lowvram.storage.links import leads_out, refuse_link
from lowvram.train.events import Evaluated, Event, Metered, Rotated, Sampled, SourceLoss, StepDone

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

# Rows of a log that a full drive does not take: some 30 MB.
MOST_WAITING = 100_000
# Events that wait for a tracker; those that come while so many wait are not sent to it.
MOST_EVENTS = 10_000
# A run that ends waits so long for a tracker to take what it has not taken yet.
LAST_WAIT_S = 30.0


class Log(Protocol):
    """A destination that events are written to."""

    def write(self, event: Event) -> None:
        """Write one event."""

    def close(self) -> None:
        """Finish writing."""


class JsonlLog:
    """Writes one JSON object per line at once; after a resume, steps since the last checkpoint appear twice.

    Rows for which the drive has no room wait in memory, the last MOST_WAITING of them, and are written when it has.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        if leads_out(path, path.parent):
            refuse_link(path)
        self._folder = path.parent
        # Without a buffer, which after a failure would hold a part of a row.
        self._file = open(path, "ab+", buffering=0)  # noqa: SIM115 - open as long as the run
        self._waiting: deque[bytes] = deque(maxlen=MOST_WAITING)
        # If a full disk or a power cut left half a row, the next row must begin on a new line.
        if self._file.tell() and self._file.seek(-1, 2) and self._file.read(1) != b"\n":
            self._waiting.append(b"")

    def write(self, event: DataclassInstance) -> None:
        """Write the event's name, its values and the Unix time in seconds; NaN becomes null, since JSON has no NaN."""
        values = {f.name: _finite(getattr(event, f.name)) for f in dataclasses.fields(event)}
        if not values.get("by_source", True):  # nothing is said of sources where there are none
            del values["by_source"]
        if values.get("spike_above", True) is None:
            del values["spike_above"]
        row = {"event": type(event).__name__, "time_s": round(time.time(), 3), **values}
        self._waiting.append(json.dumps(row, ensure_ascii=False, default=str).encode())
        try:
            self._write_waiting()
        except DiskFullError:
            return  # the next save pauses the run, and says so

    def close(self) -> None:
        """Write what waits, and close the file; raises DiskFullError where there is no room for it."""
        try:
            self._write_waiting()
        finally:
            self._file.close()

    def _write_waiting(self) -> None:
        """Write every row that waits; of one that does not fit, nothing is left in the file."""
        while self._waiting:
            row, end = self._waiting[0] + b"\n", self._file.seek(0, 2)
            with explain_full_disk(self._folder):
                try:
                    written = self._file.write(row)
                    if written < len(row):
                        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                except OSError:
                    with suppress(OSError):  # what is no file has no length
                        self._file.truncate(end)
                    raise
            self._waiting.popleft()


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _finite(each) for name, each in value.items()}
    if isinstance(value, SourceLoss):
        return _finite(dataclasses.asdict(value))
    return None if isinstance(value, float) and not math.isfinite(value) else value


def scalars(event: Event) -> dict[str, float]:
    """Return an event's numbers by the names that charts use; empty where it has none."""
    if isinstance(event, StepDone):
        return {
            "train/loss": event.loss,
            "train/gradient_norm": event.gradient_norm,
            "train/learning_rate": event.learning_rate,
            "train/tokens_per_second": event.tokens_per_second,
        }
    if isinstance(event, Evaluated):
        name = "valid_masters" if event.reads_masters else "valid"
        shares = {"pairs_right": event.pairs_right, "choices_right": event.choices_right}
        found = {"loss": event.loss, "bits_per_byte": event.bits_per_byte}
        found |= {f"bits_per_byte/{source}": each.bits_per_byte for source, each in event.by_source.items()}
        found |= {share: value for share, value in shares.items() if value is not None}
        found |= {f"suffix_bits/{kind}": bits for kind, bits in (event.suffix_bits or {}).items()}
        return {f"{name}/{figure}": value for figure, value in found.items()}
    if isinstance(event, Rotated):
        return {"rotation/card_bytes": event.card_bytes, "rotation/host_bytes": event.host_bytes}
    if isinstance(event, Metered):
        sensed = {"power_w": event.power_w, "temperature_c": event.temperature_c}
        known = {name: value for name, value in sensed.items() if value is not None}
        return {f"energy/{name}": value for name, value in ({"kwh": event.kwh} | known).items()}
    return {}


class TensorBoardLog:
    """Scalars and samples for TensorBoard, in the run directory's `tensorboard` folder."""

    def __init__(self, run: Path) -> None:
        module = _require("torch.utils.tensorboard", "tensorboard")
        self._writer = module.SummaryWriter(str(run / "tensorboard"))

    def write(self, event: Event) -> None:
        """Write the event's scalars, or its text."""
        for name, value in scalars(event).items():
            self._writer.add_scalar(name, value, event.step)
        if isinstance(event, Sampled):
            self._writer.add_text(f"sample/{event.prompt}", event.text, event.step)

    def close(self) -> None:
        """Close the writer."""
        self._writer.close()


class WandbLog:
    """Scalars for Weights & Biases, one run per run directory, resumed under the same name."""

    def __init__(self, run: Path) -> None:
        module = _require("wandb", "wandb")
        # wandb's ids are unique in a project, so two run directories of the same name need different ids.
        identity = hashlib.sha256(str(run.resolve()).encode()).hexdigest()[:16]
        self._run = module.init(project="lowvram", name=run.name, id=identity, resume="allow", dir=str(run))

    def write(self, event: Event) -> None:
        """Log the event's scalars at its step."""
        if numbers := scalars(event):
            self._run.log(numbers, step=event.step)

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()


class TrackerThread:
    """Writes a log in a thread of its own, so that a tracker that hangs or fails never holds up training.

    lost: how many events the log did not take, because too many waited or because it had failed.  An error in the log
    is shown with its traceback, and ends the log alone.
    """

    def __init__(self, log: Log, last_wait_s: float = LAST_WAIT_S, most_events: int = MOST_EVENTS) -> None:
        self.lost = 0
        self._log, self._last_wait_s = log, last_wait_s
        self._events: queue.Queue[Event | None] = queue.Queue(most_events)
        # A daemon: the process must end even where the tracker never answers.
        self._thread = threading.Thread(target=self._work, name="lowvram-tracker", daemon=True)
        self._thread.start()

    def _work(self) -> None:
        try:
            while (event := self._events.get()) is not None:
                self._log.write(event)
        finally:
            self._log.close()

    def write(self, event: Event) -> None:
        """Hand an event over; returns at once."""
        try:
            if self._thread.is_alive():
                self._events.put_nowait(event)
                return
        except queue.Full:
            pass
        self.lost += 1

    def close(self) -> None:
        """Let the log finish, and wait for it for a limited time."""
        with suppress(queue.Full):
            self._events.put(None, timeout=self._last_wait_s if self._thread.is_alive() else 0.0)
        self._thread.join(self._last_wait_s)


def _require(module: str, extra: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MachineError(
            f'run.log names "{extra}", which is not installed.', fix=f"Install it: pip install {extra}."
        ) from error


def open_logs(run: Path, names: Sequence[str]) -> list[Log]:
    """Return the JSONL log of a run directory and those asked for by name, which are written in threads."""
    kinds: dict[str, Callable[[Path], Log]] = {"tensorboard": TensorBoardLog, "wandb": WandbLog}
    asked = [TrackerThread(kinds[name](run)) for name in names]
    return [JsonlLog(run / "log.jsonl"), *asked]
