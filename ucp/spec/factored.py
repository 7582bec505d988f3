"""States whose axes are some of their parameter's, such as the rows and columns of Adafactor.

Where a parameter is cut, such a state is cut along the axes that it has, and held in common along the others. The spec
says which these are (``states:`` in a parameter's line), or the shapes on all ranks do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations

from ucp.errors import Unsupported
from ucp.geometry import Shape
from ucp.spec.grammar import Axis, Expression, Number, cuts

# For each dimension of a state the parameter's dimension that it is, or None where it is 1.
Kept = tuple[int | None, ...]

# A state without the last axis, and without the one before, by the ends of their names in transformers' Adafactor and
# in CAME. Where a parameter is as wide as it is high, shapes do not tell them apart.
_WITHOUT = {"_row": -1, "_col": -2}


def kept_axes(state: str, weights: Sequence[Shape], states: Sequence[Shape]) -> list[Kept]:
    """Which of a parameter's dimensions a state may have, by the shapes of both in the same places: on several ranks,
    say, or as a whole and on one rank. More than one if shapes and name leave it open."""
    n, m = len(weights[0]), len(states[0])
    found: list[Kept] = []
    if n == m:
        kept: list[int | None] = []
        for k in range(n):
            if all(w[k] == s[k] for w, s in zip(weights, states, strict=True)):
                kept.append(k)
            elif all(s[k] == 1 for s in states):
                kept.append(None)
            else:
                return []
        return [tuple(kept)]
    for dims in combinations(range(n), m):
        if all(tuple(w[k] for k in dims) == tuple(s) for w, s in zip(weights, states, strict=True)):
            found.append(dims)
    missing = next((k for end, k in _WITHOUT.items() if state.endswith(end)), None)
    if len(found) > 1 and missing is not None and m == n - 1:
        named = tuple(k for k in range(n) if k != n + missing)
        found = [dims for dims in found if dims == named] or found
    return found


def state_expression(
    owner: str,
    state: str,
    expression: Expression,
    said: Mapping[str, Expression],
    weights: Sequence[Shape],
    states: Sequence[Shape],
) -> Expression | None:
    """What a state of another shape than its parameter's is made of; None if every rank holds all of it.

    expression, said: the parameter's own, and what the spec says of its states.
    weights, states: shapes of both, rank by rank.

    Raises Unsupported if its axes are not the parameter's and the parameter is cut, SpecError if shapes leave open
    which of them they are.
    """
    if state in said:
        return said[state]
    found: dict[str, Expression] = {}
    for kept in kept_axes(state, weights, states):
        dims: tuple[Axis, ...] = tuple(Number(1, (0, 0)) if k is None else expression.dims[k] for k in kept)
        one = Expression(dims, expression.average, expression.source)
        found.setdefault(str(one), one)
    if len(found) == 1:
        return next(iter(found.values()))
    if not cuts(expression) and not found:
        return None  # of axes of its own, as Shampoo's matrices
    if found:
        first, second = list(found)[:2]
        raise expression.source.refuse(
            (0, len(expression.source.text)),
            f"the state '{state}' of '{owner}' ({list(states[0])}) may be '{first}' or '{second}'; say which: "
            f'{{axes: "{expression}", states: {{{state}: "{first}"}}}}',
        )
    raise Unsupported(
        f"optimizer state '{state}' of '{owner}' has shape {list(states[0])}, whose axes are not those of the "
        f"parameter ({list(weights[0])}), and tensor parallelism cuts that ('{expression}'); checkpoints of this "
        "optimizer cannot be resharded where tensor parallelism cuts the model"
    )
