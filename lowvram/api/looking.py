"""A corpus seen by a trained model: which documents it finds strangest and most boring; prints nothing."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowvram.api.tasks import Notice, Progress, Task, count_progress

if TYPE_CHECKING:
    from lowvram.api.loading import LoadedModel
    from lowvram.data.shard_set import ShardSet
    from lowvram.evaluate.document_score import Choice
    from lowvram.generate.precision import Precision

DEFAULT_LOOK_OUT = Path("look.jsonl")
DEFAULT_TOKENS, DEFAULT_LEAST, DEFAULT_MOST = 1_000_000, 200, 10
# Above so many files, what they cost is added up by folder.
_MOST_SOURCES = 20
_UNKNOWN = "(not noted)"


@dataclass(frozen=True)
class LookOptions:
    """Which documents are scored, and where the scores go.

    tokens: about so many are scored, None for all.  least_bytes: shorter documents are left out.  most: so many of the
    strangest and of the most boring documents are returned.  out: gets a row for every document that was scored.
    replace: whether `out` may be the list of another look, which is replaced.
    """

    tokens: int | None = DEFAULT_TOKENS
    least_bytes: int = DEFAULT_LEAST
    most: int = DEFAULT_MOST
    out: Path = DEFAULT_LOOK_OUT
    replace: bool = False


@dataclass(frozen=True)
class SeenDocument:
    """A document and what it costs the model.

    hash: SHA-256 of its text in NFC and UTF-8.  text_bytes: its size.  file, line: where it begins; of Parquet and data
    sets the row, from 0 on; None where the packing did not note it.  shard, document: the shard's name, and which
    document of it, from 0 on.  excerpt: its beginning, on one line.  place: file and line in words.
    """

    hash: str
    bits_per_byte: float
    text_bytes: int
    file: str | None
    line: int | None
    shard: str
    document: int
    excerpt: str

    @property
    def place(self) -> str:
        """Where it is, in words: `a.txt:7`, or shard and number where its file is not known."""
        from lowvram.data.places import Place

        if self.file is None or self.line is None:
            return f"{self.shard}, document {self.document}"
        return str(Place(self.file, self.line))


@dataclass(frozen=True)
class SourceScore:
    """What the scored documents of a file, or of a folder where there are many files, cost in all."""

    source: str
    documents: int
    text_bytes: int
    bits_per_byte: float


@dataclass(frozen=True)
class Looked:
    """What a model finds in shards.

    checkpoint: the directory that was read; step: None where another program wrote it.  documents: all of the shards;
    scored: those that were read, with `tokens` and `text_bytes`; short: those that are shorter than `least_bytes`.
    strangest, boring: the extremes, each text once.  sources: every file or folder.  out: the list of all of them.
    """

    shards: Path
    checkpoint: Path
    step: int | None
    documents: int
    scored: int
    short: int
    least_bytes: int
    tokens: int
    text_bytes: int
    bits_per_byte: float
    sources: tuple[SourceScore, ...]
    strangest: tuple[SeenDocument, ...]
    boring: tuple[SeenDocument, ...]
    out: Path
    notices: tuple[Notice, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Return the values that `lowvram data look --json` prints."""
        from lowvram.api.measures import plain

        found = {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "notices"}
        for name in ("sources", "strangest", "boring"):
            found[name] = [dataclasses.asdict(each) for each in found[name]]
        return dict(plain(found))


def look(
    shards: str | Path,
    checkpoint: str | Path,
    *,
    tokens: int = DEFAULT_TOKENS,
    all_documents: bool = False,
    least_bytes: int = DEFAULT_LEAST,
    most: int = DEFAULT_MOST,
    out: str | Path = DEFAULT_LOOK_OUT,
    replace: bool = False,
    precision: Precision | None = None,
    device: str = "auto",
    progress: bool = False,
) -> Looked:
    """Let a trained model name the documents of shards that it finds strangest and most boring, in bits per byte.

    shards: a folder of shards; of one that was split, its training data.  checkpoint: a run, or a checkpoint.  tokens:
    about so many are read, in documents that are always the same; all_documents: read all.  least_bytes: shorter
    documents are left out.  most: how many of each end are returned.  out: a file of JSON lines with every document
    that was scored, for `exclude`; if it is interrupted, the same call goes on.  replace: replace a list of another
    model, of other shards or by other options there.  precision, device: as for `evaluate`.
    Raises DataError where there are no such shards, they are of another tokenizer than the model's, no document is
    long enough, or `out` is another list; BusyError, CheckpointError, MachineError, NumbersError.
    """
    from lowvram.api.arguments import PATH, refuse_count, refuse_missing
    from lowvram.api.progress import carry_out

    for name, path in (("shards", shards), ("checkpoint", checkpoint), ("out", out)):
        refuse_missing(name, path, *PATH)
    refuse_missing("device", device, str)
    for name, count in (("tokens", tokens), ("least_bytes", least_bytes), ("most", most)):
        refuse_count(name, count)
    for name, switch in (("all_documents", all_documents), ("replace", replace)):
        refuse_missing(name, switch, bool)
    options = LookOptions(None if all_documents else tokens, least_bytes, most, Path(out), replace)
    found, notices = carry_out(look_task(Path(shards), Path(checkpoint), options, precision, device), progress)
    return dataclasses.replace(found, notices=notices)


