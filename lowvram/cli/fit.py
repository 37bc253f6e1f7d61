"""`lowvram fit`: which models a card can pretrain, and how; or what one run needs, line by line."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lowvram.cli.options import count, days, memory

if TYPE_CHECKING:
    from lowvram.cli.fit_report import Beside
    from lowvram.cli.place import Card
    from lowvram.config.model import ModelConfig
    from lowvram.config.run import RunConfig
    from lowvram.config.train import TrainConfig
    from lowvram.fit.epochs import Remark, RunText
    from lowvram.fit.recommend import Advice
    from lowvram.fit.report import FitReport, MemoryBudget
    from lowvram.fit.search import PlanConstraints
    from lowvram.fit.suggestions import Change


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command and its options."""
    parser = commands.add_parser(
        "fit",
        help="what fits on a card, how fast it trains, what it costs",
        description="Say which presets a card can pretrain, with which plan and in how many days, or what one run "
        "needs, line by line.  The bytes come from the trainer's own step, rehearsed on paper; nothing is trained, and "
        "the card need not be here.  Without --gpu and --memory it is this machine's.  Every key of RUN.toml: "
        "docs/run-file.md.",
    )
    parser.add_argument("run_file", nargs="?", type=Path, metavar="RUN.toml", help="judge this run (default: presets)")
    parser.add_argument("--gpu", metavar="CARD", help='rtx5070, "RTX 4060 Laptop", m3-max, cpu, …')
    parser.add_argument("--memory", type=memory, metavar="SIZE", help="the card's memory, with or without a name: 8GB")
    parser.add_argument("--ram", type=memory, metavar="SIZE", help="the computer's memory: 16GB")
    parser.add_argument(
        "--desktop",
        choices=("none", "linux", "windows"),
        help="which desktop the card draws (default: this system's; of a card that is here, what is free counts)",
    )
    parser.add_argument("--model", metavar="PRESET", help="judge this preset alone, line by line")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override a value of RUN.toml or of --model"
    )
    parser.add_argument("--micro-batch", type=count, metavar="N", help="only plans with N sequences at a time")
    parser.add_argument("--recompute", choices=("none", "attention", "block"), help="only plans that recompute this")
    parser.add_argument("--days", type=days, default=21.0, metavar="N", help="longest run to recommend (default: 21)")
    parser.add_argument(
        "--measure",
        action="store_true",
        help="time real steps here first, on a processor in bf16 and in fp32, and remember the result",
    )
    parser.add_argument("--explain", action="store_true", help="say why each choice was made")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write a run file that `lowvram train` takes")
    parser.add_argument(
        "--data",
        type=Path,
        metavar="SHARDS",
        help="packed text, or the folder of train, valid and tok: say which presets it is enough for",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Judge and print."""
    from lowvram.cli.console import notice, result
    from lowvram.cli.fit_report import explain, show_json, show_one
    from lowvram.cli.fit_table import Advised, show_table
    from lowvram.cli.place import find_card, name_card
    from lowvram.fit.recommend import recommend, recommend_first

    _refuse_contradictions(arguments)
    if arguments.gpu is None and arguments.memory is None:
        card = find_card(ram_bytes=arguments.ram)
    else:
        card = name_card(arguments.gpu, arguments.memory, arguments.ram, arguments.desktop)
    notice(card.sentence)
    what = _read_run(arguments) if arguments.run_file is not None else None
    if arguments.measure:
        _measure(arguments, card, what)
    text = _read_text(arguments, what)
    answers, place = _judge(arguments, card, what)
    advised = recommend_first(answers, text), recommend(answers, arguments.days, text)
    beside = _look_beside(arguments, card, place, answers[0], text)
    if arguments.json:
        show_json(answers, place, advised, beside, text)
    elif _is_alone(arguments):
        show_one(answers[0], place, beside, is_preset=arguments.run_file is None)
    else:
        show_table(answers, place, Advised(*advised, _repeat(arguments)), text)
    if arguments.run_file is None:
        _say_slower(answers, place, arguments.json)
    for line in explain(answers, place) if arguments.explain else ():
        (notice if arguments.json else result)(line)
    if arguments.out is not None:
        _write(arguments, card, _choose_written(arguments, answers, advised[1], text))


def _say_slower(answers: list[FitReport], place: MemoryBudget, is_json: bool) -> None:
    """Say of presets, which are judged in bf16, that this processor was measured to be slower in it."""
    from lowvram.cli.console import notice, result
    from lowvram.fit.calibration_store import compare_precisions
    from lowvram.fit.suggestions import describe_slower, is_slower

    times = compare_precisions(place.profile)
    if answers[0].train.precision == "bf16" and is_slower(times):
        says = f'Precision: {describe_slower(times)}. --out writes precision = "fp32" where that fits.'
        (notice if is_json else result)(says)


def _look_beside(
    arguments: argparse.Namespace, card: Card, place: MemoryBudget, answer: FitReport, text: RunText | None
) -> Beside:
    """Look for what is said about a single model beside its ledger."""
    from lowvram.cli.console import bar
    from lowvram.cli.fit_report import Beside
    from lowvram.cli.place import find_changes, find_faster
    from lowvram.fit.recommend import TOO_SLOW_DAYS, recommend

    is_asked = _is_asked(arguments)
    if not _is_alone(arguments):
        return Beside(None if is_asked else [])
    changes: list[Change] | None = None if is_asked else []
    if not is_asked and not (answer.fits_headless and answer.fits_host):
        with bar("Looking for changes that would fit"):
            changes = find_changes(answer.model, answer.train, place)
    faster: list[Change] = []
    if arguments.run_file is not None and answer.fits_headless and not is_asked:
        with bar("Looking for a faster precision"):
            faster = find_faster(answer, card)
    is_too_slow = answer.days is not None and answer.days > TOO_SLOW_DAYS
    instead = recommend(_judge_known(card), arguments.days) if is_too_slow else None
    return Beside(changes, faster, _remark(text, answer), instead)


def _remark(text: RunText | None, answer: FitReport) -> list[Remark]:
    from lowvram.errors import DataError
    from lowvram.fit.epochs import Remark, remark_on

    try:
        return list(remark_on(text, answer.model, answer.train)) if text is not None else []
    except DataError as error:
        return [Remark(str(error), True)]


def _repeat(arguments: argparse.Namespace) -> str:
    """Return this command with what it says about the machine and the text, as a shell takes it."""
    from lowvram.cli.next_step import quote_command

    said = (("--gpu", arguments.gpu), ("--memory", arguments.memory), ("--ram", arguments.ram))
    said += (("--desktop", arguments.desktop), ("--data", arguments.data))
    words = [word for option, value in said if value is not None for word in (option, _type_again(value))]
    return quote_command("lowvram", "fit", *words)


def _type_again(value: object) -> str:
    if not isinstance(value, int):
        return str(value)
    return f"{value // 2**30}GB" if value % 2**30 == 0 else f"{value // 2**20}MiB"


def _is_alone(arguments: argparse.Namespace) -> bool:
    return arguments.run_file is not None or arguments.model is not None


def _is_asked(arguments: argparse.Namespace) -> bool:
    """Say whether a plan, or a part of one, was asked for."""
    return arguments.micro_batch is not None or arguments.recompute is not None


def _refuse_contradictions(arguments: argparse.Namespace) -> None:
    """Raise ConfigError where options say nothing together, before anything takes time."""
    from lowvram.errors import ConfigError
    from lowvram.fit.run_file_writer import refuse_overwriting

    here = arguments.gpu is None and arguments.memory is None
    run_file, is_alone, is_asked = arguments.run_file, _is_alone(arguments), _is_asked(arguments)
    if run_file is not None and arguments.gpu and not run_file.exists() and run_file.suffix != ".toml":
        words = f"{arguments.gpu} {run_file}"
        raise ConfigError(f"There is no run file {run_file}.", fix=f'Two words go in quotes: --gpu "{words}".')
    for is_wrong, what, fix in (
        (run_file and arguments.model, "A run file and --model were both given.", "Leave one of them out."),
        (run_file and arguments.out, f"--out has nothing to write: {run_file} is a run file.", "Leave it out."),
        (arguments.set and not is_alone, "--set changes one run.", "Name it: RUN.toml, or --model PRESET."),
        (arguments.set and arguments.out, "--out writes a preset as it is.", "Change values in the file it writes."),
        (is_asked and arguments.out, "--out writes no plan.", "Give the same options to lowvram train."),
        (arguments.micro_batch and not is_alone, "--micro-batch is for one run.", "Name RUN.toml, or --model PRESET."),
        (run_file and arguments.data, f"--data and {run_file} both name the text.", "Leave --data out."),
        (arguments.desktop and here, "--desktop is for a card elsewhere.", "Here, what is free now counts."),
        (arguments.measure and not here, "--measure times this machine.", "Leave --gpu and --memory out."),
    ):
        if is_wrong:
            raise ConfigError(what, fix=fix)
    if arguments.out is not None:
        refuse_overwriting(arguments.out)
    if arguments.data is not None and arguments.out is not None:
        _choose_folders(arguments.data)


def _judge(arguments: argparse.Namespace, card: Card, what: RunConfig | None) -> tuple[list[FitReport], MemoryBudget]:
    """Judge the run file, the preset that was named, or every preset."""
    from lowvram.cli.console import bar, notice
    from lowvram.cli.place import evaluate_fit_here, warn_of_precision
    from lowvram.config.run_file import preset_names

    if what is not None:
        if warning := warn_of_precision(what.train, card.profile):
            notice(warning, "yellow")
        name, place = arguments.run_file.stem, card.place(what.train.precision)
        wish = _wish(arguments, what.train)
        with bar(f"Rehearsing {name} on paper"):
            return [evaluate_fit_here(name, what.model, what.train, place, what.run, wish)], place
    place = card.place(_load_preset(arguments.model or "tr-25m", arguments, card)[1].precision)
    answers = []
    for name in [arguments.model] if arguments.model else preset_names():
        model, train = _load_preset(name, arguments, card)
        wish = _wish(arguments, train)
        answer = _judge_by_sketch(name, model, train, card, place, wish) if wish.micro_batch is None else None
        if answer is None:
            with bar(f"Rehearsing {name} on paper"):
                answer = evaluate_fit_here(name, model, train, place, wish=wish)
        answers.append(answer)
    return sorted(answers, key=lambda answer: answer.model.num_parameters()), place


def _judge_known(card: Card) -> list[FitReport]:
    """Judge the presets whose rehearsals are known for a card."""
    from lowvram.config.run_file import load_preset, preset_names
    from lowvram.fit.search import ANY

    place = card.place(card.profile.dtype)
    answers = []
    for name in preset_names():
        model, train = load_preset(name)
        train = train.model_copy(update={"precision": card.profile.dtype})
        answers.append(_judge_by_sketch(name, model, train, card, place, ANY))
    return [answer for answer in answers if answer is not None]


def _judge_by_sketch(
    name: str, model: ModelConfig, train: TrainConfig, card: Card, place: MemoryBudget, wish: PlanConstraints
) -> FitReport | None:
    """Judge a preset by its stored rehearsals; None where there are none for such a card."""
    from lowvram.fit.ledgers import find_memory_curve, path_of
    from lowvram.fit.report import evaluate_fit

    sketch = find_memory_curve(name, model, train, path_of(card.profile, train))
    return None if sketch is None else evaluate_fit(name, model, train, sketch, place, wish=wish)


def _read_text(arguments: argparse.Namespace, what: RunConfig | None) -> RunText | None:
    """Open the shards of --data or of a run file; a run file is judged without them too, since they may come later."""
    from lowvram.cli.console import notice
    from lowvram.errors import DataError
    from lowvram.fit.epochs import open_folder, open_text

    if what is None:
        return open_folder(arguments.data) if arguments.data is not None else None
    try:
        return open_text(what.data)
    except DataError as error:
        notice(f"How often the text is read is not known: {error}", "yellow")
        return None


def _choose_folders(data: Path) -> dict[str, str]:
    """Return the folders that a run file names, or raise ConfigError with what makes the one that is missing."""
    from lowvram.cli.next_step import quote_command
    from lowvram.errors import ConfigError
    from lowvram.fit.folders import find_folders

    found = find_folders(data)
    if found.is_packed and found.tokenizer is not None:
        return found.as_words()
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
    raise ConfigError(f"--data {data} has {lacks}.", "A run needs its shards and their tokenizer.", fix)


def _load_preset(name: str, arguments: argparse.Namespace, card: Card) -> tuple[ModelConfig, TrainConfig]:
    """Load a preset; which 16-bit numbers it computes with is the one thing that it leaves to the card."""
    from lowvram.config.run_file import load_preset

    model, train = load_preset(name, arguments.set)
    if any("precision" in assignment for assignment in arguments.set):
        return model, train
    return model, train.model_copy(update={"precision": card.profile.dtype})


def _wish(arguments: argparse.Namespace, train: TrainConfig) -> PlanConstraints:
    from lowvram.config.plan import choose_plan
    from lowvram.fit.search import PlanConstraints

    if arguments.micro_batch is not None:
        choose_plan(train, arguments.micro_batch)  # refuses what does not divide the step
    return PlanConstraints(arguments.micro_batch, arguments.recompute)


def _read_run(arguments: argparse.Namespace) -> RunConfig:
    """Read the run file; before there is a tokenizer, the vocabulary is the one that file or preset names."""
    from lowvram.cli.console import notice
    from lowvram.config.run_file import load_run, name_vocabulary
    from lowvram.data.hf_tokenizer import load_tokenizer

    def count_ids(directory: Path) -> int:
        said = None if directory.exists() else name_vocabulary(arguments.run_file, arguments.set)
        if said is None:
            return load_tokenizer(directory).size
        notice(f"There is no tokenizer yet: {said:,} ids are taken, as the run file or its preset says.", "yellow")
        return said

    return load_run(arguments.run_file, arguments.set, count_ids, with_gaps=True)


def _measure(arguments: argparse.Namespace, card: Card, what: RunConfig | None) -> None:
    """Time one preset, or the run that was named, on this machine."""
    from lowvram.cli.measure import measure_here

    if what is not None:
        measure_here(arguments.run_file.stem, what.model, what.train, card)
    else:
        name = arguments.model or "tr-25m"
        measure_here(name, *_load_preset(name, arguments, card), card)


def _prefer_fp32(advice: Advice, card: Card) -> tuple[Advice, str]:
    """Return a preset in fp32 where this processor was measured to be slower in bf16, and why; else as it is."""
    from lowvram.cli.console import bar
    from lowvram.cli.place import evaluate_fit_here
    from lowvram.fit.calibration_store import compare_precisions
    from lowvram.fit.suggestions import describe_slower, is_slower

    answer, times = advice.answer, compare_precisions(card.profile)
    if answer.train.precision != "bf16" or not is_slower(times):
        return advice, ""
    train = answer.train.model_copy(update={"precision": "fp32"})
    with bar(f"Rehearsing {answer.name} on paper"):
        wide = evaluate_fit_here(answer.name, answer.model, train, card.place("fp32"))
    if not wide.fits:
        return advice, f'precision = "bf16", since it does not fit in fp32, although {describe_slower(times)}'
    return advice._replace(answer=wide), f'precision = "fp32", since {describe_slower(times)}'


def _choose_written(
    arguments: argparse.Namespace, answers: Sequence[FitReport], advice: Advice | None, text: RunText | None
) -> Advice:
    """Return the preset that was named or recommended, with its tokens; raises ConfigError where there is none.

    advice: the long run that is recommended.
    """
    from lowvram.cli.console import notice
    from lowvram.errors import ConfigError
    from lowvram.fit.recommend import Advice, explain_too_little, limit_tokens

    if _is_alone(arguments):
        tokens = limit_tokens(answers[0], text)
        if text is not None and tokens == 0:  # one's own choice: smaller steps and windows can be set in the file
            notice(" ".join(explain_too_little(answers, text)), "yellow")
        return Advice(answers[0], "", tokens or None)
    if advice is None and text is not None and any(answer.fits for answer in answers):
        what, why, fix = explain_too_little(answers, text)
        raise ConfigError(f"--out has nothing to write. {what}", why, f"{fix} Or name a preset with --model.")
    if advice is None:
        fix = "Name one with --model to write it all the same."
        raise ConfigError("--out has nothing to write: no preset fits.", fix=fix)
    return advice


def _write(arguments: argparse.Namespace, card: Card, advice: Advice) -> None:
    """Write a run file for a preset, with gaps that `lowvram train` names where --data was not given."""
    from lowvram.cli.console import notice
    from lowvram.cli.fit_table import describe_time
    from lowvram.cli.next_step import quote_command
    from lowvram.fit.run_file_writer import write_run

    advice, reason = _prefer_fp32(advice, card)
    train, model = advice.answer.train, advice.answer.model
    if advice.tokens is not None:
        train = train.model_copy(update={"tokens": advice.tokens})
    folders = _choose_folders(arguments.data) if arguments.data is not None else None
    write_run(arguments.out, advice.answer.name, model, train, folders)
    begin = "" if folders else "put your folders into it, then "
    lasts = f", {describe_time(advice)}" if advice.answer.days_range is not None else ""
    command = quote_command("lowvram", "train", arguments.out)
    because = f"; {reason}" if reason else ""
    notice(f"Wrote {arguments.out} ({advice.answer.name}{lasts}{because}): {begin}{command}", "green")
