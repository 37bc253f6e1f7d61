"""Sources of text as a mix: each is packed into shards of its own, and one file says the share of each."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lowvram.api.arguments import read_count, read_share
from lowvram.api.mix_options import DEFAULT_MIX, MixOptions, read_caps, read_weights, refuse_levels, refuse_temperature
from lowvram.api.mix_packing import SourcePacker
from lowvram.api.packing import DEFAULT_TOKENIZER, find_data, read_excluded, refuse_arguments
from lowvram.api.progress import carry_out
from lowvram.api.tasks import Notice, Progress, Task, count_progress
from lowvram.api.texts import (
    OnBadRow,
    TextOptions,
    Texts,
    choose_left_out,
    read_beside,
    read_text_options,
    tell_left_out,
)

if TYPE_CHECKING:
    from lowvram.config.mix import Mix, MixedSource
    from lowvram.data.mix.caps import Sizes, Taken
    from lowvram.data.mix.sources import TextSource
    from lowvram.data.shards import ShardSet

# A source must have one window of the run that reads it; presets read 1,024 tokens or more at once.
_WINDOW = 1024


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
    exclude: str | Path | None = None,
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
    generated Turkish.  holdout, field, on_bad_row, exclude, leave_out, replace, processes, progress: as for `pack`.

    Raises what `pack` raises, and DataError for sources of one name, without text or in `out`, for an `out` that holds
    other shards, and for names, shares and caps that cannot be.
    """
    options = read_text_options(texts, field, on_bad_row, holdout, leave_out)
    refuse_arguments(out, tokenizer, exclude, replace, processes)
    wanted = MixOptions(
        tokenizer=Path(tokenizer),
        out=Path(out),
        weights=read_weights(weights or {}),
        temperature=temperature,
        caps=read_caps(caps or {}),
        demo=read_share("demo", demo),
        tokens=None if tokens is None else read_count("tokens", tokens),
        levels=levels,
        replace=replace,
        exclude=Path(exclude) if exclude is not None else None,
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
    _refuse_plain_shards(wanted.out)
    tokenizer = load_tokenizer(wanted.tokenizer)
    listed = read_excluded(wanted.exclude) if wanted.exclude is not None else None
    found = find_sources(
        options.paths, wanted.levels, wanted.out, lambda files: choose_left_out(files, options.leave_out)
    )
    for sentence in found.passed_over:
        yield Notice(sentence)
    yield from tell_left_out(found.left_out)
    names = [source.name for source in found.sources]
    _refuse_names(names, wanted)
    taken = yield from _measure(found.sources, options, wanted, listed or {})
    packer = SourcePacker(options, wanted, tokenizer, processes, len(names) + (wanted.demo is not None), listed)
    packed = {}
    for source in found.sources:
        packed[source.name] = yield from packer.pack(source, taken.get(source.name))
    if wanted.demo is not None:
        packed |= yield from _pack_demo(packer, wanted, [sides[0] for sides in packed.values()])
    yield from packer.summarise()
    shares = yield from _find_shares({name: sides[0].tokens for name, sides in packed.items()}, wanted)
    sources = [_describe(name, sides, shares[name], taken.get(name)) for name, sides in packed.items()]
    mixed = Mix(temperature=wanted.temperature, sources=tuple(sorted(sources, key=lambda source: source.name)))
    DISK.write(wanted.out / MIX, (mixed.model_dump_json(indent=1) + "\n").encode("utf-8"))
    result = _count_epochs(mixed, wanted)
    yield from _warn(result, options.holdout is not None)
    return result


def _refuse_plain_shards(out: Path) -> None:
    """Raise DataError where a folder holds shards that are no mix's: a run would then read the mix in their place."""
    from lowvram.data.shard_folder import holds_shards
    from lowvram.data.shards import SIDES
    from lowvram.errors import DataError

    for folder in (out, *(out / side for side in SIDES)):
        if holds_shards(folder):
            why = f"A run that is to read {out} would read the mix in their place."
            raise DataError(f"{folder} holds shards already.", why, f"Name another `out`, or delete {folder} first.")


def _refuse_names(names: Sequence[str], wanted: MixOptions) -> None:
    """Raise DataError where a name is not known, or one source alone is no mix, before anything is packed."""
    from lowvram.data.mix.shares import find_shares
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
    find_shares(dict.fromkeys([*names, *([] if wanted.demo is None else [DEMO])], 1), 0.0, wanted.wishes())


def _measure(
    sources: Sequence[TextSource], options: TextOptions, wanted: MixOptions, listed: Collection[str]
) -> Task[dict[str, Taken]]:
    """Read the sources that a cap is about, and return which of their documents are taken.

    listed: hashes of documents that are left out, and count for no cap.
    """
    from lowvram.data.mix.caps import Sizes, apply_caps
    from lowvram.data.mix.sources import match

    names = [source.name for source in sources]
    capped = {name for cap in wanted.caps for name in match(cap, names, "")}
    sizes: dict[str, Sizes] = {}
    for source in sources:
        if source.name in capped:
            sizes[source.name] = Sizes()
            yield from _read(source, options, sizes[source.name], listed)
    return apply_caps(sizes, wanted.caps)


def _read(source: TextSource, options: TextOptions, sizes: Sizes, listed: Collection[str]) -> Iterator[Progress]:
    from lowvram.data.bad_rows import BadRows
    from lowvram.data.exclusion_list import hash_document

    what = f"Measuring {source.name}"
    yield Progress(what)
    # Bad rows are told when the source is packed.
    for text, progress in read_beside(source.files, options.field, BadRows(options.on_bad_row), what):
        if not (listed and hash_document(text) in listed):
            sizes.add(text)
        yield progress


def _pack_demo(
    packer: SourcePacker, wanted: MixOptions, others: Sequence[ShardSet]
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
    from lowvram.data.mix.shares import LEAST_SHARE, find_shares

    found = find_shares(tokens, wanted.temperature, wanted.wishes())
    if found.raised:
        are = "is" if len(found.raised) == 1 else "are each"
        yield Notice(f"{', '.join(found.raised)} {are} raised to {LEAST_SHARE:.3%} of what is read, the least share.")
    return found.by_name


def _describe(name: str, sides: Sequence[ShardSet], share: float, taken: Taken | None) -> MixedSource:
    from lowvram.config.mix import MixedSource

    train = sides[0]
    return MixedSource(
        name=name,
        share=share,
        tokens=train.tokens,
        documents=train.documents,
        text_bytes=train.text_bytes,
        held_out_tokens=sides[1].tokens if len(sides) > 1 else 0,
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
        yield Notice(f"{warning} Give `holdout` a larger share, or mix more text.", "warning")
