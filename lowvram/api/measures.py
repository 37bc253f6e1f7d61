"""What a trained model knows, measured on files: text, minimal pairs, multiple choice, suffixes; and its samples."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowvram.api.tasks import Notice, Progress, Task, count_progress

if TYPE_CHECKING:
    from lowvram.api.loading import LoadedModel
    from lowvram.data.shards import ShardSet
    from lowvram.evaluate.harness import HarnessRow
    from lowvram.evaluate.minimal_pairs import Answers, Pair, PairsReport
    from lowvram.evaluate.multiple_choice import ChoicesReport, Item
    from lowvram.evaluate.scorer import Scorer
    from lowvram.evaluate.suffix_loss import Sentence, SuffixReport
    from lowvram.evaluate.text_score import TextScore

# What samples begin with where the model's run names no prompts.
_PROMPTS = ("Bir gün", "Türkiye'nin", "Bu yüzden")
_SAMPLE_TOKENS = 64


@dataclass(frozen=True)
class Measures:
    """The files to measure on, and how many samples to write.

    text: text files, folders of them or of shards.  field: of JSON lines and Parquet, the text.  items: at most so many
    of each file's pairs, questions and sentences, evenly spread, and the first so many of a task of the harness.
    harness: tasks of lm-evaluation-harness, by their names or as paths of YAML files.  stems: a learnt morphology, by
    which plain text files among `suffixes` are cut.
    """

    text: tuple[Path, ...] = ()
    pairs: tuple[Path, ...] = ()
    choices: tuple[Path, ...] = ()
    suffixes: tuple[Path, ...] = ()
    samples: int = 0
    harness: tuple[str, ...] = ()
    field: str = "text"
    items: int | None = None
    stems: Path | None = None

    @property
    def any_asked(self) -> bool:
        """Whether anything is to be measured."""
        return bool(self.text or self.pairs or self.choices or self.suffixes or self.samples or self.harness)


def refuse_idle_options(wanted: Measures, data: Path | None, tokens: int | None) -> None:
    """Raise ConfigError for an option that belongs to measures of which none is asked for."""
    from lowvram.errors import ConfigError

    reads_text = bool(wanted.text or data is not None or not wanted.any_asked)
    has_items = bool(wanted.pairs or wanted.choices or wanted.suffixes or wanted.harness)
    for name, is_idle, of in (
        ("items", wanted.items is not None and not has_items, "`pairs`, `choices`, `suffixes` and `harness`"),
        ("tokens", tokens is not None and not reads_text, "`data` and `text`"),
        ("stems", wanted.stems is not None and not wanted.suffixes, "`suffixes`"),
        ("field", wanted.field != "text" and not wanted.text, "`text`"),
    ):
        if is_idle:
            what = f"`{name}` is given, and nothing that it belongs to."
            raise ConfigError(what, f"It is an option of {of}.", "Name a file for one of these, or leave it out.")


@dataclass(frozen=True)
class Sample:
    """What a model wrote behind a prompt."""

    prompt: str
    text: str


@dataclass(frozen=True)
class Measured:
    """One report for each file of a kind, in the order in which they were named."""

    text: tuple[TextScore, ...] = ()
    pairs: tuple[PairsReport, ...] = ()
    choices: tuple[ChoicesReport, ...] = ()
    suffixes: tuple[SuffixReport, ...] = ()
    samples: tuple[Sample, ...] = ()
    harness: tuple[HarnessRow, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Return what was measured as values that JSON has; a number that is not finite is None."""
        kinds = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: [plain(dataclasses.asdict(report)) for report in found] for name, found in kinds.items() if found}


