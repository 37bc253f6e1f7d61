"""A trained model measured: bits per byte of held-out text beside a bigram model's, and what files ask of it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowvram.api.measures import Measured, Measures, warn_of_learnt_text
from lowvram.api.tasks import Notice, Progress, Task, count_progress

if TYPE_CHECKING:
    from lowvram.api.loading import LoadedModel
    from lowvram.config.run import RunConfig
    from lowvram.data.shards import ShardSet
    from lowvram.data.tokenizer import Tokenizer
    from lowvram.evaluate.bits_per_byte import Score
    from lowvram.generate.precision import Precision


@dataclass(frozen=True)
class Evaluation:
    """What a model scores: on a set of shards, and on files.

    checkpoint: the directory that was read; step: None where another program wrote it.  precision: of the weights.
    seq_len: tokens that the model reads at once.  measured: what files ask.
    data: the shards; None where other measures alone were asked for, and then the rest is empty.  bits_per_byte: what
    the model needs for one byte of their text.  loss: nats per predicted token, of which there are `targets`.  Both are
    not finite where the model's numbers are broken.  bigram_bits_per_byte: of a bigram model counted on `bigrams_of`,
    None where the training shards are not here.
    """

    checkpoint: Path
    step: int | None
    precision: str
    seq_len: int
    measured: Measured = dataclasses.field(default_factory=Measured)
    data: Path | None = None
    bits_per_byte: float = math.nan
    loss: float = math.nan
    targets: int = 0
    bigram_bits_per_byte: float | None = None
    bigrams_of: str = ""
    notices: tuple[Notice, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Return the values that `lowvram evaluate --json` prints; JSON has no NaN, so it is None."""
        found: dict[str, Any] = {"checkpoint": str(self.checkpoint), "step": self.step, "precision": self.precision}
        if self.data is not None:
            is_finite = math.isfinite(self.loss)
            found |= {
                "data": str(self.data),
                "bits_per_byte": self.bits_per_byte if is_finite else None,
                "loss": self.loss if is_finite else None,
                "targets": self.targets,
                "bigram_bits_per_byte": self.bigram_bits_per_byte,
            }
        return found | self.measured.as_dict()


Paths = str | Path | Sequence[str | Path]


def evaluate(
    checkpoint: str | Path,
    *,
    data: str | Path | None = None,
    tokens: int | None = None,
    text: Paths | None = None,
    pairs: Paths | None = None,
    choices: Paths | None = None,
    suffixes: Paths | None = None,
    samples: int | None = None,
    harness: str | Sequence[str] | None = None,
    items: int | None = None,
    field: str = "text",
    precision: Precision | None = None,
    device: str = "auto",
    progress: bool = False,
) -> Evaluation:
    """Measure a run's newest checkpoint, or the one named: bits per byte of held-out shards, and what files ask.

    data: shards to measure on; None: the run's own `data.valid`, unless one of the following is given.  text: text
    files or folders, each with bits per byte of its own.  pairs: minimal pairs.  choices: questions with choices.
    suffixes: sentences with gold analyses.  samples: how many texts the model writes.  harness: tasks of
    lm-evaluation-harness (package lm_eval), by their names or as paths of YAML files.  tokens: only the first so many
    of each text; items: only so many of each file's pairs, questions and sentences, evenly spread.  field: of text in
    JSON lines and Parquet.  precision: of the weights, None: what the run validates in.  progress: show a progress bar,
    in a terminal or a notebook.
    Raises CheckpointError, DataError where there is no held-out text or a file is of another form, MachineError where
    the device is not here, NumbersError where the model's numbers are broken.
    """
    from lowvram.api.arguments import PATH, read_paths, refuse_count, refuse_missing, refuse_type
    from lowvram.api.progress import carry_out

    refuse_missing("checkpoint", checkpoint, *PATH)
    refuse_type("data", data, *PATH)
    for name, count in (("tokens", tokens), ("samples", samples), ("items", items)):
        refuse_count(name, count)
    refuse_missing("field", field, str)
    refuse_type("harness", harness, str, list, tuple)
    refuse_missing("device", device, str)
    given = {"text": text, "pairs": pairs, "choices": choices, "suffixes": suffixes}
    files = {name: read_paths(name, paths) for name, paths in given.items() if paths is not None}
    tasks = (harness,) if isinstance(harness, str) else tuple(harness or ())
    wanted = Measures(**files, samples=samples or 0, harness=tasks, field=field, items=items)
    task = evaluate_task(Path(checkpoint), Path(data) if data is not None else None, tokens, precision, device, wanted)
    found, notices = carry_out(task, progress)
    return dataclasses.replace(found, notices=notices)


