r"""Foreign text made fit to be shown: what a checkpoint says never moves a cursor, hides a word or fakes a line.

Names, tags, paths and whatever else comes from files may hold any character. Before they are shown, on a terminal, in a
log, in an error or on a page, control characters are escaped as ``ls -b`` does: ``\n``, ``\t`` and the like by their
letters, all others by the octal numbers of their bytes (``\033`` is Escape). Escaped are C0, DEL, C1, the controls of
bidirectional text, the separators of lines and paragraphs, and what is no Unicode. Everything else stays as it is.
"""

from __future__ import annotations

import json
import logging
import re
import reprlib
from collections.abc import Mapping
from typing import Any

_ODD = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
_LETTERS = {"\a": "a", "\b": "b", "\f": "f", "\n": "n", "\r": "r", "\t": "t", "\v": "v"}


def line(text: str) -> str:
    """The text as one line, or as one entry of one."""
    return text if text.isprintable() else _ODD.sub(_escape, text)


def lines(text: str) -> str:
    """The text with its line ends (``\\n``) as they are, for what is meant to have several lines."""
    return "\n".join(map(line, text.split("\n")))


def data(value: Any) -> Any:
    """A copy of JSON-like data with every text in it as `line` shows it, keys as well."""
    if isinstance(value, str):
        return line(value)
    if isinstance(value, Mapping):
        return {data(key): data(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [data(item) for item in value]
    return value


def short(value: Any) -> str:
    """A foreign value as an error or a table may show it, whatever it is: its ``repr``, of long ones the beginning.

    Deep values, shared ones and long integers, whose ``repr`` fails or never ends, are cut first.
    """
    try:
        return line(_SHORT.repr(value))
    except (ValueError, RecursionError) as error:
        return f"<{type(value).__name__}: {error}>"


def dumps(value: Any) -> str:
    """JSON in ASCII on one line, in which every control character stands as JSON's own escape (DEL, too)."""
    return json.dumps(value, allow_nan=False, default=str).replace("\x7f", "\\u007f")


def logger(name: str) -> logging.Logger:
    """The logger of that name, whose records are lines, whatever they quote and whoever handles them."""
    found = logging.getLogger(name)
    found.addFilter(_CLEAN)
    return found


class _Short(reprlib.Repr):
    """Longer than reprlib's own, since a table cuts to its own width; and for integers that Python does not print."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxstring, self.maxother, self.maxlong = 4, 200, 200, 60
        self.maxlist = self.maxtuple = self.maxdict = self.maxset = self.maxfrozenset = self.maxdeque = 12

    def repr_int(self, x: int, level: int) -> str:
        return hex(x)[: self.maxlong] + "..." if x.bit_length() > 8000 else repr(x)


_SHORT = _Short()


class _Clean(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        text = record.getMessage()
        cleaned = line(text)
        if cleaned != text:
            record.msg, record.args = cleaned, ()  # without arguments nothing is put in for a percent sign
        return True


_CLEAN = _Clean()


def _escape(match: re.Match[str]) -> str:
    letter = match[0]
    if letter in _LETTERS:
        return f"\\{_LETTERS[letter]}"
    try:
        raw = letter.encode("utf-8", "surrogateescape")  # a byte of a file's name that is no UTF-8
    except UnicodeEncodeError:
        raw = letter.encode("utf-8", "surrogatepass")
    return "".join(f"\\{byte:03o}" for byte in raw)
