"""A run on the screen: one live line for its steps, and a lasting line for everything else that happens."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from rich.progress import BarColumn, Progress, ProgressColumn, SpinnerColumn, Task
from rich.progress_bar import ProgressBar
from rich.text import Text

from lowvram.cli.console import err, notice
from lowvram.train.events import (
    Cause,
    Evaluated,
    Event,
    Halved,
    Metered,
    Paused,
    Recorded,
    Resumed,
    Rotated,
    Sampled,
    Saved,
    Slowed,
    Started,
    StepDone,
    Stopped,
    WentBack,
)
from lowvram.units import count_of, show_bytes, show_count, show_duration

if TYPE_CHECKING:
    from lowvram.train.trainer import Trainer

# Without a terminal a progress line would fill a log file; one of them every so often is enough.
QUIET_INTERVAL_S = 30.0
# Work between two steps that lasts longer than this is named.
_LONG_S = 2.0
_WIDEST_BAR, _NARROWEST_BAR = 24, 8
_BESIDE_BAR = 4  # the spinner, and a blank between columns
# How a run that waits goes on.
_BY_ITSELF = "Training goes on by itself then"
_GOES_ON: dict[Cause, str] = {
    "room": "Training goes on by itself when there is room",
    "asked": "It goes on after lowvram resume",
    "schedule": _BY_ITSELF,
    "battery": "Training goes on by itself on the mains",
    "disk": "Training goes on by itself when there is more",
}
_MEMORY_OF = {"cuda": "card", "mps": "GPU"}  # else this process


class TrainingScreen:
    """Turns a trainer's events into lines: one live line for steps, and a lasting one for everything else.

    evaluated: the last validation that was shown.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.evaluated: Evaluated | None = None
        self._told_problems: set[str] = set()
        self._trainer, self._steps = trainer, trainer.config.train.steps
        self._memory_of = _MEMORY_OF.get(trainer.state.model.embedding.device.type, "process")
        self._told_at, self._last_at = 0.0, time.monotonic()
        self._progress = Progress(
            SpinnerColumn(),
            _FittingBar(self._live_line),
            _Line(self._live_line),
            console=err,
            transient=True,
            refresh_per_second=4,
            disable=not err.is_terminal,
        )
        self._task = self._progress.add_task("", total=self._steps)
        self._last: StepDone | None = None
        self._was_finished = self._is_slowed = False
        self._metered: Metered | None = None

    def __enter__(self) -> TrainingScreen:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def _live_line(self) -> str:
        """Return what is going on now, in one line of the terminal's width."""
        waited_s = time.monotonic() - self._last_at
        work = [] if self._last is not None and waited_s < _LONG_S else [self._name_work(waited_s)]
        told = [] if self._last is None else self._parts(self._last)
        told += [(1, f"slowed: {self._trainer.held_by}")] if self._is_slowed and self._trainer.held_by else []
        return join_fitting([*told, *work], err.width - 2)

    def _name_work(self, waited_s: float) -> tuple[int, str]:
        """Return the work in progress and for how long it has been, with its rank."""
        trainer = self._trainer
        if trainer.doing == "step":
            begun, count = trainer.micro_batches_begun, trainer.plan.accumulate
            first = f"step {trainer.state.step + 1}/{self._steps}  " if self._last is None else ""
            what = f"{first}micro-batch {begun} of {count}" if count > 1 else f"{first}computing"
            if self._last is None and self._memory_of == "card" and begun <= 1:
                what += ", kernels are compiled first"
        elif trainer.doing == "paused":
            what = f"paused: {trainer.held_by}"
        else:
            what = trainer.doing
        return 1, f"{what}, {show_duration(waited_s)}"

    def _parts(self, event: StepDone) -> list[tuple[int, str]]:
        return step_parts(event, self._steps, self._memory_of)

    def show(self, event: Event) -> None:
        """Show one event."""
        self._last_at = time.monotonic()
        if isinstance(event, StepDone):
            self._show_step(event)
        elif isinstance(event, Started):
            self._show_start(event)
        elif isinstance(event, Halved):
            now = f"{count_of(event.micro_batch, 'sequence')} × {event.accumulate} a step"
            notice(f"step {event.step + 1:>6}  memory ran out: tried again, and continued, with {now}", "yellow")
        elif isinstance(event, WentBack):
            notice(f"step {event.step:>6}  diverged: goes on with the weights of step {event.to_step}", "yellow")
        elif isinstance(event, Recorded):
            how = f"not replayed from CUDA graphs: {event.problem}" if event.problem else "replayed from CUDA graphs."
            notice(f"Updates are {how}", "dim")
        elif isinstance(event, Evaluated):
            self.evaluated = event
            how = ", experts read from their masters" if event.reads_masters else ""
            pairs = "" if event.pairs_right is None else f", {event.pairs_right:.1%} of the minimal pairs right"
            questions = "" if event.choices_right is None else f", {event.choices_right:.1%} of the questions"
            found = f"{event.bits_per_byte:.4f} bits/byte (loss {event.loss:.4f}{how}{pairs}{questions})"
            notice(f"step {event.step:>6}  valid {found}", "cyan")
            if event.by_source:
                each = ", ".join(f"{name} {loss.bits_per_byte:.3f}" for name, loss in event.by_source.items())
                notice(f"step {event.step:>6}  by source: {each}", "cyan")
            if event.suffix_bits:
                parts = [f"{name.partition(',')[0]} {bits:.2f}" for name, bits in event.suffix_bits.items()]
                notice(f"step {event.step:>6}  bits/byte of {', '.join(parts)}", "cyan")
            for why in (event.pairs_problem, event.suffixes_problem, event.choices_problem):
                if why and why not in self._told_problems:
                    notice(f"step {event.step:>6}  {why}", "yellow")
                    self._told_problems.add(why)
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
            notice(f"step {event.step:>6}  saved {event.directory} ({_duration_of_save(event)})", "dim")
        elif isinstance(event, Paused | Resumed | Slowed):
            self._show_hold(event)
        elif isinstance(event, Metered):
            self._metered = event
        elif isinstance(event, Stopped):
            self._show_end(event)

    def _show_start(self, event: Started) -> None:
        for problem in event.passed_over:
            notice(f"Passed over a corrupt checkpoint: {problem}", "yellow")
        for sentence in event.notices:
            notice(sentence)
        if event.began_from:
            notice(f"Beginning with the weights of {event.began_from}.")
        self._was_finished = event.step >= event.steps
        if self._was_finished:
            notice(f"This run was finished before: all of its tokens were seen by step {event.step}.", "green")
        elif event.resumed_from:
            notice(f"Going on from {event.resumed_from} (step {event.step} of {event.steps}).")

    def _show_hold(self, event: Paused | Resumed | Slowed) -> None:
        style = "green"
        if isinstance(event, Paused):
            says, style = f"paused: {event.why} {_GOES_ON[event.cause]}; Ctrl-C ends it.", "yellow"
        elif isinstance(event, Resumed):
            says = f"goes on after {show_duration(event.waited_s)}"
        else:
            self._is_slowed = bool(event.why)
            says = "at full speed again"
            if event.why:
                says, style = f"slowed, with pauses between steps: {event.why}", "yellow"
        notice(f"step {event.step:>6}  {says}", style)

    def _show_step(self, event: StepDone) -> None:
        if event.spike_above is not None:
            what = "skipped" if event.is_skipped else "learnt from; train.skip_spikes = true would skip it"
            limit = f"above {event.spike_above:.3f}"
            notice(f"step {event.step:>6}  loss {event.loss:.3f} is a spike ({limit}): {what}", "yellow")
        elif event.is_skipped:
            what = "its gradients were" if event.skipped == 1 else f"the gradients of {event.skipped} weights were"
            notice(f"step {event.step:>6}  skipped: {what} not finite", "yellow")
        self._last = event
        self._progress.update(self._task, completed=event.step)
        if not err.is_terminal and time.monotonic() - self._told_at > QUIET_INTERVAL_S:
            self._told_at = time.monotonic()
            notice(join_fitting(self._parts(event)))

    def _show_end(self, event: Stopped) -> None:
        self._progress.update(self._task, visible=False)
        if self._last is not None:
            notice(join_fitting(self._parts(self._last)))
        if self._metered is not None:
            notice(describe_energy(self._metered))
        if self._was_finished:
            return
        if event.is_finished:
            notice("All tokens were seen.", "green")
        else:
            notice(f"Stopped after step {event.step}; the same command resumes the run.", "green")


