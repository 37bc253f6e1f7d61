"""Packs the sources of a mix one after the other: what is held out of each, skipped in it and left out of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowvram.api.mix_options import MixOptions
from lowvram.api.packing import show_packing, tell_excluded
from lowvram.api.tasks import Notice, Task
from lowvram.api.texts import SkippedRows, TextOptions

if TYPE_CHECKING:
    from lowvram.data.mix.caps import Taken
    from lowvram.data.mix.sources import TextSource
    from lowvram.data.shards import ShardSet
    from lowvram.data.tokenizer import Tokenizer

# On the disk: of a smaller source processes would take as long to start as its text to encode.
_SMALL_BYTES = 4 << 20


class SourcePacker:
    """Packs sources.  processes: None for one per core; count: of the sources; listed: documents to leave out."""

    def __init__(
        self,
        options: TextOptions,
        wanted: MixOptions,
        tokenizer: Tokenizer,
        processes: int | None,
        count: int,
        listed: Mapping[str, Mapping[str, Any]] | None,
    ) -> None:
        self._options, self._wanted, self._tokenizer = options, wanted, tokenizer
        self._processes, self._count, self._number = processes, count, 0
        self._listed, self._left_out = listed, set[str]()
        self._excluded = 0
        self._without: list[str] = []

    def pack(
        self, source: TextSource, taken: Taken | None = None, replace: bool | None = None
    ) -> Task[tuple[ShardSet, ...]]:
        """Pack a source into its folder; one with too few documents to hold one out has training shards alone.

        taken: the documents below a cap; None: all.  replace: whether other shards may be replaced; None: as wanted.
        """
        from lowvram.data.holdout import NothingHeldOutError

        self._number += 1
        replace = self._wanted.replace if replace is None else replace
        _drop_stale(self._wanted.out, source.name, replace)
        is_split = self._options.holdout is not None
        try:
            return (yield from self._pack_sides(source, taken, replace, is_split))
        except NothingHeldOutError:
            self._without.append(source.name)
        # The first attempt has told of the rows that are skipped.
        return (yield from self._pack_sides(source, taken, replace, False, is_told=True))

    def _pack_sides(
        self, source: TextSource, taken: Taken | None, replace: bool, is_split: bool, is_told: bool = False
    ) -> Task[tuple[ShardSet, ...]]:
        from lowvram.data.exclusion_list import HASH, Exclusion
        from lowvram.data.shards import SIDES, pack_each_shard
        from lowvram.data.text_files import size_of

        home = self._wanted.out / source.name
        if not is_split:
            _refuse_held_out(home / SIDES[1], source.name, replace, self._options.holdout is not None)
        skipped = SkippedRows(self._options.on_bad_row)
        exclusion = Exclusion(self._listed) if self._listed is not None else None
        packing = pack_each_shard(
            source.files,
            self._tokenizer,
            home if is_split else home / SIDES[0],
            self._options.field,
            1 if sum(map(size_of, source.files)) < _SMALL_BYTES else self._processes,
            holdout=self._options.build_holdout() if is_split else None,
            replace=replace,
            bad_rows=skipped.bad_rows,
            is_packed=taken,
            exclusion=exclusion,
        )
        work = show_packing(packing, f"Packing {source.name} ({self._number} of {self._count})")
        sides = yield from work if is_told else skipped.tell_beside(work)
        yield from skipped.summarise()
        if exclusion is not None:
            self._excluded += len(exclusion.rows)
            self._left_out.update(row[HASH] for row in exclusion.rows)
        return tuple(sides)

    def summarise(self) -> Iterator[Notice]:
        """Yield a notice of the sources of which nothing could be held out, and of documents that a list left out."""
        if self._without:
            few = "too few documents for that share, and all of them are learnt"
            yield Notice(f"Nothing is held out of {', '.join(self._without)}: {few}.")
        if self._listed is not None:
            yield from tell_excluded(self._excluded, len(self._listed), len(self._listed) - len(self._left_out))


def _drop_stale(out: Path, name: str, replace: bool) -> None:
    """Delete the file of an earlier mix where a source may get another text: its shares would be taken for those of it.

    Without `replace` finished shards of another text stay.
    """
    from lowvram.config.mix import MIX, is_mix
    from lowvram.data.shard_set import INDEX
    from lowvram.data.shards import SIDES
    from lowvram.storage.disk import DISK

    if is_mix(out) and (replace or not (out / name / SIDES[0] / INDEX).is_file()):
        DISK.delete(out / MIX)


def _refuse_held_out(valid: Path, name: str, replace: bool, is_given: bool) -> None:
    """Raise DataError where a source holds out text of an earlier mix, which would now be learnt; or delete that.

    is_given: whether `holdout` is given, and holds out nothing of this source.
    """
    from lowvram.data.shard_folder import holds_shards
    from lowvram.errors import DataError
    from lowvram.storage.disk import DISK

    if not holds_shards(valid):
        return
    if replace:
        DISK.delete(valid)
        return
    if is_given:
        why = f"This `holdout` holds out nothing of {name}: its documents would be learnt, and measured as if not."
        fix = "Give the share or the text of before, a larger share, or add `replace=True` to delete them."
    else:
        why = "Without `holdout` its documents would be learnt, and measured as if they were not."
        fix = "Give the same `holdout` again, or add `replace=True` to delete them."
    raise DataError(f"{valid} holds text that was held out.", why, fix)
