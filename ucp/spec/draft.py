"""Write a spec's text from what is known of each parameter: one line for all whose names differ only in numbers.

What is not known is written as unknown, together with what to decide. A spec with such a line is refused when it is
used.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ucp import printable
from ucp.errors import Unsupported
from ucp.spec.language import VERSION
from ucp.units import counted

# The segments of one dimension: a width for each rank if the segment is cut, one number if every rank holds it whole.
Segments = Sequence[Sequence[int] | int]

_NUMBER = re.compile(r"(?<![^.])[0-9]{1,9}(?![^.])")
_CAPTURES = "ijklmnop"
_PLAIN = re.compile(r"[A-Za-z_][\w.]*(\{[a-z]\}[\w.]*)*")


@dataclass(frozen=True)
class Drafted:
    """A parameter's expression."""

    axes: str


@dataclass(frozen=True)
class Pending:
    """Why a parameter has no expression yet, and what to decide."""

    why: str


@dataclass
class Axes:
    """The named axes of the expressions, collected as they come up: name -> (size, comment)."""

    sizes: dict[str, tuple[int, str]] = field(default_factory=dict)

    def dimension(self, segments: Segments) -> str | None:
        """One dimension's axis; None for segments that no cut of a single axis makes."""
        if len(segments) == 1:
            (only,) = segments
            return self.whole(only) if isinstance(only, int) else self.cut(only)
        units: dict[tuple[int, ...], int] = {}
        for widths in segments:
            if not isinstance(widths, int) and any(widths):
                g = math.gcd(*widths)
                unit = tuple(w // g for w in widths)
                units[unit] = math.gcd(units.get(unit, 0), g)
        if len(units) > 1:
            return None
        out = []
        for widths in segments:
            if isinstance(widths, int):
                out.append(self.whole(widths))
            elif any(widths):
                ((unit, g),) = units.items()
                factor = math.gcd(*widths) // g
                out.append(self.cut([u * g for u in unit]) + (f" {factor}" if factor > 1 else ""))
        return f"({' | '.join(out)})"

    def whole(self, n: int) -> str:
        return str(n) if n else self.name("axis_0", 0, "")

    def cut(self, widths: Sequence[int]) -> str:
        n, even = sum(widths), len(set(widths)) == 1
        cut = "" if even else "_cut_" + "_".join(map(str, widths))
        shown = f"{widths[0]} on each of {len(widths)} ranks" if even else " + ".join(map(str, widths))
        return self.name(f"axis_{n}{cut}", n, shown) + "/tp"

    def padded(self, name: str, n: int) -> str:
        return f"({self.name(name, n, 'what is beyond it is padding')}+pad)/tp"

    def name(self, name: str, n: int, comment: str) -> str:
        self.sizes.setdefault(name, (n, comment))
        return name


def write(
    lines: Mapping[str, Drafted | Pending],
    sizes: Mapping[str, tuple[int, str]],
    *,
    model: str,
    head: Sequence[str] = (),
    tied: Mapping[str, str] | None = None,
    captures: Sequence[tuple[str, str]] = (),
) -> str:
    """The text of a spec.

    lines: parameter -> what is known of it.
    sizes: axis -> (its size, a comment).
    model: the model that the spec is for.
    head: comments at the top.
    tied: other name -> parameter.
    captures: (regular expression for a part of a name, its capture) for numbers with a meaning of their own.

    Raises Unsupported for a name that no pattern can spell.
    """
    patterns = _patterns(lines, captures)
    open_ones = [p for p, line in patterns.items() if isinstance(line, Pending)]
    out = [f"# {printable.line(line)}" for line in head]
    if open_ones:
        out.append(
            f"# {counted(len(open_ones), 'line is', 'lines are')} marked unknown. "
            "The spec can't be used before they are written."
        )
    out += [f"ucp: {VERSION}", f"model: {_quoted(model)}"]
    out += ["", "sizes:"] if sizes else []
    out += [f"  {name}: {n}" + (f"  # {comment}" if comment else "") for name, (n, comment) in sizes.items()]
    out += ["", "parameters:"]
    for pattern, line in patterns.items():
        said = json.dumps(line.axes) if isinstance(line, Drafted) else f"{{unknown: {json.dumps(line.why)}}}"
        out.append(f"  {_quoted(pattern)}: {said}")
    out += ["", "tied:"] if tied else []
    out += [f"  {_quoted(alias)}: {_quoted(owner)}" for alias, owner in (tied or {}).items()]
    return "\n".join(out) + "\n"


def _patterns(
    lines: Mapping[str, Drafted | Pending], captures: Sequence[tuple[str, str]]
) -> dict[str, Drafted | Pending]:
    """One pattern for the parameters whose names differ only in numbers, with what most of them have.

    The others are listed under their own names.
    """
    families: dict[str, list[str]] = {}
    for name in lines:
        if not name or re.search(r"[{}*\s]|\.\.", f".{name}."):
            raise Unsupported(f"a spec can't spell the parameter name '{name}'")
        families.setdefault(_family(name, captures), []).append(name)
    out: dict[str, Drafted | Pending] = {}
    for family, members in families.items():
        if len(members) == 1 and not any(capture in family for _, capture in captures):
            out[members[0]] = lines[members[0]]
            continue
        common = Counter(lines[name] for name in members).most_common(1)[0][0]
        out[family] = common
        out.update({name: lines[name] for name in members if lines[name] != common})
    return out


def _family(name: str, captures: Sequence[tuple[str, str]]) -> str:
    for found, capture in captures:
        name = re.sub(found, capture, name)
    letters = iter(_CAPTURES)
    return _NUMBER.sub(lambda match: f"{{{letter}}}" if (letter := next(letters, "")) else match[0], name)


def _quoted(text: str) -> str:
    return text if _PLAIN.fullmatch(text) else json.dumps(text)
