"""Another framework's names and tensors, made of this spec's parameters and the reverse, by the lines under ``names:``.

A line has one larger parameter and the smaller ones that it is made of. With ``from``, the larger one is on the
framework's side (q, k and v fused). With ``to``, it is on the spec's own side (experts that the framework keeps apart).
With a plain name, the parameter is the same on both sides. Axes match by name, so another order of them is a
transposition. The smaller ones fill the segments of the larger one in order.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from itertools import product
from math import prod

import numpy as np

from ucp import limits
from ucp.errors import DamagedCheckpoint, SpecError
from ucp.geometry import Blocks, Ints, Shape, concat
from ucp.spec.arrange import View, carry, piece, segments
from ucp.spec.bound import Bound
from ucp.spec.grammar import Expression
from ucp.spec.language import Renaming
from ucp.spec.patterns import Pattern, Template


@dataclass(frozen=True)
class Contribution:
    """What one smaller parameter, ``source``, gives to a larger one.

    shape: of the smaller parameter.
    views: for each of its segments, how it lies in the smaller parameter and in the larger one.
    """

    source: str
    shape: Shape
    views: tuple[tuple[View, View], ...]

    def into(self, blocks: Blocks) -> tuple[Blocks, Ints]:
        """Boxes of the smaller parameter as boxes of the larger one, and the block that each of them is a part of."""
        return _joined([carry(blocks, here, there) for here, there in self.views], len(self.views[0][1].shape))

    def back(self, blocks: Blocks) -> tuple[Blocks, Ints]:
        """Boxes of the larger parameter as boxes of the smaller one. What belongs to other parameters is left out."""
        return _joined([carry(blocks, there, here) for here, there in self.views], len(self.shape))


@dataclass(frozen=True)
class Assembled:
    """A larger parameter: its shape, and the parts that make it."""

    name: str
    shape: Shape
    parts: tuple[Contribution, ...]


@dataclass(frozen=True)
class Moves:
    """What becomes of names. Names that no line is about are in none of these.

    plain: name -> its new name.
    split: name -> what it is taken apart into.
    joined: new name -> what it is made of.
    """

    plain: Mapping[str, str]
    split: Mapping[str, Assembled]
    joined: Mapping[str, Assembled]


@dataclass
class _JoinedParameters:
    """Smaller parameters that make one larger one by a line, collected as they are found."""

    renaming: Renaming
    captures: Mapping[str, int]
    names: list[str]


def moves(bound: Bound, framework: str, names: Collection[str], *, to_framework: bool) -> Moves:
    """What becomes of the spec's own names in a framework (``to_framework``), or of a framework's in the spec.

    Raises SpecError if two lines are equally specific for a name, if its numbers lead out of an axis, or if the axes of
    the two sides don't match. Raises DamagedCheckpoint if a part of a parameter is not among the names.
    """
    plain: dict[str, str] = {}
    split: dict[str, Assembled] = {}
    groups: dict[str, _JoinedParameters] = {}
    present = frozenset(names)
    for name in names:
        line = _line(bound, framework, name, to_framework, present)
        if line is None:
            continue
        renaming, side, captures = line
        if renaming.is_plain:
            new = (renaming.sources[0] if isinstance(side, Pattern) else renaming.pattern).fill(captures)
            if new is None:
                raise side.source.refuse((0, len(side.source.text)), f"'{name}' leads to a number below 0")
            plain[name] = new
        elif isinstance(side, Pattern):
            split[name] = _assembled(bound, renaming, captures, name)
        else:
            group = groups.setdefault(renaming.pattern.fill(captures), _JoinedParameters(renaming, captures, []))
            group.names.append(name)
    joined = {name: _assembled(bound, group.renaming, group.captures, name) for name, group in groups.items()}
    for name, made in joined.items():
        parts, there = [part.source for part in made.parts], set(groups[name].names)
        missing = [part for part in parts if part not in there]
        if missing:
            raise DamagedCheckpoint(
                f"'{name}' is made of {len(parts)} parameters by {bound.spec.file}, and {len(missing)} of them are not "
                f"there, such as '{missing[0]}'; files are missing, or the config is another model's"
            )
        if len(there) > len(parts):
            stray = min(there - set(parts))
            raise groups[name].renaming.pattern.refuse(f"'{stray}' is none of the {len(parts)} that make '{name}'")
    return Moves(plain, split, joined)


def is_about(bound: Bound, framework: str, name: str) -> bool:
    """Whether a line is about this name of a framework."""
    return _line(bound, framework, name, to_framework=False) is not None


def assemble(bound: Bound, framework: str, name: str) -> Assembled | None:
    """How a parameter of another framework is made of this spec's parameters; None if no line says so.

    Raises SpecError if the axes of the two sides don't match by name, or if two lines are equally specific.
    """
    line = _line(bound, framework, name, to_framework=False)
    if line is None or not isinstance(line[1], Pattern):
        return None
    return _assembled(bound, line[0], line[2], name)


def _line(
    bound: Bound, framework: str, name: str, to_framework: bool, present: frozenset[str] = frozenset()
) -> tuple[Renaming, Pattern | Template, dict[str, int]] | None:
    """The most specific line about a name, the side of it that matches, and the numbers there.

    present: with ``to_framework``, all of the spec's own names, for lines that are about parameters beside others.
    """
    matches: list[tuple[Renaming, Pattern | Template, dict[str, int]]] = []
    for renaming in bound.spec.names.get(framework, ()):
        # With 'from' the larger parameter is the framework's, with 'to' the spec's own.
        sides = (renaming.pattern,) if renaming.apart == to_framework else renaming.sources
        found = [(renaming, side, c) for side in sides if (c := side.match(name)) is not None]
        found = [one for one in found if _is_meant(bound, renaming, one[2])]
        if to_framework and renaming.beside is not None:
            found = [one for one in found if renaming.beside.fill(one[2]) in present]
        matches += found
    if not matches:
        return None
    best = max(side.rank for _, side, _ in matches)
    first, *others = [m for m in matches if m[1].rank == best]
    if others:
        raise others[0][1].source.refuse(
            (0, len(others[0][1].source.text)),
            f"'{name}' matches '{first[1]}' (line {first[1].source.position.line}) as well, equally specific",
        )
    return first


def _is_meant(bound: Bound, renaming: Renaming, captures: Mapping[str, int]) -> bool:
    """Whether the numbers are those that the line is about."""
    below = all(captures[capture] < _size(bound, renaming, axis) for capture, axis in renaming.below.items())
    return below and all(
        captures[capture] >= _size(bound, renaming, axis) for capture, axis in renaming.from_on.items()
    )


def _assembled(bound: Bound, renaming: Renaming, captures: Mapping[str, int], name: str) -> Assembled:
    """A larger parameter, made by its line and the numbers in its name."""
    whole = _own(bound, renaming.pattern, name) if renaming.apart else renaming.expression
    parts: list[Contribution] = []
    sizes = [_size(bound, renaming, axis) for axis in renaming.stack.values()]
    if not 0 < (count := prod(sizes)) <= limits.EXPERTS:
        axes = ", ".join(f"{axis} is {size}" for axis, size in zip(renaming.stack.values(), sizes, strict=True))
        raise renaming.pattern.refuse(
            f"'{name}' would be made of {count} parameters in a stack, since {axes}; it is from 1 to {limits.EXPERTS}"
        )
    for index in product(*map(range, sizes)):
        fixed = dict(zip(renaming.stack.values(), index, strict=True))
        numbers = {**captures, **dict(zip(renaming.stack, index, strict=True))}
        for j, template in enumerate(renaming.sources):
            source = template.fill(numbers)
            if source is None:
                raise template.source.refuse((0, len(template.source.text)), f"'{name}' leads to a number below 0")
            if renaming.apart and whole is not None:
                part = renaming.expression or _piece(whole, j, len(renaming.sources), fixed)
            else:
                part = _own(bound, template, source, name)
            whole = whole or part
            parts.append(_part(bound, whole, part, source, j, len(renaming.sources), fixed))
    if whole is None:
        raise renaming.pattern.refuse(f"'{name}' is made of nothing")
    return Assembled(name, parts[0].views[0][1].shape, tuple(parts))


def _own(bound: Bound, side: Pattern | Template, name: str, larger: str | None = None) -> Expression:
    """The expression of one of the spec's own parameters."""
    found = bound.find(name)
    if found is None:
        what = f"'{larger}' is made of '{name}'" if larger else f"'{name}' is to be taken apart"
        raise side.source.refuse((0, len(side.source.text)), f"{what}, which no line names")
    return found.expression


