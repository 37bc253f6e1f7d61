"""What goes on around a run while it trains: sensors, guard, wake lock, requests from other terminals, energy.

Everything here watches the run's events and adds its own; the run itself asks the guard before each step.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from lowvram.api.tasks import Notice, Task

if TYPE_CHECKING:
    from lowvram.config.guard import GuardConfig
    from lowvram.hardware.sensors import Reading, SensorThread
    from lowvram.hardware.wake_lock import WakeLock
    from lowvram.train.control import Control
    from lowvram.train.creep import CreepWatch
    from lowvram.train.events import Event, Metered, Paused, StepDone
    from lowvram.train.trainer import Trainer

# The log is told of the energy at most so often.
_METERED_EVERY_S = 60.0


class Flatmate:
    """Watches one run."""

    def __init__(
        self, sensors: SensorThread, control: Control, lock: WakeLock | None, meter: EnergyMeter, creep: CreepWatch
    ) -> None:
        self._sensors, self._control, self._lock, self._meter, self._creep = sensors, control, lock, meter, creep
        self._is_slowed = False

    def follow(self, events: Iterator[Event]) -> Iterator[Event | Notice]:
        """Yield a run's events, and beside them what is told of its energy and of requests."""
        from lowvram.train.events import Evaluated, Halved, Paused, Resumed, Saved, Slowed, Started, StepDone, Stopped

        is_stop_told = False
        for event in events:
            if self._control.is_stop_asked and not is_stop_told:
                is_stop_told = True
                yield Notice("lowvram stop was typed in another terminal: the run is saved and ends.")
            if isinstance(event, Started | StepDone):
                self._control.tell("training", event.step)
            elif isinstance(event, Paused):
                self._pause(event)
            elif isinstance(event, Resumed):
                self._resume(event.step)
            elif isinstance(event, Stopped):
                yield from self._meter.tell(event.step, is_last=True)
                self._control.tell("ended", event.step)
            elif isinstance(event, Slowed):
                self._is_slowed = bool(event.why)
            if isinstance(event, Paused | Slowed | Halved):
                self._creep.forget()
            yield event
            if isinstance(event, Evaluated | Saved):
                yield from self._meter.tell(event.step)
            elif isinstance(event, StepDone) and not self._is_slowed:
                yield from self._watch(event)

    def _watch(self, step: StepDone) -> Iterator[Notice]:
        """Tell what has been changing slowly, or spills."""
        from lowvram.train.creep import Sample

        reading = self._sensors.latest()
        if not self._creep.is_due(reading.taken_at_s):
            return
        used, free, others = reading.card_used_bytes, reading.card_free_bytes, reading.others_bytes
        own = None if used is None or others is None else used - others
        free_share = None if used is None or free is None else free / max(1, used + free)
        sample = Sample(reading.taken_at_s, step.tokens_per_second, reading.host_bytes, own, free_share)
        for sentence in self._creep.add(sample):
            yield Notice(sentence, "warning")

    def _pause(self, event: Paused) -> None:
        self._control.tell("paused", event.step, event.why, event.cause == "asked")
        self._meter.pause()
        # Nothing but a person ends these, and the computer may sleep until then; for the others it stays awake.
        if self._lock is not None and event.cause in ("asked", "battery"):
            self._lock.release()

    def _resume(self, step: int) -> None:
        self._control.tell("training", step)
        self._meter.resume()
        if self._lock is not None:
            self._lock.take()


class EnergyMeter:
    """The energy of one run, counted from its sensors' readings and kept in its directory.  clock: seconds."""

    def __init__(
        self, run: Path, config: GuardConfig, sensors: SensorThread, clock: Callable[[], float] = time.monotonic
    ) -> None:
        from lowvram.train.energy import read_energy

        self._run, self._config, self._sensors, self._clock = run, config, sensors, clock
        self._count = read_energy(run)
        self._counted_to, self._told_at_s = self._read_now(), -_METERED_EVERY_S + clock()
        self._is_paused = False

    def pause(self) -> None:
        """Count up to now, and nothing from now on."""
        self._add()
        self._is_paused = True

    def resume(self) -> None:
        """Count from now on."""
        self._is_paused, self._counted_to = False, self._read_now()

    def tell(self, step: int, is_last: bool = False) -> Iterator[Metered]:
        """Yield the energy so far and keep it, at most once a minute and at the end; nothing where none is known."""
        from lowvram.errors import DiskFullError
        from lowvram.train.energy import write_energy
        from lowvram.train.events import Metered

        now_s = self._clock()
        if now_s - self._told_at_s < _METERED_EVERY_S and not is_last:
            return
        self._told_at_s = now_s
        self._add()
        count, price = self._count, self._config.price_per_kwh
        if count.source is None:
            return
        with suppress(DiskFullError):  # the next save says so; what was counted is written with the next one
            write_energy(self._run, count)
        newest = self._sensors.latest()
        cost = None if price is None else count.kwh * price
        figures = (newest.power_w, newest.temperature_c)
        yield Metered(step, count.kwh, count.seconds, count.source, cost, self._config.currency, *figures)

    def _add(self) -> None:
        from lowvram.train.energy import add_energy

        if self._is_paused:
            return
        readings = [self._counted_to, *self._sensors.since(self._counted_to.taken_at_s), self._read_now()]
        self._count = add_energy(self._count, readings, self._config.power_watts)
        self._counted_to = readings[-1]

    def _read_now(self) -> Reading:
        """Return the newest reading as one of now: a run of seconds may begin and end between two readings."""
        return dataclasses.replace(self._sensors.latest(), taken_at_s=self._clock())


def move_in(trainer: Trainer, control: Control, stack: ExitStack) -> Task[Flatmate]:
    """Start what watches a run, and give the trainer its guard; `stack` ends it all.  Yields what cannot be watched."""
    import torch

    from lowvram.hardware.sensors import choose_sources, reading_sensors
    from lowvram.hardware.wake_lock import WakeLock
    from lowvram.train.creep import CreepWatch
    from lowvram.train.guard import Guard, explain_blind

    run = trainer.config.run
    device = trainer.state.model.embedding.device

    def own_bytes() -> int:
        return torch.cuda.memory_reserved(device)

    sensors = stack.enter_context(reading_sensors(choose_sources(device.type, run.dir, own_bytes)))
    for sentence in explain_blind(run.guard, sensors.latest()):
        yield Notice(sentence)
    lock = None
    if run.wake_lock:
        lock = WakeLock(f"training {run.dir.name}")
        stack.callback(lock.release)
        if refusal := lock.take():
            yield Notice(f"The computer may go to sleep while it trains: {refusal}.", "detail")
    control.attach(trainer.stop)
    trainer.guard, trainer.control = Guard(run.guard, sensors), control
    # Elsewhere a card without memory refuses to give more.
    creep = CreepWatch(watches_spill=sys.platform == "win32")
    return Flatmate(sensors, control, lock, EnergyMeter(run.dir, run.guard, sensors), creep)
