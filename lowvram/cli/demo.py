"""`lowvram demo`: every step in a few minutes, with the functions that the other commands use."""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from lowvram.cli.options import add_device, device_words
from lowvram.shell import quote_command

if TYPE_CHECKING:
    from lowvram.config.run import RunConfig
    from lowvram.data.tokenizer import Tokenizer

SEED = 1
HELD_OUT_SEED = 2
SAMPLE_CHARACTERS = 2_000_000
HELD_OUT_CHARACTERS = 60_000
LEAST_USER_CHARACTERS = 20_000
MOST_USER_CHARACTERS = 20_000_000
HELD_OUT_SHARE = 0.03
VOCABULARY = 4096
PROMPTS = ("Ayşe", "Bu sabah", "Ankara'da")
# docs/measured.md: the first row of the models that FP8 is measured on.
REAL_TEXT = "1.158 on Turkish law with 22 M parameters and 1.55 M tokens, where bigrams have 1.248"
_MARKER = ".lowvram-demo"
_MADE = ("text", "tok", "shards", "run", "run.toml")
# Chosen so that the whole takes a few minutes: 3 min 20 s were measured on two idle processor cores.
_RUN_FILE = """\
[model]
layers = 4
dim = 192
attention = { kind = "gqa", heads = 4, kv_heads = 2, head_dim = 48 }
ffn = { kind = "swiglu", hidden = 512 }

[data]
train = "shards/train"
valid = "shards/valid"
tokenizer = "tok"

[train]
tokens = 983_040
seq_len = 128
batch_tokens = 2_048
precision = "fp32"
optimizer = { name = "adamw", lr = 3e-3 }
schedule = { kind = "wsd", warmup = 0.05, decay = 0.3 }

[run]
dir = "run"
validate_every = 120
sample_every = 10_000
guard = { battery = "ignore" }
"""


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command and its options."""
    parser = commands.add_parser(
        "demo",
        help="every step in a few minutes, on any machine",
        description="Train a small model from scratch, in a few minutes and without network or GPU: tokenizer, "
        "shards, what fits, training, an interruption and a resume, bits per byte, three prompts. Each step names the "
        "command that does it on your own text.",
    )
    parser.add_argument("--text", type=Path, metavar="FOLDER", help="your own files instead of generated Turkish text")
    parser.add_argument(
        "--dir",
        type=Path,
        default=Path("lowvram-demo"),
        help="where to work; an earlier demo there is continued (default: %(default)s)",
    )
    parser.add_argument("--replace", action="store_true", help="delete what an earlier demo made in --dir")
    add_device(parser)
    parser.set_defaults(run=run, goes_on=True)


def run(arguments: argparse.Namespace) -> int:
    """Run every step, keeping what an earlier demo made; returns 3 if the user stopped the training."""
    from lowvram.cli.train import STOPPED

    home = _claim(arguments.dir.resolve(), arguments.text, arguments.replace)
    run_file = arguments.dir / "run.toml"
    if (home / "run.toml").exists():
        _show_line(f"An earlier demo in {home} is continued; --replace starts a new one.")

    tokenizer = _prepare(home, arguments)

    _show_heading(4, "What fits", "fit", run_file)
    what = _read_run_file(home, tokenizer)
    _show_line(_describe_fit(what, arguments.device))

    if not _train(what, arguments):
        again = ["--text", arguments.text] if arguments.text else []
        _show_command("You stopped it. Resume with:", "demo", *again, "--dir", arguments.dir, *device_words(arguments))
        return STOPPED

    _show_heading(7, "Bits per byte of held-out text", "evaluate", arguments.dir / "run")
    _evaluate(home / "run", arguments.device)
    if not arguments.text:
        _show_line("This text is generated from templates, which repeat; that is why the number is so small.")
        _show_line(f"On real text it is larger: {REAL_TEXT}.")

    _show_heading(8, "Three prompts", "chat", arguments.dir / "run", "--prompt", PROMPTS[0])
    _answer(home / "run", arguments.device)
    _show_end(home, arguments.dir)
    return 0


def _prepare(home: Path, arguments: argparse.Namespace) -> Tokenizer:
    """Make text, tokenizer and shards, or find them made."""
    from lowvram.api.packing import pack_task
    from lowvram.api.texts import TextOptions
    from lowvram.cli.tasks import run_task
    from lowvram.units import count_of, show_bytes

    train_file, valid_file = home / "text/train.txt", home / "text/valid.txt"
    _show_heading(1, f"Text, in {home}", "demo", "--text", "FOLDER")
    source = "your files" if arguments.text else "generated Turkish, the project's own"
    _write_text(arguments.text, train_file, valid_file)
    learnt, held_out = (show_bytes(file.stat().st_size) for file in (train_file, valid_file))
    _show_line(f"{source}: {learnt} to learn, {held_out} held out")

    _show_heading(2, "Tokenizer", "tokenizer", "train", "FOLDER", "--vocab", str(VOCABULARY), "--out", "tok")
    tokenizer = _make_tokenizer(home / "tok", train_file)
    sample = train_file.read_text(encoding="utf-8")[:60].split("\n")[0]
    pieces = "·".join(tokenizer.decode([token]) for token in tokenizer.encode(sample))
    _show_line(f"{tokenizer.size} ids; {pieces}")

    _show_heading(3, "Shards", "data", "pack", "FOLDER", "--tokenizer", "tok", "--out", "shards/train")
    for name, file in (("train", train_file), ("valid", valid_file)):
        [shards] = run_task(pack_task(TextOptions((file,)), home / "tok", home / "shards" / name)).shards
        _show_line(f"{name}: {count_of(shards.tokens, 'token')} of {count_of(shards.documents, 'document')}")
    return tokenizer


def _make_tokenizer(directory: Path, train_file: Path) -> Tokenizer:
    """Train the tokenizer, or load the one that is there and whole."""
    from lowvram.api.texts import TextOptions
    from lowvram.api.tokenizer_training import MergeOptions, train_tokenizer_task
    from lowvram.cli.tasks import run_task
    from lowvram.data.tokenizer import Tokenizer
    from lowvram.errors import TokenizerError
    from lowvram.storage.disk import DISK

    if directory.exists():
        try:
            return Tokenizer.load(directory)
        except TokenizerError:
            DISK.delete(directory)  # an interruption left half of it
    return run_task(train_tokenizer_task(TextOptions((train_file,)), directory, MergeOptions(VOCABULARY))).tokenizer


def _read_run_file(home: Path, tokenizer: Tokenizer) -> RunConfig:
    """Read the run file, which is written where there is none: what a user changed in it stays."""
    from lowvram.config.run_file import load_run
    from lowvram.storage.disk import DISK

    run_file = home / "run.toml"
    if not run_file.exists():
        DISK.write(run_file, _RUN_FILE.encode())
    return load_run(run_file, [], lambda _: tokenizer.size)


def _train(what: RunConfig, arguments: argparse.Namespace) -> bool:
    """Train the first half, stop as by Ctrl-C, and resume; returns False if the user stopped it."""
    from lowvram.cli.train import train

    run_file, half = arguments.dir / "run.toml", what.train.steps // 2
    _show_heading(5, "Training", "train", run_file)
    reached = _find_step(what.run.dir)
    if reached >= half:
        _show_line(f"step {reached} of {what.train.steps} was reached before")
    elif train(what, device=arguments.device, stop_at=half).step != half:
        return False

    _show_heading(6, "Interrupted half-way, as by Ctrl-C; the same command resumes", "train", run_file)
    if not train(what, device=arguments.device).is_finished:
        return False
    _show_curve(what)
    return True


def _find_step(run_dir: Path) -> int:
    """Return the step of the newest whole checkpoint, 0 where there is none."""
    from lowvram.errors import CheckpointError
    from lowvram.storage.checkpoint import find_checkpoint

    try:
        return find_checkpoint(run_dir)[0].step
    except CheckpointError:
        return 0


def _show_curve(what: RunConfig) -> None:
    """Draw the training loss of the whole run."""
    from lowvram.cli.console import literal, out
    from lowvram.cli.curve import draw_curve
    from lowvram.convert.model_card import read_curve

    losses = [
        point.loss for point in read_curve(what.run.dir / "log.jsonl", what.train.steps) if point.loss is not None
    ]
    lines = draw_curve(losses, min(out.width, 80) - 4, is_ascii=not out.is_terminal)
    if lines:
        _show_line(f"training loss (nats per token), steps 1 to {len(losses)}:")
        for line in lines:
            literal(f"    {line}")


def _show_end(home: Path, directory: Path) -> None:
    """Show what to do with the model, and how to delete it."""
    from lowvram.cli.console import result

    result()
    _show_command("Talk to it:", "chat", directory / "run")
    _show_command("What this machine can train on your own text:", "fit")
    others = sorted(path.name for path in home.iterdir() if path.name not in (*_MADE, _MARKER))
    if others:
        _show_line(f"The demo made {', '.join(_MADE)} in {home}; delete them when you like.")
    else:
        _show_line(f"Everything is in {home}; delete that folder when you like.")


def _describe_fit(what: RunConfig, device: str) -> str:
    """Return the run's plan, its memory on this machine and its duration."""
    from lowvram.api.device import choose_device
    from lowvram.api.plan_monitor import PlanMonitor
    from lowvram.api.target import notices_of
    from lowvram.cli.tasks import tell
    from lowvram.units import show_bytes, show_duration_range

    chosen = choose_device(device)
    monitor = PlanMonitor(what, chosen.device)
    for said in (*chosen.notices, *notices_of(monitor.budget)):
        tell(said)
    report = monitor.rehearse_fit()
    plan, limit = report.search_result.plan, show_bytes(monitor.budget.limit_bytes)
    lasts = report.days_range
    days = f", about {show_duration_range(*(days * 86_400 for days in lasts))}" if lasts is not None else ""
    cut = f"{plan.micro_batch} × {plan.accumulate} sequences a step"
    return f"{cut}: tensors take {show_bytes(report.search_result.peak_bytes)} of {limit}{days}"


