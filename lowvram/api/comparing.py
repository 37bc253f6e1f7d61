"""Several runs compared on the same documents, read one run after the other."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lowvram.api.measures import plain
from lowvram.api.tasks import Notice, Progress, Task, count_progress

if TYPE_CHECKING:
    from lowvram.api.loading import LoadedModel
    from lowvram.errors import LowvramError
    from lowvram.evaluate.comparison import Comparison
    from lowvram.generate.precision import Precision

# Ids of held-out text in which beginnings of documents are looked for at once: 64 MiB at most.
_TOKENS_AT_ONCE = 2**24


@dataclass(frozen=True)
class Compared:
    """A comparison of runs.  checkpoints: the directories that were read."""

    checkpoints: tuple[Path, ...]
    comparison: Comparison
    notices: tuple[Notice, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Return the values that `lowvram compare --json` prints."""
        found: dict[str, Any] = plain(dataclasses.asdict(self.comparison))
        for difference, each in zip(found["differences"], self.comparison.differences, strict=True):
            difference["is_certain"] = each.is_certain
        return {"checkpoints": [str(path) for path in self.checkpoints], **found}


def compare(
    runs: Sequence[str | Path],
    *,
    text: str | Path | Sequence[str | Path] | None = None,
    items: int | None = None,
    field: str = "text",
    precision: Precision | None = None,
    device: str = "auto",
    progress: bool = False,
) -> Compared:
    """Compare runs by what they pay for the same documents; those that differ in `train.seed` alone are one recipe.

    Checkpoints of different steps are different recipes, of one run too.  Of one recipe alone the result has its
    seeds, and no differences.

    text: text files, folders, or mixes for what they hold out; None: what the first run holds out.  items: at most so
    many documents, evenly spread.  field: of text in JSON lines and Parquet.  precision: of the weights, None: what
    each run validates in.
    Raises ConfigError for fewer than two runs or two of one recipe, seed and step, CheckpointError, DataError where
    there is no text.
    """
    from lowvram.api.arguments import read_paths, refuse_count, refuse_missing
    from lowvram.api.progress import carry_out

    paths = read_paths("runs", list(runs) if isinstance(runs, tuple | list) else runs)
    refuse_count("items", items)
    refuse_missing("field", field, str)
    refuse_missing("device", device, str)
    texts = read_paths("text", text) if text is not None else ()
    found, notices = carry_out(compare_task(paths, texts, items, field, precision, device), progress)
    return dataclasses.replace(found, notices=notices)


def compare_task(
    runs: Sequence[Path],
    texts: Sequence[Path] = (),
    items: int | None = None,
    field: str = "text",
    precision: Precision | None = None,
    device: str = "auto",
) -> Task[Compared]:
    """Do what `compare` does, and yield its notices and its progress."""
    import numpy as np

    from lowvram.api.loading import load_model
    from lowvram.data.tokenizer import count_bytes
    from lowvram.errors import ConfigError
    from lowvram.evaluate.comparison import Paid, warn_of_few_seeds
    from lowvram.evaluate.comparison import compare as compare_paid
    from lowvram.train.oom import free_memory

    if len(set(runs)) < 2:
        raise ConfigError("There are fewer than two runs.", "A comparison needs two.", "Name several runs.")
    if field != "text" and not texts:
        what = "`field` is given, and no text that has fields."
        raise ConfigError(what, "It is an option of `text`.", "Name files with `text`, or leave it out.")
    named = yield from _identify(tuple(dict.fromkeys(runs)))
    documents: list[str] = []
    recipes: dict[str, list[tuple[Path, np.ndarray]]] = {}
    for each in named:
        loaded = yield from load_model(each.directory, device, precision, as_trained=True)
        if not documents:
            documents = yield from _read_documents(loaded, texts, field, items)
        nats_N = yield from _pay(loaded, documents, each.path)
        recipes.setdefault(each.recipe, []).append((each.path, nats_N))
        where = loaded.model.embedding.device
        # Two models may not fit into the memory together.
        del loaded
        free_memory(where)
    paid = [Paid(tuple(path for path, _ in each), np.stack([nats for _, nats in each])) for each in recipes.values()]
    result = compare_paid(paid, np.array([count_bytes(text) for text in documents]))
    if warning := warn_of_few_seeds(result):
        yield Notice(warning, "warning")
    return Compared(tuple(each.directory for each in named), result)


class _Named(NamedTuple):
    """A path that was given, what is read of it, and what it counts as.

    directory: the checkpoint, or a model of another program.  recipe: the same text for runs of as many steps that
    differ in `train.seed` and in where they are kept alone.  seed, step: None of a model of another program.
    """

    path: Path
    directory: Path
    recipe: str
    seed: int | None = None
    step: int | None = None


