r"""Foreign text made fit to be shown: what a checkpoint says never moves a cursor, hides a word or fakes a line.

Names, tags, paths and whatever else comes from files may hold any character. Control characters are escaped before the
text is shown on a terminal, in a log, in an error or on a page. They are escaped as ``ls -b`` does it: ``\n``, ``\t``
and the like by their letters, all others by the octal numbers of their bytes (``\033`` is Escape). This covers C0, DEL,
C1, the controls of bidirectional text, the separators of lines and paragraphs, and what is not valid Unicode.
Everything else stays as it is.
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
    """The text as one line, or as a part of one line."""
    return text if text.isprintable() else _ODD.sub(_escape, text)


def lines(text: str) -> str:
    """The text with its line ends (``\\n``) kept, for text that is meant to have several lines."""
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
    """A foreign value of any kind as an error or a table may show it: its ``repr``, cut short if it is long.

    Deep values, shared ones and long integers, whose ``repr`` would fail or never end, are cut before that.
    """
    try:
        return line(_SHORT.repr(value))
    except (ValueError, RecursionError) as error:
        return f"<{type(value).__name__}: {error}>"


def dumps(value: Any) -> str:
    """JSON in ASCII on one line. Every control character, DEL included, is written as JSON's own escape."""
    return json.dumps(value, allow_nan=False, default=str).replace("\x7f", "\\u007f")


def logger(name: str) -> logging.Logger:
    """The logger of that name. Each of its records is one line, whatever it quotes and whoever handles it."""
    found = logging.getLogger(name)
    found.addFilter(_CLEAN)
    return found


class _Short(reprlib.Repr):
    """Longer than reprlib's own, since a table cuts to its own width. Also takes integers that Python won't print."""

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
            record.msg, record.args = cleaned, ()  # without arguments, a percent sign is left as it is
        return True


_CLEAN = _Clean()


def _escape(match: re.Match[str]) -> str:
    letter = match[0]
    if letter in _LETTERS:
        return f"\\{_LETTERS[letter]}"
    try:
        raw = letter.encode("utf-8", "surrogateescape")  # a byte of a file's name that is not UTF-8
    except UnicodeEncodeError:
        raw = letter.encode("utf-8", "surrogatepass")
    return "".join(f"\\{byte:03o}" for byte in raw)
