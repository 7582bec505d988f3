"""Merge files: how sources are combined, parameter by parameter.

    merge: 1
    sources: {a: runs/x@step100, b: runs/y}
    parameters:
      "model.layers.{i}.*": "lerp(a, b, t=i/31)"
      "lm_head.*": "a"
      "*": "0.7*a + 0.3*b"

Patterns are those of specs, except that ``*`` at the end stands for any rest, with dots. The most specific pattern
counts. An expression is a weighted sum of sources, or one call: ``lerp(a, b, t=)``, ``slerp(a, b, t=)``, ``task(base,
sum, scale=)``, ``ties(base, sum, density=, scale=)``, ``dare(base, sum, density=, seed=, scale=)``. Numbers may use
what the pattern captures. Python's parser reads an expression, but Python never runs it: anything else is refused.
"""

from __future__ import annotations

import ast
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ucp.errors import Position, SpecError
from ucp.merging.operations import Combination, Differences, Drawn, Largest, Lerp, Linear, Slerp
from ucp.spec import patterns
from ucp.spec.patterns import Pattern
from ucp.spec.positions import SpecText, suggestion
from ucp.spec.yaml_text import YamlEntry, YamlReader, compose, read_text

VERSION = 1
_LONGEST = 2000
"""Characters of an expression; more is no expression that anyone writes."""

_Sum = dict[int, float]
_Value = float | _Sum | Combination


@dataclass(frozen=True)
class Rule:
    """One line: a pattern of names, and the expression for them."""

    pattern: Pattern
    text: SpecText
    root: ast.expr


@dataclass(frozen=True)
class MergeFile:
    """What a merge file says. sources: name -> path, with ``@tag`` for one in a folder of several."""

    file: str
    sources: Mapping[str, str]
    rules: tuple[Rule, ...]

    def operation(self, name: str) -> Combination:
        """The operation for a parameter.

        Raises SpecError, which points at the line, if no pattern fits or numbers are wrong.
        """
        fitting = [(rule.pattern.rank, rule, found) for rule in self.rules if (found := _match(rule, name)) is not None]
        if not fitting:
            text = f"no pattern fits '{name}'; add a line for it, or one for \"*\""
            raise SpecError(text, Position(self.file, 1, 1))
        fitting.sort(key=lambda one: one[0], reverse=True)
        if len(fitting) > 1 and fitting[0][0] == fitting[1][0]:
            one, other = fitting[0][1].pattern, fitting[1][1].pattern
            raise one.refuse(f"'{name}' fits '{one}' and '{other}', which are equally specific; make one more so")
        _, rule, captured = fitting[0]
        return _RuleEvaluation(rule.text, {name: k for k, name in enumerate(self.sources)}, captured).operation(
            rule.root
        )


def load(path: str | os.PathLike[str]) -> MergeFile:
    """Read a merge file. Raises SpecError, which points at the first thing that is wrong, and OSError."""
    return loads(read_text(path), os.fspath(path))


def loads(text: str, file: str = "merge") -> MergeFile:
    """Read a merge file from its text. ``file`` is its name in refusals."""
    return _MergeFileReader(file).recipe(text)


class _MergeFileReader(YamlReader):
    def recipe(self, text: str) -> MergeFile:
        root = compose(text, self.file)
        parts = {e.key.text: e.value for e in self.entries(root, "a merge file", ("merge", "sources", "parameters"))}
        for needed in ("merge", "sources", "parameters"):
            if needed not in parts:
                raise SpecError(
                    f"it has no '{needed}:'; a merge file needs merge: {VERSION}, sources: and parameters:",
                    Position(self.file, 1, 1),
                )
        version = self.text(parts["merge"], "merge")
        if version.text != str(VERSION):
            raise version.refuse(
                (0, len(version.text)), f"version {version.text} of merge files; this program reads version {VERSION}"
            )
        sources = {e.key.text: self._source(e) for e in self.entries(parts["sources"], "sources:")}
        rules = tuple(self._rule(e) for e in self.entries(parts["parameters"], "parameters:"))
        recipe = MergeFile(self.file, sources, rules)
        for rule in rules:  # names and calls are checked before any checkpoint is opened
            captured = dict.fromkeys(rule.pattern.captures, 1)
            _RuleEvaluation(rule.text, _numbers(sources), captured).operation(rule.root)
        return recipe

    def _source(self, entry: YamlEntry) -> str:
        if not entry.key.text.isidentifier():
            raise entry.key.refuse((0, len(entry.key.text)), "a source is called by letters, digits and _")
        return self.text(entry.value, f"the source '{entry.key.text}'").text

    def _rule(self, entry: YamlEntry) -> Rule:
        text = self.text(entry.value, "an expression")
        return Rule(patterns.parse(entry.key), text, _parsed(text))


