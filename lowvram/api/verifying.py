"""A run's last steps made again from the checkpoint before them, and compared bit by bit; writes nothing."""

from __future__ import annotations

import dataclasses
import os
import statistics
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import lowvram
from lowvram.api.measures import plain
from lowvram.api.tasks import Notice, Progress, Task

if TYPE_CHECKING:
    import torch

    from lowvram.config.plan import Plan
    from lowvram.config.run import RunConfig
    from lowvram.errors import LowvramError
    from lowvram.storage.checkpoint import Checkpoint
    from lowvram.storage.tensor_files import MappedTensors
    from lowvram.train.logged_steps import LoggedStep, StepDifference
    from lowvram.train.replay import Replay, TensorDifference

Origin = Literal["checkpoint", "start"]
# A run with a single checkpoint is repeated from its start without being asked where that takes no longer.
CHEAP_S = 60.0


@dataclass(frozen=True)
class NumberDifference:
    """A number beside the tensors (step, tokens, loss scale, rotation …) that differs."""

    name: str
    saved: Any
    repeated: Any


@dataclass(frozen=True)
class Verification:
    """What came out of repeating the steps after `first_step` up to `last_step`.

    checkpoint: the one that they lead to, of step `checkpoint_step`; where that is later than `last_step`, only the log
    was compared.  step: the first step whose logged numbers differ.  tensor: the first tensor that differs, in the
    model's order, of `differing_tensors`.  unlogged_steps: repeated steps that the log does not have.
    changed_conditions: what is not as it was when the checkpoint was saved; equality is not promised then.
    """

    checkpoint: Path
    first_step: int
    last_step: int
    checkpoint_step: int
    compared_tensors: int
    step: StepDifference | None = None
    tensor: TensorDifference | None = None
    differing_tensors: int = 0
    numbers: tuple[NumberDifference, ...] = ()
    unlogged_steps: int = 0
    changed_conditions: tuple[str, ...] = ()
    notices: tuple[Notice, ...] = ()

    @property
    def is_equal(self) -> bool:
        """Say whether everything that was compared is equal."""
        return self.step is None and self.tensor is None and not self.numbers

    def as_dict(self) -> dict[str, Any]:
        """Return the values that `lowvram verify --json` prints."""
        found: dict[str, Any] = plain(dataclasses.asdict(self))
        del found["notices"]
        return {"is_equal": self.is_equal, **found, "checkpoint": str(self.checkpoint)}


def verify(
    run: str | Path,
    *,
    origin: Origin | None = None,
    steps: int | None = None,
    device: str = "auto",
    progress: bool = False,
) -> Verification:
    """Make the steps between a run's last two checkpoints again, and compare every bit with what was saved.

    run: a run directory, or one of its checkpoints, which is then the later one.  It is only read, and may be training.
    origin: what the steps begin from: "checkpoint", the one before, or "start", the run's first step.  None takes the
    one before; where there is none, the start if that takes at most a minute.  steps: the most that are repeated; where
    that is fewer than lead to the checkpoint, only the log is compared.  device: "auto" is the run's, if it is here.
    Raises CheckpointError where there are not two checkpoints or one is damaged, ConfigError where data or tokenizer
    are others, MemoryRanOutError where the steps do not fit now.
    """
    from lowvram.api.arguments import PATH, refuse_count, refuse_missing
    from lowvram.api.progress import carry_out
    from lowvram.errors import refuse_unknown

    refuse_missing("run", run, *PATH)
    refuse_missing("device", device, str)
    refuse_unknown("origin", origin, ("checkpoint", "start"))
    refuse_count("steps", steps)
    found, notices = carry_out(verify_task(Path(run), origin, steps, device), progress)
    return dataclasses.replace(found, notices=notices)


class _Saved(NamedTuple):
    """The later checkpoint.  Its files are open from the first step on: a run that trains may delete them meanwhile."""

    checkpoint: Checkpoint
    config: RunConfig
    numbers: dict[str, Any]
    plan: Plan
    weights: MappedTensors
    states: MappedTensors


