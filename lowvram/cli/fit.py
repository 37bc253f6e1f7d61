"""`lowvram fit`: which models a card can pretrain, and how; or the memory of one run, line by line."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from lowvram.cli.options import count, days, memory

if TYPE_CHECKING:
    from lowvram.api.fit_result import FitOptions, FitResult
    from lowvram.api.run_file import ChosenRun


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command and its options."""
    parser = commands.add_parser(
        "fit",
        help="what fits on a card, how fast it trains, what it costs",
        description="Show which presets a card can pretrain, with which plan and in how many days, or what one run "
        "needs, line by line. The memory comes from a rehearsal: a training step is replayed on meta tensors, which "
        "have a shape and no contents, and every allocation is added up. Nothing is trained, and the card need not be "
        "here: without --gpu and --memory this machine is meant. Every key of RUN.toml: docs/run-file.md.",
    )
    parser.add_argument(
        "run_file", nargs="?", type=Path, metavar="RUN.toml", help="evaluate this run (default: all presets)"
    )
    parser.add_argument("--gpu", metavar="CARD", help='rtx5070, "RTX 4060 Laptop", m3-max, cpu, …')
    parser.add_argument("--memory", type=memory, metavar="SIZE", help="the card's memory, with or without --gpu: 8GB")
    parser.add_argument("--ram", type=memory, metavar="SIZE", help="the computer's memory: 16GB")
    parser.add_argument(
        "--desktop",
        choices=("none", "linux", "windows"),
        help="the desktop that the card shows (default: this system's; for this machine's card the free memory counts)",
    )
    parser.add_argument("--model", metavar="PRESET", help="evaluate this preset alone, line by line")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override a value of RUN.toml or of --model"
    )
    parser.add_argument("--micro-batch", type=count, metavar="N", help="only plans with N sequences at a time")
    parser.add_argument("--recompute", choices=("none", "attention", "block"), help="only plans that recompute this")
    parser.add_argument("--days", type=days, default=21.0, metavar="N", help="longest run to recommend (default: 21)")
    parser.add_argument(
        "--measure",
        action="store_true",
        help="time real steps here first, on a processor in bf16 and in fp32, on an NVIDIA card in bf16, FP8 and INT8, "
        "and remember the result",
    )
    parser.add_argument("--explain", action="store_true", help="show why each choice was made")
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="write a run file that `lowvram train` takes, without --set"
    )
    parser.add_argument(
        "--data",
        type=Path,
        metavar="SHARDS",
        help="packed text, or the folder of train, valid and tok: show which presets it is enough for",
    )
    parser.add_argument(
        "--tariff",
        type=Path,
        metavar="FILE",
        help="prices of electricity by the hour (docs/flatmate.md): show what RUN.toml or --model costs in all hours, "
        "and in the cheapest only",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Evaluate and print."""
    from lowvram.api.fitting import fit_task
    from lowvram.api.run_file import choose_run_task
    from lowvram.cli.console import literal, notice, result
    from lowvram.cli.fit_report import explain, show_one
    from lowvram.cli.fit_tariff import show_tariff
    from lowvram.cli.tasks import run_task

    options = _read_options(arguments)
    _refuse_contradictions(options, arguments.out)
    found = run_task(fit_task(options))
    chosen = None
    if arguments.out is not None and options.is_alone:
        # The file may hold fewer tokens than the preset, or another precision: what is shown is what is written.
        chosen = run_task(choose_run_task(found))
        found = chosen.result
    if arguments.json:
        literal(json.dumps(found.as_dict(), ensure_ascii=False))
    elif options.is_alone:
        show_one(found)
        show_tariff(found)
    else:
        _show_table(found, arguments.out)
    if options.run_file is None:
        _show_slower_precision(found, arguments.json)
    for line in explain(found) if arguments.explain else ():
        (notice if arguments.json else result)(line)
    if arguments.out is not None:
        # A table is followed by the commands that train.
        is_told = not arguments.json and not options.is_alone
        _write(chosen or run_task(choose_run_task(found)), arguments.out, is_told)


def _read_options(arguments: argparse.Namespace) -> FitOptions:
    from lowvram.api.fit_result import FitOptions

    return FitOptions(
        run_file=arguments.run_file,
        gpu=arguments.gpu,
        memory_bytes=arguments.memory,
        ram_bytes=arguments.ram,
        desktop=arguments.desktop,
        preset=arguments.model,
        overrides=tuple(arguments.set),
        micro_batch=arguments.micro_batch,
        recompute=arguments.recompute,
        days=arguments.days,
        measure=arguments.measure,
        data=arguments.data,
        tariff=arguments.tariff,
    )


def _refuse_contradictions(options: FitOptions, out: Path | None) -> None:
    """Raise ConfigError where options contradict one another, before anything takes time."""
    from lowvram.api.fitting import refuse_contradictions
    from lowvram.api.run_file import choose_folders
    from lowvram.errors import ConfigError
    from lowvram.fit.run_file_writer import refuse_overwriting

    refuse_contradictions(options)
    if out is None:
        return
    run_file = options.run_file
    for is_wrong, what, fix in (
        (run_file, f"--out has nothing to write: {run_file} is a run file.", "Leave it out."),
        (options.overrides, "--out writes a preset as it is.", "Change values in the file it writes."),
        (options.has_plan, "--out writes no plan.", "Give the same options to lowvram train."),
    ):
        if is_wrong:
            raise ConfigError(what, fix=fix)
    refuse_overwriting(out)
    if options.data is not None:
        choose_folders(options.data)


def _show_table(found: FitResult, out: Path | None) -> None:
    from lowvram.cli.fit_table import Advised, show_table

    advised = Advised(found.first_run, found.recommended, _command_so_far(found.options), out)
    show_table(found.models, found.budget, advised, found.text)


def _show_slower_precision(found: FitResult, is_json: bool) -> None:
    """Show that presets are evaluated in bf16 and this processor was measured to be slower in it, if that is so."""
    from lowvram.cli.console import notice, result
    from lowvram.fit.calibration_store import compare_precisions
    from lowvram.fit.suggestions import describe_slower, is_slower

    times = compare_precisions(found.budget.profile)
    if found.models[0].train.precision == "bf16" and is_slower(times):
        says = f'Precision: {describe_slower(times)}. --out writes precision = "fp32" where that fits.'
        (notice if is_json else result)(says)


def _command_so_far(options: FitOptions) -> str:
    """Return this command with its options for the machine and the text, quoted for a shell."""
    from lowvram.shell import quote_command

    said: dict[str, object] = {"--gpu": options.gpu, "--memory": options.memory_bytes, "--ram": options.ram_bytes}
    said |= {"--desktop": options.desktop, "--data": options.data}
    words = [word for option, value in said.items() if value is not None for word in (option, _format_value(value))]
    return quote_command("lowvram", "fit", *words)


def _format_value(value: object) -> str:
    if not isinstance(value, int):
        return str(value)
    return f"{value // 2**30}GB" if value % 2**30 == 0 else f"{value // 2**20}MiB"


def _write(chosen: ChosenRun, out: Path, is_told: bool) -> None:
    """Write a run file for a preset, with gaps that `lowvram train` names where --data was not given.

    is_told: the command that trains was shown before.
    """
    from lowvram.api.run_file import write_chosen_run
    from lowvram.cli.console import notice
    from lowvram.cli.fit_table import describe_time
    from lowvram.shell import quote_command

    write_chosen_run(chosen, out)
    report = chosen.advice.report
    todo = [] if chosen.result.options.data is not None else ["put your folders into it"]
    todo += [] if is_told else [quote_command("lowvram", "train", out)]
    lasts = f", {describe_time(chosen.advice)}" if report.days_range is not None else ""
    because = f"; {chosen.reason}" if chosen.reason else ""
    told = f": {', then '.join(todo)}" if todo else "."
    notice(f"Wrote {out} ({report.name}{lasts}{because}){told}", "green")