def look_task(
    path: Path,
    checkpoint: Path,
    options: LookOptions = LookOptions(),
    precision: Precision | None = None,
    device: str = "auto",
) -> Task[Looked]:
    """Do what `look` does, and yield its notices and its progress."""
    from lowvram.api.loading import load_model
    from lowvram.data.shard_documents import check_tokenizer
    from lowvram.data.shards import ShardSet
    from lowvram.evaluate.document_score import choose_documents
    from lowvram.evaluate.look_file import refuse_other_file

    refuse_other_file(options.out)
    folder = yield from choose_training_side(path)
    shards = ShardSet.open(folder)
    loaded = yield from load_model(checkpoint, device, precision, as_trained=True)
    check_tokenizer(loaded.path, shards, loaded.tokenizer)
    shards.vocabulary = loaded.tokenizer.size
    choosing = choose_documents(shards, loaded.tokenizer, options.tokens, options.least_bytes)
    choice = yield from count_progress(choosing, "Choosing documents")
    _refuse_none(shards, options, choice)
    yield from _announce(shards, options, choice)
    return (yield from _score(loaded, shards, options, choice))


def choose_training_side(path: Path) -> Task[Path]:
    """Return the folder of shards that is meant; of a split folder the training data, with a notice."""
    from lowvram.data.shard_folder import holds_shards, holds_split

    train, valid = path / "train", path / "valid"
    if not holds_split(path):
        return path
    if holds_shards(valid):
        what = f"Held-out text in {valid} stays as it is, so that runs can be compared on it."
        yield Notice(f"{what} Name that folder itself to look into it.", "detail")
    return train


def _refuse_none(shards: ShardSet, options: LookOptions, choice: Choice) -> None:
    from lowvram.errors import DataError, argument
    from lowvram.units import count_of, show_count

    if choice.documents:
        return
    if choice.short == shards.documents:
        what = f"None of {count_of(shards.documents, 'document')} has {options.least_bytes:,} bytes."
        raise DataError(what, "Shorter ones are left out.", f"Give a smaller {argument('least_bytes')}.")
    what = f"A sample of {show_count(options.tokens or 0)} tokens of {shards.directory} holds no document."
    raise DataError(what, "Its documents are longer than that.", f"Give more {argument('tokens')}.")


def _announce(shards: ShardSet, options: LookOptions, choice: Choice) -> Task[None]:
    from lowvram.units import count_of, show_count

    what = f"{choice.documents:,} of {count_of(shards.documents, 'document')} of {shards.directory}"
    of = f"{show_count(choice.tokens)} of {show_count(shards.tokens)} tokens"
    short = f"; {choice.short:,} are shorter than {options.least_bytes} bytes" if choice.short else ""
    is_sample = choice.documents + choice.short < shards.documents
    rest = " They are drawn by lot, and the same each time; `all_documents` reads all." if is_sample else ""
    yield Notice(f"Reading {what}, {of}{short}.{rest}")


def _score(loaded: LoadedModel, shards: ShardSet, options: LookOptions, choice: Choice) -> Task[Looked]:
    from lowvram.data.exclusion_list import FILE
    from lowvram.evaluate.document_score import score_documents
    from lowvram.evaluate.look_file import LookFile, describe_row
    from lowvram.evaluate.scorer import Scorer

    scorer = Scorer(loaded.model, loaded.dtype, loaded.tokenizer, loaded.trained_len)
    totals = _Totals()
    with LookFile(options.out, _key_of(loaded, shards, options), replace=options.replace) as file:
        for row in file.read_kept():
            totals.add(row)
        if len(file):
            yield Notice(f"{len(file):,} documents were scored before, by a look that was interrupted.")
        what = f"Reading {choice.documents:,} documents"
        yield Progress(what, 0, choice.tokens)
        for done, scores in score_documents(scorer, shards, choice, len(file)):
            rows = [describe_row(score) for score in scores]
            if rows:
                file.add(rows)
            for row in rows:
                totals.add(row)
            yield Progress(what, done, choice.tokens, f"{len(file):,} done")
        strangest, boring = file.extremes(options.most)
        if any(row[FILE] is None for row in (*strangest, *boring)):
            yield Notice(_explain_unknown(shards.directory), "warning")
        found = _describe(loaded, shards, options, choice, totals)
        file.finish()
    return dataclasses.replace(found, strangest=tuple(map(_see, strangest)), boring=tuple(map(_see, boring)))


