"""Where every rank's local tensors lie in the logical tensors: a spec applied to all ranks' shapes together.

The same answer serves both directions. A reader uses it for the fragments of a rank's files, and a live engine for the
places in its own memory. So both sides speak of logical tensors only.

If an axis is padded, a local tensor is split in two: the parameter's own part, and its padding. The padding is a
logical tensor of its own (kind 'padding'). So a target of the same width gets it bit for bit, and any other leaves it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import numpy as np

from ucp.errors import Mismatch, Position, SpecError, Unsupported
from ucp.geometry import Blocks, Shape, whole
from ucp.parallel.mesh import Coordinate, Layout
from ucp.spec.bound import Bound
from ucp.spec.evaluate import Cutting, shape_of, shard
from ucp.spec.factored import state_expression
from ucp.spec.grammar import Expression, Padded, names
from ucp.spec.places import NO_FACTORS, Factors, Parts, Placed, Placements, padding_name
from ucp.spec.solve import Observed, solve_cuts


def place(
    bound: Bound,
    parts: Parts,
    layout: Layout,
    buffers: Collection[str] = (),
    factors: Factors = NO_FACTORS,
    unpadded: Collection[str] = (),
) -> Placements:
    """Where all local tensors lie by a spec. Its cuts are solved from the shapes on all ranks.

    buffers: names that need no line in the spec. Without one they are replicated.
    factors: local tensors that are states of others, with some of their axes.
    unpadded: axes that are padded by the spec, and are known to have no padding where ranks cut them.

    With one tensor-parallel rank nothing is cut, and the spec only tells what is padding.

    Raises SpecError if shapes contradict the spec or leave a cut open, or if a parameter has no line.
    """
    expressions: dict[str, Expression | None] = {}
    shards: dict[str, list[tuple[Mapping[str, int], Shape]]] = {}
    for at, held in parts.items():
        for name, shape in held.items():
            if name not in expressions and name not in factors:
                found = _padded(bound, name) if layout.tp == 1 else expression_of(bound, name, shape, name in buffers)
                expressions[name] = found
            shards.setdefault(name, []).append((at._asdict(), shape))
    for name, (owner, state) in factors.items():
        base = expressions.get(owner)
        both = [(held[owner], held[name]) for held in parts.values() if owner in held and name in held]
        if both and base is not None:
            expressions[name] = factor_expression(bound, owner, state, base, both)
    observed = {name: Observed(name, e, shards[name]) for name, e in expressions.items() if e is not None}
    cuttings = solve_cuts(list(observed.values()), bound.sizes, {"tp": layout.tp}, unpadded=unpadded)
    out: dict[tuple[Coordinate, str], tuple[Placed, ...]] = {}
    for at, held in parts.items():
        for name, shape in held.items():
            if name not in observed:
                out[at, name] = (Placed(name, shape, whole(shape)),)
                continue
            expression, cutting = observed[name].expression, cuttings[name]
            mine = shard(expression, bound.sizes, cutting, at._asdict())
            if mine.shape != shape:
                raise Mismatch(
                    f"{expression.source.position}: '{expression}' makes '{name}' {list(mine.shape)} on {at}, but it "
                    f"has {list(shape)}"
                )
            own = Placed(name, mine.logical, mine.blocks, average=expression.average is not None)
            out[at, name] = (own, *_padding(bound, name, expression, cutting, at))
    return out


def _padded(bound: Bound, name: str) -> Expression | None:
    """The parameter's expression if it has a padded axis whose true size is known."""
    for line in bound.lines:
        axes = names(line.expression)
        if any(isinstance(a, Padded) for a in axes) and line.pattern.match(name) is not None:
            found = bound.find(name) if not any(a.name in bound.absent for a in axes) else None
            return found.expression if found is not None and found.expression is line.expression else None
    return None


def expression_of(bound: Bound, name: str, shape: Shape, optional: bool) -> Expression | None:
    """What the spec says of a parameter; None if it says nothing and the line is optional.

    Raises SpecError if there is no line and it is not optional.
    """
    found = bound.find(name)
    if found is None:
        if optional:
            return None
        raise SpecError(
            f"no line under parameters: matches '{name}' (shape {list(shape)}); write one",
            Position(bound.spec.file, 1, 1),
        )
    return found.expression


def factor_expression(
    bound: Bound, owner: str, state: str, base: Expression, both: Sequence[tuple[Shape, Shape]]
) -> Expression | None:
    """What a state is made of that has some of its parameter's axes, by the spec or by the shapes of both on each rank.

    base: the parameter's own expression. None and errors as for `state_expression`.
    """
    found = bound.find(owner)
    said = found.states if found is not None and found.expression is base else {}
    return state_expression(owner, state, base, said, [w for w, _ in both], [s for _, s in both])


def _padding(bound: Bound, name: str, expression: Expression, cutting: Cutting, at: Coordinate) -> tuple[Placed, ...]:
    """The padding that a local tensor holds: nothing, or the region of one axis beyond its true size."""
    true, full = shape_of(expression, bound.sizes), shape_of(expression, bound.sizes, cutting.padded)
    wide = [k for k in range(len(true)) if true[k] != full[k]]
    if not wide:
        return ()
    if len(wide) > 1:
        raise Unsupported(f"{expression.source.position}: '{name}' is padded along {len(wide)} axes; one is supported")
    k = wide[0]
    blocks = shard(expression, bound.sizes, cutting, at._asdict(), keep_padding=True).blocks
    first = np.maximum(blocks.offsets[:, k], true[k])
    beyond = blocks.offsets[:, k] + blocks.sizes[:, k] - first
    offsets, sizes = blocks.offsets.copy(), blocks.sizes.copy()
    starts = blocks.starts + (first - blocks.offsets[:, k]) * blocks.strides[:, k]
    offsets[:, k], sizes[:, k] = first - true[k], beyond
    kept = Blocks(offsets, sizes, starts, blocks.strides, blocks.buffers).take(beyond > 0)
    shape = (*full[:k], full[k] - true[k], *full[k + 1 :])
    return (Placed(padding_name(name), shape, kept, padding=True),)
