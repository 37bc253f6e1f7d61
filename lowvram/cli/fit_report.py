"""Shows the evaluation of one model: its ledger line by line, and the reasons; decides nothing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from lowvram.api.fit_result import FitResult
from lowvram.cli.console import out, result
from lowvram.cli.spelling import as_options
from lowvram.config.run import LEAST_COPIED_BYTES
from lowvram.config.train import TrainConfig
from lowvram.fit.evidence import describe_evidence
from lowvram.fit.recommend import DENSE_FIRST, TOO_SLOW_DAYS, Advice
from lowvram.fit.report import FitReport, MemoryBudget
from lowvram.fit.suggestions import Change
from lowvram.fit.throughput import is_replayed
from lowvram.hardware.profile import measured_ids
from lowvram.units import count_of, show_bytes, show_count, show_duration_range, show_energy_range

# Cells of the longest bar, and the cells before it in its row.
_BAR_CELLS, _BEFORE_THE_BAR = 40, 27


def describe_technique(report: FitReport) -> str:
    """Return what makes the step smaller: recomputation, lower precision, rotation; a dash where nothing does."""
    plan, train, ffn = report.search_result.plan, report.train, report.model.ffn
    words = [f"recompute {plan.recompute}"] if plan.recompute != "none" else []
    words += ["bf16 weights"] if train.weights == "bf16" else []
    words += [describe_optimizer(train)] if train.optimizer.bits != 32 else []
    if train.rotation is not None and ffn.kind == "moe":
        words += [f"{train.rotation.window} of {ffn.experts} experts learn"]
    words += ["update during backward"] if train.update_during_backward else []
    words += ["states in RAM"] if plan.offload == "optimizer" else []
    return ", ".join(words) or "–"


def describe_optimizer(train: TrainConfig) -> str:
    """Return `8-bit AdamW`, `16-bit Muon`."""
    name = {"adamw": "AdamW", "muon": "Muon"}[train.optimizer.name]
    return f"{train.optimizer.bits}-bit {name}"


def show_one(seen: FitResult) -> None:
    """Print one model's ledger line by line, what it costs, what would be faster, and what would make it fit."""
    report, budget, is_preset = seen.models[0], seen.budget, seen.options.run_file is None
    found, ledger, plan = report.search_result, report.search_result.rehearsal.ledger, report.search_result.plan
    cut = f"{count_of(plan.micro_batch, 'sequence')} × {plan.accumulate} a step"
    again = "" if plan.recompute == "none" else f", {plan.recompute} computed again in backward"
    result(f"{report.name} {_describe_fit(report, budget)}: {cut}{again}.")
    result(f"  {found.reason[:1].upper()}{found.reason[1:]}.")
    result()
    widest = min(_BAR_CELLS, max(0, out.width - _BEFORE_THE_BAR)) if out.is_terminal else _BAR_CELLS
    for name, size in ledger.lines().items():
        cells = round(size / ledger.peak_bytes * widest)
        result(f"  {name:<12} {show_bytes(size):>10}  {'█' * cells}".rstrip())
    result(f"  {'peak':<12} {show_bytes(ledger.peak_bytes):>10}  during {ledger.moment}")
    if not found.is_rehearsed:
        says = "these lines are interpolated between two rehearsed plans; a run file is rehearsed with its own plan"
        result(f"{'':<15}{says}")
    result(f"  {'limit':<12} {show_bytes(budget.limit_bytes):>10}  {_describe_limit(budget)}")
    if recorded := found.rehearsal.recorded_bytes:
        fits = is_replayed(found.rehearsal, budget.limit_bytes)
        how = "so a step is replayed" if fits else "which is too much: a step is launched"
        result(f"  {'graphs':<12} {show_bytes(recorded):>10}  in all with CUDA graphs, {how}")
    ram = "" if budget.ram_bytes is None else f", which has {show_bytes(budget.ram_bytes)}"
    kept = (
        f", {show_bytes(ledger.kept_on_host)} of it for frozen experts and offloaded states"
        if ledger.kept_on_host
        else ""
    )
    result(f"  {'host':<12} {show_bytes(report.host_bytes):>10}  in the computer's memory{ram}{kept}")
    result()
    if report.lacks_host_bytes:
        result(f"  The computer lacks {show_bytes(report.lacks_host_bytes)} of memory for it.")
    _show_time(report, budget, seen.instead)
    for change in seen.faster:
        result(f"  {change.says} (--set {change.sets[0]}): {change.costs}; peak {show_bytes(change.peak_bytes)}.")
    writes, disk = show_bytes(report.written_bytes_per_day), show_bytes(report.disk_bytes)
    result(f"  A checkpoint has {show_bytes(report.state_bytes)}; checkpoints write up to {writes} a day to the disk.")
    result(f"  {_describe_saving(report)}")
    result(f"  {disk} of disk must be free.")
    for remark in seen.remarks:
        result(f"  {as_options(remark.says)}", "yellow" if remark.is_warning else "")
    if not (report.fits_headless and report.fits_host):
        _show_changes(report, seen.changes, is_preset)


