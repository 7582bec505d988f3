"""Sizes that a model has outgrown: of a checkpoint that does not say them, found in its own shapes.

A spec's sizes come from the model's config. Where a checkpoint has none, the live model's is taken, and that may have
been changed since. The checkpoint's parameters tell what its sizes were; the load then finds which of them differ.
"""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase

from ucp.errors import SpecError
from ucp.parallel.mesh import Layout
from ucp.spec.bound import Bound
from ucp.spec.grammar import Axis, AxisName, Cut, Expression, Padded
from ucp.spec.places import Parts
from ucp.spec.select import Choice


def outgrown(bound: Bound, parts: Parts, layout: Layout, choice: Choice, padless: bool) -> dict[str, int]:
    """Sizes by name of which the shapes show others than the spec has been bound with.

    Parameters
    ----------
    bound: the spec with the sizes of a config that may be newer than the shapes.
    parts: local names and shapes of every part of the model.
    choice: has the patterns of the parameters that may have other sizes now, and sizes that were given, which stay.
    padless: whether nothing is padded. Else the true width of a padded axis is in no shape.

    Raises SpecError where the shapes leave open what a parameter was that is declared to be resized.
    """
    given = {*choice.settings, *choice.old}
    possible: dict[str, set[int]] = {}
    said: dict[str, tuple[str, Expression, Axis]] = {}
    for name in dict.fromkeys(name for held in parts.values() for name in held):
        if not any(fnmatchcase(name, pattern) for pattern in choice.resized) or (found := bound.find(name)) is None:
            continue
        shapes = [(at.tp, held[name]) for at, held in parts.items() if name in held]
        for k, dim in enumerate(found.expression.dims):
            axis = dim.axis if isinstance(dim, Cut) else dim
            known = all(len(shape) == len(found.expression.dims) for _, shape in shapes)
            if not known or not isinstance(axis, (AxisName, Padded)) or axis.name in given:
                continue
            widths = _widths({tp: shape[k] for tp, shape in shapes}, isinstance(dim, Cut) and layout.tp > 1)
            possible[axis.name] = possible.get(axis.name, widths) & widths
            said[axis.name] = name, found.expression, axis
    out = {}
    for size, widths in possible.items():
        name, expression, axis = said[size]
        here = bound.sizes.get(size)
        hidden = isinstance(axis, Padded) and not padless
        if here in widths or (hidden and here is not None and any(here < width for width in widths)):
            continue
        if len(widths) == 1 and not hidden:
            out[size] = next(iter(widths))
        elif choice.declared:
            raise _open(size, here, widths, name, expression, axis, hidden)
    return out


def _widths(by_rank: Mapping[int, int], cut: bool) -> set[int]:
    """How wide the whole may be by its width on each rank."""
    widths = set(by_rank.values())
    whole = widths if len(widths) == 1 else set()
    return whole | {sum(by_rank.values())} if cut else whole


def _open(
    size: str, here: int | None, widths: set[int], name: str, expression: Expression, axis: Axis, hidden: bool
) -> SpecError:
    known = " or ".join(map(str, sorted(widths))) or "of no one width"
    padding = ", padding included" if hidden else ""
    return expression.refuse(
        axis,
        f"'{size}' is {here} by the model's config, and '{name}' is declared to be resized: in the checkpoint it is "
        f'{known}{padding}, and nothing says which; declare what it was, as in "changes": '
        f'{{"old_sizes": {{"{size}": {min(widths, default=1)}}}}}',
    )