def _show_heading(number: int, what: str, *command: str | Path) -> None:
    from rich.text import Text

    from lowvram.cli.console import out

    out.print(Text(f"\n{number}/8 {what}", "bold"))
    out.print(Text.assemble(("    $ ", "dim"), (quote_command("lowvram", *command), "green")))


def _show_line(text: str) -> None:
    from lowvram.cli.console import result

    result(f"    {text}")


def _show_command(what: str, *command: str | Path) -> None:
    from lowvram.cli.console import literal

    literal(f"    {what} {quote_command('lowvram', *command)}")


def _claim(home: Path, folder: Path | None, replace: bool) -> Path:
    """Return the demo's directory as an earlier demo left it.

    replace: without what that one made; nothing else in it is ever deleted.
    """
    from lowvram.data.text import find_files
    from lowvram.errors import ConfigError
    from lowvram.storage.disk import DISK
    from lowvram.train.start import lock_run

    if folder is not None:
        find_files([folder])
        if home in (folder.resolve(), *folder.resolve().parents) or folder.resolve() in home.parents:
            what = f"--text {folder} and --dir {home} lie in one another."
            raise ConfigError(what, "The demo would read the files that it writes.", "Name another --dir.")
    if home.exists() and any(home.iterdir()) and not (home / _MARKER).exists():
        raise ConfigError(
            f"--dir {home} is not empty.", "No earlier demo made it, so nothing is deleted.", "Name another --dir."
        )
    if replace and (home / "run").exists():
        with lock_run(home / "run"):  # raises BusyError where another process trains in it
            pass
    for name in _MADE if replace else ():
        if (home / name).exists():
            DISK.delete(home / name)
    (home / "text").mkdir(parents=True, exist_ok=True)
    (home / _MARKER).touch()
    return home


