"""A spec joined with a model's config. Sizes are numbers, conditions are decided, and names have their expressions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ucp.errors import BadArgument, SpecError
from ucp.spec import arithmetic
from ucp.spec.arithmetic import Formula, Missing, Reference, Value
from ucp.spec.grammar import Expression, names
from ucp.spec.language import Line, Spec, Tie
from ucp.spec.patterns import Pattern
from ucp.spec.positions import suggestion


@dataclass(frozen=True)
class Active:
    """A line of the spec that counts for this model, with the expression that its condition chose. states: those that
    have only some of the parameter's axes, with their expressions."""

    pattern: Pattern
    expression: Expression
    optional: bool
    layout: bool
    states: Mapping[str, Expression] = field(default_factory=dict)


@dataclass(frozen=True)
class Found:
    """What the spec says of one name.

    captures: the numbers in the name.
    tied_to: the parameter that owns the tensor, if the name is tied to one.
    states: what the line says of states that have only some of the parameter's axes.
    """

    name: str
    pattern: Pattern
    expression: Expression
    captures: Mapping[str, int]
    tied_to: str | None
    states: Mapping[str, Expression] = field(default_factory=dict)


@dataclass(frozen=True)
class Bound:
    """A spec for one model. sizes: those that have a value. absent: those that have none, with the reason."""

    spec: Spec
    sizes: Mapping[str, int]
    absent: Mapping[str, SpecError]
    lines: tuple[Active, ...]
    ties: tuple[Tie, ...]

    def owner(self, name: str) -> str | None:
        """The parameter that this name is tied to, or None."""
        for tie in self.ties:
            captures = tie.pattern.match(name)
            if captures is not None:
                return tie.to.fill(captures)
        return None

    def find(self, name: str) -> Found | None:
        """What the spec says of this name by the most specific line that matches; None if no line does.

        A layout's own lines go before all others. Raises SpecError if two lines are equally specific, and for an
        expression with a size that the config does not have.
        """
        matches = [(a, c) for a in self.lines if (c := a.pattern.match(name)) is not None]
        if not matches:
            return None
        best = max((a.layout, a.pattern.rank) for a, _ in matches)
        first, *others = [(a, c) for a, c in matches if (a.layout, a.pattern.rank) == best]
        if others:
            other = others[0][0].pattern
            raise other.refuse(
                f"'{name}' matches '{other}' and '{first[0].pattern}' (line {first[0].pattern.source.position.line}), "
                "which are equally specific; write one of them out further"
            )
        active, captures = first
        for axis in names(active.expression):
            if axis.name in self.absent:
                raise active.expression.refuse(
                    axis, f"'{name}' needs '{axis.name}', and {self.absent[axis.name].message}"
                )
        return Found(name, active.pattern, active.expression, captures, self.owner(name), active.states)


def bind(
    spec: Spec,
    config: Mapping[str, Any] | None = None,
    settings: Mapping[str, int] | None = None,
    layout: str | None = None,
) -> Bound:
    """Join a spec with the config of a model (config.json as a mapping) and with sizes that are set by hand.

    settings: size, or ``config.`` key -> number. They go before the config.
    layout: the section under ``layouts:`` that counts, if the spec has it.

    A size that can't be computed is kept in ``absent``, and refused once a parameter needs it. Raises SpecError for
    arithmetic without an exact result, for conditions that can't be decided and for lines that are marked unknown.
    Raises BadArgument for a setting whose name is not a size of the spec.
    """
    _refuse_unknown(spec)
    settings = settings or {}
    keys = {k.removeprefix("config."): v for k, v in settings.items() if k.startswith("config.")}
    for name in settings:
        if not name.startswith("config.") and name not in spec.sizes:
            raise BadArgument(f"--set {name}: {spec.file} has no size '{name}'{suggestion(name, spec.sizes)}")
    values = _Values(spec, {**(config or {}), **keys}, {k: v for k, v in settings.items() if k in spec.sizes})
    sizes, absent = {}, {}
    for name in spec.sizes:
        try:
            sizes[name] = values.size(name)
        except Missing as missing:
            absent[name] = arithmetic.refused(spec.sizes[name], missing)
    lines = [*_active(spec.lines, values, False), *_active(spec.layouts.get(layout or "", ()), values, True)]
    ties = tuple(t for t in spec.ties if t.when is None or values.holds(t.when))
    return Bound(spec, sizes, absent, tuple(lines), ties)


def _refuse_unknown(spec: Spec) -> None:
    if spec.unknown:
        first, *others = spec.unknown
        listed = ", ".join(f"'{u.pattern}'" for u in others[:8]) + (", ..." if len(others) > 8 else "")
        more = f"; {len(others)} more are: {listed}" if others else ""
        raise first.pattern.refuse(f"'{first.pattern}' is marked unknown: {first.why}{more}")


def _active(lines: tuple[Line, ...], values: _Values, layout: bool) -> list[Active]:
    out = []
    for line in lines:
        chosen: Expression | None = line.expression
        if line.when is not None and not values.holds(line.when):
            chosen = line.otherwise
        if chosen is not None:
            out.append(Active(line.pattern, chosen, line.optional, layout, line.states))
    return out


class _Values:
    """The values of names. Each is computed once."""

    def __init__(self, spec: Spec, config: Mapping[str, Any], settings: Mapping[str, int]) -> None:
        self.spec = spec
        self.config = config
        self.known: dict[str, int] = dict(settings)

    def lookup(self, reference: Reference) -> Value:
        if not reference.name.startswith("config."):
            return self.size(reference.name)
        found: Any = {**self.spec.defaults, **self.config}
        for key in reference.name.split(".")[1:]:
            if not isinstance(found, Mapping) or key not in found:
                known = self.config if found is not None and isinstance(found, Mapping) else {}
                near = suggestion(key, known) if len(known) < 200 and "did you mean" in suggestion(key, known) else ""
                raise Missing(reference, f"the model's config has no '{key}'{near or '; give it with --set'}")
            found = found[key]
        if found is not None and not isinstance(found, (int, float, str)):
            raise Missing(reference, f"'{reference.name}' is no number")
        return found

    def size(self, name: str) -> int:
        if name not in self.known:
            formula = self.spec.sizes[name]
            value = arithmetic.evaluate(formula, self.lookup)
            if value is None:
                references = formula.references()
                if not references:
                    raise formula.source.refuse((0, len(formula.source.text)), f"the size '{name}' is null")
                raise Missing(references[0], f"'{references[-1].name}' is null")
            if isinstance(value, float) and value.is_integer():
                value = int(value)
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise formula.source.refuse(
                    (0, len(formula.source.text)), f"the size '{name}' is {value!r}; a size is a whole number from 0"
                )
            self.known[name] = value
        return self.known[name]

    def holds(self, condition: Formula) -> bool:
        try:
            return bool(arithmetic.evaluate(condition, self.lookup))
        except Missing as missing:
            raise arithmetic.refused(condition, missing) from None