def _piece(whole: Expression, j: int, count: int, fixed: Mapping[str, int]) -> Expression:
    """The j-th of ``count`` parts if its line does not say what it is: one segment, or all of the tensor."""
    if count not in (1, segments(whole)):
        raise _wrong_count(whole, count)
    return piece(whole, None if count == 1 else j, fixed)


def _part(
    bound: Bound, whole: Expression, part: Expression, source: str, j: int, count: int, fixed: Mapping[str, int]
) -> Contribution:
    own = segments(part)
    if count * own != segments(whole):
        raise _wrong_count(whole, count * own)
    views = []
    for k in range(own):
        here, there = View(part, bound.sizes, k, {}), View(whole, bound.sizes, j * own + k, fixed)
        _matching(whole, there, here, source)
        views.append((here, there))
    return Contribution(source, views[0][0].shape, tuple(views))


def _wrong_count(whole: Expression, found: int) -> SpecError:
    return whole.source.refuse(
        (0, len(whole.source.text)),
        f"'{whole}' has {segments(whole)} segments, and its sources {found}; each source fills one",
    )


def _size(bound: Bound, renaming: Renaming, axis: str) -> int:
    if axis in bound.absent:
        raise renaming.pattern.refuse(f"'{axis}' has no size")
    return bound.sizes[axis]


def _matching(target: Expression, there: View, here: View, source: str) -> None:
    a, b = set(there.leaves), set(here.leaves)
    if a != b:
        only = ", ".join(sorted(a - b)) or "none"
        theirs = ", ".join(sorted(b - a)) or "none"
        raise target.source.refuse(
            (0, len(target.source.text)),
            f"the axes of '{source}' don't match by name: only here {only}, only there {theirs}",
        )


def _joined(parts: list[tuple[Blocks, Ints]], ndim: int) -> tuple[Blocks, Ints]:
    return concat([blocks for blocks, _ in parts], ndim), np.concatenate([which for _, which in parts])
