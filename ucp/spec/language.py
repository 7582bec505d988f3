"""Read a spec: YAML with the position of every word, so that each refusal can point at the place it is about.

The reference of the language, with examples, is the README beside the catalogue. A `Spec` is what a file says.
`ucp.spec.bound` joins it with a model's config.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml

from ucp.errors import Position, SpecError
from ucp.spec import arithmetic, grammar, patterns
from ucp.spec.arithmetic import Formula
from ucp.spec.grammar import Expression
from ucp.spec.patterns import Pattern, Template
from ucp.spec.positions import suggestion
from ucp.spec.yaml_text import YamlEntry, YamlReader, compose, read_text

VERSION = 1
_LINE = ("axes", "states", "when", "else", "optional")
_RENAMING = ("from", "to", "as", "stack", "below", "from_on", "beside")
_SECTIONS = ("ucp", "model", "about", "defaults", "sizes", "parameters", "tied", "names", "layouts")
_CONSTANTS = tuple(f"tag:yaml.org,2002:{kind}" for kind in ("int", "float", "bool", "null", "str"))
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


@dataclass(frozen=True)
class Line:
    """One line under parameters.

    otherwise: the expression if ``when`` does not hold. Without it, the line does not count in that case.
    optional: the model may have no such parameter.
    states: the optimizer's states that have only some of the parameter's axes.
    """

    pattern: Pattern
    expression: Expression
    when: Formula | None = None
    otherwise: Expression | None = None
    optional: bool = False
    states: Mapping[str, Expression] = field(default_factory=dict)

    @property
    def expressions(self) -> tuple[Expression, ...]:
        """All that the line says."""
        return (self.expression, *((self.otherwise,) if self.otherwise else ()), *self.states.values())


@dataclass(frozen=True)
class Unknown:
    """A line that is yet to be written, as in drafts. why: what is known of it, and what to decide."""

    pattern: Pattern
    why: str


@dataclass(frozen=True)
class Tie:
    """One line under ``tied:``. The names that match are other names of ``to``."""

    pattern: Pattern
    to: Template
    when: Formula | None = None


@dataclass(frozen=True)
class Renaming:
    """One line under a framework's names: a parameter, and those of the other side that it is made of.

    pattern, sources: the framework's parameter, and the spec's own parameters that it is made of. With ``apart`` it is
    the spec's own parameter, and the framework's parameters that it is made of.
    expression: what ``as`` says: how the sources lie in the parameter; with ``apart``, what each of the sources is.
    stack: capture of the sources -> the axis that it counts.
    below, from_on: capture -> a size: the line is only about numbers below it, or only about those from it on.
    beside: the line is only about numbers that the spec's own parameter of this name is there with.
    """

    pattern: Pattern
    sources: tuple[Template, ...]
    expression: Expression | None = None
    stack: Mapping[str, str] = field(default_factory=dict)
    apart: bool = False
    below: Mapping[str, str] = field(default_factory=dict)
    from_on: Mapping[str, str] = field(default_factory=dict)
    beside: Template | None = None

    @property
    def is_plain(self) -> bool:
        """Whether only the name changes."""
        return len(self.sources) == 1 and self.expression is None and not self.stack


@dataclass(frozen=True)
class Spec:
    """What a spec says.

    defaults: config keys that config.json may leave out -> their values in that case.
    unknown: lines that are yet to be written. Until they are, the spec can't be used.
    """

    file: str
    models: tuple[str, ...]
    about: str
    defaults: Mapping[str, Any]
    sizes: Mapping[str, Formula]
    lines: tuple[Line, ...]
    ties: tuple[Tie, ...]
    names: Mapping[str, tuple[Renaming, ...]]
    layouts: Mapping[str, tuple[Line, ...]]
    unknown: tuple[Unknown, ...] = ()


def load(path: str | os.PathLike[str]) -> Spec:
    """Read a spec's file. Raises a SpecError that points at the first thing that is wrong, or OSError."""
    return loads(read_text(path), os.fspath(path))


def loads(text: str, file: str = "spec") -> Spec:
    """Read a spec from its text; ``file`` names it in refusals."""
    return _SpecReader(file).spec(compose(text, file))


def names_alone(parts: Mapping[str, yaml.Node], file: str, framework: str) -> Spec:
    """A spec of the sections that say how names change: ``sizes:``, ``defaults:``, ``parameters:`` (of what is put
    together or taken apart) and ``names:``, whose lines are all of this one framework."""
    reader = _SpecReader(file)
    renamings = tuple(reader.renaming(entry) for entry in reader.section(parts, "names"))
    return reader.joined(parts, (), {framework: renamings})


