"""A training run from its run file to its events: configured in one place, then iterated; prints nothing."""

from __future__ import annotations

import dataclasses
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from lowvram.api.progress import carry_out, with_step_bar
from lowvram.api.tasks import Notice, Progress, Task

if TYPE_CHECKING:
    from types import TracebackType

    import torch

    from lowvram.api.flatmate import Flatmate
    from lowvram.api.plan_monitor import PlanMonitor
    from lowvram.config.plan import Plan, Recompute
    from lowvram.config.run import RunConfig
    from lowvram.train.events import Event
    from lowvram.train.log import Log
    from lowvram.train.settings import RunSettings
    from lowvram.train.trainer import Trainer


@dataclass(frozen=True)
class PlanOptions:
    """What the user decides about the plan; None leaves it to lowvram.

    micro_batch: sequences at a time.  recompute: what backward computes again instead of keeping it.  compile: whether
    blocks are compiled.  graphs: whether the passes of a micro-batch are replayed from CUDA graphs.  device_check:
    whether the device is compared with the processor before the first step; None does so for a new run elsewhere.
    """

    micro_batch: int | None = None
    recompute: Recompute | None = None
    compile: bool | None = None
    graphs: bool | None = None
    device_check: bool | None = None


class TrainingRun:
    """A run that is about to begin or to go on: iterate over it to train.

    settings: what was chosen before the first step.  budget: the memory of the device.  notices: what was said
    meanwhile.  It holds the lock of the run directory until it is exhausted or closed: use it in a `with` block where
    the loop may be left early.  Where the loop is left without `stop()`, what was learnt after the last checkpoint is
    lost.
    """

    def __init__(self, prepared: PreparedRun, notices: tuple[Notice, ...] = (), progress: bool = False) -> None:
        self.settings, self.budget, self.notices = prepared.settings, prepared.monitor.budget, notices
        self._prepared, self._events = prepared, _train(prepared)
        if progress:
            self._events = with_step_bar(self._events, prepared.settings.config.train.steps)

    @property
    def trainer(self) -> Trainer:
        """The trainer, whose state a caller may read at any moment."""
        return self._prepared.trainer

    def stop(self) -> None:
        """Ask the run to save and end after the step in progress; iterate on to let it do so."""
        self.trainer.stop()

    def close(self) -> None:
        """End at once, without saving; the last checkpoint stands."""
        self._events.close()
        self._prepared.resources.close()

    def __iter__(self) -> Iterator[Event | Notice]:
        """Return the run itself: what was done is not done again."""
        return self

    def __next__(self) -> Event | Notice:
        """Train until the next event."""
        return next(self._events)

    def __enter__(self) -> TrainingRun:
        """Return the run itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the run."""
        self.close()


@dataclass(frozen=True)
class PreparedRun:
    """A run whose lock is held and whose trainer stands at its first step.

    flatmate: watches it, None where nothing does.  resources: what is closed at the end.
    """

    settings: RunSettings
    trainer: Trainer
    monitor: PlanMonitor
    logs: tuple[Log, ...] = ()
    flatmate: Flatmate | None = None
    resources: ExitStack = field(default_factory=ExitStack)


def train(
    run: str | Path | RunConfig,
    *,
    overrides: Mapping[str, object] | Sequence[str] = (),
    device: str = "auto",
    micro_batch: int | None = None,
    recompute: Recompute | None = None,
    compile: bool | None = None,
    graphs: bool | None = None,
    device_check: bool | None = None,
    progress: bool = False,
    allow: Sequence[str] = (),
) -> TrainingRun:
    """Configure a run and return it; iterating over what is returned trains, and yields events as they happen.

    run: a run file, or a configuration.  Starting and resuming are the same call.  overrides: values laid over a run
    file, as {"optimizer.lr": 3e-4} or as ["optimizer.lr=3e-4"].  micro_batch, recompute, compile, graphs,
    device_check: see `PlanOptions`.  progress: show a progress bar, in a terminal or a notebook.  allow: "data",
    "tokenizer" or both, where a run may go on although they have other contents than at its last save.

    Raises, now or while iterating, a LowvramError: ConfigError for the run file, DataError for the shards,
    MachineError where the device is not here or nothing fits, BusyError where another process trains in the run's
    directory, TrainingError where training cannot go on.
    """
    from lowvram.api.arguments import PATH, refuse_count, refuse_missing, refuse_type
    from lowvram.config.plan import TECHNIQUES
    from lowvram.config.run import RunConfig
    from lowvram.errors import refuse_unknown
    from lowvram.train.start import ALLOWABLE

    refuse_missing("run", run, *PATH, RunConfig)
    refuse_missing("device", device, str)
    refuse_count("micro_batch", micro_batch)
    refuse_unknown("recompute", recompute, TECHNIQUES)
    refuse_type("compile", compile, bool)
    refuse_type("graphs", graphs, bool)
    refuse_type("device_check", device_check, bool)
    for each in allow:
        refuse_unknown("allow", each, ALLOWABLE)
    asked = PlanOptions(micro_batch, recompute, compile, graphs, device_check)
    config = run if not isinstance(run, str | Path) else read_run_file(Path(run), overrides, asked)
    task = prepare_run(config, device, asked, allow)
    prepared, notices = carry_out(task, progress)
    return TrainingRun(prepared, notices, progress)


