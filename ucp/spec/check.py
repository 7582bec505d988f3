"""Check a spec against what there is: names and shapes of a model, or the shards of a run themselves.

Neither shapes nor copies can reveal some mistakes. What the spec says there is listed as taken on trust.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from ucp.errors import Mismatch, Position, SpecError
from ucp.geometry import Blocks, Shape
from ucp.spec.bound import Bound, Found
from ucp.spec.evaluate import Cutting, axis_size, shard
from ucp.spec.grammar import Axis, Cut, Expression, Number, Padded, Product, Sum, cuts, spell, walk
from ucp.spec.patterns import Pattern
from ucp.spec.solve import Coordinate, Observed, solve_cuts

Shards = Sequence[tuple[Coordinate, NDArray]]


@dataclass(frozen=True)
class CheckedTensor:
    """One parameter or buffer.

    found: what its line in the spec says; None for a buffer without a line.
    words: its pattern in the words of the paper.
    """

    name: str
    shape: Shape
    found: Found | None
    words: str


@dataclass(frozen=True)
class Report:
    """What a check found.

    problems: refusals, in the order of the names.
    trust: statement -> the names that it is about.
    padding: padded axis -> its width with the padding.
    absent: optional lines that no name matches.
    """

    checked: tuple[CheckedTensor, ...]
    problems: tuple[SpecError, ...]
    trust: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    padding: Mapping[str, int] = field(default_factory=dict)
    absent: tuple[str, ...] = ()


def words(pattern: Pattern, expression: Expression) -> str:
    """The pattern in the words of the paper, such as ``fragment over tp (dimension 0, 3 segments)``."""
    out = []
    for inside in pattern.cuts:
        out.append(f"unique to a rank of {'/'.join(cuts(inside)[0].over)}")
    for k, dim in enumerate(expression.dims):
        over = list(dict.fromkeys(m for a in walk(dim) if isinstance(a, Cut) for m in a.over))
        if not over:
            continue
        sums = [a for a in walk(dim) if isinstance(a, Sum)]
        more = f", {len(sums[0].segments)} segments" if sums else ""
        more += ", padded" if any(isinstance(a, Padded) for a in walk(dim)) else ""
        out.append(f"fragment over {'/'.join(over)} (dimension {k}{more})")
    if expression.average:
        out.append(f"average over {expression.average} (inexact)")
    return ", ".join(out) or "replicated"


def trusted(expression: Expression, sizes: Mapping[str, int]) -> list[str]:
    """What the expression says that neither shapes nor equal copies can confirm."""
    out = []
    for dim in expression.dims:
        held = [a for a in walk(dim) if isinstance(a, Cut)]
        if not held:
            continue
        for axis in walk(dim):
            if isinstance(axis, Sum):
                out.append(f"that the segments of '{spell(axis)}' lie in this order")
            elif isinstance(axis, Product) and not isinstance(axis.factors[0], Cut) and _cut_inside(axis):
                out.append(f"that '{spell(axis)}' is in this order, not cut straight through")
            elif isinstance(axis, Product) and any(isinstance(f, (Number, Sum)) and _many(f) for f in axis.factors[1:]):
                out.append(f"that '{spell(axis)}' is in this order: heads or groups outermost")
    if expression.average:
        out.append(f"that the copies over {expression.average} may be averaged")
    whole = [axis_size(expression, d, sizes, {}) for d in expression.dims]
    is_cut = [any(isinstance(a, Cut) for a in walk(d)) for d in expression.dims]
    for k, n in enumerate(whole):
        if is_cut[k] and any(whole[j] == n and not is_cut[j] for j in range(len(whole))):
            out.append(f"which of two equal dimensions of '{expression}' is which, where no shards show it")
            break
    return out


def _many(axis: Axis) -> bool:
    return axis.value > 1 if isinstance(axis, Number) else True


def _cut_inside(axis: Axis) -> bool:
    return any(isinstance(a, Cut) for a in walk(axis))


def check_names(
    bound: Bound,
    shapes: Mapping[str, Shape],
    buffers: Collection[str] = (),
    aliases: Mapping[str, str] | None = None,
) -> Report:
    """Check a spec against the names and whole shapes of a model's parameters and buffers.

    shapes: the shape of every parameter and buffer, in elements.
    buffers: the names that need no line. Without one they are replicated.
    aliases: other name of a tied parameter -> the name that it is listed under.
    """
    problems: list[SpecError] = []
    checked: list[CheckedTensor] = []
    observed: list[Observed] = []
    trust: dict[str, list[str]] = {}
    aliases = aliases or {}
    for name, shape in sorted({**shapes, **{a: shapes[o] for a, o in aliases.items() if o in shapes}}.items()):
        try:
            found = bound.find(name)
            if found is None and name not in buffers:
                raise SpecError(
                    f"no line under parameters: matches '{name}' (shape {list(shape)}); write one",
                    Position(bound.spec.file, 1, 1),
                )
            if found is not None:
                _check_captures(bound, found)
                one = Observed(name, found.expression, [({}, tuple(shape))])
                solve_cuts([one], bound.sizes, {})
                observed.append(one)
                for statement in trusted(found.expression, bound.sizes):
                    trust.setdefault(statement, []).append(name)
            checked.append(
                CheckedTensor(
                    name, tuple(shape), found, words(found.pattern, found.expression) if found else "replicated"
                )
            )
        except SpecError as error:
            problems.append(error)
    padding: Mapping[str, int] = {}
    if not problems:
        try:
            cuttings = solve_cuts(observed, bound.sizes, {})
            padding = next(iter(cuttings.values())).padded if cuttings else {}
            padding = {k: n for k, n in padding.items() if n != bound.sizes[k]}
        except SpecError as error:
            problems.append(error)
    absent = _unmatched(bound, set(shapes) | set(aliases), problems)
    _check_ties(bound, set(shapes), aliases, problems)
    return Report(tuple(checked), tuple(problems), {k: tuple(v) for k, v in trust.items()}, padding, tuple(absent))


def _check_captures(bound: Bound, found: Found) -> None:
    for inside in found.pattern.cuts:
        name = spell(cuts(inside)[0].axis)
        if name in bound.absent:
            raise bound.absent[name]
        if found.captures[name] >= bound.sizes[name]:
            raise found.pattern.refuse(
                f"'{found.name}' is number {found.captures[name]} of '{name}', which is {bound.sizes[name]}"
            )


def _unmatched(bound: Bound, names: set[str], problems: list[SpecError]) -> list[str]:
    """Lines that match nothing. Each is a problem, unless it is optional or about a tied name that is not kept."""
    absent = []
    for line in bound.lines:
        if any(line.pattern.match(name) is not None for name in names):
            continue
        if line.optional or bound.owner(str(line.pattern)) in names:
            absent.append(str(line.pattern))
        elif not line.layout:
            problems.append(
                line.pattern.refuse(f"'{line.pattern}' matches no parameter; mend it, take it out or mark it optional")
            )
    return absent


def _check_ties(bound: Bound, names: set[str], aliases: Mapping[str, str], problems: list[SpecError]) -> None:
    for tie in bound.ties:
        for name in sorted(names | set(aliases)):
            captures = tie.pattern.match(name)
            if captures is None:
                continue
            owner = tie.to.fill(captures)
            if owner is None or owner not in names | set(aliases):
                problems.append(tie.pattern.refuse(f"'{name}' is tied to '{owner}', and there is no such parameter"))
            elif name in names and owner in names:
                problems.append(
                    tie.pattern.refuse(
                        f"'{name}' is tied to '{owner}' by the spec, but both are parameters of their own here; "
                        "check the condition"
                    )
                )
    for name, owner in aliases.items():
        tied = bound.owner(name)
        group = {owner, *(a for a, o in aliases.items() if o == owner)}
        if tied not in group and bound.owner(owner) not in group:
            problems.append(
                SpecError(
                    f"'{name}' is tied to '{owner}' in the checkpoint, and nothing under tied: says so",
                    Position(bound.spec.file, 1, 1),
                )
            )


def merge(expression: Expression, sizes: Mapping[str, int], cutting: Cutting, shards: Shards, name: str) -> NDArray:
    """The whole tensor from its shards (arrays in memory), without padding. Copies must be equal, bit for bit.

    An average is the mean of the copies. It is computed in float64 and has the shards' dtype. Raises Mismatch if copies
    differ, if a part is missing, or if a shard's shape is not what the cutting says.
    """
    if expression.average:
        return _averaged(expression, sizes, cutting, shards, name)
    out: NDArray | None = None
    filled: NDArray | None = None
    for at, array in shards:
        held = shard(expression, sizes, cutting, at)
        if held.shape != array.shape:
            raise Mismatch(f"'{name}'{_at(at)} has shape {list(array.shape)}; the spec makes it {list(held.shape)}")
        if out is None or filled is None:
            out, filled = np.zeros(held.logical, array.dtype), np.zeros(held.logical, bool)
        for box, part in _parts(held.blocks, np.ascontiguousarray(array).reshape(-1)):
            before = filled[box]
            if before.any() and not _same(out[box][before], part[before]):
                raise Mismatch(
                    f"{expression.source.position}: '{expression}' says that ranks hold copies of parts of '{name}', "
                    f"but those{_at(at)} differ from another rank's; it is cut otherwise, or its copies are not kept "
                    "alike (then write average)"
                )
            out[box] = part
            filled[box] = True
    if out is None or filled is None or not filled.all():
        missing = "all" if filled is None else int((~filled).sum())
        raise Mismatch(f"'{name}' lacks {missing} of its elements: shards are missing")
    return out


def cut(
    expression: Expression, sizes: Mapping[str, int], cutting: Cutting, tensor: NDArray, at: Coordinate, into: NDArray
) -> NDArray:
    """Put a rank's part of the whole tensor (without padding) into its shard and return the shard.

    Padding stays as it is. Raises Mismatch if the shard's shape is not what the cutting says.
    """
    held = shard(expression, sizes, cutting, at)
    if held.shape != into.shape:
        raise Mismatch(
            f"{expression.source.position}: the shard{_at(at)} is {list(held.shape)}, not {list(into.shape)}"
        )
    flat = np.ascontiguousarray(into).reshape(-1)
    for box, part in _parts(held.blocks, flat):
        part[...] = tensor[box]
    return flat.reshape(into.shape)


def _parts(blocks: Blocks, flat: NDArray) -> Iterator[tuple[tuple[slice, ...], NDArray]]:
    """Every box of the whole tensor, and its elements in the flat buffer, as a view."""
    for k in range(len(blocks)):
        box = tuple(slice(int(o), int(o + n)) for o, n in zip(blocks.offsets[k], blocks.sizes[k], strict=True))
        steps = tuple(int(s) * flat.itemsize for s in blocks.strides[k])
        shape = tuple(int(n) for n in blocks.sizes[k])
        yield box, np.lib.stride_tricks.as_strided(flat[int(blocks.starts[k]) :], shape, steps)


def _averaged(expression: Expression, sizes: Mapping[str, int], cutting: Cutting, shards: Shards, name: str) -> NDArray:
    over = str(expression.average)
    plain = Expression(expression.dims, None, expression.source)
    ranks = sorted({at.get(over, 0) for at, _ in shards})
    copies = [merge(plain, sizes, cutting, [(a, x) for a, x in shards if a.get(over, 0) == r], name) for r in ranks]
    return np.mean(np.stack(copies).astype(np.float64), axis=0).astype(copies[0].dtype)


def _same(a: NDArray, b: NDArray) -> bool:
    return np.ascontiguousarray(a).tobytes() == np.ascontiguousarray(b).tobytes()


def _at(at: Coordinate) -> str:
    return " on " + ", ".join(f"{m} rank {r}" for m, r in at.items()) if at else ""