def describe_energy(event: Metered) -> str:
    """Return the energy of a run, and what it costs, as a sentence."""
    whose = {"counter": "The card", "power": "The card", "power_watts": "By run.guard.power_watts the computer"}
    cost = "" if event.cost is None else f", which costs {event.cost:,.2f} {event.currency}".rstrip()
    used = f"{1000 * event.kwh:.0f} Wh" if event.kwh < 1 else f"{event.kwh:,.2f} kWh"
    return f"{whose[event.source]} took {used} in {show_duration(event.seconds)} of this run{cost}."


def _duration_of_save(event: Saved) -> str:
    beside = f", beside training but for {event.held_s:.1f} s" if event.held_s < event.took_s else ""
    return f"{event.took_s:.1f} s{beside}"


def step_parts(event: StepDone, steps: int, memory_of: str) -> list[tuple[int, str]]:
    """Return the parts of a step's line, each with its rank: a narrow line leaves out those of the highest ranks.

    memory_of: whose memory the step's figure is: the card's peak, or all that this process holds.
    """
    return [
        (0, f"step {event.step}/{steps}"),
        (2, f"loss {event.loss:.3f}"),
        (4, f"{show_count(event.tokens_per_second)} tok/s"),
        (5, f"{memory_of} {show_bytes(event.memory_bytes)}"),
        (3, f"{show_duration(event.left_s)} left"),
    ]


def join_fitting(parts: list[tuple[int, str]], width: int | None = None) -> str:
    """Return the parts in one line; if it would be wider than `width`, those of the highest ranks are left out."""
    kept = list(parts)
    while True:
        line = "  ".join(text for _, text in kept)
        if width is None or len(line) <= width or len(kept) <= 1:
            return line
        kept.remove(max(kept, key=lambda part: part[0]))


class _Line(ProgressColumn):
    """The text of the live line."""

    max_refresh = None

    def __init__(self, line: Callable[[], str]) -> None:
        self._line = line
        super().__init__()

    def render(self, task: Task) -> Text:
        return Text(self._line(), no_wrap=True, overflow="ellipsis")


class _FittingBar(BarColumn):
    """A bar in what the text leaves free; none where that is too little."""

    def __init__(self, line: Callable[[], str]) -> None:
        self._line = line
        super().__init__()

    def render(self, task: Task) -> ProgressBar | Text:  # type: ignore[override]
        room = min(_WIDEST_BAR, err.width - len(self._line()) - _BESIDE_BAR)
        if room < _NARROWEST_BAR:
            return Text("")
        self.bar_width = room
        return super().render(task)
