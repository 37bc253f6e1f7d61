"""Line breaks between words, where a terminal would break a line inside of one; prints nothing, knows no terminal."""

from __future__ import annotations

import re

from rich.cells import cell_len

_PARTS = re.compile(r"\n|[ \t]+|[^ \t\n]+")
_TAB_CELLS = 8
# `name    what it means`: a first column of at most so many cells.  Two blanks after a full stop separate sentences.
_COLUMN = re.compile(r"(.{0,24}?[^.:!?…\s]) {2,}(?=\S)")


class WordWrap:
    """Wraps a text that arrives in pieces.

    A word is held back until it has ended, because only then is it known whether it fits into the line.  A word that
    is wider than a whole line stays in one piece, so that a path can still be copied.
    """

    def __init__(self, width: int, indent: int = 0) -> None:
        """Begin at the left margin.  width: cells of a line.  indent: blanks before each further line."""
        self._width, self._indent = max(1, width), indent if indent <= width // 2 else 0
        self._column, self._blanks, self._word = 0, "", ""
        self._is_too_wide = False

    def push(self, piece: str) -> str:
        """Return what can be printed now."""
        done = []
        for part in _PARTS.findall(piece):
            if part == "\n":
                done += [self._end_word(), "\n"]
                self._column, self._blanks = 0, ""
            elif part[0] in " \t":
                done.append(self._end_word())
                self._blanks += part
            else:
                self._word += part
                if self._is_too_wide or self._is_wider_than_a_line(self._word):
                    done.append(self._place_word())
                    self._is_too_wide = True
        return "".join(done)

    def end(self) -> str:
        """Return what is still held back."""
        return self._end_word()

    def _end_word(self) -> str:
        placed = self._place_word() if self._word else ""
        self._is_too_wide = False
        return placed

    def _place_word(self) -> str:
        """Return the word after the blanks before it, or on a new line if it does not fit."""
        blanks, word = self._blanks, self._word
        self._blanks = self._word = ""
        if self._is_too_wide:  # the word goes on
            self._column += cell_len(word)
            return word
        after = self._advance(blanks) + cell_len(word)
        if after <= self._width and not self._is_wider_than_a_line(word):
            self._column = after
            return blanks + word
        before = "\n" + " " * self._indent if self._column > 0 else ""
        self._column = len(before[1:]) + cell_len(word)
        return before + word

    def _is_wider_than_a_line(self, word: str) -> bool:
        return cell_len(word) > self._width - self._indent

    def _advance(self, blanks: str) -> int:
        column = self._column
        for blank in blanks:
            column = column + 1 if blank == " " else column // _TAB_CELLS * _TAB_CELLS + _TAB_CELLS
        return column


def wrap_words(text: str, width: int) -> str:
    """Return a whole text with its lines wrapped, each continued below its own beginning or below its second column."""
    return "\n".join(_wrap_line(line, width) for line in text.split("\n"))


def _wrap_line(line: str, width: int) -> str:
    column = _COLUMN.match(line)
    indent = cell_len(column[0]) if column else len(line) - len(line.lstrip(" "))
    wrapped = WordWrap(width, indent)
    return wrapped.push(line) + wrapped.end()