def verify_task(
    path: Path, origin: Origin | None = None, steps: int | None = None, device: str = "auto"
) -> Task[Verification]:
    """Do what `verify` does, and yield its notices and its progress."""
    from lowvram.errors import CheckpointError
    from lowvram.train.logged_steps import read_logged_steps
    from lowvram.train.prepare import prepare_replay
    from lowvram.train.settings import RunSettings

    yield Progress("Checking the checkpoints")
    saved = _open_saved(path)
    run, last = saved.checkpoint.directory.parent, saved.checkpoint.step
    before = yield from _find_before(saved, origin)
    first = before.step if before is not None else 0
    logged = read_logged_steps(run / "log.jsonl", first, last)
    needed_s = _estimate(saved.config, logged, last - first)
    if before is None and origin is None and (needed_s is None or needed_s > CHEAP_S):
        raise _explain_single(saved.checkpoint, needed_s)
    until = min(last, first + (steps or last))
    if until < last and not logged:
        what = f"`steps` is {steps}, fewer than the {last - first} that lead to {saved.checkpoint.directory}."
        raise CheckpointError(what, f"{run} has no log of them, so nothing could be compared.", "Leave `steps` out.")
    where = _choose_device(device, saved.numbers)
    yield from where[1]
    yield Progress("Checking the shards and building the model")
    plan_before = _read_plan(before) if before is not None else saved.plan
    with _threads_of(saved.numbers, where[0]):
        replay = prepare_replay(RunSettings(saved.config, plan_before, where[0]))
        _refuse_changes(replay, [saved.checkpoint, *([before] if before is not None else [])])
        replay.state.check(saved.checkpoint)
        began_from = replay.begin(before)
        yield Notice(_describe(saved.checkpoint, before, began_from, until, needed_s))
        difference = yield from _repeat(replay, until, logged, plan_before, saved.plan)
        found = Verification(
            saved.checkpoint.directory,
            first,
            until,
            last,
            compared_tensors=0,
            step=difference,
            unlogged_steps=sum(number not in logged for number in range(first + 1, until + 1)),
            changed_conditions=_list_conditions(replay, saved),
        )
        if until < last:
            return found
        yield Progress("Comparing the tensors")
        return _compare(replay, saved, found)


def _open_saved(path: Path) -> _Saved:
    """Open the checkpoint that a path is, or the newest one of a run; raises CheckpointError where it is damaged."""
    from lowvram.errors import CheckpointError
    from lowvram.generate.saved_run import saved_config
    from lowvram.storage.manifest import MANIFEST, STEP_NAME, list_checkpoints
    from lowvram.storage.missing_run import explain_no_checkpoint, explain_no_directory

    if not path.is_dir():
        raise explain_no_directory(path)
    path = path.resolve()
    directories = list_checkpoints(path)
    if (path / MANIFEST).is_file() or (STEP_NAME.fullmatch(path.name) and not directories):
        directories = [path]
    if not directories:
        raise explain_no_checkpoint(path, sorted({found.parent for found in path.glob("*/step-????????")}))
    with _while_it_is_there(directories[0]):
        try:
            checkpoint = _open_whole(directories[0])
        except CheckpointError as problem:
            raise CheckpointError(problem.what, problem.why, problem.fix or _go_on_before(directories)) from problem
        weights, states = checkpoint.map_weights(), checkpoint.map_state()
        config = saved_config(checkpoint)
        return _Saved(checkpoint, config, checkpoint.numbers(), _read_plan(checkpoint), weights, states)


def _go_on_before(directories: list[Path]) -> str:
    """Return what to do where the first of these checkpoints, the newest first, is damaged."""
    if len(directories) == 1:
        return "The run has no other one here: copy it anew, or begin again."
    return f"lowvram train goes on from the checkpoint before it, which lowvram verify {directories[1]} looks at."


def _open_whole(directory: Path) -> Checkpoint:
    from lowvram.storage.checkpoint import open_checkpoint

    with _while_it_is_there(directory):
        return open_checkpoint(directory)


@contextmanager
def _while_it_is_there(directory: Path) -> Iterator[None]:
    """Raise CheckpointError where a checkpoint was deleted while it was read."""
    from lowvram.errors import CheckpointError

    try:
        yield
    except (CheckpointError, FileNotFoundError) as error:
        if directory.is_dir():
            raise
        raise CheckpointError(
            f"{directory} was deleted while it was read.",
            "The run that trains there has saved newer ones, and keeps run.keep of them.",
            "Type the same command again; a larger run.keep or save_every_minutes leaves more time.",
        ) from error


def _find_before(saved: _Saved, origin: Origin | None) -> Task[Checkpoint | None]:
    """Return the newest whole checkpoint before the saved one; None where there is none, or the start was asked for."""
    from lowvram.errors import CheckpointError
    from lowvram.storage.manifest import list_checkpoints, step_of

    if origin == "start":
        return None
    directory = saved.checkpoint.directory
    older = [path for path in list_checkpoints(directory.parent) if step_of(path) < saved.checkpoint.step]
    for path in older:
        try:
            return _open_whole(path)
        except CheckpointError as problem:
            yield Notice(f"Passed over a corrupt checkpoint: {problem}", "warning")
    if origin == "checkpoint":
        raise _explain_single(saved.checkpoint, None)
    return None


def _read_plan(checkpoint: Checkpoint) -> Plan:
    """Return the plan that a checkpoint was made with; raises CheckpointError where it holds none."""
    from pydantic import ValidationError

    from lowvram.config.plan import Plan
    from lowvram.errors import CheckpointError
    from lowvram.storage.manifest import NUMBERS

    try:
        return Plan.model_validate(checkpoint.numbers()["plan"])
    except (KeyError, ValidationError) as error:
        raise CheckpointError(
            f"{checkpoint.directory / NUMBERS} holds no plan of this version.",
            "No trainer of this version saved it, so its steps cannot be repeated.",
        ) from error


