"""Rows of text files that are no text: what is wrong with one, and what is done about all of them; opens no file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, final

from lowvram.errors import DataError
from lowvram.units import count_of

Action = Literal["stop", "skip", "report"]
# Beyond either the files are not text with a few faults; the second is asked where many rows were read, and at the end.
MOST_SKIPPED = 10_000
MOST_SKIPPED_SHARE = 0.01
# So few characters may be lost, whatever their share.
MOST_LOST = 100_000
_FEW = 10
_MANY = 1_000
_SHOWN = 3


@final
@dataclass(frozen=True)
class BadRow:
    """One row, or the rest of a file, that is no text.

    kind: a few words by which such rows are counted.  ends_file: nothing more can be read of the file, so nobody knows
    how many rows are lost.  characters: about how much text is lost with it, 0 where that is not known.
    """

    kind: str
    what: str
    why: str = ""
    fix: str = ""
    ends_file: bool = False
    characters: int = 0

    @staticmethod
    def of(kind: str, error: DataError, ends_file: bool = False) -> BadRow:
        """Return what an error says, as a bad row."""
        return BadRow(kind, error.what, error.why, error.fix, ends_file)


@dataclass
class BadRows:
    """What is done with bad rows, and how many there were; one object for all files of a reading.

    action: `stop` raises at the first, `skip` leaves single rows out and raises beyond a limit or where a file ends
    too early, `report` reads on.
    tell: called with each bad row that does not stop.  hint: what an error that stops at a row says of the other
    actions, in the caller's words; `file_hint` the same where a file ends too early.
    """

    action: Action = "stop"
    tell: Callable[[BadRow], None] | None = None
    hint: str = ""
    file_hint: str = ""
    rows: int = 0
    ended_files: int = 0
    characters: int = 0
    lost_characters: int = 0
    kinds: Counter[str] = field(default_factory=Counter)
    _first: list[str] = field(default_factory=list)

    @property
    def count(self) -> int:
        """How many bad rows there were."""
        return self.kinds.total()

    def count_text(self, characters: int) -> None:
        """Count a row that is text."""
        self.rows += 1
        self.characters += characters

    def take(self, row: BadRow) -> None:
        """Count a bad row and tell of it, or raise DataError."""
        if self.action == "stop" or (self.action == "skip" and row.ends_file):
            # The hint goes first, because a fix may end in a command, behind which nothing may stand.
            hint = self.file_hint if row.ends_file else self.hint
            raise DataError(row.what, row.why, " ".join(filter(None, (hint, row.fix))))
        self.rows += 1
        self.ended_files += row.ends_file
        self.lost_characters += row.characters
        self.kinds[row.kind] += 1
        if len(self._first) < _SHOWN:
            self._first.append(row.what)
        if self.tell:
            self.tell(row)
        self._check(_MANY)

    def finish(self) -> None:
        """Raise DataError where more than the share was skipped; call it when everything was read."""
        self._check(_FEW)
        if self.action == "skip" and self._is_much_text():
            lost, all = self.lost_characters, self.characters + self.lost_characters
            holds = f"{count_of(self.count, 'bad row')} {'holds' if self.count == 1 else 'hold'}"
            raise self._too_many(f"{holds} {lost:,} of {all:,} characters", f"{MOST_SKIPPED_SHARE:.0%}")

    @property
    def can_be_skipped(self) -> bool:
        """Whether `skip` would leave out all that was found, when everything was read."""
        return (
            not self.ended_files
            and self.count <= MOST_SKIPPED
            and not (self._is_large_share(_FEW) or self._is_much_text())
        )

    def _is_much_text(self) -> bool:
        """Whether few rows are much text: a whole book in another encoding, without a blank line, is one row."""
        lost, all = self.lost_characters, self.characters + self.lost_characters
        return lost > MOST_LOST and lost > all * MOST_SKIPPED_SHARE

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
            "Mend these files or leave them out; --on-bad-row report lists every such row.",
        )

    def describe(self) -> str:
        """Return how many there were of each kind."""
        return ", ".join(f"{count:,} {kind}" for kind, count in self.kinds.most_common())
