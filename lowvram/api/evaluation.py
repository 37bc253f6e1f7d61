"""A trained model measured: bits per byte of held-out text beside a bigram model's, and what files ask of it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowvram.api.measures import Measured, Measures, warn_of_learnt_text
from lowvram.api.tasks import Notice, Progress, Task, count_progress

if TYPE_CHECKING:
    from lowvram.api.loading import LoadedModel
    from lowvram.config.run import Corpus, RunConfig
    from lowvram.data.shards import ShardSet
    from lowvram.data.source_set import SourceSet
    from lowvram.data.tokenizer import Tokenizer
    from lowvram.evaluate.bits_per_byte import Score, TokenSource
    from lowvram.generate.precision import Precision


@dataclass(frozen=True)
class Evaluation:
    """What a model scores: on a set of shards, and on files.

    checkpoint: the directory that was read; step: None where another program wrote it.  precision: of the weights.
    seq_len: tokens that the model reads at once.  measured: what files ask.
    data: the shards; None where other measures alone were asked for, and then the rest is empty.  bits_per_byte: what
    the model needs for one byte of their text.  loss: nats per predicted token, of which there are `targets`.  Both are
    not finite where the model's numbers are broken.  bigram_bits_per_byte: of a bigram model counted on `bigrams_of`,
    None where the training shards are not here.  by_source: the score of each source, where there are several.
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
    by_source: Mapping[str, Score] = dataclasses.field(default_factory=dict)
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
            if self.by_source:
                found["by_source"] = {name: _plain_score(score) for name, score in self.by_source.items()}
        return found | self.measured.as_dict()


def _plain_score(score: Score) -> dict[str, Any]:
    is_finite = math.isfinite(score.nats)
    return {
        "bits_per_byte": score.bits_per_byte if is_finite else None,
        "loss": score.loss if is_finite else None,
        "targets": score.targets,
        "text_bytes": score.text_bytes,
    }


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
    stems: str | Path | None = None,
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
    suffixes: sentences with gold analyses, or plain text files, whose words are cut by `stems`, the morphology.json
    of a tokenizer that was trained with morphology.  samples: how many texts the model writes.  harness: tasks of
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
    refuse_type("stems", stems, *PATH)
    given = {"text": text, "pairs": pairs, "choices": choices, "suffixes": suffixes}
    files = {name: read_paths(name, paths) for name, paths in given.items() if paths is not None}
    tasks = (harness,) if isinstance(harness, str) else tuple(harness or ())
    wanted = Measures(
        **files,
        samples=samples or 0,
        harness=tasks,
        field=field,
        items=items,
        stems=None if stems is None else Path(stems),
    )
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
    from lowvram.config.mix import find_common
    from lowvram.data.source_set import list_sets, open_sources
    from lowvram.evaluate.by_source import score_held_out
    from lowvram.evaluate.verdict import warn_of_few_tokens

    named = _name_held_out(loaded, data)
    tokenizer, seq_len = loaded.tokenizer, loaded.trained_len
    shards = open_sources(named, tokenizer.hash, tokenizer.size)
    scoring = score_held_out(
        loaded.model, shards, tokenizer.bos_id, tokenizer.byte_count_V, seq_len, loaded.dtype, tokens
    )
    what = str(named[0][1]) if len(named) == 1 else "held-out text"
    found, by_source = yield from count_progress(scoring, f"Reading {what}")
    opened = zip(list_sets(shards), named, strict=True)
    learnt = (warn_of_learnt_text(loaded, each, path) for each, (_, path) in opened)
    if warning := next(filter(None, learnt), None) or warn_of_few_tokens(found.targets):
        yield Notice(warning, "warning")
    baseline = None
    if loaded.run is not None:
        baseline = yield from score_bigrams(loaded.run, tokenizer, shards, tokens)
    return dataclasses.replace(
        before,
        data=find_common([path for _, path in named]) or named[0][1],
        by_source=by_source,
        bits_per_byte=found.bits_per_byte,
        loss=found.loss,
        targets=found.targets,
        bigram_bits_per_byte=baseline[0].bits_per_byte if baseline else None,
        bigrams_of=baseline[1] if baseline else "",
    )


def _name_held_out(loaded: LoadedModel, data: Path | None) -> Sequence[tuple[str, Path]]:
    """Return the names and folders of the shards to measure on; raises DataError where there are none."""
    from lowvram.config.mix import MIX, is_mix, read_mix
    from lowvram.errors import DataError

    if data is None and (loaded.run is None or not loaded.run.data.held_out):
        raise DataError("The run names no data.valid.", "Bits per byte need held-out text.", "Name shards with `data`.")
    if data is None:
        assert loaded.run is not None, "checked above"
        return loaded.run.data.held_out
    if not is_mix(data):
        return [("", data)]
    named = read_mix(data).valid(data)
    if not named:
        why = f"{data / MIX} names no source with held-out text."
        raise DataError(f"The mix {data} holds nothing out.", why, "Name the shards of a source with `data`.")
    return named


def score_bigrams(
    run: RunConfig, tokenizer: Tokenizer, valid: ShardSet | SourceSet, most_tokens: int | None
) -> Task[tuple[Score, str] | None]:
    """Return the bigram model's score on the first `most_tokens` of `valid`, and what it was counted on.

    Of several corpora it is counted on as much of each as its share is, or all of it.  None, with a notice, where the
    training shards cannot be read.
    """
    from lowvram.data.source_set import SourceSet
    from lowvram.errors import DataError
    from lowvram.evaluate.bits_per_byte import BIGRAM_TOKENS, bigram_score

    corpora = run.data.train
    if not all(corpus.path.exists() for corpus in corpora):  # of an imported or moved model nobody has them here
        yield Notice("No bigram model to compare with: the shards that the model was trained on are not here.")
        return None
    try:
        train, counted_on = _open_corpora(corpora, tokenizer, BIGRAM_TOKENS)
    except DataError as error:
        yield Notice(f"No bigram model to compare with: {error}")
        return None
    if isinstance(valid, SourceSet):
        valid, most_tokens = valid.limit(most_tokens), None
    yield Progress("Counting bigrams to compare with")
    return bigram_score(train, valid, tokenizer.bos_id, tokenizer.byte_count_V, most_tokens), counted_on


def _open_corpora(corpora: Sequence[Corpus], tokenizer: Tokenizer, most: int) -> tuple[TokenSource, str]:
    """Return at most `most` tokens of the corpora, of each as much as its share is, and words for what that is."""
    from lowvram.data.shard_set import ShardSet
    from lowvram.data.source_set import Source, SourceSet
    from lowvram.units import show_count

    opened = [ShardSet.open(corpus.path, tokenizer.hash, tokenizer.size) for corpus in corpora]
    if len(opened) == 1:
        part = f"the first {show_count(most)} tokens of " if opened[0].tokens > most else ""
        return opened[0], f"{part}{corpora[0].path}"
    total = sum(corpus.weight for corpus in corpora)
    sources = [
        Source(str(corpus.path), shards, max(1, min(shards.tokens, round(most * corpus.weight / total))))
        for shards, corpus in zip(opened, corpora, strict=True)
    ]
    found = SourceSet(sources)
    return found, f"{show_count(found.tokens)} tokens of {len(sources)} corpora, by their shares"
