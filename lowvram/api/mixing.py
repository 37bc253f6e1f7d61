"""Sources of text as a mix: each is packed into shards of its own, and one file says the share of each."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lowvram.api.arguments import PATH, read_count, read_share, refuse_count, refuse_missing
from lowvram.api.mix_options import DEFAULT_MIX, MixOptions, read_caps, read_weights, refuse_levels, refuse_temperature
from lowvram.api.packing import DEFAULT_TOKENIZER, find_data, show_packing
from lowvram.api.progress import carry_out
from lowvram.api.tasks import Notice, Progress, Task, count_progress
from lowvram.api.texts import OnBadRow, SkippedRows, TextOptions, Texts, choose_left_out, read_text_options

if TYPE_CHECKING:
    from lowvram.config.mix import Mix, MixedSource
    from lowvram.data.mix.caps import Sizes, Taken
    from lowvram.data.mix.sources import TextSource
    from lowvram.data.shards import ShardSet
    from lowvram.data.tokenizer import Tokenizer

# A source must have one window of the run that reads it; presets read 1,024 tokens or more at once.
_WINDOW = 1024
# On the disk: of a smaller source processes would take as long to start as its text to encode.
_SMALL_BYTES = 4 << 20


@dataclass(frozen=True)
class Mixed:
    """A mix.  path: its folder.  sources: with share, tokens, bytes of text and what caps left out.

    read_tokens: how many tokens a run is to read, and epochs: how often it then reads each source.  most_tokens: up to
    that number no source is read more than four times.  data: what `fit(data=...)` takes; None where no tokenizer lies
    in the folder or beside it.
    """

    path: Path
    sources: tuple[MixedSource, ...]
    read_tokens: int
    epochs: tuple[float, ...]
    most_tokens: int
    data: Path | None
    notices: tuple[Notice, ...] = ()


def mix(
    texts: Texts,
    out: str | Path = DEFAULT_MIX,
    *,
    tokenizer: str | Path = DEFAULT_TOKENIZER,
    weights: Mapping[str, float | str] | None = None,
    temperature: float = 1.0,
    caps: Mapping[str, int | str] | None = None,
    tokens: int | str | None = None,
    demo: float | str | None = None,
    holdout: float | str | None = None,
    levels: int = 1,
    field: str = "text",
    on_bad_row: OnBadRow = "stop",
    leave_out: Texts | None = None,
    replace: bool = False,
    processes: int = 1,
    progress: bool = False,
) -> Mixed:
    """Pack the sources in a folder, such as domains or languages, and note in `out/mix.json` the share of each.

    texts: a folder whose files and folders are the sources, or several; a file that is named is a source too.  levels:
    2: the sources are in the folders of that folder, and are called as `tr/law`.  temperature: shares are proportional
    to tokens ** temperature.  weights: by a source's name, or that of a folder of sources: 2, it is read twice as
    often; "20%", it is a fifth of what is read.  caps: most bytes of text, as `{"law": "200MB"}`; which documents are
    taken is decided by their hash.  tokens: what a run is to read, for which epochs are counted.  demo: the share of
    generated Turkish.  holdout, field, on_bad_row, leave_out, replace, processes, progress: as for `pack`.

    Raises what `pack` raises, and DataError for sources of one name, without text or in `out`, and for names, shares
    and caps that cannot be.
    """
    options = read_text_options(texts, field, on_bad_row, holdout, leave_out)
    refuse_missing("out", out, *PATH)
    refuse_missing("tokenizer", tokenizer, *PATH)
    refuse_missing("replace", replace, bool)
    refuse_missing("processes", processes, int)
    refuse_count("processes", processes)
    wanted = MixOptions(
        Path(tokenizer),
        Path(out),
        read_weights(weights or {}),
        temperature,
        read_caps(caps or {}),
        read_share("demo", demo),
        None if tokens is None else read_count("tokens", tokens),
        levels,
        replace,
    )
    found, notices = carry_out(mix_task(options, wanted, processes), progress)
    return dataclasses.replace(found, notices=notices)


def mix_task(options: TextOptions, wanted: MixOptions, processes: int | None = None) -> Task[Mixed]:
    """Do what `mix` does, and yield its notices and its progress.  processes: None for one per core."""
    from lowvram.config.mix import MIX, Mix
    from lowvram.data.hf_tokenizer import load_tokenizer
    from lowvram.data.mix.sources import find_sources
    from lowvram.storage.disk import DISK

    refuse_temperature(wanted.temperature)
    refuse_levels(wanted.levels)
    tokenizer = load_tokenizer(wanted.tokenizer)
    found = find_sources(
        options.paths, wanted.levels, wanted.out, lambda files: choose_left_out(files, options.leave_out)
    )
    for sentence in found.passed_over:
        yield Notice(sentence)
    names = [source.name for source in found.sources]
    _refuse_names(names, wanted)
    taken = yield from _measure(found.sources, options, wanted)
    packer = _Packer(options, wanted, tokenizer, processes, len(names) + (wanted.demo is not None))
    packed = {}
    for source in found.sources:
        packed[source.name] = yield from packer.pack(source, taken.get(source.name))
    if wanted.demo is not None:
        packed |= yield from _pack_demo(packer, wanted, [sides[0] for sides in packed.values()])
    yield from packer.tell_without()
    shares = yield from _find_shares({name: sides[0].tokens for name, sides in packed.items()}, wanted)
    sources = [
        _describe(name, sides, shares[name], taken.get(name), wanted.caps.get(name)) for name, sides in packed.items()
    ]
    mixed = Mix(temperature=wanted.temperature, sources=tuple(sorted(sources, key=lambda source: source.name)))
    DISK.write(wanted.out / MIX, (mixed.model_dump_json(indent=1) + "\n").encode("utf-8"))
    result = _count_epochs(mixed, wanted)
    yield from _warn(result, options.holdout is not None)
    return result


def _refuse_names(names: Sequence[str], wanted: MixOptions) -> None:
    """Raise DataError where a name is not known, or one source alone is no mix, before anything is packed."""
    from lowvram.data.mix.shares import Wish, find_shares
    from lowvram.data.mix.sources import DEMO, match
    from lowvram.errors import DataError, argument

    if len(names) == 1 and wanted.demo is None:
        what = f"{names[0]} is the only source."
        fix = "Name the folder above it, or pack it alone: lowvram data pack."
        raise DataError(what, "A mix has two or more: files and folders in the folder that is named.", fix)
    for name in wanted.caps:
        match(name, names, argument("caps", name))
    if wanted.demo is not None and DEMO in wanted.weights:
        raise DataError("`demo` is generated text.", "Its share is what `demo` says.", "Leave its weight out.")
    wishes = {**wanted.weights, **({} if wanted.demo is None else {DEMO: Wish(share=wanted.demo)})}
    find_shares(dict.fromkeys([*names, *([] if wanted.demo is None else [DEMO])], 1), 0.0, wishes)


def _measure(sources: Sequence[TextSource], options: TextOptions, wanted: MixOptions) -> Task[dict[str, Taken]]:
    """Read the sources that a cap is about, and return which of their documents are taken."""
    from lowvram.data.mix.caps import Sizes, apply_caps
    from lowvram.data.mix.sources import match

    names = [source.name for source in sources]
    capped = {name for cap in wanted.caps for name in match(cap, names, "")}
    sizes: dict[str, Sizes] = {}
    for source in sources:
        if source.name in capped:
            sizes[source.name] = Sizes()
            yield from _read(source, options, sizes[source.name])
    return apply_caps(sizes, wanted.caps)


def _read(source: TextSource, options: TextOptions, sizes: Sizes) -> Iterator[Progress]:
    from lowvram.data.bad_rows import BadRows
    from lowvram.data.text import documents_of

    what = f"Measuring {source.name}"
    at = Progress(what)

    def keep(done: int, total: int | None) -> None:
        nonlocal at
        at = Progress(what, done, total)

    yield at
    # Bad rows are told when the source is packed.
    for text in documents_of(source.files, options.field, keep, BadRows(options.on_bad_row)):
        sizes.add(text)
        yield at


class _Packer:
    """Packs one source after the other."""

    def __init__(
        self, options: TextOptions, wanted: MixOptions, tokenizer: Tokenizer, processes: int | None, count: int
    ) -> None:
        self._options, self._wanted, self._tokenizer = options, wanted, tokenizer
        self._processes, self._count, self._number = processes, count, 0
        self._without: list[str] = []

    def pack(
        self, source: TextSource, takes: Taken | None = None, replace: bool | None = None
    ) -> Task[tuple[ShardSet, ...]]:
        """Pack a source into its folder; one with too few documents to hold one out has training shards alone."""
        from lowvram.data.holdout import NothingHeldOutError

        self._number += 1
        replace = self._wanted.replace if replace is None else replace
        if self._options.holdout is not None:
            try:
                return (yield from self._pack_sides(source, takes, replace, True))
            except NothingHeldOutError:
                self._without.append(source.name)
        return (yield from self._pack_sides(source, takes, replace, False))

    def _pack_sides(
        self, source: TextSource, takes: Taken | None, replace: bool, is_split: bool
    ) -> Task[tuple[ShardSet, ...]]:
        from lowvram.data.shards import SIDES, pack_each_shard
        from lowvram.data.text_files import size_of

        home = self._wanted.out / source.name
        if not is_split:
            _refuse_held_out(home / SIDES[1], replace)
        skipped = SkippedRows(self._options.on_bad_row)
        packing = pack_each_shard(
            source.files,
            self._tokenizer,
            home if is_split else home / SIDES[0],
            self._options.field,
            1 if sum(map(size_of, source.files)) < _SMALL_BYTES else self._processes,
            holdout=self._options.build_holdout() if is_split else None,
            replace=replace,
            bad_rows=skipped.bad_rows,
            takes=takes,
        )
        what = f"Packing {source.name} ({self._number} of {self._count})"
        sides = yield from skipped.tell_beside(show_packing(packing, what))
        _drop_stale(self._wanted.out, source.name, sides[0])
        yield from skipped.summarise()
        return tuple(sides)

    def tell_without(self) -> Iterator[Notice]:
        """Yield a notice of the sources of which nothing could be held out."""
        if self._without:
            few = "too few documents for that share, and all of them are learnt"
            yield Notice(f"Nothing is held out of {', '.join(self._without)}: {few}.")


def _drop_stale(out: Path, name: str, train: ShardSet) -> None:
    """Delete the file of an earlier mix whose source had another text: its shares would be taken for those of this."""
    from lowvram.config.mix import MIX, is_mix, read_mix
    from lowvram.errors import ConfigError
    from lowvram.storage.disk import DISK

    if not is_mix(out):
        return
    try:
        before = {each.name: (each.tokens, each.documents, each.text_bytes) for each in read_mix(out).sources}
    except ConfigError:  # damaged; it is written anew in the end
        before = {}
    if before.get(name) != (train.tokens, train.documents, train.text_bytes):
        DISK.delete(out / MIX)


def _refuse_held_out(valid: Path, replace: bool) -> None:
    """Raise DataError where a source holds out text of an earlier mix, which would now be learnt; or delete that."""
    from lowvram.data.shard_folder import holds_shards
    from lowvram.errors import DataError
    from lowvram.storage.disk import DISK

    if not holds_shards(valid):
        return
    if not replace:
        why = "Without `holdout` its documents would be learnt, and measured as if they were not."
        fix = "Give the same `holdout` again, or add `replace=True` to delete them."
        raise DataError(f"{valid} holds text that was held out.", why, fix)
    DISK.delete(valid)


def _pack_demo(
    packer: _Packer, wanted: MixOptions, others: Sequence[ShardSet]
) -> Task[dict[str, tuple[ShardSet, ...]]]:
    """Generate as much text as its share of what is read, and pack it; an older, shorter or longer one is replaced."""
    from lowvram.data.mix.demo_text import write_demo_text
    from lowvram.data.mix.sources import DEMO, TextSource

    assert wanted.demo is not None, "the caller has checked it"
    text_bytes, tokens = sum(each.text_bytes for each in others), sum(each.tokens for each in others)
    if wanted.tokens is not None:
        size = wanted.demo * wanted.tokens * text_bytes / tokens
    else:
        size = text_bytes * wanted.demo / (1.0 - wanted.demo)
    writing = write_demo_text(wanted.out / DEMO / "text", round(size))
    file = yield from count_progress(writing, "Generating text")
    return {DEMO: (yield from packer.pack(TextSource(DEMO, [file]), replace=True))}


def _find_shares(tokens: Mapping[str, int], wanted: MixOptions) -> Task[dict[str, float]]:
    from lowvram.data.mix.shares import LEAST_SHARE, Wish, find_shares
    from lowvram.data.mix.sources import DEMO

    wishes = {**wanted.weights, **({} if wanted.demo is None else {DEMO: Wish(share=wanted.demo)})}
    found = find_shares(tokens, wanted.temperature, wishes)
    if found.raised:
        are = "is" if len(found.raised) == 1 else "are each"
        yield Notice(f"{', '.join(found.raised)} {are} raised to {LEAST_SHARE:.3%} of what is read, the least share.")
    return found.by_name


def _describe(
    name: str, sides: Sequence[ShardSet], share: float, taken: Taken | None, cap_bytes: int | None
) -> MixedSource:
    from lowvram.config.mix import MixedSource

    train = sides[0]
    return MixedSource(
        name=name,
        share=share,
        tokens=train.tokens,
        documents=train.documents,
        text_bytes=train.text_bytes,
        held_out_tokens=sides[1].tokens if len(sides) > 1 else 0,
        cap_bytes=cap_bytes,
        left_out_bytes=taken.left_out_bytes if taken is not None else 0,
    )


def _count_epochs(mixed: Mix, wanted: MixOptions) -> Mixed:
    from lowvram.fit.epochs import ENOUGH_PASSES

    read_tokens = wanted.tokens or mixed.tokens
    epochs = tuple(read_tokens * source.share / source.tokens for source in mixed.sources)
    most = int(min(ENOUGH_PASSES * source.tokens / source.share for source in mixed.sources))
    data = find_data(wanted.out, wanted.tokenizer)
    return Mixed(wanted.out, mixed.sources, read_tokens, epochs, most, data)


def _warn(found: Mixed, is_split: bool) -> Iterator[Notice]:
    """Yield what should be known before a run: sources that are read too often or are too short, held-out text."""
    from lowvram.evaluate.verdict import warn_of_few_tokens
    from lowvram.fit.epochs import ENOUGH_PASSES
    from lowvram.units import show_count

    often = [
        f"{source.name} {times:,.1f} times"
        for source, times in zip(found.sources, found.epochs, strict=True)
        if times > ENOUGH_PASSES
    ]
    if often:
        yield Notice(
            f"{show_count(found.read_tokens)} tokens read {', '.join(often)}. Up to about {ENOUGH_PASSES:.0f} readings "
            "teach nearly as much as fresh text, later ones less and less (Muennighoff et al. 2023): give such a "
            f"source less weight or more text, or read at most {show_count(found.most_tokens)} tokens.",
            "warning",
        )
    if short := [source.name for source in found.sources if source.tokens <= _WINDOW]:
        why = f"at most {_WINDOW:,} tokens, which is less than one window of most presets"
        yield Notice(f"{', '.join(short)}: {why}. Put such text into another source.", "warning")
    if is_split and (warning := warn_of_few_tokens(sum(source.held_out_tokens for source in found.sources))):
        yield Notice(f"{warning}  Give `holdout` a larger share, or mix more text.", "warning")