def _numbers(sources: Mapping[str, str]) -> dict[str, int]:
    return {name: k for k, name in enumerate(sources)}


def _match(rule: Rule, name: str) -> dict[str, int] | None:
    """The captured numbers. A ``*`` at the end of the pattern stands for any rest."""
    found = rule.pattern.match(name)
    if found is not None or not rule.pattern.source.text.endswith("*"):
        return found
    steps = rule.pattern.source.text.count(".")
    parts = name.split(".", steps)
    return rule.pattern.match(".".join([*parts[:-1], parts[-1].replace(".", "_")])) if len(parts) > steps else None


def _parsed(text: SpecText) -> ast.expr:
    if len(text.text) > _LONGEST:
        raise text.refuse((0, _LONGEST), f"an expression has at most {_LONGEST} characters")
    try:
        return ast.parse(f"({text.text})", mode="eval").body
    except SyntaxError as error:
        at = min(max((error.offset or 1) - 2, 0), len(text.text))
        raise text.refuse((at, at + 1), "not an expression; write a sum of sources such as 0.7*a + 0.3*b") from None
    except (RecursionError, MemoryError, ValueError):
        raise text.refuse((0, len(text.text)), "nested too deep, or not a text") from None


@dataclass
class _RuleEvaluation:
    """Evaluates an expression for one parameter. sources: name -> number. captured: the numbers of the pattern."""

    text: SpecText
    sources: Mapping[str, int]
    captured: Mapping[str, int]

    def operation(self, root: ast.expr) -> Combination:
        value = self.value(root)
        if isinstance(value, float):
            raise self.refuse(root, "a number is no tensor; name a source")
        return Linear(tuple(value.items())) if isinstance(value, dict) else value

    def refuse(self, node: ast.expr, message: str) -> SpecError:
        raw = f"({self.text.text})".encode()  # Python counts in bytes, from the bracket on
        first, last = (len(raw[:at].decode()) - 1 for at in (node.col_offset, node.end_col_offset or len(raw)))
        return self.text.refuse((first, last), message)

    def value(self, node: ast.expr) -> _Value:
        if isinstance(node, ast.Constant) and type(node.value) in (int, float):
            return float(node.value)  # type: ignore[arg-type]
        if isinstance(node, ast.Name):
            return self.named(node)
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.USub, ast.UAdd)):
            inner = self.linear(node.operand)
            return inner if isinstance(node.op, ast.UAdd) else _scaled(inner, -1.0)
        if isinstance(node, ast.BinOp):
            return self.binary(node)
        if isinstance(node, ast.Call):
            return self.call(node)
        raise self.refuse(node, "has no meaning here; an expression has sources, numbers, + - * / ( ) and calls")

    def named(self, node: ast.Name) -> _Value:
        if node.id in self.captured:
            return float(self.captured[node.id])
        if node.id not in self.sources:
            raise self.refuse(
                node, f"there is no source '{node.id}'{suggestion(node.id, (*self.sources, *self.captured))}"
            )
        return {self.sources[node.id]: 1.0}

    def linear(self, node: ast.expr) -> float | _Sum:
        value = self.value(node)
        if isinstance(value, (float, dict)):
            return value
        raise self.refuse(node, "a call gives the whole result and is no part of a sum")

    def number(self, node: ast.expr) -> float:
        value = self.value(node)
        if isinstance(value, float):
            return value
        raise self.refuse(node, "a number is needed here")

    def binary(self, node: ast.BinOp) -> float | _Sum:
        left, right = self.linear(node.left), self.linear(node.right)
        if isinstance(node.op, (ast.Add, ast.Sub)):
            return self.sum(node, left, right if isinstance(node.op, ast.Add) else _scaled(right, -1.0))
        if isinstance(node.op, ast.Mult):
            if isinstance(left, float):
                return _scaled(right, left)
            if isinstance(right, float):
                return _scaled(left, right)
            raise self.refuse(node, "tensors are not multiplied with each other; one side has to be a number")
        if isinstance(node.op, ast.Div):
            if not isinstance(right, float) or right == 0:
                raise self.refuse(node.right, "only a number other than 0 divides")
            return left / right if isinstance(left, float) else {k: weight / right for k, weight in left.items()}
        raise self.refuse(node, "this operator has no meaning here; there are + - * /")

    def sum(self, node: ast.BinOp, left: float | _Sum, right: float | _Sum) -> float | _Sum:
        if isinstance(left, float) and isinstance(right, float):
            return left + right
        if isinstance(left, float) or isinstance(right, float):
            raise self.refuse(node, "a number can't be added to a tensor")
        return {k: left.get(k, 0.0) + right.get(k, 0.0) for k in dict.fromkeys((*left, *right))}

    def call(self, node: ast.Call) -> Combination:
        if not isinstance(node.func, ast.Name) or node.func.id not in _CALLS:
            raise self.refuse(node.func, f"there is no such call; known are {', '.join(_CALLS)}")
        count, keys, make = _CALLS[node.func.id]
        given = {k.arg: k.value for k in node.keywords if k.arg is not None}
        if len(node.args) != count or any(isinstance(a, ast.Starred) for a in node.args):
            raise self.refuse(node, f"{node.func.id} is of {count} tensors, found {len(node.args)}")
        unknown = [key for key in given if key not in keys]
        if unknown or len(given) != len(node.keywords):
            raise self.refuse(node, f"{node.func.id} takes {', '.join(keys)}; found {', '.join(unknown) or '**'}")
        return make(self, node, {key: self.number(value) for key, value in given.items()})

    def source(self, node: ast.expr) -> int:
        value = self.value(node)
        if isinstance(value, dict) and list(value.values()) == [1.0]:
            return next(iter(value))
        raise self.refuse(node, "one source alone is needed here")

    def terms(self, node: ast.expr) -> tuple[tuple[int, float], ...]:
        value = self.linear(node)
        if isinstance(value, float):
            raise self.refuse(node, "a sum of sources is needed here")
        return tuple(value.items())