class _SpecReader(YamlReader):
    def spec(self, root: yaml.Node | None) -> Spec:
        parts = {e.key.text: e.value for e in self.entries(root, "a spec", _SECTIONS)}
        start = Position(self.file, 1, 1)
        for needed in ("ucp", "model", "parameters"):
            if needed not in parts:
                raise SpecError(f"the spec has no '{needed}:'; it needs ucp: {VERSION}, model: and parameters:", start)
        version = self.text(parts["ucp"], "ucp")
        if version.text != str(VERSION):
            raise version.refuse(
                (0, len(version.text)), f"version {version.text} of the language; this program reads version {VERSION}"
            )
        names = {e.key.text: self.renamings(e) for e in self.section(parts, "names")}
        return self.joined(parts, self.models(parts["model"]), names)

    def joined(
        self, parts: Mapping[str, yaml.Node], models: tuple[str, ...], names: dict[str, tuple[Renaming, ...]]
    ) -> Spec:
        parameters = [self.unknown(e) or self.line(e) for e in self.section(parts, "parameters")]
        spec = Spec(
            self.file,
            models,
            " ".join(self.text(parts["about"], "about").text.split()) if "about" in parts else "",
            {e.key.text: self.constant(e.value) for e in self.section(parts, "defaults")},
            {e.key.text: self.size(e) for e in self.section(parts, "sizes")},
            tuple(line for line in parameters if isinstance(line, Line)),
            tuple(self.tie(e) for e in self.section(parts, "tied")),
            names,
            {
                e.key.text: tuple(self.line(i) for i in self.entries(e.value, f"layouts: {e.key.text}"))
                for e in self.section(parts, "layouts")
            },
            tuple(line for line in parameters if isinstance(line, Unknown)),
        )
        _check(spec)
        return spec

    def section(self, parts: Mapping[str, yaml.Node], name: str) -> Iterator[YamlEntry]:
        return self.entries(parts[name], f"{name}:") if name in parts else iter(())

    def models(self, node: yaml.Node) -> tuple[str, ...]:
        nodes = node.value if isinstance(node, yaml.SequenceNode) else [node]
        out = tuple(self.text(n, "model").text for n in nodes)
        if not out or not all(out):
            raise self.refuse(node, "model: names no model; write the model_type of its config.json")
        return out

    def constant(self, node: yaml.Node) -> Any:
        if not isinstance(node, yaml.ScalarNode):
            raise self.refuse(node, "a default must be a number, true, false, null or a text")
        if node.tag not in _CONSTANTS:
            raise self.refuse(node, f"a default must be a number, true, false, null or a text, and this is {node.tag}")
        try:
            return yaml.SafeLoader("").construct_object(node)
        except (yaml.YAMLError, ValueError):
            raise self.refuse(node, f"'{node.value}' can't be read as {node.tag.rpartition(':')[2]}") from None

    def size(self, entry: YamlEntry) -> Formula:
        name = entry.key
        if not _NAME.fullmatch(name.text) or name.text in grammar.RESERVED:
            why = "is a word of the language" if name.text in grammar.RESERVED else "is no name (letters, digits and _)"
            raise name.refuse((0, len(name.text)), f"'{name.text}' {why}; call the size something else")
        return arithmetic.parse(self.text(entry.value, f"the size '{name.text}'"))

    def condition(self, node: yaml.Node) -> Formula:
        return arithmetic.parse(self.text(node, "when"))

    def boolean(self, node: yaml.Node, what: str) -> bool:
        source = self.text(node, what)
        if source.text not in ("true", "false"):
            raise source.refuse((0, len(source.text)), f"{what} is true or false")
        return source.text == "true"

    def unknown(self, entry: YamlEntry) -> Unknown | None:
        """The line if it is marked as unknown."""
        if not isinstance(entry.value, yaml.MappingNode) or len(entry.value.value) != 1:
            return None
        key, why = entry.value.value[0]
        if self.text(key, "a key").text != "unknown":
            return None
        return Unknown(patterns.parse(entry.key), self.text(why, "unknown").text)

    def line(self, entry: YamlEntry) -> Line:
        pattern = patterns.parse(entry.key)
        if not isinstance(entry.value, yaml.MappingNode):
            return Line(pattern, grammar.parse(self.text(entry.value, "an expression")))
        what = f"'{entry.key.text}'"
        more = {e.key.text: e.value for e in self.entries(entry.value, what, _LINE)}
        if "axes" not in more:
            raise self.refuse(entry.value, f"{what} has no 'axes:', the expression of its dimensions")
        if "else" in more and "when" not in more:
            raise self.refuse(more["else"], f"'else' of {what} needs a 'when'")
        if "else" in more and "states" in more:
            raise self.refuse(more["states"], f"{what} has 'else', so 'states' could be of either; write two lines")
        axes = grammar.parse(self.text(more["axes"], "axes"))
        return Line(
            pattern,
            axes,
            self.condition(more["when"]) if "when" in more else None,
            grammar.parse(self.text(more["else"], "else")) if "else" in more else None,
            self.boolean(more["optional"], "optional") if "optional" in more else False,
            {e.key.text: self.state(e, axes) for e in self.entries(more["states"], f"states of {what}")}
            if "states" in more
            else {},
        )

    def state(self, entry: YamlEntry, axes: Expression) -> Expression:
        """What a state of a parameter with these axes is made of."""
        found = grammar.parse(self.text(entry.value, f"the state '{entry.key.text}'"))
        known = [axis.name for axis in grammar.names(axes)]
        for axis in grammar.names(found):
            if axis.name not in known:
                raise found.refuse(
                    axis,
                    f"'{axis.name}' is no axis of the parameter, '{axes}'{suggestion(axis.name, known)}; a state has "
                    "some of its parameter's axes, or 1",
                )
        return found

    def tie(self, entry: YamlEntry) -> Tie:
        pattern = patterns.parse(entry.key)
        when = None
        if isinstance(entry.value, yaml.MappingNode):
            what = f"'{entry.key.text}'"
            more = {e.key.text: e.value for e in self.entries(entry.value, what, ("to", "when"))}
            if "to" not in more:
                raise self.refuse(entry.value, f"{what} has no 'to:', the parameter that it is tied to")
            to = patterns.template(self.text(more["to"], "to"))
            when = self.condition(more["when"]) if "when" in more else None
        else:
            to = patterns.template(self.text(entry.value, "the parameter that it is tied to"))
        _known_captures(to, pattern.captures)
        return Tie(pattern, to, when)

    def renamings(self, entry: YamlEntry) -> tuple[Renaming, ...]:
        return tuple(self.renaming(e) for e in self.entries(entry.value, f"names: {entry.key.text}"))

    def renaming(self, entry: YamlEntry) -> Renaming:
        pattern = patterns.parse(entry.key)
        if not isinstance(entry.value, yaml.MappingNode):
            to = patterns.template(self.text(entry.value, "the parameter that it renames"))
            _known_captures(to, pattern.captures)
            return Renaming(pattern, (to,))
        what = f"'{entry.key.text}'"
        more = {e.key.text: e.value for e in self.entries(entry.value, what, _RENAMING)}
        if ("from" in more) == ("to" in more):
            raise self.refuse(
                entry.value,
                f"{what} needs either 'from:', the spec's parameters that it is made of, or 'to:', the framework's "
                "that it is taken apart into",
            )
        side = "to" if "to" in more else "from"
        node = more[side]
        nodes = node.value if isinstance(node, yaml.SequenceNode) else [node]
        sources = tuple(patterns.template(self.text(n, side)) for n in nodes)
        stack, below, from_on = (self.counted(more, key) for key in ("stack", "below", "from_on"))
        for capture in (*below, *from_on):
            if capture not in pattern.captures:
                raise self.refuse(entry.value, f"{what} has no {{{capture}}} whose numbers could be chosen")
        for source in sources:
            _known_captures(source, (*pattern.captures, *stack))
        beside = patterns.template(self.text(more["beside"], "beside")) if "beside" in more else None
        if beside is not None:
            if side == "to":
                raise self.refuse(entry.value, f"{what} is of the spec's own side, and 'beside:' is for 'from:'")
            _known_captures(beside, pattern.captures)
        if side == "from" and "as" not in more and (len(sources) != 1 or stack):
            raise self.refuse(
                entry.value, f"{what} is made of several parameters and has no 'as:', which says how they lie in it"
            )
        expression = grammar.parse(self.text(more["as"], "as")) if "as" in more else None
        return Renaming(pattern, sources, expression, stack, side == "to", below, from_on, beside)

    def counted(self, more: Mapping[str, Any], key: str) -> dict[str, str]:
        """What lies under a key such as 'stack:': captures, each with the name of a size."""
        return {e.key.text: self.text(e.value, key).text for e in self.entries(more[key], key)} if key in more else {}