def _describe_saving(report: FitReport) -> str:
    """Return whether training waits for a save, which is decided by the memory for a copy."""
    size = show_bytes(report.state_bytes)
    if report.state_bytes < LEAST_COPIED_BYTES:
        return "That is written in a moment, between two steps."
    if report.saves_beside_training is None:
        return f"Training goes on while one is written if {size} of the computer's memory are free for a copy."
    if report.saves_beside_training:
        return f"Training goes on while one is written, from a copy of {size} in the computer's memory."
    return f"Training waits while one is written: the computer's memory has no room for a copy of {size}."


def _show_time(report: FitReport, budget: MemoryBudget, instead: Advice | None) -> None:
    """Print how fast the model is trained, how long that takes, and what to do where it takes years."""
    if report.speed is None or report.days_range is None or report.days is None:
        if report.fits_headless:
            result(f"  The speed of {budget.profile.name} is not known.")
        return
    speed = report.speed
    pace = f"{show_count(speed.low)}–{show_count(speed.high)} tokens/s"
    result(f"  {pace} ({describe_evidence(budget.profile, measured_ids(), speed.is_measured, budget.receipts)}).")
    energy = f", {show_energy_range(*report.kwh_range)}" if report.kwh_range is not None else ""
    lasts = show_duration_range(*(days * 86_400 for days in report.days_range))
    result(f"  {show_count(report.train.tokens)} tokens in {lasts}{energy}.")
    if report.days > TOO_SLOW_DAYS:
        result(f"  {budget.profile.name} is too slow for {report.name}. {_suggest_instead(instead)}", "yellow")


def _suggest_instead(instead: Advice | None) -> str:
    demo = "`lowvram demo` trains a small model in minutes."
    if instead is None or instead.report.days_range is None:
        return f"What it can do: {demo}"
    name = instead.report.name
    lasts = show_duration_range(*(days * instead.share * 86_400 for days in instead.report.days_range))
    return f"What it can do: train {name} in {lasts} (--model {name}). {demo}"


def _describe_fit(report: FitReport, budget: MemoryBudget) -> str:
    if report.fits:
        return "fits"
    if report.search_result.fits:
        return "fits the card, but not the computer's memory"
    return f"fits only without {budget.beside}" if report.fits_headless else "does not fit"


def _describe_limit(budget: MemoryBudget) -> str:
    if budget.limit_bytes == budget.headless_bytes:
        return "for tensors"
    return f"for tensors beside {budget.beside}, {show_bytes(budget.headless_bytes)} without"


def _show_changes(report: FitReport, changes: Sequence[Change] | None, is_preset: bool) -> None:
    largest = sorted(report.search_result.rehearsal.ledger.lines().items(), key=lambda line: -line[1])[:3]
    lines = ", ".join(f"{name} {show_bytes(size)}" for name, size in largest)
    result(f"  Its largest lines: {lines}.")
    if changes is None:
        result("  Another plan may fit: leave --micro-batch and --recompute out.")
        return
    if not changes:
        tried = "a lighter recipe, rotation of experts, a shorter context, fewer layers"
        result(f"  None of these would make it fit: {tried}. Take a smaller preset.")
        return
    where = "as a run (--out run.toml) " if is_preset else ""
    result(f"  What would fit, {where}with other results:")
    for change in changes:
        sets = " ".join(f"--set {assignment}" for assignment in change.sets)
        result(f"    {sets}")
        result(f"      {change.says}; peak {show_bytes(change.peak_bytes)}; {change.costs}")


_ATTENTION = {
    "flash": "a fused kernel (FlashAttention), so that the scores are never stored",
    "efficient": "a fused kernel (memory-efficient attention); FlashAttention needs an RTX 30 or later",
    "math": "computed with all scores in memory: Metal has no fused kernel for training",
}
_PRECISION = {
    "bf16": "half the memory of fp32, and no loss scaling",
    "fp16": "this card has tensor cores for it and none for bf16, which would be 8 times slower",
}


def explain(seen: FitResult) -> Iterator[str]:
    """Yield why each choice was made: first those of the card, then those of each model."""
    reports, budget = seen.models, seen.budget
    profile, train = budget.profile, reports[0].train
    yield ""
    rest = "driver, context, workspaces and the gaps between tensors" if profile.platform == "cuda" else "the system"
    yield f"limit: {show_bytes(budget.headless_bytes)} of {show_bytes(profile.memory_bytes)}; the rest is for {rest}"
    yield f"attention: {_ATTENTION[profile.attention]}"
    is_own = train.precision == profile.dtype
    yield f"precision: {train.precision}, {_PRECISION[profile.dtype] if is_own else 'as the run says'}"
    is_measured = any(report.speed is not None and report.speed.is_measured for report in reports)
    has_figures = bool(profile.tflops)
    source = describe_evidence(profile, measured_ids(), is_measured, budget.receipts) + (
        "" if is_measured else "; --measure times it here"
    )
    yield f"speed: {source if is_measured or has_figures else 'not known'}"
    if any(not report.is_dense for report in reports):
        yield f"recommendation: {DENSE_FIRST[0].lower()}{DENSE_FIRST[1:]}"
    for report in reports:
        states = f"{describe_optimizer(report.train)}, as the recipe says"
        moment = f"peak during {report.search_result.rehearsal.ledger.moment}"
        yield f"{report.name}: {report.search_result.reason}; {states}; {moment}"
