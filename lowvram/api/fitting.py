"""Which models a card can pretrain, and how; or what one run needs: options in, a FitResult out; prints nothing."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from lowvram.api.fit_result import FitOptions, FitResult
from lowvram.api.tasks import Notice, Progress, Task

if TYPE_CHECKING:
    from lowvram.api.target import Target
    from lowvram.config.model import ModelConfig
    from lowvram.config.plan import Recompute
    from lowvram.config.run import RunConfig
    from lowvram.config.train import TrainConfig
    from lowvram.fit.epochs import Remark, RunText
    from lowvram.fit.report import FitReport, MemoryBudget
    from lowvram.fit.search import PlanConstraints
    from lowvram.fit.suggestions import Change
    from lowvram.hardware.profile import Desktop

# What stands for "the presets" where one must be named: the smallest.
_SMALLEST = "tr-25m"
# A smaller number is meant in another unit.
_LEAST_MEMORY_BYTES = 64 << 20


def fit(
    run: str | Path | None = None,
    *,
    gpu: str | None = None,
    memory: str | int | None = None,
    ram: str | int | None = None,
    desktop: Desktop | None = None,
    preset: str | None = None,
    overrides: Mapping[str, object] | Sequence[str] = (),
    micro_batch: int | None = None,
    recompute: Recompute | None = None,
    days: float | None = None,
    measure: bool = False,
    data: str | Path | None = None,
    tariff: str | Path | None = None,
    progress: bool = False,
) -> FitResult:
    """Return which presets a card can pretrain, with which plan and in how many days; or what one run needs.

    Nothing is trained, and the card need not be here.  run: a run file to judge.  gpu: "rtx5070", "m3-max", …; without
    it and without memory this machine is meant.  memory, ram: of the card and of the computer, in bytes or as "8GB".
    The other parameters: see `FitOptions`.  progress: show a progress bar, in a terminal or a notebook.

    Raises ConfigError for options that say nothing together, or naming the nearest cards, presets or keys; DataError
    for shards that cannot be read; MachineError where nothing can be measured here.
    """
    from lowvram.api.arguments import PATH, refuse_count, refuse_type
    from lowvram.api.overrides import assignments
    from lowvram.api.progress import carry_out
    from lowvram.config.plan import TECHNIQUES
    from lowvram.errors import refuse_unknown
    from lowvram.hardware.profile import Desktop

    for name, path in (("run", run), ("data", data), ("tariff", tariff)):
        refuse_type(name, path, *PATH)
    refuse_type("gpu", gpu, str)
    refuse_unknown("desktop", desktop, get_args(Desktop))
    refuse_type("preset", preset, str)
    refuse_count("micro_batch", micro_batch)
    refuse_unknown("recompute", recompute, TECHNIQUES)
    refuse_type("days", days, int, float)
    refuse_type("measure", measure, bool)
    options = FitOptions(
        run_file=Path(run) if run is not None else None,
        gpu=gpu,
        memory_bytes=_read_size("memory", memory),
        ram_bytes=_read_size("ram", ram),
        desktop=desktop,
        preset=preset,
        overrides=tuple(assignments(overrides)),
        micro_batch=micro_batch,
        recompute=recompute,
        measure=measure,
        data=Path(data) if data is not None else None,
        tariff=Path(tariff) if tariff is not None else None,
    )
    if days is not None:
        options = dataclasses.replace(options, days=days)
    found, notices = carry_out(fit_task(options), progress)
    return dataclasses.replace(found, notices=notices)


def _read_size(name: str, value: str | int | None) -> int | None:
    from lowvram.api.arguments import refuse_count, refuse_type
    from lowvram.errors import ConfigError, argument
    from lowvram.units import parse_memory

    refuse_type(name, value, int, str)
    if value is None or isinstance(value, int):
        refuse_count(name, value)
        if value is not None and value < _LEAST_MEMORY_BYTES:
            why = "A number is a size in bytes, and no machine has so few."
            raise ConfigError(f"{argument(name)} is {value}.", why, f"Write {argument(name, f'{value}GB')}.")
        return value
    try:
        return parse_memory(value)
    except ValueError as error:
        raise ConfigError(f"{argument(name)} is {value!r}.", f"{error}.", f"Write {argument(name, '8GB')}.") from error


def fit_task(options: FitOptions) -> Task[FitResult]:
    """Do what `fit` does, and yield its notices and its progress."""
    from lowvram.api.cheap_hours import plan_hours_of
    from lowvram.api.target import describe_target, detect_target
    from lowvram.config.tariff import read_tariff
    from lowvram.fit.recommend import recommend, recommend_first

    refuse_contradictions(options)
    tariff = read_tariff(options.tariff) if options.tariff is not None else None
    if options.is_here:
        target = detect_target(options.ram_bytes)
    else:
        target = describe_target(options.gpu, options.memory_bytes, options.ram_bytes, options.desktop)
    yield Notice(target.sentence)
    run = None
    if options.run_file is not None:
        run = yield from _read_run(options, options.run_file)
    elif options.preset is not None:  # one that does not exist is refused before anything is measured or opened
        _read_constraints(options, _load_preset(options.preset, options, target)[1])
    if options.measure:
        yield from _calibrate(options, target, run)
    text = yield from _read_text(options, run)
    if run is not None:
        reports, budget = yield from _evaluate_run(options, target, run)
    else:
        reports, budget = yield from _evaluate_presets(options, target)
    result = FitResult(
        options=options,
        target=target,
        budget=budget,
        models=tuple(reports),
        first_run=recommend_first(reports, text),
        recommended=recommend(reports, options.days, text),
        text=text,
        changes=None if options.has_plan else (),
        tariff=tariff,
        hours=plan_hours_of(reports[0], run, tariff),
    )
    return (yield from _look_closer(result)) if options.is_alone else result


def refuse_contradictions(options: FitOptions) -> None:
    """Raise ConfigError where options say nothing together, before anything takes time."""
    from lowvram.errors import ConfigError, argument

    run_file, is_alone = options.run_file, options.is_alone
    if run_file is not None and options.gpu and not run_file.exists() and run_file.suffix != ".toml":
        words = f"{options.gpu} {run_file}"
        raise ConfigError(f"There is no run file {run_file}.", fix=f"Two words go in quotes: {argument('gpu', words)}.")
    name_one = "Name it: a run file, or a preset (`preset`)."
    for is_wrong, what, fix in (
        (run_file and options.preset, "A run file and `preset` were both given.", "Leave one of them out."),
        (options.overrides and not is_alone, "Values are overridden (`overrides`) of one run only.", name_one),
        (options.micro_batch and not is_alone, "A plan (`micro_batch`) is of one run only.", name_one),
        (options.tariff and not is_alone, "What a run costs (`tariff`) is said of one run only.", name_one),
        (run_file and options.data, f"`data` and {run_file} both name the text.", "Leave `data` out."),
        (options.desktop and options.is_here, "`desktop` is for a card elsewhere.", "Here, what is free now counts."),
        (options.measure and not options.is_here, "`measure` times this machine.", "Leave `gpu` and `memory` out."),
    ):
        if is_wrong:
            raise ConfigError(what, fix=fix)


def _read_run(options: FitOptions, run_file: Path) -> Task[RunConfig]:
    """Read the run file, and refuse a plan that it cannot have.

    Before there is a tokenizer, the vocabulary is the one that the file or its preset names.
    """
    from lowvram.config.run_file import load_run, name_vocabulary
    from lowvram.data.hf_tokenizer import load_tokenizer
    from lowvram.errors import LowvramError

    notices: list[Notice] = []

    def count_ids(directory: Path) -> int:
        named = None if directory.exists() else name_vocabulary(run_file, options.overrides)
        if named is None:
            return load_tokenizer(directory).size
        says = f"There is no tokenizer yet: {named:,} ids are taken, as the run file or its preset says."
        notices.append(Notice(says, "warning"))
        return named

    try:
        run = load_run(run_file, options.overrides, count_ids, True, lambda run: _refuse_plan(options, run.train))
    except LowvramError:
        yield from notices
        raise
    yield from notices
    return run


def _read_text(options: FitOptions, run: RunConfig | None) -> Task[RunText | None]:
    """Open the shards of a folder or of a run file, which is judged without them too, since they may come later."""
    from lowvram.errors import DataError
    from lowvram.fit.epochs import open_folder, open_text

    if run is None:
        return open_folder(options.data) if options.data is not None else None
    try:
        return open_text(run.data)
    except DataError as error:
        yield Notice(f"How often the text is read is not known: {error}", "warning")
        return None


def _calibrate(options: FitOptions, target: Target, run: RunConfig | None) -> Task[None]:
    """Time one preset, or the run that was named, on this machine."""
    from lowvram.api.calibration import calibrate

    if run is not None and options.run_file is not None:
        yield from calibrate(options.run_file.stem, run.model, run.train, target)
    else:
        name = options.preset or _SMALLEST
        yield from calibrate(name, *_load_preset(name, options, target), target)


def _evaluate_run(options: FitOptions, target: Target, run: RunConfig) -> Task[tuple[list[FitReport], MemoryBudget]]:
    from lowvram.api import rehearsals
    from lowvram.api.target import notices_of, warn_of_precision

    assert options.run_file is not None, "the run was read from it"
    if warning := warn_of_precision(run.train, target.profile):
        yield Notice(warning, "warning")
    name, budget = options.run_file.stem, target.budget(run.train.precision)
    yield from notices_of(budget)
    constraints = _read_constraints(options, run.train)
    yield Progress(f"Replaying a step of {name} on meta tensors")
    return [rehearsals.rehearse_fit(name, run.model, run.train, budget, run.run, constraints)], budget


def _evaluate_presets(options: FitOptions, target: Target) -> Task[tuple[list[FitReport], MemoryBudget]]:
    """Judge the preset that was named, or every preset."""
    from lowvram.api import rehearsals
    from lowvram.api.target import notices_of
    from lowvram.config.run_file import preset_names

    budget = target.budget(_load_preset(options.preset or _SMALLEST, options, target)[1].precision)
    yield from notices_of(budget)
    ids = yield from _count_ids(options)
    reports = []
    for name in [options.preset] if options.preset else preset_names():
        model, train = _load_preset(name, options, target)
        if ids is not None:
            model = model.model_copy(update={"vocabulary": ids})
        constraints = _read_constraints(options, train)
        report = None
        if constraints.micro_batch is None:
            report = evaluate_fit_from_ledgers(name, model, train, budget, constraints)
        if report is None:
            yield Progress(f"Replaying a step of {name} on meta tensors")
            report = rehearsals.rehearse_fit(name, model, train, budget, constraints=constraints)
        reports.append(report)
    return sorted(reports, key=lambda report: report.model.num_parameters()), budget


def _count_ids(options: FitOptions) -> Task[int | None]:
    """Return the size of the tokenizer that lies beside `data`, for the preset that was named.

    None where each preset keeps its own vocabulary, whose rehearsals are known; that is told where it is another one.
    """
    from lowvram.data.hf_tokenizer import load_tokenizer
    from lowvram.errors import LowvramError
    from lowvram.fit.folders import find_folders

    if options.data is None or any("vocabulary" in assignment for assignment in options.overrides):
        return None
    tokenizer = find_folders(options.data).tokenizer
    if tokenizer is None:
        return None
    try:
        ids = load_tokenizer(tokenizer).size
    except LowvramError as error:
        yield Notice(f"Presets keep their own vocabularies: {error}", "warning")
        return None
    if options.is_alone:
        return ids
    says = f"Each preset is judged with its own vocabulary; one that is named with `preset` takes the {ids:,} ids"
    yield Notice(f"{says} of {tokenizer}.")
    return None


def _load_preset(name: str, options: FitOptions, target: Target) -> tuple[ModelConfig, TrainConfig]:
    """Load a preset; which 16-bit numbers it computes with is the one thing that it leaves to the card."""
    from lowvram.config.run_file import load_preset

    model, train = load_preset(name, options.overrides)
    if any("precision" in assignment for assignment in options.overrides):
        return model, train
    return model, train.model_copy(update={"precision": target.profile.dtype})


def evaluate_fit_from_ledgers(
    name: str, model: ModelConfig, train: TrainConfig, budget: MemoryBudget, constraints: PlanConstraints
) -> FitReport | None:
    """Judge a preset by its stored rehearsals; None where there are none for such a card."""
    from lowvram.fit.ledgers import find_memory_curve, path_of
    from lowvram.fit.report import evaluate_fit

    curve = find_memory_curve(name, model, train, path_of(budget.profile, train))
    return None if curve is None else evaluate_fit(name, model, train, curve, budget, constraints=constraints)


def _refuse_plan(options: FitOptions, train: TrainConfig) -> None:
    """Raise ConfigError where the micro-batch that was asked for does not divide the step."""
    from lowvram.config.plan import choose_plan

    if options.micro_batch is not None:
        choose_plan(train, options.micro_batch)


def _read_constraints(options: FitOptions, train: TrainConfig) -> PlanConstraints:
    from lowvram.fit.search import PlanConstraints

    _refuse_plan(options, train)
    return PlanConstraints(options.micro_batch, options.recompute)


def _look_closer(result: FitResult) -> Task[FitResult]:
    """Add what is said about a single model beside its ledger."""
    from lowvram.api.rehearsals import suggest_changes, suggest_precisions, untimed_precisions
    from lowvram.fit.recommend import TOO_SLOW_DAYS, recommend

    options, report = result.options, result.models[0]
    changes = result.changes
    if not options.has_plan and not (report.fits_headless and report.fits_host):
        yield Progress("Looking for changes that would fit")
        changes = tuple(suggest_changes(report.model, report.train, result.budget))
    faster: tuple[Change, ...] = ()
    remarks = remarks_about(result.text, report)
    if options.run_file is not None and report.fits_headless and not options.has_plan:
        yield Progress("Looking for a faster precision")
        untimed = untimed_precisions(report, result.target)
        faster = tuple((yield from suggest_precisions(report, result.target, untimed)))
        remarks += remarks_on_precisions(untimed)
    is_too_slow = report.days is not None and report.days > TOO_SLOW_DAYS
    instead = None
    if is_too_slow:
        known = yield from _evaluate_known_presets(result.target)
        instead = recommend(known, options.days)
    return dataclasses.replace(result, changes=changes, faster=faster, remarks=tuple(remarks), instead=instead)


def remarks_on_precisions(untimed: Sequence[str]) -> list[Remark]:
    """Return what is said of 8-bit precisions that nobody has timed on such a card."""
    from lowvram.fit.epochs import Remark

    if not untimed:
        return []
    names = " and ".join(precision.upper() for precision in untimed)
    times = "times both" if len(untimed) > 1 else "times it"
    unsaid = f"{names} products are unmeasured on such a card, so whether they are faster is not said"
    return [Remark(f"{unsaid}: try `fit` with `measure=True` there, which {times}.")]


def remarks_about(text: RunText | None, report: FitReport) -> list[Remark]:
    """Return what is said about the text of a run: how often it is read, and what to do if that is too often."""
    from lowvram.errors import DataError
    from lowvram.fit.epochs import Remark, remark_on

    try:
        return list(remark_on(text, report.model, report.train)) if text is not None else []
    except DataError as error:
        return [Remark(str(error), True)]


def _evaluate_known_presets(target: Target) -> Task[list[FitReport]]:
    """Judge the presets whose rehearsals are known for a card."""
    from lowvram.api.target import notices_of
    from lowvram.config.run_file import load_preset, preset_names
    from lowvram.fit.search import ANY

    budget = target.budget(target.profile.dtype)
    yield from notices_of(budget)
    reports = []
    for name in preset_names():
        model, train = load_preset(name)
        train = train.model_copy(update={"precision": target.profile.dtype})
        reports.append(evaluate_fit_from_ledgers(name, model, train, budget, ANY))
    return [report for report in reports if report is not None]