def _scaled(value: float | _Sum, factor: float) -> float | _Sum:
    return value * factor if isinstance(value, float) else {k: weight * factor for k, weight in value.items()}


def _needed(self: _RuleEvaluation, node: ast.Call, numbers: Mapping[str, float], key: str) -> float:
    if key not in numbers:
        raise self.refuse(node, f"needs {key}=")
    return numbers[key]


def _density(self: _RuleEvaluation, node: ast.Call, numbers: Mapping[str, float]) -> float:
    density = _needed(self, node, numbers, "density")
    if not 0 < density <= 1:
        raise self.refuse(node, f"a density lies above 0 and is at most 1, found {density:g}")
    return density


def _lerp(self: _RuleEvaluation, node: ast.Call, numbers: Mapping[str, float]) -> Combination:
    return Lerp(self.source(node.args[0]), self.source(node.args[1]), _needed(self, node, numbers, "t"))


def _slerp(self: _RuleEvaluation, node: ast.Call, numbers: Mapping[str, float]) -> Combination:
    return Slerp(self.source(node.args[0]), self.source(node.args[1]), _needed(self, node, numbers, "t"))


def _task(self: _RuleEvaluation, node: ast.Call, numbers: Mapping[str, float]) -> Combination:
    return Differences(self.source(node.args[0]), self.terms(node.args[1]), numbers.get("scale", 1.0))


def _ties(self: _RuleEvaluation, node: ast.Call, numbers: Mapping[str, float]) -> Combination:
    chosen = Largest(_density(self, node, numbers))
    base, terms = self.source(node.args[0]), self.terms(node.args[1])
    return Differences(base, terms, numbers.get("scale", 1.0), chosen, elected=True)


def _dare(self: _RuleEvaluation, node: ast.Call, numbers: Mapping[str, float]) -> Combination:
    chosen = Drawn(_density(self, node, numbers), math.floor(numbers.get("seed", 0)))
    base, terms = self.source(node.args[0]), self.terms(node.args[1])
    return Differences(base, terms, numbers.get("scale", 1.0), chosen)


_Maker = Callable[[_RuleEvaluation, ast.Call, Mapping[str, float]], Combination]
_CALLS: Mapping[str, tuple[int, tuple[str, ...], _Maker]] = {
    "lerp": (2, ("t",), _lerp),
    "slerp": (2, ("t",), _slerp),
    "task": (2, ("scale",), _task),
    "ties": (2, ("density", "scale"), _ties),
    "dare": (2, ("density", "seed", "scale"), _dare),
}
