"""Where in a spec something stands, and refusals that point there."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass

from ucp.errors import Position, SpecError


@dataclass(frozen=True)
class SpecText:
    """A piece of a spec's text that has a grammar of its own (an expression, a size), and where it begins."""

    text: str
    position: Position

    def refuse(self, span: tuple[int, int], message: str) -> SpecError:
        """The error that marks the characters ``[span[0], span[1])`` of this text."""
        start, end = span
        marks = " " * start + "^" * max(end - start, 1)
        return SpecError(message, self.position.right(start), f"    {self.text}\n    {marks}")


def suggestion(name: str, known: Iterable[str]) -> str:
    """``; did you mean 'x'?`` if a known name is close, else a list of the known names."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, 1)
    if near:
        return f"; did you mean '{near[0]}'?"
    return f"; known are {', '.join(names)}" if names else ""
