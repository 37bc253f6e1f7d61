"""Handles bad rows (rows of text files that are not text): describes, counts, skips or refuses them; opens no file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, final

from lowvram.errors import DataError
from lowvram.units import count_of

Action = Literal["stop", "skip", "report"]
# Above either limit, the files are not text with a few faults.  The share is checked after many bad rows and at last.
MOST_SKIPPED = 10_000
MOST_SKIPPED_SHARE = 0.01
# Up to this many characters may be lost, and this many rows be bad, whatever their share.
MOST_LOST = 100_000
FEW = 10
_MANY = 1_000
_SHOWN = 3


@final
@dataclass(frozen=True)
class BadRow:
    """One row, or the rest of a file, that is not text.

    kind: a few words by which such rows are counted.  ended_file: nothing more can be read from this file, so the
    number of lost rows is unknown.  characters: about how much text is lost, 0 where that is not known.
    """

    kind: str
    what: str
    why: str = ""
    fix: str = ""
    ended_file: Path | None = None
    characters: int = 0

    @staticmethod
    def of(kind: str, error: DataError, ended_file: Path | None = None) -> BadRow:
        """Return a bad row with the text of an error."""
        return BadRow(kind, error.what, error.why, error.fix, ended_file)


@dataclass
class BadRows:
    """Counts bad rows and decides what is done with them; one object serves all files that are read together.

    action: `stop` raises at the first one, `skip` leaves single rows out and raises above a limit or where a file ends
    too early, `report` reads on.
    tell: called with each bad row that does not raise.  hint: the caller's advice on the other actions, for the error
    at a bad row; file_hint: the same for a file that ends too early.
    """

    action: Action = "stop"
    tell: Callable[[BadRow], None] | None = None
    hint: str = ""
    file_hint: str = ""
    rows: int = 0
    ended_files: list[Path] = field(default_factory=list)
    characters: int = 0
    lost_characters: int = 0
    kinds: Counter[str] = field(default_factory=Counter)
    encodings: dict[str, list[Path]] = field(default_factory=dict)
    _first: list[str] = field(default_factory=list)

    @property
    def count(self) -> int:
        """The number of bad rows so far."""
        return self.kinds.total()

    def count_text(self, characters: int) -> None:
        """Count a good row."""
        self.rows += 1
        self.characters += characters

    def note_encoding(self, file: Path, encoding: str) -> None:
        """Note that a file, or lines of it, were converted from another encoding than UTF-8."""
        files = self.encodings.setdefault(encoding, [])
        if file not in files[-1:]:
            files.append(file)

    def describe_encodings(self) -> list[str]:
        """Return one sentence for each encoding that files were converted from."""
        return [
            f"Read as {encoding}: {', '.join(map(str, files[:_SHOWN]))}"
            + (f" and {len(files) - _SHOWN:,} more." if len(files) > _SHOWN else ".")
            for encoding, files in self.encodings.items()
        ]

    def take(self, row: BadRow) -> None:
        """Count a bad row and report it, or raise DataError."""
        if self.action == "stop" or (self.action == "skip" and row.ended_file):
            # The hint goes first, because a fix may end in a command, and nothing may follow a command.
            hint = self.file_hint if row.ended_file else self.hint
            raise DataError(row.what, row.why, " ".join(filter(None, (hint, row.fix))))
        self.rows += 1
        self.ended_files += [row.ended_file] if row.ended_file else []
        self.lost_characters += row.characters
        self.kinds[row.kind] += 1
        if len(self._first) < _SHOWN:
            self._first.append(row.what)
        if self.tell:
            self.tell(row)
        self._check(_MANY)

    def finish(self) -> None:
        """Raise DataError where too large a share was skipped; call it when everything was read."""
        self._check(FEW)
        if self.action == "skip" and self._is_much_text():
            lost, total = self.lost_characters, self.characters + self.lost_characters
            holds = f"{count_of(self.count, 'bad row')} {'holds' if self.count == 1 else 'hold'}"
            raise self._too_many(f"{holds} {lost:,} of {total:,} characters", f"{MOST_SKIPPED_SHARE:.0%}")

    @property
    def can_be_skipped(self) -> bool:
        """Whether `skip` would accept all bad rows so far; ask when everything was read."""
        return not self.ended_files and self.rest_can_be_skipped

    @property
    def rest_can_be_skipped(self) -> bool:
        """Whether `skip` would accept them if the files that end too early were left out."""
        return self.count <= MOST_SKIPPED and not (self._is_large_share(FEW) or self._is_much_text())

    @property
    def is_more_than_its_share(self) -> bool:
        """Whether bad rows are only accepted because they are few."""
        return self._is_large_share(0)

    def _is_much_text(self) -> bool:
        """Say whether bad rows hold much text: a whole book in another encoding, without a blank line, is one row."""
        lost, total = self.lost_characters, self.characters + self.lost_characters
        return lost > MOST_LOST and lost > total * MOST_SKIPPED_SHARE

    def _is_large_share(self, least: int) -> bool:
        return self.count > least and self.count > self.rows * MOST_SKIPPED_SHARE

    def _check(self, least: int) -> None:
        count, is_share = self.count, self._is_large_share(least)
        if self.action != "skip" or not (is_share or count > MOST_SKIPPED):
            return
        limit = f"{MOST_SKIPPED_SHARE:.0%}" if is_share else f"{MOST_SKIPPED:,} rows"
        raise self._too_many(f"{count:,} of {self.rows:,} rows so far are bad", limit)

    def _too_many(self, what: str, limit: str) -> DataError:
        return DataError(
            f"{what}, which is more than {limit} ({self.describe()}).",
            f"The first: {' '.join(self._first)}",
            "Mend these files, or leave them out with `leave_out`; `check_texts` lists every such row.",
        )

    def describe(self) -> str:
        """Return how many bad rows there were of each kind."""
        return ", ".join(f"{count:,} {kind}" for kind, count in self.kinds.most_common())