def _explain_single(checkpoint: Checkpoint, needed_s: float | None) -> LowvramError:
    from lowvram.errors import CheckpointError, argument
    from lowvram.units import count_of, show_duration

    about = "" if needed_s is None else f", about {show_duration(needed_s)}"
    return CheckpointError(
        f"{checkpoint.directory.parent} has no whole checkpoint before step {checkpoint.step}.",
        "The steps between two checkpoints are repeated.",
        f"Train until the next save, or repeat the whole run with {argument('origin', 'start')} "
        f"({count_of(checkpoint.step, 'step')}{about}).",
    )


def _estimate(config: RunConfig, logged: Mapping[int, LoggedStep], steps: int) -> float | None:
    """Return the seconds that so many steps take at the run's own speed; None where its log tells none."""
    speeds = [each.tokens_per_second for each in logged.values() if each.tokens_per_second > 0]
    return steps * config.train.batch_tokens / statistics.median(speeds) if speeds else None


def _choose_device(asked: str, numbers: dict[str, Any]) -> tuple[torch.device, tuple[Notice, ...]]:
    """Return the device that was asked for; for "auto" the kind of device on which the run was saved, if it is here."""
    from lowvram.api.device import choose_device
    from lowvram.errors import MachineError
    from lowvram.train.conditions import KEY, device_kind

    kind = device_kind(numbers.get(KEY))
    if asked == "auto" and kind is not None:
        try:
            return choose_device(kind)
        except MachineError:
            return choose_device()  # the conditions that changed are told
    return choose_device(asked)


@contextmanager
def _threads_of(numbers: dict[str, Any], device: torch.device) -> Iterator[None]:
    """Compute with as many threads as the run did, where its processor made the steps and this one has as many."""
    import torch

    from lowvram.train.conditions import KEY

    before, conditions = torch.get_num_threads(), numbers.get(KEY)
    threads = conditions.get("threads") if isinstance(conditions, dict) else None
    if device.type == "cpu" and isinstance(threads, int) and 1 <= threads <= (os.cpu_count() or 1):
        torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _refuse_changes(replay: Replay, checkpoints: list[Checkpoint]) -> None:
    from lowvram.errors import ConfigError
    from lowvram.train.start import list_changes

    for checkpoint in checkpoints:
        if changed := list_changes(replay.config, replay.hashes, checkpoint):
            raise ConfigError(
                f"The steps around {checkpoint.directory} cannot be repeated:",
                "; ".join(change.says for change in changed) + ".",
                "Put back the data and the tokenizer with which the run was trained.",
            )


def _describe(
    saved: Checkpoint, before: Checkpoint | None, began_from: Path | None, until: int, needed_s: float | None
) -> str:
    from lowvram.units import count_of, show_duration

    first = before.step if before is not None else 0
    start = str(before.directory) if before is not None else "the run's start"
    if began_from is not None:
        start += f" with the weights of {began_from}"
    share = (until - first) / max(1, saved.step - first)
    about = "" if needed_s is None else f": about {show_duration(share * needed_s)} at the run's own speed"
    return f"Repeating {count_of(until - first, 'step')} from {start}{about}."


def _repeat(
    replay: Replay, until: int, logged: Mapping[int, LoggedStep], plan_before: Plan, plan_after: Plan
) -> Task[StepDifference | None]:
    """Repeat the steps; return the first one whose logged numbers differ."""
    from lowvram.train.logged_steps import compare_step, plan_of_step
    from lowvram.units import show_duration

    first, found = replay.state.step, None
    was_halved = any(step.halved_to is not None for step in logged.values())

    def plan_of(step: int) -> Plan:
        return plan_of_step(logged.get(step), plan_before, plan_after, was_halved)

    yield Progress("Repeating the steps", 0, until - first)
    for step in replay.repeat(until, plan_of):
        left_s = (until - step.step) * replay.config.train.batch_tokens / step.tokens_per_second
        yield Progress("Repeating the steps", step.step - first, until - first, f"{show_duration(left_s)} left")
        if found is None and step.step in logged:
            found = compare_step(step, logged[step.step])
            if found is not None:
                yield Notice(found.describe(), "warning")
    return found


def _list_conditions(replay: Replay, saved: _Saved) -> tuple[str, ...]:
    from lowvram.train.conditions import KEY
    from lowvram.train.environment import list_changed_conditions

    conditions = saved.numbers.get(KEY)
    # Older checkpoints have the version of lowvram in their manifest alone.
    wrote = {"lowvram": saved.checkpoint.manifest["versions"].get("lowvram", lowvram.__version__)}
    saved_then = (conditions if isinstance(conditions, dict) else {}) | wrote
    return tuple(list_changed_conditions(saved_then, replay.conditions))


def _compare(replay: Replay, saved: _Saved, found: Verification) -> Verification:
    """Add to what was found the tensors and the numbers that differ."""
    from lowvram.train.replay import differing_tensors

    weights, states = replay.state.tensors()
    differing = [*differing_tensors(weights, saved.weights), *differing_tensors(states, saved.states)]
    numbers = tuple(
        NumberDifference(name, saved.numbers.get(name), value)
        for name, value in replay.state.numbers().items()
        if saved.numbers.get(name) != value
    )
    return dataclasses.replace(
        found,
        compared_tensors=len(weights) + len(states),
        tensor=differing[0] if differing else None,
        differing_tensors=len(differing),
        numbers=numbers,
    )