def plain(value: Any) -> Any:
    """Return a value as JSON has it: paths as texts, and None for a number that is not finite."""
    if isinstance(value, dict):
        return {name: plain(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value


@dataclass(frozen=True)
class Items:
    """What the files hold; they are read before the model is, so that a fault in them is told at once."""

    domains: tuple[Path, ...]
    pairs: tuple[tuple[Path, list[Pair], int], ...]
    choices: tuple[tuple[Path, str, list[Item]], ...]
    suffixes: tuple[tuple[Path, list[Sentence]], ...]


def read_items_task(wanted: Measures) -> Task[Items]:
    """Read all files but the texts, of which only the names are looked up.

    Raises DataError for a file of a wrong form, MachineError where a package is not installed.
    """
    from lowvram.errors import MachineError
    from lowvram.evaluate.minimal_pairs import read_pairs
    from lowvram.evaluate.multiple_choice import read_items
    from lowvram.evaluate.records import spread
    from lowvram.evaluate.suffix_loss import read_sentences
    from lowvram.evaluate.text_score import find_domains

    if wanted.harness and importlib.util.find_spec("lm_eval") is None:
        what = "Tasks of lm-evaluation-harness need the package lm_eval."
        raise MachineError(what, "It is not installed.", "Type: pip install -e '.[eval]'")
    domains, passed_over = find_domains(list(wanted.text)) if wanted.text else ([], [])
    yield from map(Notice, passed_over)
    pairs, choices, suffixes = [], [], []
    for file in wanted.pairs:
        yield Progress(f"Reading {file.name}")
        found = spread(read_pairs(file), wanted.items)
        differing = [pair for pair in found if pair.good != pair.bad]
        pairs.append((file, differing, len(found) - len(differing)))
    for file in wanted.choices:
        yield Progress(f"Reading {file.name}")
        kind, questions = read_items(file)
        choices.append((file, kind, spread(questions, wanted.items)))
    for file in wanted.suffixes:
        yield Progress(f"Reading {file.name}")
        sentences = _read_plain(file, wanted.stems) if is_plain_text(file) else read_sentences(file)
        suffixes.append((file, spread(sentences, wanted.items)))
    return Items(tuple(domains), tuple(pairs), tuple(choices), tuple(suffixes))


def is_plain_text(file: Path) -> bool:
    """Say whether a file has no analyses, by its name."""
    from lowvram.data.text_files import name_unpacked

    return name_unpacked(file).endswith(".txt")


def _read_plain(file: Path, stems: Path | None) -> list[Sentence]:
    from lowvram.data.morphology.segmenter import Segmenter
    from lowvram.errors import DataError
    from lowvram.evaluate.plain_suffixes import read_plain_sentences

    if stems is None:
        why = "Its words are cut by stems that were learnt from other text, and `stems` names none."
        fix = "Learn them with `lowvram tokenizer train --morphology soft`, which writes morphology.json."
        raise DataError(f"{file} is plain text, without analyses.", why, fix)
    return read_plain_sentences(file, Segmenter.load(stems))


def measure_task(loaded: LoadedModel, wanted: Measures, items: Items, tokens: int | None = None) -> Task[Measured]:
    """Measure all that is asked for.  tokens: only the first so many of each text."""
    scorer = open_scorer(loaded)
    text = yield from _measure_text(loaded, items.domains, wanted.field, tokens)
    pairs = yield from _measure_pairs(scorer, items.pairs)
    choices, suffixes = [], []
    for file, kind, questions in items.choices:
        from lowvram.evaluate.multiple_choice import choose

        found = yield from count_progress(choose(scorer, file, kind, questions), f"Answering {file.name}")
        yield from _tell_cut(found.cut, f"questions of {file}", scorer.max_context)
        choices.append(found)
    for file, sentences in items.suffixes:
        from lowvram.evaluate.suffix_loss import measure_suffixes

        paid = yield from count_progress(measure_suffixes(scorer, file, sentences), f"Reading {file.name}")
        yield from _tell_cut(paid.cut, f"sentences of {file}", scorer.max_context)
        suffixes.append(paid)
    samples = yield from _write_samples(loaded, wanted.samples)
    harness = []
    if wanted.harness:
        from lowvram.evaluate.harness import run_harness

        yield Progress("Running lm-evaluation-harness")
        harness = run_harness(scorer, wanted.harness, wanted.items)
    return Measured(tuple(text), tuple(pairs), tuple(choices), tuple(suffixes), tuple(samples), tuple(harness))


def open_scorer(loaded: LoadedModel) -> Scorer:
    """Return a loaded model as what scores texts."""
    import torch

    from lowvram.evaluate.scorer import Scorer
    from lowvram.model.linear import is_slow_in_half

    # A processor without instructions for 16-bit numbers reads many tokens several times as fast in fp32.
    is_slow = is_slow_in_half(torch.empty(0, dtype=loaded.dtype, device=loaded.model.embedding.device))
    dtype = torch.float32 if is_slow else loaded.dtype
    return Scorer(loaded.model, dtype, loaded.tokenizer, loaded.trained_len)


def warn_of_learnt_text(loaded: LoadedModel, shards: ShardSet, path: Path) -> str | None:
    """Return a sentence where the run that a model is of learns from these shards; None where it does not."""
    from lowvram.data.shards import ShardSet
    from lowvram.errors import DataError

    for corpus in loaded.run.data.train if loaded.run is not None else ():
        try:
            is_same = corpus.path.resolve() == path.resolve() or ShardSet.open(corpus.path).hash == shards.hash
        except DataError:  # the training shards are not here any more
            continue
        if is_same:
            return (
                f"{path} is training text of this run: what it scores there says how well the text is remembered, and "
                "not how the model does on other text."
            )
    return None


def _tell_cut(count: int, what: str, longest: int) -> Task[None]:
    if count:
        yield Notice(f"{count:,} {what} are longer than the {longest:,} tokens that the model reads.", "warning")


def _measure_text(
    loaded: LoadedModel, domains: tuple[Path, ...], field: str, tokens: int | None
) -> Task[list[TextScore]]:
    from lowvram.data.bad_rows import BadRows
    from lowvram.data.shards import ShardSet
    from lowvram.evaluate.bits_per_byte import Score, score_windows
    from lowvram.evaluate.text_score import TextScore, open_domain

    tokenizer, rows, total, read = loaded.tokenizer, [], Score(0.0, 0, 0), BadRows()
    for path in domains:
        encoding = open_domain(path, field, tokenizer, tokens, read)
        source = yield from count_progress(encoding, f"Encoding {path.name}")
        if isinstance(source, ShardSet) and (warning := warn_of_learnt_text(loaded, source, path)):
            yield Notice(warning, "warning")
        windows = score_windows(
            loaded.model, source, tokenizer.bos_id, tokenizer.byte_count_V, loaded.trained_len, loaded.dtype, tokens
        )
        found = yield from count_progress(windows, f"Reading {path.name}")
        rows.append(TextScore.of(path, found, source.documents))
        sums = (total.nats + found.nats, total.targets + found.targets, total.text_bytes + found.text_bytes)
        total = Score(*sums)
    yield from map(Notice, read.describe_encodings())
    if len(rows) > 1:
        documents = sum(row.documents or 0 for row in rows)
        rows.append(TextScore.of(Path("all"), total, documents))
    return rows


def _measure_pairs(scorer: Scorer, files: tuple[tuple[Path, list[Pair], int], ...]) -> Task[list[PairsReport]]:
    from lowvram.errors import DataError
    from lowvram.evaluate.minimal_pairs import answer_pairs, report_pairs

    if not files:
        return []
    for file, pairs, identical in files:
        if not pairs:
            what = f"{file} holds {identical} pairs, and both sentences of each are the same."
            raise DataError(what, "A preference needs two sentences that differ.", "Name another file.")
    trained = []
    for file, pairs, _ in files:
        trained.append((yield from count_progress(answer_pairs(scorer, pairs), f"Comparing {file.name}")))
    untrained = yield from _ask_untrained(scorer, files)
    return [
        report_pairs(file, pairs, answers, before, identical)
        for (file, pairs, identical), answers, before in zip(files, trained, untrained, strict=True)
    ]


def _ask_untrained(scorer: Scorer, files: tuple[tuple[Path, list[Pair], int], ...]) -> Task[Sequence[Answers | None]]:
    """Return the answers of the untrained model to each file; None, with a notice, where memory runs out for it."""
    from lowvram.train.oom import free_memory, is_out_of_memory
    from lowvram.units import show_bytes

    found: list[Answers] = []
    try:
        yield from _add_untrained(scorer, files, found)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
    else:
        return found
    # Behind the handler, since the error's frames keep the tensors alive.
    free_memory(scorer.model.embedding.device)
    what = f"Memory ran out for the untrained model, which takes {show_bytes(scorer.untrained_bytes())} beside the"
    yield Notice(f"{what} trained one and what it computes with: its answers are left out.", "warning")
    return [*found, *[None] * (len(files) - len(found))]


def _add_untrained(scorer: Scorer, files: tuple[tuple[Path, list[Pair], int], ...], found: list[Answers]) -> Task[None]:
    from lowvram.evaluate.minimal_pairs import answer_pairs

    before = scorer.untrained()
    for file, pairs, _ in files:
        asked = answer_pairs(before, pairs)
        found.append((yield from count_progress(asked, f"Comparing {file.name} with the untrained model")))


def _write_samples(loaded: LoadedModel, count: int) -> Task[list[Sample]]:
    from lowvram.errors import PromptError
    from lowvram.generate.decoder import Decoder
    from lowvram.generate.engine import Engine
    from lowvram.generate.sampling import Sampler

    if not count:
        return []
    prompts = loaded.run.run.prompts if loaded.run is not None and loaded.run.run.prompts else _PROMPTS
    length = loaded.run.run.sample_tokens if loaded.run is not None else _SAMPLE_TOKENS
    engine = Engine(Decoder(loaded.model, loaded.trained_len, dtype=loaded.dtype, captures=False), loaded.tokenizer)
    samples = []
    for number in range(count):
        yield Progress("Writing samples", number, count)
        prompt = prompts[number % len(prompts)]
        id_T = [loaded.tokenizer.bos_id, *loaded.tokenizer.encode(prompt)]
        try:
            text = "".join(engine.generate(id_T, Sampler(seed=number // len(prompts)), length))
        except PromptError as error:
            raise PromptError(f"The run's prompt {prompt!r} is too long.", error.why, error.fix) from error
        samples.append(Sample(prompt, text))
    return samples
