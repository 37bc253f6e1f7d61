"""The last lines of a run or an interrupted command: what a model has learnt, and the commands that come next."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

from lowvram.cli.next_step import next_step, or_step, with_assignment
from lowvram.cli.options import device_words

if TYPE_CHECKING:
    from lowvram.config.run import RunConfig
    from lowvram.data.shards import ShardSet
    from lowvram.data.source_set import SourceSet
    from lowvram.data.tokenizer import Tokenizer
    from lowvram.train.events import Evaluated, Stopped


def show_verdict(
    what: RunConfig, tokenizer: Tokenizer, valid: ShardSet | SourceSet | None, evaluated: Evaluated | None
) -> None:
    """Compare the last validation of a finished run with bigrams; Ctrl-C leaves the comparison out."""
    from lowvram.api.evaluation import score_bigrams
    from lowvram.cli.console import notice
    from lowvram.cli.tasks import run_task
    from lowvram.evaluate.verdict import compare_with_bigrams, is_worse_than_bigrams

    if valid is None:
        notice("Nothing was held out (data.valid), so the model's quality on other text is not known.", "yellow")
    if valid is None or evaluated is None:
        return
    try:
        baseline = run_task(score_bigrams(what, tokenizer, valid, what.run.validate_tokens))
    except KeyboardInterrupt:
        notice("(not compared with bigrams)", "dim")
        return
    if baseline is None:
        return
    found, bigrams = evaluated.bits_per_byte, baseline[0].bits_per_byte
    is_worse = is_worse_than_bigrams(found, bigrams)
    notice(compare_with_bigrams(found, bigrams), "yellow" if is_worse else "green")


def show_next_steps(arguments: argparse.Namespace, what: RunConfig, ended: Stopped) -> None:
    """Show what to type next: the command that resumes a stopped run, or those that use a finished one."""
    from lowvram.cli.console import copyable

    if not ended.is_finished:
        copyable(next_step(*arguments.typed, why="resumes the run"))
        return
    run, device = near(what.run.dir), device_words(arguments)
    copyable(next_step("chat", run, *device, why="talk to it"))
    if what.data.valid is not None:
        copyable(or_step("evaluate", run, *device, why="measure it"))
    copyable(or_step("export", run, "--to", "hf", "--out", Path(f"{run}-hf"), why="for transformers"))
    further = with_assignment(arguments.typed, "train.tokens", str(2 * what.train.tokens))
    copyable(or_step(*further, why="train it further, to twice the tokens"))


def show_interruption(arguments: argparse.Namespace, is_terminated: bool) -> None:
    """Say that a signal ended the command and, where typing it again goes on, show it.

    A parser says by its default `goes_on` that its command keeps what is finished.
    """
    from lowvram.cli.console import copyable, notice

    notice(f"{'Terminated' if is_terminated else 'Interrupted'}; what was finished before is kept.")
    texts = getattr(arguments, "text", None)
    reads_input = isinstance(texts, list) and Path("-") in texts
    is_report = getattr(arguments, "on_bad_row", "") == "report"
    if getattr(arguments, "goes_on", False) and not reads_input and not is_report:
        copyable(next_step(*arguments.typed, why="goes on where it stopped"))


def near(path: Path | str) -> Path:
    """Return the shortest path to type here: a relative one inside the working directory."""
    path, here = Path(path), Path.cwd()
    inside = path.is_absolute() and path != here and here in path.parents
    return Path(os.path.relpath(path, here)) if inside else path