def _write_text(folder: Path | None, train_file: Path, valid_file: Path) -> None:
    from lowvram.data.sample import sample_documents

    if folder is None:
        _write(train_file, sample_documents(SEED, SAMPLE_CHARACTERS))
        _write(valid_file, sample_documents(HELD_OUT_SEED, HELD_OUT_CHARACTERS))
        return
    train, valid = _split(folder)
    _write(train_file, train)
    _write(valid_file, valid)


def _split(folder: Path) -> tuple[list[str], list[str]]:
    """Hold out a share of the user's documents, chosen by their own hash."""
    from lowvram.cli.console import notice
    from lowvram.data.text import documents, find_files
    from lowvram.errors import DataError
    from lowvram.units import count_of

    train: list[str] = []
    valid: list[str] = []
    read = 0
    for text in (text for file in find_files([folder]) for text in documents(file)):
        number = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "little")
        (valid if number < HELD_OUT_SHARE * 2**32 else train).append(text)
        read += len(text)
        if read > MOST_USER_CHARACTERS:
            notice(f"    Only the first {MOST_USER_CHARACTERS:,} characters are used here.")
            break
    if not valid and len(train) > 1:
        valid.append(train.pop())
    if not train or not valid or read < LEAST_USER_CHARACTERS:
        raise DataError(
            f"{folder} has {count_of(len(train) + len(valid), 'document')} of {read:,} characters together.",
            f"Training and validation need {LEAST_USER_CHARACTERS:,} characters in two documents at least.",
            "Add text, or separate documents by blank lines.",
        )
    return train, valid


def _write(path: Path, texts: Iterable[str]) -> None:
    """Write a text whole or not at all; raises ConfigError where an earlier demo learnt another one."""
    from lowvram.errors import ConfigError
    from lowvram.storage.disk import DISK

    data = "".join(text.strip("\n") + "\n\n" for text in texts).encode()
    if not path.exists():
        DISK.write(path, data)
    elif path.read_bytes() != data:
        raise ConfigError(
            f"An earlier demo in {path.parents[1]} learnt another text.",
            "Continuing with this one would spoil what it learnt.",
            "Name another --dir, or add --replace: it deletes what that demo made and starts again.",
        )


def _evaluate(run_dir: Path, device: str) -> None:
    from lowvram.cli.evaluate import show_held_out

    show_held_out(run_dir, device)


def _answer(run_dir: Path, device: str) -> None:
    from lowvram.api.loading import load_model
    from lowvram.cli.console import AnswerStream
    from lowvram.cli.tasks import run_task
    from lowvram.generate.conversation import Conversation
    from lowvram.generate.decoder import Decoder
    from lowvram.generate.engine import Engine
    from lowvram.generate.sampling import Sampler

    loaded = run_task(load_model(run_dir, device))
    decoder = Decoder(loaded.model, loaded.trained_len, dtype=loaded.dtype)
    for prompt in PROMPTS:
        conversation = Conversation(Engine(decoder, loaded.tokenizer))
        answer = AnswerStream(indent=4)
        answer.write(f"    {prompt}")
        for piece in conversation.ask(prompt, Sampler(temperature=0.6), 40):
            answer.write(piece)
        answer.end()
