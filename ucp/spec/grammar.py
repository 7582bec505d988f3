"""Expressions of named axes, such as ``(heads/tp head_dim) hidden``: from text to an immutable tree.

    expression = "scalar" | axes | "average" "(" axes "," dimension ")"
    axes       = axis axis ...                          one per dimension of the tensor
    axis       = atom [ "/" dimension "/" ... ]         cut over these mesh dimensions, the first outermost
    atom       = name | number | "(" axes ")"           a product, row-major, outermost first
               | "(" axes "|" axes ... ")"              segments, one after the other
               | "(" name "+" "pad" ")"                 a padded axis; it stands alone in its dimension
               | "repeat" "(" axes ")"                  must be cut; several ranks may hold copies of one element

Nothing here knows how large an axis is: `ucp.spec.evaluate` gives a tree its meaning.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ucp.errors import SpecError
from ucp.spec.positions import SpecText, suggestion

MESH = ("dp", "tp", "pp", "ep", "sp")
RESERVED = (*MESH, "average", "repeat", "pad", "scalar", "config", "or", "and", "not", "true", "false", "null")

Span = tuple[int, int]


@dataclass(frozen=True)
class AxisName:
    """An axis by its name."""

    name: str
    span: Span


@dataclass(frozen=True)
class Number:
    """An axis of a fixed size."""

    value: int
    span: Span


@dataclass(frozen=True)
class Padded:
    """``(name+pad)``: an axis that the saved tensor may have made longer."""

    name: str
    span: Span


@dataclass(frozen=True)
class Product:
    """``(a b)``: row-major, the first factor outermost."""

    factors: tuple[Axis, ...]
    span: Span


@dataclass(frozen=True)
class Sum:
    """``(a | b)``: segments, one after the other."""

    segments: tuple[Axis, ...]
    span: Span


@dataclass(frozen=True)
class Cut:
    """``axis/m``: consecutive parts of the axis, one for each rank of the mesh dimensions ``over``.

    repeat: if there are more ranks than elements, several ranks in a row hold copies of one element.
    """

    axis: Axis
    over: tuple[str, ...]
    repeat: bool
    span: Span


Axis = AxisName | Number | Padded | Product | Sum | Cut


@dataclass(frozen=True)
class Expression:
    """One axis per dimension. average: the mesh dimension over which copies are averaged, if any."""

    dims: tuple[Axis, ...]
    average: str | None
    source: SpecText

    def __str__(self) -> str:
        dims = " ".join(map(spell, self.dims)) or "scalar"
        return f"average({dims}, {self.average})" if self.average else dims

    def refuse(self, axis: Axis, message: str) -> SpecError:
        """The error that marks this axis."""
        return self.source.refuse(axis.span, message)


def spell(axis: Axis) -> str:
    """The axis in its canonical spelling. Two axes with the same spelling are the same axis."""
    if isinstance(axis, AxisName):
        return axis.name
    if isinstance(axis, Number):
        return str(axis.value)
    if isinstance(axis, Padded):
        return f"({axis.name}+pad)"
    if isinstance(axis, Product):
        return f"({' '.join(map(spell, axis.factors))})"
    if isinstance(axis, Sum):
        return f"({' | '.join(_bare(s) for s in axis.segments)})"
    inner = spell(axis.axis)
    if axis.repeat:
        inner = f"repeat{inner}" if inner.startswith("(") else f"repeat({inner})"
    return "/".join([inner, *axis.over])


def _bare(segment: Axis) -> str:
    text = spell(segment)
    return text[1:-1] if isinstance(segment, Product) else text


def walk(axis: Axis) -> Iterator[Axis]:
    """The axis and everything inside it, outermost first."""
    yield axis
    for child in children(axis):
        yield from walk(child)


def children(axis: Axis) -> tuple[Axis, ...]:
    """What the axis is made of."""
    if isinstance(axis, Product):
        return axis.factors
    if isinstance(axis, Sum):
        return axis.segments
    if isinstance(axis, Cut):
        return (axis.axis,)
    return ()


def cuts(expression: Expression) -> tuple[Cut, ...]:
    """Every cut in the expression, from left to right."""
    return tuple(a for dim in expression.dims for a in walk(dim) if isinstance(a, Cut))


def names(expression: Expression) -> tuple[AxisName | Padded, ...]:
    """Every named axis in the expression, from left to right."""
    return tuple(a for dim in expression.dims for a in walk(dim) if isinstance(a, (AxisName, Padded)))


_TOKEN = re.compile(r"(?P<name>[A-Za-z_][A-Za-z0-9_]*)|(?P<number>[0-9]+)|(?P<sign>[()|/+,])|(?P<space>\s+)")


@dataclass(frozen=True)
class _Token:
    kind: str  # name, number, sign or end
    text: str
    span: Span


def _tokens(source: SpecText) -> list[_Token]:
    out, at = [], 0
    while at < len(source.text):
        match = _TOKEN.match(source.text, at)
        if match is None:
            raise source.refuse(
                (at, at + 1),
                f"'{source.text[at]}' has no meaning here; an expression has names, numbers and the signs ( ) | / + ,",
            )
        if match.lastgroup != "space":
            out.append(_Token(str(match.lastgroup), match[0], match.span()))
        at = match.end()
    return [*out, _Token("end", "the end", (at, at))]


def parse(source: SpecText) -> Expression:
    """Read one expression. Raises a SpecError that marks what is wrong and says what is allowed."""
    return _ExpressionParser(source).expression()


class _ExpressionParser:
    def __init__(self, source: SpecText) -> None:
        self.source = source
        self.tokens = _tokens(source)
        self.at = 0
        self.depth = 0

    @property
    def token(self) -> _Token:
        return self.tokens[self.at]

    def take(self) -> _Token:
        self.at += 1
        return self.tokens[self.at - 1]

    def is_sign(self, sign: str) -> bool:
        return self.token.kind == "sign" and self.token.text == sign

    def expect(self, sign: str, why: str) -> _Token:
        if not self.is_sign(sign):
            raise self.refuse(self.token.span, f"expected '{sign}' {why}, found {self.found()}")
        return self.take()

    def found(self) -> str:
        return "the end" if self.token.kind == "end" else f"'{self.token.text}'"

    def refuse(self, span: Span, message: str) -> SpecError:
        return self.source.refuse(span, message)

    def called(self, word: str) -> bool:
        """Whether ``word (`` comes next."""
        following = self.tokens[min(self.at + 1, len(self.tokens) - 1)]
        return self.token.text == word and following.kind == "sign" and following.text == "("

    def expression(self) -> Expression:
        average = None
        if self.token.kind == "end":
            raise self.refuse(self.token.span, "the expression is empty; a tensor without dimensions is 'scalar'")
        if self.token.text == "scalar" and self.tokens[1].kind == "end":
            return Expression((), None, self.source)
        if self.called("average"):
            self.at += 2
            dims = self.axes()
            self.expect(",", "before the mesh dimension of average(axes, dimension)")
            average = self.mesh_dimension()
            self.expect(")", "to close average(")
        else:
            dims = self.axes()
        if self.token.kind != "end":
            hint = {
                "|": "'|' stands only inside brackets: (a | b)",
                ")": "this ')' closes nothing",
                ",": "',' stands only in average(axes, dimension)",
            }.get(self.token.text, f"found {self.found()} where an axis was expected")
            raise self.refuse(self.token.span, hint)
        out = Expression(dims, average, self.source)
        self.check(out)
        return out

    def axes(self) -> tuple[Axis, ...]:
        out: list[Axis] = []
        while self.token.kind in ("name", "number") or self.is_sign("("):
            out.append(self.axis())
        if not out:
            if self.is_sign("/"):
                raise self.refuse(self.token.span, "'/' follows the axis that it cuts, as in heads/tp")
            raise self.refuse(self.token.span, f"expected an axis (name, number or bracket), found {self.found()}")
        return tuple(out)

    def axis(self) -> Axis:
        start = self.token.span[0]
        repeat = self.called("repeat")
        if repeat:
            self.at += 1
        axis = self.atom()
        over: list[str] = []
        while self.is_sign("/"):
            self.take()
            over.append(self.mesh_dimension())
        span = (start, self.tokens[self.at - 1].span[1])
        if repeat and not over:
            raise self.refuse(span, "repeat(...) says which ranks hold copies, so it must be cut: repeat(kv_heads)/tp")
        if not over:
            return axis
        if isinstance(axis, Number):
            raise self.refuse(span, "a number can't be cut; give the axis a name under sizes: and cut that")
        return Cut(axis, tuple(over), repeat, span)

    def mesh_dimension(self) -> str:
        token = self.token
        if token.kind != "name":
            raise self.refuse(token.span, f"expected a mesh dimension ({', '.join(MESH)}), found {self.found()}")
        if token.text not in MESH:
            raise self.refuse(token.span, f"'{token.text}' is no mesh dimension{suggestion(token.text, MESH)}")
        return self.take().text

    def atom(self) -> Axis:
        token = self.take()
        if token.kind == "number":
            value = int(token.text[:19])
            if not 1 <= value < 2**62:
                raise self.refuse(token.span, f"an axis of size {token.text}; sizes are whole numbers from 1")
            return Number(value, token.span)
        if token.kind == "name":
            if token.text in RESERVED:
                kind = "a mesh dimension and stands" if token.text in MESH else "a word of the language and stands"
                where = "behind '/'" if token.text in MESH else "for no axis here"
                raise self.refuse(token.span, f"'{token.text}' is {kind} {where}")
            return AxisName(token.text, token.span)
        self.depth += 1
        if self.depth > 50:
            raise self.refuse(token.span, "brackets are nested more than 50 deep")
        out = self.bracket(token)
        self.depth -= 1
        return out

    def bracket(self, opened: _Token) -> Axis:
        segments = [self.axes_span()]
        if self.is_sign("+"):
            self.take()
            if self.token.text != "pad":
                raise self.refuse(self.token.span, f"only 'pad' can be added: (name+pad); found {self.found()}")
            self.take()
            end = self.expect(")", "to close (name+pad)").span[1]
            (axes, span) = segments[0]
            if len(axes) != 1 or not isinstance(axes[0], AxisName):
                raise self.refuse(span, "only a name can be padded: (vocab+pad)")
            return Padded(axes[0].name, (opened.span[0], end))
        while self.is_sign("|"):
            self.take()
            segments.append(self.axes_span())
        end = self.expect(")", f"to close the '(' in column {self.source.position.column + opened.span[0]}").span[1]
        whole = (opened.span[0], end)
        parts = [axes[0] if len(axes) == 1 else Product(axes, span) for axes, span in segments]
        if len(parts) > 1:
            return Sum(tuple(parts), whole)
        if isinstance(parts[0], Product):
            return Product(parts[0].factors, whole)
        return parts[0]

    def axes_span(self) -> tuple[tuple[Axis, ...], Span]:
        axes = self.axes()
        return axes, (axes[0].span[0], axes[-1].span[1])

    def check(self, expression: Expression) -> None:
        """Refuse what the grammar allows but the meaning forbids."""
        for dim in expression.dims:
            alone = dim.axis if isinstance(dim, Cut) else dim
            for axis in walk(dim):
                if isinstance(axis, Padded) and axis is not alone:
                    raise self.refuse(axis.span, "a padded axis must be a whole dimension: '(vocab+pad)/tp hidden'")
                if isinstance(axis, Cut):
                    inner = next((a for a in walk(axis.axis) if isinstance(a, Cut)), None)
                    if inner is not None:
                        raise self.refuse(
                            inner.span,
                            f"'{spell(inner)}' is cut inside the cut '{spell(axis)}'; cut one of them, or write "
                            "both mesh dimensions behind one axis: experts/ep/tp",
                        )
                    twice = next((m for k, m in enumerate(axis.over) if m in axis.over[:k]), None)
                    if twice:
                        raise self.refuse(axis.span, f"'{spell(axis)}' is cut over {twice} twice")
        self.once(expression.dims)
        if expression.average:
            for cut in cuts(expression):
                if expression.average in cut.over:
                    raise self.refuse(
                        cut.span, f"copies over {expression.average} are averaged, so nothing is cut over it"
                    )

    def once(self, factors: Sequence[Axis]) -> set[str]:
        """The mesh dimensions that cut these factors. Each may cut only one of them, or parts would be missing."""
        seen: set[str] = set()
        for factor in factors:
            if isinstance(factor, Sum):
                found = set().union(*(self.once([s]) for s in factor.segments))
            elif isinstance(factor, Product):
                found = self.once(factor.factors)
            else:
                found = set(factor.over) if isinstance(factor, Cut) else set()
            both = sorted(seen & found)
            if both:
                raise self.refuse(
                    factor.span,
                    f"{both[0]} cuts another axis of this product already; with both cut, no rank would hold the parts "
                    "in which they differ",
                )
            seen |= found
        return seen
