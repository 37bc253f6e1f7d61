"""Shows the evaluations of many models as a table that fits the window, and what to begin with; decides nothing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.table import Table
from rich.text import Text as Cell

from lowvram.cli.console import lay_out, literal, out, result, table_width
from lowvram.cli.fit_report import describe_technique
from lowvram.errors import DataError
from lowvram.fit.epochs import ENOUGH_PASSES, RunText, round_down
from lowvram.fit.evidence import describe_evidence
from lowvram.fit.recommend import DENSE_FIRST, TOO_SLOW_DAYS, Advice, explain_too_little, limit_tokens
from lowvram.fit.report import FitReport, MemoryBudget
from lowvram.hardware.profile import measured_ids
from lowvram.shell import quote_command
from lowvram.units import show_bytes, show_count, show_duration_range, show_energy_range

# Cells of the bar, the widest first; a window that is too narrow for any of them gets none.
_BAR_CELLS = (16, 8, 0)
# The columns that a narrow window shows first; "parameters" is left out after all others.
_KEPT = ("preset", "parameters", "fits", "peak", "time", "passes")
_LEFT = {"preset", "fits", "peak", "technique"}


class Advised(NamedTuple):
    """What is recommended.  first, long: None where nothing is.  command: `lowvram fit` with the card's options.

    written: the file that this command writes for the long run, None for none.
    """

    first: Advice | None
    long: Advice | None
    command: str
    written: Path | None = None


def show_table(reports: Sequence[FitReport], budget: MemoryBudget, advised: Advised, text: RunText | None) -> None:
    """Print one row per model, what the columns mean, and what to begin with."""
    names = {advice.report.name for advice in advised[:2] if isinstance(advice, Advice)}
    shown, cells = _choose_layout(reports, budget, names, text)
    rows = [_row(report, budget, names, text, cells) for report in reports]
    lay_out(_tabulate(rows, shown))
    result()
    tensors = f"{show_bytes(budget.headless_bytes)} that tensors may take on {budget.profile.name}"
    result(f"Peak: of the {tensors}{_mark(budget, cells)}")
    if left_out := [name for name in rows[0] if name not in shown]:
        result(f"A wider window shows also: {', '.join(left_out)}.")
    if any(report.speed for report in reports):
        is_measured = any(report.speed is not None and report.speed.is_measured for report in reports)
        evidence = describe_evidence(budget.profile, measured_ids(), is_measured, budget.receipts)
        result(f"Time and energy: until all of the preset's tokens are seen; {evidence}.")
    result("Parameters in brackets: active for a token.")
    if lacking := [report for report in reports if report.lacks_host_bytes and report.search_result.fits]:
        needs = ", ".join(f"{report.name} {show_bytes(report.host_bytes)}" for report in lacking)
        result(f"The computer's memory of {show_bytes(budget.ram_bytes or 0)} is too small for: {needs}.")
    if text is not None:
        _show_text(text)
    result()
    _show_advice(reports, budget, advised, text)


def _show_text(text: RunText) -> None:
    many = len(text.parts) > 1
    which = f"the source that they read most often, of {len(text.parts)} with" if many else "this text of"
    result(
        f"Passes: how often a preset's own tokens read {which} {show_count(text.tokens)} tokens; beyond about "
        f"{ENOUGH_PASSES:.0f} a model memorises rather than learns."
    )


def _show_advice(reports: Sequence[FitReport], budget: MemoryBudget, advised: Advised, text: RunText | None) -> None:
    if advised.long is None and text is not None and any(report.fits for report in reports):
        result(" ".join(explain_too_little(reports, text)), "yellow")
        result("`lowvram demo` trains a small model in minutes.")
        return
    if advised.long is None:
        least = min(reports, key=lambda report: report.search_result.peak_bytes).name
        result(f"None of them fits. With --model {least} the same command shows what the smallest needs.")
        return
    name = advised.long.report.name
    is_one_preset = advised.first is not None and advised.first.report.name == name
    is_one_run = is_one_preset and advised.first is not None and advised.first.tokens == advised.long.tokens
    if advised.first is None:
        says = f"An hour on {budget.profile.name} is too short for every preset"
        result(f"{says}: `lowvram demo` trains a smaller model in minutes.")
    elif not is_one_run:
        _show_run("A first run", advised.first, advised, text)
    # A first run of the same preset has written the file, and the long run resumes it.
    has_file = is_one_preset and not is_one_run
    _show_run("A run" if is_one_run else "A long run", advised.long, advised, text, has_file)
    if any(not report.is_dense and report.fits for report in reports) and advised.long.report.is_dense:
        result(DENSE_FIRST)


def _show_run(what: str, advice: Advice, advised: Advised, text: RunText | None, has_file: bool = False) -> None:
    """Print a run and what to type.  has_file: the commands that were printed before have written its run file."""
    name = advice.report.name
    says = [f"{what}: {name}"]
    says += [describe_time(advice)] if advice.days is not None else []
    result(f"{', '.join(says)}: {advice.reason}.")
    file = Path(f"{name}.toml")
    if advised.written is not None and advised.long is not None and advised.long.report.name == name:
        file = advised.written
    elif not has_file:
        literal(f"  {advised.command} --model {name} --out {file}")
    # The file holds the tokens that the text is enough for; a limit of one hour is set on the command line.
    is_in_file = advice.tokens is None or advice.tokens == limit_tokens(advice.report, text)
    sets = () if is_in_file else ("--set", f"train.tokens={round_down(advice.tokens or 0)}")
    literal(f"  {quote_command('lowvram', 'train', file, *sets)}")


def describe_time(advice: Advice) -> str:
    """Return the range of time and of energy of a recommended run: `0.7–1.7 h, 200–400 Wh`."""
    report = advice.report
    assert report.days_range is not None, "only asked where there is a speed"
    low, high = (days * advice.share * 86_400 for days in report.days_range)
    energy = report.kwh_range
    said = [show_duration_range(low, high)]
    said += [show_energy_range(*(kwh * advice.share for kwh in energy))] if energy is not None else []
    return ", ".join(said)


def _choose_layout(
    reports: Sequence[FitReport], budget: MemoryBudget, names: set[str], text: RunText | None
) -> tuple[list[str], int]:
    """Return the columns that the window has room for, and the cells of the bar; a pipe has room for all."""
    rows = [_row(report, budget, names, text, _BAR_CELLS[0]) for report in reports]
    everything = list(rows[0])
    if not out.is_terminal:
        return everything, _BAR_CELLS[0]
    kept = [name for name in everything if name in _KEPT]
    offers = [(everything[:count], _BAR_CELLS[0]) for count in range(len(everything), len(kept), -1)]
    offers += [(kept, cells) for cells in _BAR_CELLS]
    offers.append(([name for name in kept if name != "parameters"], 0))
    for shown, cells in offers:
        rows = [_row(report, budget, names, text, cells) for report in reports]
        if table_width(_tabulate(rows, shown)) <= out.width:
            return shown, cells
    return offers[-1]


def _tabulate(rows: Sequence[dict[str, Any]], shown: Sequence[str]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in shown:
        table.add_column(name, justify="left" if name in _LEFT else "right", no_wrap=True)
    for row in rows:
        table.add_row(*(row[name] for name in shown))
    return table


def _row(report: FitReport, budget: MemoryBudget, names: set[str], text: RunText | None, cells: int) -> dict[str, Any]:
    """Return the cells by column, what matters most first.  names: the presets that are recommended."""
    found, model, speed = report.search_result, report.model, report.speed
    size = show_count(model.num_parameters())
    if model.active_parameters() != model.num_parameters():
        size += f" ({_round(model.active_parameters())})"
    peak: list[str | Cell] = [_bar(found.peak_bytes, budget, cells), " "] if cells else []
    row = {
        "preset": Cell(report.name, "bold" if report.name in names else ""),
        "parameters": size,
        "fits": _fits(report, budget),
        "peak": Cell.assemble(*peak, f"{show_bytes(found.peak_bytes):>9}"),
        "time": _time(report),
    }
    row |= {"passes": _passes(report, text)} if text is not None else {}
    return row | {
        "tokens/s": f"{show_count(speed.tokens_per_second)} ({_range(report)})" if speed else "–",
        "energy": show_energy_range(*report.kwh_range) if report.kwh_range is not None else "–",
        "plan": f"{found.plan.micro_batch} × {found.plan.accumulate}",
        "technique": describe_technique(report),
        "tokens": show_count(report.train.tokens),
        "disk writes a day": show_bytes(report.written_bytes_per_day),
        "disk needed": show_bytes(report.disk_bytes),
    }


def _time(report: FitReport) -> Cell:
    if report.days_range is None or report.days is None:
        return Cell("–")
    if report.days > TOO_SLOW_DAYS:
        return Cell("over a year", "red")
    low, high = (days * 86_400 for days in report.days_range)
    return Cell(show_duration_range(low, high))


def _passes(report: FitReport, text: RunText) -> Cell:
    try:
        most = max(text.passes(report.train))
    except DataError:
        return Cell("too short", "red")  # for a single window
    return Cell(f"{most:,.{1 if most < 9.95 else 0}f}", "yellow" if most > ENOUGH_PASSES else "")


def _fits(report: FitReport, budget: MemoryBudget) -> Cell:
    if report.fits:
        return Cell("yes", "green")
    if report.search_result.fits:
        return Cell("too little RAM", "red")
    return Cell(f"without {budget.beside}", "yellow") if report.fits_headless else Cell("no", "red")


def _range(report: FitReport) -> str:
    assert report.speed is not None, "only asked where there is a speed"
    return f"{_round(report.speed.low)}–{_round(report.speed.high)}"


def _round(count: float) -> str:
    """Return a count with two or three digits, for an end of a range: `8.4k`, `187k`, `1.1B`."""
    power = sum(count >= 999.5 * 1000**power for power in range(3))
    value = count / 1000**power
    return f"{value:.{1 if value < 9.95 else 0}f}{('', 'k', 'M', 'B')[power]}"


def _bar(peak_bytes: int, budget: MemoryBudget, width: int) -> Cell:
    """Draw the peak over the whole limit; a mark shows where a desktop's memory begins."""
    whole = max(1, budget.headless_bytes)
    filled = min(width, max(1, round(peak_bytes / whole * width)))
    desktop = min(width - 1, int(budget.limit_bytes / whole * width))
    cells = ["█" if cell < filled else "░" for cell in range(width)]
    if budget.limit_bytes < budget.headless_bytes:
        cells[desktop] = "▓" if desktop < filled else "│"
    colour = "green" if peak_bytes <= budget.limit_bytes else "yellow" if peak_bytes <= whole else "red"
    return Cell("".join(cells), colour)


def _mark(budget: MemoryBudget, cells: int) -> str:
    if budget.limit_bytes == budget.headless_bytes:
        return "."
    left = show_bytes(budget.limit_bytes)
    if not cells:
        return f"; {left} are left beside {budget.beside}."
    return f"; the mark │ stands at the {left} that are left beside {budget.beside}."
