"""Where in a spec something stands, and refusals that point there."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass

from ucp.errors import UcpError


@dataclass(frozen=True)
class Position:
    """A position in a text. file: as people know it; line and column count from 1."""

    file: str
    line: int
    column: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}:{self.column}"

    def right(self, characters: int) -> Position:
        """The position so many characters further on in the line."""
        return Position(self.file, self.line, self.column + characters)


class SpecError(UcpError):
    """A spec, or what it says of a model, is refused.

    ``str()`` is one line that begins with the position; ``picture`` is the offending text with a line of marks under
    the part that is meant, or empty.
    """

    def __init__(self, position: Position, message: str, picture: str = "") -> None:
        super().__init__(f"{position}: {message}")
        self.position = position
        self.picture = picture


@dataclass(frozen=True)
class SpecText:
    """A piece of a spec's text that has a grammar of its own (an expression, a size), and where it begins."""

    text: str
    position: Position

    def refuse(self, span: tuple[int, int], message: str) -> SpecError:
        """The error that marks the characters ``[span[0], span[1])`` of this text."""
        start, end = span
        marks = " " * start + "^" * max(end - start, 1)
        return SpecError(self.position.right(start), message, f"    {self.text}\n    {marks}")


def suggestion(name: str, known: Iterable[str]) -> str:
    """``; did you mean 'x'?`` for a near name, else the known ones in a few words."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, 1)
    if near:
        return f"; did you mean '{near[0]}'?"
    return f"; known are {', '.join(names)}" if names else ""
