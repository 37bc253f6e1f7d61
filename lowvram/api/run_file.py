"""A run file for the preset that `fit` named or recommended, over the user's own folders."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from lowvram.api.tasks import Notice, Progress, Task, finish
from lowvram.shell import quote_command

if TYPE_CHECKING:
    from lowvram.api.fit_result import FitResult
    from lowvram.fit.recommend import Advice
    from lowvram.fit.report import MemoryBudget


class ChosenRun(NamedTuple):
    """A run that a run file can be written for.  advice: the preset and its tokens.  reason: for its precision, or "".

    result: of a single model the evaluation of this run, whose tokens and precision may differ from the preset's.
    """

    result: FitResult
    advice: Advice
    reason: str


def write_run_file(result: FitResult, out: str | Path) -> Path:
    """Write a run file that `train` takes, for the preset that was named, or the one that is recommended.

    Raises ConfigError where `out` exists, where nothing fits, or where result's `data` has no shards or no tokenizer.
    """
    from lowvram.api.arguments import PATH, refuse_missing
    from lowvram.api.fit_result import FitResult

    refuse_missing("result", result, FitResult)
    refuse_missing("out", out, *PATH)
    chosen, _ = finish(choose_run_task(result))
    write_chosen_run(chosen, Path(out))
    return Path(out)


def choose_run_task(result: FitResult) -> Task[ChosenRun]:
    """Return the run that `write_run_file` writes, and yield notices and progress; raises what it raises of presets."""
    from lowvram.api.fitting import remarks_about

    advice = yield from _choose_preset(result)
    advice, reason, budget = yield from _prefer_fp32(advice, result)
    report = advice.report if advice.tokens is None else advice.report.with_tokens(advice.tokens)
    if result.options.is_alone:
        remarks = tuple(remarks_about(result.text, report))
        result = dataclasses.replace(result, models=(report,), budget=budget, remarks=remarks)
    return ChosenRun(result, advice._replace(report=report, tokens=None), reason)


def write_chosen_run(chosen: ChosenRun, out: Path) -> None:
    """Write a run's file, with gaps, which `train` names, where `fit` was given no `data`."""
    from lowvram.fit.run_file_writer import write_run

    report, data = chosen.advice.report, chosen.result.options.data
    write_run(out, report.name, report.model, report.train, choose_folders(data) if data is not None else None)


def choose_folders(data: Path) -> dict[str, str]:
    """Return the folders that a run file names, or raise ConfigError with what makes the one that is missing."""
    from lowvram.data.shard_set import INDEX
    from lowvram.data.unpacked import explain_unpacked
    from lowvram.errors import ConfigError, argument
    from lowvram.fit.folders import find_folders

    found = find_folders(data)
    if found.is_packed and found.tokenizer is not None:
        return found.as_words()
    if not found.is_packed and (unpacked := explain_unpacked(data, INDEX)):
        raise unpacked
    tok = found.tokenizer or found.home / "tok"
    make = quote_command("lowvram", "tokenizer", "train", "TEXTS", "--out", tok)
    pack = quote_command("lowvram", "data", "pack", "TEXTS", "--tokenizer", tok, "--out", found.train)
    if found.tokenizer is not None:
        lacks, fix = f"no shards in {found.train}", f"Make them: {pack}"
    elif found.is_packed:
        lacks = "no folder tok, in it or beside it"
        fix = f"Put the tokenizer there with which the shards were packed, as {tok}; another one does not fit them."
    else:
        lacks, fix = "no folder tok, in it or beside it, and no shards", f"Make both: {make}, then {pack}"
    raise ConfigError(f"{argument('data', data)} has {lacks}.", "A run needs its shards and their tokenizer.", fix)


def _choose_preset(result: FitResult) -> Task[Advice]:
    """Return the preset that was named or recommended, with its tokens; raises ConfigError where there is none."""
    from lowvram.errors import ConfigError
    from lowvram.fit.recommend import Advice, explain_too_little, limit_tokens

    reports, text, advice = result.models, result.text, result.recommended
    if result.options.run_file is not None:
        what = f"There is nothing to write: {result.options.run_file} is a run file."
        raise ConfigError(what, fix="Leave it out.")
    if result.options.is_alone:
        tokens = limit_tokens(reports[0], text)
        if text is not None and tokens == 0:  # one's own choice: smaller steps and windows can be set in the file
            yield Notice(" ".join(explain_too_little(reports, text)), "warning")
        return Advice(reports[0], "", tokens or None)
    if advice is None and text is not None and any(report.fits for report in reports):
        what, why, fix = explain_too_little(reports, text)
        raise ConfigError(f"There is nothing to write. {what}", why, f"{fix} Or name a preset with `preset`.")
    if advice is None:
        fix = "Name one with `preset` to write it all the same."
        raise ConfigError("There is nothing to write: no preset fits.", fix=fix)
    return advice


def _prefer_fp32(advice: Advice, result: FitResult) -> Task[tuple[Advice, str, MemoryBudget]]:
    """Return a preset in fp32 where this processor was measured to be slower in bf16, and why; else as it is.

    The memory budget is that of the precision.
    """
    from lowvram.api import rehearsals
    from lowvram.api.target import notices_of
    from lowvram.fit.calibration_store import compare_precisions
    from lowvram.fit.suggestions import describe_slower, is_slower

    report, times = advice.report, compare_precisions(result.target.profile)
    if report.train.precision != "bf16" or not is_slower(times):
        return advice, "", result.budget
    train, budget = report.train.model_copy(update={"precision": "fp32"}), result.target.budget("fp32")
    yield from notices_of(budget)
    yield Progress(f"Replaying a step of {report.name} on meta tensors")
    wide = rehearsals.rehearse_fit(report.name, report.model, train, budget)
    if not wide.fits:
        reason = f'precision = "bf16", since it does not fit in fp32, although {describe_slower(times)}'
        return advice, reason, result.budget
    return advice._replace(report=wide), f'precision = "fp32", since {describe_slower(times)}', budget
