"""A run on the screen: one live line for its steps, and a lasting line for everything else that happens."""

from __future__ import annotations

import time

from rich.progress import BarColumn, Progress, TextColumn

from lowvram.cli.show import err, notice
from lowvram.train.events import Evaluated, Event, Halved, Rotated, Sampled, Saved, Started, StepDone, Stopped
from lowvram.units import show_bytes, show_count, show_duration

# Without a terminal a progress line would fill a log file; one of them every so often is enough.
QUIET_INTERVAL_S = 30.0


class TrainingScreen:
    """Turns a trainer's events into lines: one live line for steps, and a lasting one for everything else."""

    def __init__(self, steps: int) -> None:
        self._steps, self._told_at = steps, 0.0
        columns = (BarColumn(bar_width=24), TextColumn("{task.fields[said]}"))
        self._progress = Progress(
            *columns, console=err, transient=True, refresh_per_second=4, disable=not err.is_terminal
        )
        self._task = self._progress.add_task("", total=steps, said="")
        self._last: StepDone | None = None

    def __enter__(self) -> TrainingScreen:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def show(self, event: Event) -> None:
        """Show one event."""
        if isinstance(event, StepDone):
            self._show_step(event)
        elif isinstance(event, Started):
            for problem in event.passed_over:
                notice(f"Passed over a corrupt checkpoint: {problem}", "yellow")
            for sentence in event.notices:
                notice(sentence)
            if event.began_from:
                notice(f"Beginning with the weights of {event.began_from}.")
            if event.resumed_from:
                notice(f"Going on from {event.resumed_from} (step {event.step} of {event.steps}).")
        elif isinstance(event, Halved):
            now = f"{event.micro_batch} sequences × {event.accumulate} a step"
            notice(f"step {event.step + 1:>6}  memory ran out: tried again, and on from here, with {now}", "yellow")
        elif isinstance(event, Evaluated):
            how = ", experts read from their masters" if event.reads_masters else ""
            found = f"{event.bits_per_byte:.4f} bits/byte  (loss {event.loss:.4f}{how})"
            notice(f"step {event.step:>6}  valid {found}", "cyan")
        elif isinstance(event, Rotated):
            where = (
                f"{show_bytes(event.card_bytes)} on the card, {show_bytes(event.host_bytes)} in the computer's memory"
            )
            learn = f"experts {', '.join(map(str, event.experts))} learn now"
            notice(f"step {event.step:>6}  {learn}  ({where}; {event.took_s:.1f} s)", "dim")
        elif isinstance(event, Sampled) and event.problem:
            notice(f"step {event.step:>6}  no sample after {event.prompt!r}: {event.problem}", "yellow")
        elif isinstance(event, Sampled):
            text = " ".join(f"{event.prompt}│{event.text}".split("\n"))
            notice(f"step {event.step:>6}  {text}", "dim")
        elif isinstance(event, Saved):
            notice(f"step {event.step:>6}  saved {event.directory} ({event.took_s:.1f} s)", "dim")
        elif isinstance(event, Stopped):
            self._show_end(event)

    def _show_step(self, event: StepDone) -> None:
        if event.is_skipped:
            what = "its gradients were" if event.skipped == 1 else f"the gradients of {event.skipped} weights were"
            notice(f"step {event.step:>6}  skipped: {what} not finite", "yellow")
        self._last = event
        self._progress.update(self._task, completed=event.step, said=step_line(event, self._steps))
        if not err.is_terminal and time.monotonic() - self._told_at > QUIET_INTERVAL_S:
            self._told_at = time.monotonic()
            notice(step_line(event, self._steps))

    def _show_end(self, event: Stopped) -> None:
        self._progress.update(self._task, visible=False)
        if self._last is not None:
            notice(step_line(self._last, self._steps))
        if event.is_finished:
            notice("All tokens were seen.", "green")
        else:
            notice(f"Stopped after step {event.step}; the same command goes on from here.", "green")


def step_line(event: StepDone, steps: int) -> str:
    """Return the live line of a step."""
    return (
        f"step {event.step}/{steps}  loss {event.loss:.3f}  {show_count(event.tokens_per_second)} tok/s  "
        f"{show_bytes(event.memory_bytes)}  {show_duration(event.left_s)} left"
    )