def evaluate_task(
    path: Path,
    data: Path | None = None,
    tokens: int | None = None,
    precision: Precision | None = None,
    device: str = "auto",
    wanted: Measures | None = None,
) -> Task[Evaluation]:
    """Do what `evaluate` does, and yield its notices and its progress."""
    from lowvram.api.loading import load_model
    from lowvram.api.measures import measure_task, read_items_task, refuse_idle_options

    wanted = wanted or Measures()
    refuse_idle_options(wanted, data, tokens)
    items = yield from read_items_task(wanted)
    loaded = yield from load_model(path, device, precision, as_trained=True)
    step = loaded.checkpoint.step if loaded.checkpoint is not None else None
    found = Evaluation(loaded.path, step, loaded.precision, loaded.trained_len)
    if data is not None or not wanted.any_asked:
        found = yield from _score_held_out(loaded, data, tokens, found)
    measured = yield from measure_task(loaded, wanted, items, tokens)
    return dataclasses.replace(found, measured=measured)


def _score_held_out(loaded: LoadedModel, data: Path | None, tokens: int | None, before: Evaluation) -> Task[Evaluation]:
    """Return the evaluation with what the model scores on shards."""
    from lowvram.data.shards import ShardSet
    from lowvram.errors import DataError
    from lowvram.evaluate.bits_per_byte import score_windows
    from lowvram.evaluate.verdict import warn_of_few_tokens

    shards_path = data or (loaded.run.data.valid if loaded.run is not None else None)
    if shards_path is None:
        raise DataError("The run names no data.valid.", "Bits per byte need held-out text.", "Name shards with `data`.")
    tokenizer, seq_len = loaded.tokenizer, loaded.trained_len
    shards = ShardSet.open(shards_path, tokenizer.hash, tokenizer.size)
    scoring = score_windows(
        loaded.model, shards, tokenizer.bos_id, tokenizer.byte_count_V, seq_len, loaded.dtype, tokens
    )
    found = yield from count_progress(scoring, f"Reading {shards_path}")
    warning = warn_of_learnt_text(loaded, shards, shards_path) or warn_of_few_tokens(found.targets)
    if warning:
        yield Notice(warning, "warning")
    baseline = None
    if loaded.run is not None:
        baseline = yield from score_bigrams(loaded.run, tokenizer, shards, tokens)
    return dataclasses.replace(
        before,
        data=shards_path,
        bits_per_byte=found.bits_per_byte,
        loss=found.loss,
        targets=found.targets,
        bigram_bits_per_byte=baseline[0].bits_per_byte if baseline else None,
        bigrams_of=baseline[1] if baseline else "",
    )


def score_bigrams(
    run: RunConfig, tokenizer: Tokenizer, valid: ShardSet, most_tokens: int | None
) -> Task[tuple[Score, str] | None]:
    """Return the bigram model's score on the first `most_tokens` of `valid`, and what it was counted on.

    None, with a notice, where the training shards cannot be read.
    """
    from lowvram.data.shards import ShardSet
    from lowvram.errors import DataError
    from lowvram.evaluate.bits_per_byte import BIGRAM_TOKENS, bigram_score
    from lowvram.units import show_count

    path = run.data.train[0].path
    if not path.exists():  # of a model that was imported or moved nobody has it here
        yield Notice("No bigram model to compare with: the shards that the model was trained on are not here.")
        return None
    try:
        train = ShardSet.open(path, tokenizer.hash, tokenizer.size)
    except DataError as error:
        yield Notice(f"No bigram model to compare with: {error}")
        return None
    part = f"the first {show_count(BIGRAM_TOKENS)} tokens of " if train.tokens > BIGRAM_TOKENS else ""
    yield Progress("Counting bigrams to compare with")
    return bigram_score(train, valid, tokenizer.bos_id, tokenizer.byte_count_V, most_tokens), f"{part}{path}"
