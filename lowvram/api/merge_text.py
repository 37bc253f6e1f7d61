"""Which text the merges of a tokenizer are learnt from: how much of it, and of each source; prints nothing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from lowvram.api.mix_options import refuse_levels, refuse_temperature
from lowvram.api.tasks import Notice, Progress, Task
from lowvram.api.texts import TextOptions, choose_left_out, find_texts, read_beside, tell_left_out

if TYPE_CHECKING:
    from lowvram.data.bad_rows import BadRows
    from lowvram.data.mix.portions import Portion
    from lowvram.data.mix.shares import Wish
    from lowvram.data.mix.sources import TextSource

# Bytes of text.  Merges hardly change with more: the pairs that are merged are those that are frequent.
DEFAULT_SAMPLE = 10**9
# Memory that every computer has free is not told.
_LITTLE_MEMORY = 500_000_000


@dataclass(frozen=True)
class SampleOptions:
    """How much text merges are learnt from, and of which sources.

    most_bytes: of text, at most.  weights, temperature, levels: as for `mix`; without a weight and a temperature, and
    with one level, all text is one source.
    """

    most_bytes: int = DEFAULT_SAMPLE
    weights: Mapping[str, Wish] = field(default_factory=dict)
    temperature: float | None = None
    levels: int = 1

    @property
    def has_sources(self) -> bool:
        """Whether text is learnt from source by source."""
        return bool(self.weights) or self.temperature is not None or self.levels > 1


def find_merge_sources(options: TextOptions, wanted: SampleOptions, out: Path) -> Task[list[TextSource]]:
    """Return the sources, one without a name where all text is one; yield what was passed over or left out."""
    from lowvram.data.mix.shares import find_shares
    from lowvram.data.mix.sources import TextSource, find_sources

    refuse_temperature(1.0 if wanted.temperature is None else wanted.temperature)
    refuse_levels(wanted.levels)
    if not wanted.has_sources:
        return [TextSource("", (yield from find_texts(options)))]
    found = find_sources(options.paths, wanted.levels, out, lambda files: choose_left_out(files, options.leave_out))
    yield from map(Notice, found.passed_over)
    yield from tell_left_out(found.left_out)
    find_shares(dict.fromkeys([source.name for source in found.sources], 1), 0.0, wanted.weights)  # before reading
    return found.sources


def plan_portions(
    sources: Sequence[TextSource], options: TextOptions, wanted: SampleOptions, bad_rows: BadRows
) -> Task[dict[str, Portion]]:
    """Read all text once, and return how much of each source is learnt from; yield it in words, with the memory."""
    from lowvram.data.mix.portions import TextSize, choose_portions

    sizes = {source.name: TextSize() for source in sources}
    holdout = options.build_holdout()
    for source in sources:
        doing = f"Measuring {source.name or 'the text'}"
        yield Progress(doing)
        for text, progress in read_beside(source.files, options.field, bad_rows, doing):
            yield progress
            if not (holdout and holdout.takes(text)):
                sizes[source.name].add(text)
    bad_rows.finish()
    if holdout:
        holdout.check()
    temperature = 1.0 if wanted.temperature is None else wanted.temperature
    portions = choose_portions(sizes, wanted.most_bytes, temperature, wanted.weights)
    yield from map(Notice, _explain(portions))
    return portions


def _explain(portions: Mapping[str, Portion]) -> Iterator[str]:
    from lowvram.data.tokenizer import estimate_memory
    from lowvram.units import show_bytes

    memory_bytes = estimate_memory(portion.distinct_bytes for portion in portions.values())
    whole, taken = (
        sum(getattr(portion, key) for portion in portions.values()) for key in ("text_bytes", "distinct_bytes")
    )
    memory = f"with about {show_bytes(memory_bytes)} of memory"
    again = ", some of it several times," if any(portion.copies > 1.0 for portion in portions.values()) else ""
    if taken < whole:
        yield (
            f"About {show_bytes(taken)} of {show_bytes(whole)} of text are learnt from{again or ','} {memory}: pieces "
            "of documents that a hash of their words chooses. `sample` says how much at most."
        )
    elif memory_bytes > _LITTLE_MEMORY or again:
        yield f"All {show_bytes(whole)} of text are learnt from{again or ','} {memory}."
    if list(portions) != [""]:
        listed = (
            f"{name} {portion.share:.1%} ({show_bytes(portion.learnt_bytes)}, {_show_copies(portion.copies)} its text)"
            for name, portion in portions.items()
        )
        yield f"Shares of the letters and other characters that are learnt from: {'; '.join(listed)}."


def _show_copies(copies: float) -> str:
    if copies == 1.0:
        return "all of"
    return f"{copies:g} times" if copies > 1.0 else f"{copies:.1%} of"