def _identify(paths: Sequence[Path]) -> Task[tuple[_Named, ...]]:
    """Say what each path counts as, before any model is read; raises ConfigError where two count as one."""
    from lowvram.api.loading import open_checkpoint
    from lowvram.api.tasks import finish
    from lowvram.convert.hf.reader import is_hf_directory

    found: dict[tuple[str, int | None], _Named] = {}
    for path in paths:
        if is_hf_directory(path):
            named = _Named(path, path, str(path.resolve()))
        else:
            (checkpoint, run), notices = finish(open_checkpoint(path))
            # The others come again when the checkpoint is loaded.
            yield from (notice for notice in notices if notice.level == "warning")
            recipe = repr((run.model, run.data, run.train.model_copy(update={"seed": 0}), checkpoint.step))
            named = _Named(path, checkpoint.directory, recipe, run.train.seed, checkpoint.step)
        if other := found.get((named.recipe, named.seed)):
            raise _explain_one_seed(named, other)
        found[named.recipe, named.seed] = named
    return tuple(found.values())


def _explain_one_seed(one: _Named, other: _Named) -> LowvramError:
    """Return the error of two paths that would count as two seeds of a recipe and are of one."""
    from lowvram.errors import ConfigError

    if one.directory.resolve() == other.directory.resolve():
        what = f"{one.path} and {other.path} are the same model, {one.directory}."
        return ConfigError(what, "It counts once.", f"Leave out {one.path}.")
    return ConfigError(
        f"{one.path} and {other.path} are of one recipe, of one seed (train.seed = {one.seed}), and at the same "
        f"step, {one.step}.",
        "They count as one run: nothing but rounding tells them apart.",
        f"Leave out {one.path} or {other.path}.",
    )


def _read_documents(loaded: LoadedModel, texts: Sequence[Path], field: str, items: int | None) -> Task[list[str]]:
    """Return at most `items` documents of the files in NFC, or of those that the run holds out, as their ids say.

    Of a mix among the files that is what it holds out.
    """
    from lowvram.config.mix import is_mix, read_mix
    from lowvram.errors import DataError
    from lowvram.evaluate.records import spread

    if not texts:
        held_out = loaded.run.data.held_out if loaded.run is not None else ()
        if not held_out:
            raise DataError("The first run names no data.valid.", "A comparison needs text.", "Name files with `text`.")
        return (yield from _read_held_out(loaded, held_out, items))
    mixes = [path for path in texts if is_mix(path)]
    named = [source for mix in mixes for source in read_mix(mix).valid(mix)]
    if mixes and not named:
        raise DataError(f"The mix {mixes[0]} holds nothing out.", "", "Name files with `text`.")
    files = [path for path in texts if path not in mixes]
    if not files:
        return (yield from _read_held_out(loaded, named, items))
    found = yield from _read_files(files, field)
    return spread(found + ((yield from _read_held_out(loaded, named, None)) if named else []), items)


def _read_files(paths: Sequence[Path], field: str) -> Task[list[str]]:
    from lowvram.data.bad_rows import BadRows
    from lowvram.data.nfc import nfc
    from lowvram.data.text import documents
    from lowvram.data.text_files import find_text_files

    found, files, read = list[str](), find_text_files(paths), BadRows()
    yield from map(Notice, files.describe())
    for file in files.files:
        yield Progress(f"Reading {file.name}")
        found += [nfc(document) for document in documents(file, field, bad_rows=read)]
    yield from map(Notice, read.describe_encodings())
    return found


def _read_held_out(loaded: LoadedModel, held_out: Sequence[tuple[str, Path]], items: int | None) -> Task[list[str]]:
    import numpy as np

    from lowvram.data.source_set import open_sources
    from lowvram.evaluate.records import spread

    tokenizer = loaded.tokenizer
    shards = open_sources(held_out, tokenizer.hash, tokenizer.size)
    starts = []
    for first in range(0, shards.tokens, _TOKENS_AT_ONCE):
        yield Progress(f"Finding documents in {held_out[0][1].name}", first, shards.tokens)
        id_T = shards.read(first, min(_TOKENS_AT_ONCE, shards.tokens - first))
        starts.append(first + np.flatnonzero(id_T == tokenizer.bos_id))
    borders = np.append(np.concatenate(starts), shards.tokens)
    found = []
    for number in spread(range(len(borders) - 1), items):
        start, end = int(borders[number]), int(borders[number + 1])
        found.append(tokenizer.decode(shards.read(start, end - start)[1:].tolist()))
    return found


def _pay(loaded: LoadedModel, documents: Sequence[str], path: Path) -> Task[Any]:
    """Return what a run pays for each document, read alone in windows of the length that it was trained on, in nats."""
    import numpy as np

    from lowvram.api.measures import open_scorer
    from lowvram.evaluate.likelihood import Request

    scorer = open_scorer(loaded)
    bos = (scorer.tokenizer.bos_id,)
    requests = [Request(bos, tuple(scorer.tokenizer.encode(document))) for document in documents]
    found = yield from count_progress(scorer.score(requests), f"Reading with {path}")
    return np.array([likelihood.nats for likelihood in found])