def read_run_file(
    path: Path, overrides: Mapping[str, object] | Sequence[str] = (), asked: PlanOptions | None = None
) -> RunConfig:
    """Return a run file's configuration, with the vocabulary of the tokenizer that it names.

    asked: refused, where the run cannot have such a plan, before the tokenizer is looked for.
    Raises ConfigError naming the key, TokenizerError where the tokenizer cannot be read.
    """
    from lowvram.api.overrides import assignments
    from lowvram.config.plan import choose_plan
    from lowvram.config.run_file import load_run
    from lowvram.data.hf_tokenizer import load_tokenizer

    def check(config: RunConfig) -> None:
        choose_plan(config.train, asked.micro_batch if asked is not None else None)

    return load_run(path, assignments(overrides), lambda directory: load_tokenizer(directory).size, check=check)


def prepare_run(
    config: RunConfig, device: str = "auto", asked: PlanOptions | None = None, allow: Sequence[str] = ()
) -> Task[PreparedRun]:
    """Choose device, memory budget, plan, compilation and CUDA graphs, and build the trainer; yields why.

    allow: see `train`.

    Takes the lock of the run's directory, which the PreparedRun's resources give back.
    """
    from lowvram.api.device import choose_device
    from lowvram.api.device_checking import check_device, is_worth_a_check
    from lowvram.api.flatmate import move_in
    from lowvram.train.autotune import refuse_cuda_graphs
    from lowvram.train.control import hear_requests
    from lowvram.train.log import open_logs
    from lowvram.train.prepare import prepare
    from lowvram.train.start import lock_run

    asked = asked or PlanOptions()
    chosen = choose_device(device)
    if asked.graphs:
        refuse_cuda_graphs(chosen.device, config.train)
    yield from chosen.notices
    with ExitStack() as stack:
        lock = stack.enter_context(lock_run(config.run.dir))
        control = stack.enter_context(hear_requests(config.run.dir))
        settings, monitor = yield from _resolve_plan(config, chosen.device, asked)
        settings = dataclasses.replace(settings, allow=tuple(allow))
        if asked.device_check or (asked.device_check is None and is_worth_a_check(settings)):
            yield from check_device(settings)
        yield Progress("Checking the shards and building the model")
        trainer = prepare(settings, lock)
        flatmate = yield from move_in(trainer, control, stack)
        yield from _describe_text(config)
        monitor.enforce(settings.plan)
        yield from _autotune(trainer, monitor, asked, not settings.is_kept)
        logs = (*open_logs(config.run.dir, config.run.log), *_open_receipt(trainer, monitor, chosen.device))
        for log in logs:
            stack.callback(log.close)
        settings = dataclasses.replace(settings, plan=trainer.plan, graphs=trainer.captured_pass is not None)
        return PreparedRun(settings, trainer, monitor, logs, flatmate, stack.pop_all())
    raise AssertionError("lock_run lets every error through")