def _known_captures(template: Template, known: tuple[str, ...]) -> None:
    for capture in template.captures:
        if capture not in known:
            at = template.source.text.index("{" + capture) if "{" + capture in template.source.text else 0
            raise template.source.refuse(
                (at, at + len(capture) + 1), f"nothing captures '{capture}'{suggestion(capture, known)}"
            )


def _check(spec: Spec) -> None:
    """Refuse what can be told from the spec alone: names without a size, circles, captures that count no axis."""
    sizes = spec.sizes
    for formula in sizes.values():
        for reference in formula.references():
            if not reference.name.startswith("config.") and reference.name not in sizes:
                raise formula.source.refuse(
                    reference.span,
                    f"'{reference.name}' is no size of this spec{suggestion(reference.name, sizes)} "
                    "(keys of the model's config begin with 'config.')",
                )
    _refuse_circles(sizes)
    for group in (spec.lines, *spec.layouts.values()):
        _refuse_equals(group)
    every = [*spec.lines, *(line for lines in spec.layouts.values() for line in lines)]
    for line in every:
        for expression in (*line.expressions, *line.pattern.cuts):
            _known_names(expression, sizes)
        _condition(line.when, sizes)
    for tie in spec.ties:
        _condition(tie.when, sizes)
    for renamings in spec.names.values():
        for renaming in renamings:
            if renaming.expression:
                _known_names(renaming.expression, sizes)
            kinds = {"stack": renaming.stack, "below": renaming.below, "from_on": renaming.from_on}
            for kind, axis in ((kind, axis) for kind, counted in kinds.items() for axis in counted.values()):
                if axis not in sizes:
                    raise renaming.pattern.refuse(f"{kind}: '{axis}' is no size of this spec{suggestion(axis, sizes)}")


