"""Sizes and conditions: ``config.num_attention_heads / kv_heads``, ``config.head_dim or hidden / 8``, ``not config.x``.

Plain arithmetic with names, whole numbers and quoted words. Nothing is ever evaluated as Python. ``/`` divides exactly
and refuses a remainder; ``//`` drops the remainder. ``a or b`` is a unless that is missing, null, false or 0.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from ucp.errors import SpecError
from ucp.spec.positions import SpecText

Span = tuple[int, int]
Value = int | bool | str | None | float

WORDS = ("or", "and", "not", "true", "false", "null")


@dataclass(frozen=True)
class Constant:
    """A number, a quoted word, true, false or null."""

    value: Value
    span: Span


@dataclass(frozen=True)
class Reference:
    """A name, such as ``hidden`` or ``config.hidden_size``."""

    name: str
    span: Span


@dataclass(frozen=True)
class Operation:
    """An operator and its operands (one for ``not`` and the sign, else two)."""

    operator: str
    sides: tuple[Node, ...]
    span: Span


Node = Constant | Reference | Operation


@dataclass(frozen=True)
class Formula:
    """A parsed size or condition."""

    root: Node
    source: SpecText

    def references(self) -> tuple[Reference, ...]:
        """Every name in it, from left to right."""
        return tuple(_references(self.root))


class Missing(Exception):
    """A name has no value. Only a formula that can do without it still has a result."""

    def __init__(self, reference: Reference, why: str) -> None:
        super().__init__(why)
        self.reference = reference
        self.why = why


def _references(node: Node) -> Iterator[Reference]:
    if isinstance(node, Reference):
        yield node
    elif isinstance(node, Operation):
        for side in node.sides:
            yield from _references(side)


_TOKEN = re.compile(
    r"(?P<number>[0-9]+)|(?P<name>[A-Za-z_][A-Za-z0-9_]*(?:\.[A-Za-z_][A-Za-z0-9_]*)*)"
    r"|(?P<word>'[^']*'|\"[^\"]*\")|(?P<sign>//|==|!=|[-+*/()])|(?P<space>\s+)"
)
_LEVELS = (("or",), ("and",), ("==", "!="), ("+", "-"), ("*", "/", "//"))


def parse(source: SpecText) -> Formula:
    """Read a size or a condition. Raises a SpecError that marks what is wrong."""
    return _ArithmeticParser(source).formula()


class _ArithmeticParser:
    def __init__(self, source: SpecText) -> None:
        self.source = source
        self.tokens: list[tuple[str, str, Span]] = []
        self.at = 0
        self.depth = 0
        at = 0
        while at < len(source.text):
            match = _TOKEN.match(source.text, at)
            if match is None:
                raise source.refuse(
                    (at, at + 1),
                    f"'{source.text[at]}' has no meaning here; a size has names, numbers, + - * / // ( ) and 'or'",
                )
            if match.lastgroup != "space":
                self.tokens.append((str(match.lastgroup), match[0], match.span()))
            at = match.end()
        self.tokens.append(("end", "the end", (at, at)))

    def formula(self) -> Formula:
        root = self.level(0)
        kind, text, span = self.tokens[self.at]
        if kind != "end":
            raise self.source.refuse(span, f"'{text}' was not expected here; an operator (+ - * / //, or) was")
        return Formula(root, self.source)

    def level(self, k: int) -> Node:
        if k == len(_LEVELS):
            return self.unary()
        left = self.level(k + 1)
        while self.tokens[self.at][1] in _LEVELS[k]:
            operator = self.tokens[self.at][1]
            self.at += 1
            right = self.level(k + 1)
            left = Operation(operator, (left, right), (left.span[0], right.span[1]))
        return left

    def unary(self) -> Node:
        kind, text, span = self.tokens[self.at]
        self.depth += 1
        if self.depth > 50:
            raise self.source.refuse(span, "nested more than 50 deep")
        try:
            if text in ("not", "-") and kind in ("name", "sign"):
                self.at += 1
                side = self.unary()
                return Operation(text, (side,), (span[0], side.span[1]))
            return self.atom()
        finally:
            self.depth -= 1

    def atom(self) -> Node:
        kind, text, span = self.tokens[self.at]
        self.at += kind != "end"
        if kind == "number":
            return Constant(int(text[:30]), span)
        if kind == "word":
            return Constant(text[1:-1], span)
        if kind == "name" and text in ("true", "false", "null"):
            return Constant({"true": True, "false": False, "null": None}[text], span)
        if kind == "name" and text not in WORDS:
            return Reference(text, span)
        if text == "(":
            inner = self.level(0)
            end = self.tokens[self.at]
            if end[1] != ")":
                raise self.source.refuse(end[2], f"expected ')', found '{end[1]}'")
            self.at += 1
            return inner
        found = "the end" if kind == "end" else f"'{text}'"
        raise self.source.refuse(span, f"expected a name, a number or '(', found {found}")


def evaluate(formula: Formula, lookup: Callable[[Reference], Value]) -> Value:
    """The formula's value. ``lookup`` gives a name's value, or raises Missing.

    Raises Missing if it can't do without a name that has no value, SpecError for arithmetic without an exact result.
    """
    return _Evaluation(formula.source, lookup).of(formula.root)


class _Evaluation:
    def __init__(self, source: SpecText, lookup: Callable[[Reference], Value]) -> None:
        self.source = source
        self.lookup = lookup

    def of(self, node: Node) -> Value:
        if isinstance(node, Constant):
            return node.value
        if isinstance(node, Reference):
            return self.lookup(node)
        operator = node.operator
        if operator == "or":
            try:
                left = self.of(node.sides[0])
            except Missing:
                left = None
            return left if left else self.of(node.sides[1])
        left = self.of(node.sides[0])
        if operator == "not":
            return not left
        if operator == "and":
            return self.of(node.sides[1]) if left else left
        if operator in ("==", "!="):
            return (left == self.of(node.sides[1])) == (operator == "==")
        numbers = [self.number(side) for side in node.sides]
        if operator == "-" and len(numbers) == 1:
            return -numbers[0]
        a, b = numbers
        if operator in ("/", "//"):
            return self.divided(node, a, b)
        out = {"+": a + b, "-": a - b, "*": a * b}[operator]
        if abs(out) >= 2**62:
            raise self.source.refuse(node.span, "the result is too large for a size")
        return out

    def number(self, node: Node) -> int:
        value = self.of(node)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int):
            if value is None and isinstance(node, Reference):
                raise Missing(node, f"'{node.name}' is null")
            raise self.source.refuse(node.span, f"arithmetic needs whole numbers, and this is {value!r}")
        return value

    def divided(self, node: Operation, a: int, b: int) -> int:
        if b == 0:
            raise self.source.refuse(node.span, f"{a} is divided by zero")
        if node.operator == "/" and a % b:
            raise self.source.refuse(
                node.span,
                f"{a} / {b} leaves a remainder of {a % b}; if the model drops it, write '//'",
            )
        return a // b


def refused(formula: Formula, missing: Missing) -> SpecError:
    """The error for a name that has no value and that the formula can't do without."""
    references = [r for r in formula.references() if r.name == missing.reference.name]
    span = references[0].span if references else (0, len(formula.source.text))
    return formula.source.refuse(span, missing.why)