def _resolve_plan(config: RunConfig, device: torch.device, asked: PlanOptions) -> Task[tuple[RunSettings, PlanMonitor]]:
    from lowvram.api.disk_room import check_disk_room
    from lowvram.api.plan_monitor import PlanMonitor
    from lowvram.api.target import notices_of, warn_of_precision
    from lowvram.train.settings import RunSettings
    from lowvram.train.start import resolve_plan

    monitor = PlanMonitor(config, device)
    yield from notices_of(monitor.budget)
    yield Progress("Looking for the plan that fits")
    plan, reason, is_kept = resolve_plan(
        config.run.dir, config.train, asked.micro_batch, asked.recompute, asked.compile, monitor.choose
    )
    limit_bytes = monitor.budget.limit_bytes
    settings = RunSettings(config, monitor.adapt(plan), device, reason, is_kept, limit_bytes)
    yield Notice(_describe_size(config, device))
    yield Notice(describe_plan(settings.plan, reason))
    if warning := check_disk_room(config, monitor.checkpoint_bytes(settings.plan)):
        yield Notice(warning, "warning")
    if is_kept and (warning := monitor.warn_if_tight(settings.plan)):
        yield Notice(warning, "warning")
    if warning := warn_of_precision(config.train, monitor.budget.profile):
        yield Notice(warning, "warning")
    return settings, monitor


def _autotune(trainer: Trainer, monitor: PlanMonitor, asked: PlanOptions, is_new: bool) -> Task[None]:
    """Try what may be faster on this machine: compiled blocks, then CUDA graphs."""
    from lowvram.train.autotune import autotune_compilation, autotune_cuda_graphs

    room = monitor.room_to_compile(trainer.state.optimizer.bytes_on_device())
    for sentence in autotune_compilation(trainer, asked.compile, is_new, room):
        yield Notice(sentence)
    room = monitor.room_to_compile(trainer.state.optimizer.bytes_on_device())
    for sentence in autotune_cuda_graphs(trainer, asked.graphs, room):
        yield Notice(sentence)


def _open_receipt(trainer: Trainer, monitor: PlanMonitor, device: torch.device) -> list[Log]:
    """Return the log that keeps the run's receipt; a processor or an Apple chip reports no peak to compare."""
    from lowvram.api.receipts import ReceiptLog, conditions

    if device.type != "cuda":
        return []
    return [ReceiptLog(trainer.config.run.dir, lambda: conditions(trainer, monitor))]


def _describe_text(config: RunConfig) -> Iterator[Notice]:
    """Yield how often the text is read, which decides more than anything else what can be learnt from it."""
    from lowvram.fit.epochs import open_text, remark_on

    for remark in remark_on(open_text(config.data), config.model, config.train):
        yield Notice(remark.says, "warning" if remark.is_warning else "info")


def _describe_size(config: RunConfig, device: torch.device) -> str:
    from lowvram.hardware.detect import describe_machine

    size = f"{config.model.num_parameters():,} parameters in {config.train.precision}"
    return f"{describe_machine()}: {size} on {device}."


def describe_plan(plan: Plan, reason: str) -> str:
    """Return a plan and the reason for it as a sentence."""
    from lowvram.units import count_of

    again = "" if plan.recompute == "none" else f", {plan.recompute} computed again in backward"
    moved = ", the optimizer's states in the computer's memory" if plan.offload == "optimizer" else ""
    compiled = ", blocks compiled" if plan.compile else ""
    kept = ", copies of the weights as they are multiplied kept" if plan.keep_casts else ""
    chunk = f", {plan.loss_chunk:,} rows of logits at a time" if plan.loss_chunk else ""
    cut = f"{count_of(plan.micro_batch, 'sequence')} × {plan.accumulate} a step"
    return f"Plan: {cut}{again}{moved}{compiled}{kept}{chunk} ({reason})."


def _train(prepared: PreparedRun) -> Generator[Event | Notice, None, None]:
    """Run the trainer, write its events down, and compare its first steps with what was expected."""
    from lowvram.errors import MemoryRanOutError
    from lowvram.train.events import Halved, Started, StepDone
    from lowvram.train.oom import explain_device_fault
    from lowvram.train.start import keep_plan

    trainer, monitor, flatmate = prepared.trainer, prepared.monitor, prepared.flatmate
    with prepared.resources:
        try:
            for event in trainer.run() if flatmate is None else flatmate.follow(trainer.run()):
                if isinstance(event, Notice):
                    yield event
                    continue
                if isinstance(event, Started | Halved):
                    keep_plan(trainer.config.run.dir, trainer.plan)
                    monitor.enforce(trainer.plan, trainer.captured_pass is not None)
                for log in prepared.logs:
                    log.write(event)
                yield event
                if isinstance(event, StepDone) and (surprise := monitor.check_step(event)):
                    yield Notice(surprise, "warning")
        except MemoryRanOutError as error:
            raise monitor.add_suggestions(error, trainer.plan) from error
        except RuntimeError as error:
            fault = explain_device_fault(error, trainer.saved_step)
            if fault is None:
                raise
            raise fault from error
