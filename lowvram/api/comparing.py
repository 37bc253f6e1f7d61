"""Several runs compared on the same documents, read one run after the other."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowvram.api.measures import plain
from lowvram.api.tasks import Notice, Progress, Task, count_progress

if TYPE_CHECKING:
    from lowvram.api.loading import LoadedModel
    from lowvram.evaluate.comparison import Comparison
    from lowvram.generate.precision import Precision


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

    text: text files or folders, None: what the first run holds out.  items: at most so many documents, evenly spread.
    field: of text in JSON lines and Parquet.  precision: of the weights, None: what each run validates in.
    Raises ConfigError for fewer than two runs, CheckpointError, DataError where there is no text.
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
    from lowvram.evaluate.records import spread

    if len(set(runs)) < 2:
        raise ConfigError("There are fewer than two runs.", "A comparison needs two.", "Name several runs.")
    documents: list[str] = []
    recipes: dict[str, list[tuple[Path, np.ndarray]]] = {}
    checkpoints = []
    for path in dict.fromkeys(runs):
        loaded = yield from load_model(path, device, precision, as_trained=True)
        if not documents:
            found = yield from _read_documents(loaded, texts, field)
            documents = spread(found, items)
        nats_N = yield from _pay(loaded, documents, path)
        recipes.setdefault(_name_recipe(loaded), []).append((path, nats_N))
        checkpoints.append(loaded.path)
    paid = [Paid(tuple(path for path, _ in each), np.stack([nats for _, nats in each])) for each in recipes.values()]
    if len(paid) < 2:
        what = "All runs are of one recipe: they differ in train.seed alone."
        raise ConfigError(what, "There is nothing to compare.", "Name runs of several recipes.")
    result = compare_paid(paid, np.array([count_bytes(text) for text in documents]))
    if warning := warn_of_few_seeds(result):
        yield Notice(warning, "warning")
    return Compared(tuple(checkpoints), result)


def _name_recipe(loaded: LoadedModel) -> str:
    """Return the same text for runs that differ in `train.seed` and in where they are kept alone."""
    if loaded.run is None:
        return str(loaded.path)
    return repr((loaded.run.model, loaded.run.data, loaded.run.train.model_copy(update={"seed": 0})))


def _read_documents(loaded: LoadedModel, texts: Sequence[Path], field: str) -> Task[list[str]]:
    """Return the documents of the files in NFC, or those that the run holds out, decoded from their ids."""
    from lowvram.data.nfc import nfc
    from lowvram.data.shards import ShardSet
    from lowvram.data.text import documents
    from lowvram.data.text_files import find_text_files
    from lowvram.errors import DataError

    if texts:
        found = []
        for file in find_text_files(list(texts)).files:
            yield Progress(f"Reading {file.name}")
            found += [nfc(document) for document in documents(file, field)]
        return found
    shards_path = loaded.run.data.valid if loaded.run is not None else None
    if shards_path is None:
        raise DataError("The first run names no data.valid.", "A comparison needs text.", "Name files with `text`.")
    tokenizer = loaded.tokenizer
    shards = ShardSet.open(shards_path, tokenizer.hash, tokenizer.size)
    ids = shards.read(0, shards.tokens).tolist()
    starts = [place for place, id in enumerate(ids) if id == tokenizer.bos_id]
    ends = [*starts[1:], len(ids)]
    return [tokenizer.decode(ids[start + 1 : end]) for start, end in zip(starts, ends, strict=True)]


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