def _explain_unknown(folder: Path) -> str:
    return (
        f"Some shards in {folder} do not say which file and line their documents are from: they were packed by an "
        "older lowvram. Packing the same text into that folder again notes it, and keeps the shards."
    )


def _key_of(loaded: LoadedModel, shards: ShardSet, options: LookOptions) -> str:
    """Return a hash of all on which the scores depend."""
    if loaded.checkpoint is not None:
        weights: object = loaded.checkpoint.manifest["files"]
    else:
        files = sorted(loaded.path.glob("*.safetensors"))
        weights = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    read = [loaded.precision, str(loaded.dtype), loaded.trained_len, str(loaded.model.embedding.device.type)]
    stated = [weights, read, shards.hash, str(shards.directory.resolve()), options.tokens, options.least_bytes]
    return hashlib.sha256(json.dumps(stated, sort_keys=True).encode("utf-8")).hexdigest()


class _Totals:
    """Adds up documents, bytes and bits of each file."""

    def __init__(self) -> None:
        self._by_file: defaultdict[str, list[float]] = defaultdict(lambda: [0, 0, 0.0])
        self.tokens, self.text_bytes, self.bits = 0, 0, 0.0

    def add(self, row: dict[str, Any]) -> None:
        """Add a document."""
        from lowvram.data.exclusion_list import BITS_PER_BYTE, BYTES, FILE, TOKENS

        bits = row[BITS_PER_BYTE] * row[BYTES]
        self.tokens += row[TOKENS]
        self.text_bytes += row[BYTES]
        self.bits += bits
        total = self._by_file[row[FILE] or _UNKNOWN]
        for place, value in enumerate((1, row[BYTES], bits)):
            total[place] += value

    def sources(self) -> tuple[SourceScore, ...]:
        """Return the totals of each file, or of each folder where there are many files, the strangest first."""
        totals = dict(self._by_file)
        if len(totals) > _MOST_SOURCES:
            folders: defaultdict[str, list[float]] = defaultdict(lambda: [0, 0, 0.0])
            for name, total in totals.items():
                folder = folders[name if name == _UNKNOWN else str(Path(name).parent)]
                for place, value in enumerate(total):
                    folder[place] += value
            totals = dict(folders)
        found = [SourceScore(name, int(count), int(size), bits / size) for name, (count, size, bits) in totals.items()]
        return tuple(sorted(found, key=lambda source: -source.bits_per_byte))


def _describe(loaded: LoadedModel, shards: ShardSet, options: LookOptions, choice: Choice, totals: _Totals) -> Looked:
    return Looked(
        shards=shards.directory,
        checkpoint=loaded.path,
        step=loaded.checkpoint.step if loaded.checkpoint is not None else None,
        documents=shards.documents,
        scored=choice.documents,
        short=choice.short,
        least_bytes=options.least_bytes,
        tokens=totals.tokens,
        text_bytes=totals.text_bytes,
        bits_per_byte=totals.bits / totals.text_bytes,
        sources=totals.sources(),
        strangest=(),
        boring=(),
        out=options.out,
    )


def _see(row: dict[str, Any]) -> SeenDocument:
    from lowvram.data import exclusion_list as keys

    return SeenDocument(
        hash=row[keys.HASH],
        bits_per_byte=row[keys.BITS_PER_BYTE],
        text_bytes=row[keys.BYTES],
        file=row[keys.FILE],
        line=row[keys.LINE],
        shard=row[keys.SHARD],
        document=row[keys.DOCUMENT],
        excerpt=row[keys.EXCERPT],
    )


def find_source(document: SeenDocument, sources: Sequence[SourceScore]) -> str:
    """Return which of the sources a document is from."""
    if document.file is None:
        return _UNKNOWN
    names = {source.source for source in sources}
    return document.file if document.file in names else str(Path(document.file).parent)
