"""Results on stdout: tables for people on a terminal, lines with tabs for programs in a pipe, JSON on request.

Text from a checkpoint is escaped here, entry by entry (`ucp.printable`), so that no entry adds a column or a line.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ucp.printable import dumps, line


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that every command has."""
    parser.add_argument("--json", action="store_true", help="print the result as JSON (its 'schema' names the version)")
    parser.add_argument("--quiet", action="store_true", help="no result, no progress, no warnings")
    parser.add_argument("--debug", action="store_true", help="log what happens, with tracebacks")


class Output:
    """Where a command's result goes, in one of the three forms. `people`: whether it is a terminal."""

    def __init__(self, args: argparse.Namespace) -> None:
        self._json = args.json
        self._quiet = args.quiet and not args.json
        self.people = sys.stdout.isatty() and not self._json
        self._colour = self.people and "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb"

    def result(self, as_json: Callable[[], Mapping[str, Any]]) -> bool:
        """Print the JSON form if that is asked for; True if nothing else is to be printed."""
        if self._json:
            sys.stdout.write(dumps(as_json()) + "\n")
        return self._json or self._quiet

    def report(self, schema: str, report: Any) -> bool:
        """Print what was done: a dataclass as JSON, with the schema's name, or its text. True if nothing else is to be
        printed."""
        if self.result(lambda: {"schema": schema, **dataclasses.asdict(report)}):
            return True
        self.good(str(report))
        return False

    def title(self, text: str) -> None:
        self._line(self._marked(line(text), "1"))

    def good(self, text: str) -> None:
        self._line(self._marked(line(text), "32"))

    def bad(self, text: str) -> None:
        self._line(self._marked(line(text), "31"))

    def facts(self, pairs: Sequence[tuple[str, str]]) -> None:
        """Names and values."""
        shown = [(line(name), line(value)) for name, value in pairs]
        width = max((len(name) for name, _ in shown), default=0)
        for name, value in shown:
            self._line(f"  {self._marked(name.ljust(width), '2')}  {value}" if self.people else f"{name}\t{value}")

    def table(self, head: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> None:
        """Rows of columns; those numbered in ``right`` are set to the right. The head is for people only."""
        rows = [tuple(map(line, row)) for row in rows]
        if not self.people:
            for row in rows:
                self._line("\t".join(row))
            return
        if not rows:
            return
        widths = [max(len(row[k]) for row in (head, *rows)) for k in range(len(head))]
        self._line(self._marked(_row(head, widths, right), "2"))
        for row in rows:
            self._line(_row(row, widths, right))

    def text(self, text: str) -> None:
        """A line for people and programs alike."""
        self._line(line(text))

    def note(self, text: str) -> None:
        """A line for people only."""
        if self.people:
            self._line(self._marked(line(text), "2"))

    def _marked(self, text: str, code: str) -> str:
        return f"\x1b[{code}m{text}\x1b[0m" if self._colour else text

    @staticmethod
    def _line(text: str) -> None:
        sys.stdout.write(text + "\n")


def _row(row: Sequence[str], widths: Sequence[int], right: Sequence[int]) -> str:
    cells = (c.rjust(w) if k in right else c.ljust(w) for k, (c, w) in enumerate(zip(row, widths, strict=True)))
    return "  " + "  ".join(cells).rstrip()
