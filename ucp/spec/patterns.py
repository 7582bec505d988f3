"""Patterns of parameter names: ``model.layers.{i}.*norm.weight``.

``{i}`` captures a whole number, ``*`` stands for any run of characters without a dot, and everything else stands for
itself. ``{experts/ep}`` is a number that counts along the axis ``experts``, of which each rank of ``ep`` holds its
part. Patterns are compared part by part between dots, from the left: a literal is more specific than a capture, and a
capture is more specific than a ``*``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from ucp.errors import SpecError
from ucp.spec import grammar
from ucp.spec.grammar import Cut, Expression
from ucp.spec.positions import SpecText

_LITERAL, _CAPTURE, _STAR = 2, 1, 0
_PIECE = re.compile(r"\{[^{}]*\}?|\*|[^{}*]+|\}")
_CAPTURED = re.compile(r"\{\s*([A-Za-z_][A-Za-z0-9_]*)\s*((?:/\s*[A-Za-z_]+\s*)*)\}")
_SHIFTED = re.compile(r"\{\s*([A-Za-z_][A-Za-z0-9_]*)\s*(?:([+-])\s*([0-9]+)\s*)?\}")


@dataclass(frozen=True)
class Pattern:
    """A pattern of names. captures: their names, in order. cuts: an expression for each captured axis that is cut."""

    source: SpecText
    regex: re.Pattern[str]
    rank: tuple[int, ...]
    captures: tuple[str, ...]
    cuts: tuple[Expression, ...]

    def __str__(self) -> str:
        return self.source.text

    def match(self, name: str) -> dict[str, int] | None:
        """The captured numbers, or None if the name does not match."""
        found = self.regex.fullmatch(name)
        return None if found is None else {k: int(v) for k, v in found.groupdict().items()}

    def fill(self, values: Mapping[str, int]) -> str:
        """The name for these numbers. Raises SpecError if the numbers do not determine all of it."""
        parts = _CAPTURED.split(self.source.text)  # text, capture, its cut, text, ...
        for capture in self.captures:
            if capture not in values:
                raise self.refuse(f"nothing tells the number '{capture}', so '{self}' can't be written")
        if "*" in self.source.text:
            raise self.refuse(f"'*' can't be filled in, so '{self}' can't be written; capture what it stands for")
        return "".join(str(values[part]) if k % 3 == 1 else part for k, part in enumerate(parts) if k % 3 != 2)

    def example(self) -> str:
        """A name that matches: 7 for every number, x for every ``*``."""
        return re.sub(r"\{[^{}]*\}", "7", self.source.text).replace("*", "x")

    def refuse(self, message: str) -> SpecError:
        """The error that marks the whole pattern."""
        return self.source.refuse((0, len(self.source.text)), message)


def parse(source: SpecText) -> Pattern:
    """Read a pattern. Raises SpecError for an empty part, and for brackets that capture nothing."""
    regex, ranks, captures, cut = "", [_LITERAL], [], []
    for match in _PIECE.finditer(source.text):
        text, span = match[0], match.span()
        if text == "*":
            ranks[-1] = _STAR
            regex += r"[^.]*"
        elif text[0] in "{}":
            found = _CAPTURED.fullmatch(text)
            if found is None:
                raise source.refuse(span, "a capture is {name}, or {axis/ep} where the mesh cuts its numbers")
            name = found[1]
            ranks[-1] = min(ranks[-1], _CAPTURE)
            regex += f"(?P={name})" if name in captures else f"(?P<{name}>[0-9]{{1,9}})"
            captures.append(name)
            if found[2]:
                inside = text[1:-1].strip()
                start = source.position.right(span[0] + 1)
                cut.append(grammar.parse(SpecText(inside, start)))
        else:
            regex += re.escape(text)
            ranks += [_LITERAL] * text.count(".")
    if not source.text or ".." in f".{source.text}.":
        raise source.refuse((0, len(source.text)), "a name's parts can't be empty; name the parameter, part.part.part")
    return Pattern(source, re.compile(regex), tuple(ranks), tuple(dict.fromkeys(captures)), tuple(cut))


@dataclass(frozen=True)
class Template:
    """A name to be filled in from captures, each with a shift, such as ``model.layers.{i-2}.weight``."""

    source: SpecText
    pieces: tuple[str | tuple[str, int], ...]

    def __str__(self) -> str:
        return self.source.text

    @property
    def captures(self) -> tuple[str, ...]:
        return tuple(p[0] for p in self.pieces if isinstance(p, tuple))

    @property
    def rank(self) -> tuple[int, ...]:
        """How specific it is, like `Pattern.rank`."""
        return tuple(_CAPTURE if "{" in part else _LITERAL for part in self.source.text.split("."))

    def match(self, name: str) -> dict[str, int] | None:
        """The numbers for which `fill` gives this name, or None if there are none."""
        found = self._regex.fullmatch(name)
        if found is None:
            return None
        shifted = [p for p in self.pieces if isinstance(p, tuple)]
        values = {key: int(n) - shift for (key, shift), n in zip(shifted, found.groups(), strict=True)}
        return values if min(values.values(), default=0) >= 0 and self.fill(values) == name else None

    @cached_property
    def _regex(self) -> re.Pattern[str]:
        return re.compile("".join("([0-9]{1,9})" if isinstance(p, tuple) else re.escape(p) for p in self.pieces))

    def fill(self, values: Mapping[str, int]) -> str | None:
        """The name for these numbers; None if a shift leads below 0."""
        out = []
        for piece in self.pieces:
            if isinstance(piece, tuple):
                number = values[piece[0]] + piece[1]
                if number < 0:
                    return None
                out.append(str(number))
            else:
                out.append(piece)
        return "".join(out)


def template(source: SpecText) -> Template:
    """Read a template. Raises SpecError for a ``*``, which nothing can fill, and for brackets that are no capture."""
    pieces: list[str | tuple[str, int]] = []
    for match in _PIECE.finditer(source.text):
        text, span = match[0], match.span()
        if text == "*":
            raise source.refuse(span, "'*' can't be filled in; capture what it stands for")
        if text[0] in "{}":
            found = _SHIFTED.fullmatch(text)
            if found is None:
                raise source.refuse(span, "a captured number is {i}, {i+2} or {i-2} here")
            shift = int((found[2] or "+") + (found[3] or "0"))
            pieces.append((found[1], shift))
        else:
            pieces.append(text)
    if not pieces:
        raise source.refuse((0, 0), "the name is empty")
    return Template(source, tuple(pieces))


def cut_of(expression: Expression) -> Cut:
    """The cut of a captured axis, as `Pattern.cuts` keeps it."""
    (axis,) = expression.dims
    if not isinstance(axis, Cut):
        raise ValueError(f"'{expression}' is not cut")
    return axis