def _refuse_equals(lines: tuple[Line, ...]) -> None:
    """Refuse two lines without conditions that are equally specific and match each other's example.

    A name that both match could not choose between them.
    """
    for k, line in enumerate(lines):
        for other in lines[:k]:
            a, b = line.pattern, other.pattern
            if (
                line.when
                or other.when
                or a.rank != b.rank
                or a.match(b.example()) is None
                or b.match(a.example()) is None
            ):
                continue
            raise a.refuse(
                f"'{a}' and '{b}' (line {b.source.position.line}) are equally specific, and both match "
                f"'{a.example()}'; write one of them out further"
            )


def _known_names(expression: Expression, sizes: Mapping[str, Formula]) -> None:
    for axis in grammar.names(expression):
        if axis.name not in sizes:
            raise expression.refuse(
                axis,
                f"'{axis.name}' is no size of this spec{suggestion(axis.name, sizes)}"
                if sizes
                else f"'{axis.name}' has no size; add it under sizes:",
            )


def _condition(formula: Formula | None, sizes: Mapping[str, Formula]) -> None:
    for reference in formula.references() if formula else ():
        if formula and not reference.name.startswith("config.") and reference.name not in sizes:
            raise formula.source.refuse(
                reference.span,
                f"'{reference.name}' is neither a size nor a key of the config (config.{reference.name})",
            )


def _refuse_circles(sizes: Mapping[str, Formula]) -> None:
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        if name in path:
            formula = sizes[path[-1]]
            span = next(r.span for r in formula.references() if r.name == name)
            raise formula.source.refuse(span, f"the size '{name}' needs itself: {' → '.join([*path, name])}")
        if name not in done:
            for reference in sizes[name].references():
                if reference.name in sizes:
                    visit(reference.name, (*path, name))
            done.add(name)

    for name in sizes:
        visit(name, ())


def unused_sizes(spec: Spec) -> tuple[str, ...]:
    """The sizes that no expression, condition or other size uses."""
    every = [*spec.lines, *(line for lines in spec.layouts.values() for line in lines)]
    used = {cut.name for line in every for e in line.pattern.cuts for cut in grammar.names(e)}
    for line in every:
        used |= {a.name for expression in line.expressions for a in grammar.names(expression)}
    conditions = [*(line.when for line in every), *(tie.when for tie in spec.ties)]
    formulas = [*spec.sizes.values(), *(c for c in conditions if c)]
    used |= {r.name for formula in formulas for r in formula.references()}
    for renamings in spec.names.values():
        for renaming in renamings:
            used |= {a.name for a in grammar.names(renaming.expression)} if renaming.expression else set()
            used |= {*renaming.stack.values(), *renaming.below.values(), *renaming.from_on.values()}
    return tuple(name for name in spec.sizes if name not in used)
