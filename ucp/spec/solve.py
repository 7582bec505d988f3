"""Where the cuts lie. They are solved from the shapes of all shards of all parameters together, never assumed even.

Every occurrence of one cut axis has the same cut (`kv_heads/tp` is 2 and 1 in q, k, v and o alike). A shard that is as
wide as the whole tensor is a replica. What the shapes leave open is refused, not guessed.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from ucp.geometry import Shape, numel
from ucp.spec.evaluate import Cutting, Mesh, Widths, axis_size, position
from ucp.spec.grammar import Axis, AxisName, Cut, Expression, Padded, Product, Sum, spell, walk

Coordinate = Mapping[str, int]


@dataclass(frozen=True)
class Observed:
    """A parameter's shards as they are: the mesh coordinate and the shape of each.

    A rank that is not in ``shards`` holds nothing of the parameter. If ranks differ only in mesh dimensions that don't
    cut the parameter, one of them is enough.
    """

    name: str
    expression: Expression
    shards: Sequence[tuple[Coordinate, Shape]]


@dataclass(frozen=True)
class _Fixed:
    """A cut that is known, and the parameter that it is known from."""

    widths: tuple[int, ...]
    by: str


def solve_cuts(
    observed: Sequence[Observed],
    sizes: Mapping[str, int],
    mesh: Mesh,
    known: Widths | None = None,
    padded: Mapping[str, int] | None = None,
    unpadded: Collection[str] = (),
) -> dict[str, Cutting]:
    """The cutting of every parameter by its name, such that every shard has the shape that was observed.

    known: cuts that are known from elsewhere, by their spelling.
    padded: widths of padded axes that are known.
    unpadded: axes of which equal shards are no parts of a wider table with padding.

    Raises SpecError if shapes contradict the expression, the sizes or another parameter, or if they leave a cut open.
    The error names the parameter and the rank.
    """
    return _Solver(sizes, mesh, known or {}, padded or {}, unpadded).solve(observed)


class _Solver:
    def __init__(
        self,
        sizes: Mapping[str, int],
        mesh: Mesh,
        known: Widths,
        padded: Mapping[str, int],
        unpadded: Collection[str],
    ) -> None:
        self.unpadded = unpadded
        self.sizes = sizes
        self.mesh = mesh
        self.fixed = {key: _Fixed(widths, "the widths given") for key, widths in known.items()}
        self.given_padding = padded
        self.padded: dict[str, tuple[int, str]] = {name: (n, "the width given") for name, n in padded.items()}
        self.replicas: dict[str, dict[str, tuple[int, ...]]] = {}

    def solve(self, observed: Sequence[Observed]) -> dict[str, Cutting]:
        waiting = [(o, k) for o in observed for k in range(self.rank_of(o))]
        self.replicas = {o.name: {} for o in observed}
        while waiting:
            left = [(o, k) for o, k in waiting if not self.dimension(o, k)]
            if len(left) == len(waiting):
                o, k = left[0]
                open_cuts = self.unknown(o, k)
                raise o.expression.refuse(
                    open_cuts[0],
                    f"the shapes of '{o.name}' leave open how "
                    f"{' and '.join(dict.fromkeys(spell(c) for c in open_cuts))} are cut; no other parameter shows it, "
                    "so the widths must be given",
                )
            waiting = left
        common = {key: f.widths for key, f in self.fixed.items()}
        widths = {name: n for name, (n, _) in self.padded.items()}
        return {
            o.name: Cutting(dict(self.mesh), "exact", {**common, **self.replicas[o.name]}, widths) for o in observed
        }

    def rank_of(self, o: Observed) -> int:
        d = len(o.expression.dims)
        for at, shape in o.shards:
            if len(shape) != d:
                raise o.expression.source.refuse(
                    (0, len(o.expression.source.text)),
                    f"'{o.expression}' has {d} dimensions, but '{o.name}' has {list(shape)}{_where(at)}",
                )
        return d

    def over_ranks(self, cuts: list[Cut]) -> bool:
        """Whether the mesh has more than one rank for any of these cuts."""
        return any(self.mesh.get(m, 1) > 1 for c in cuts for m in c.over)

    def sized(self, dim: Axis) -> str:
        """``kv_heads 3, head_dim 10``: the named axes in a dimension with their sizes."""
        found = {a.name: self.sizes[a.name] for a in walk(dim) if isinstance(a, (AxisName, Padded))}
        return ", ".join(f"{name} {n}" for name, n in found.items()) or "by its numbers"

    def cuts(self, o: Observed, k: int) -> list[Cut]:
        return [a for a in walk(o.expression.dims[k]) if isinstance(a, Cut)]

    def unknown(self, o: Observed, k: int) -> list[Cut]:
        return [c for c in self.cuts(o, k) if spell(c) not in self.fixed]

    def dimension(self, o: Observed, k: int) -> bool:
        """Settle one dimension of one parameter. False if that needs something that another parameter may show."""
        dim = o.expression.dims[k]
        cuts = self.cuts(o, k)
        if not isinstance(dim.axis if isinstance(dim, Cut) else dim, Padded) and not self.over_ranks(cuts):
            self.uncut(o, k, dim)
            for cut in cuts:
                n = axis_size(o.expression, cut, self.sizes, {})
                self.fixed.setdefault(spell(cut), _Fixed((n,), f"'{o.name}'"))
            return True
        if not cuts:
            self.uncut(o, k, dim)
            return True
        if not isinstance(dim, Cut) or not isinstance(dim.axis, Padded):
            full = axis_size(o.expression, dim, self.sizes, {})
            ranks = max(numel([self.mesh.get(m, 1) for m in c.over]) for c in cuts)
            if ranks > 1 and all(shape[k] == full for _, shape in o.shards) and len(o.shards) > 1 and full:
                for c in cuts:
                    n = axis_size(o.expression, c, self.sizes, {})
                    self.replicas[o.name][spell(c)] = (n,) * numel([self.mesh.get(m, 1) for m in c.over])
                return True
        keys = list(dict.fromkeys(spell(c) for c in self.unknown(o, k)))
        if len(keys) > 1:
            return False
        if keys or len({spell(c) for c in cuts}) == 1:
            return self.one_cut(o, k, next(c for c in cuts if not keys or spell(c) == keys[0]))
        self.verify(o, k, dim)
        return True

    def uncut(self, o: Observed, k: int, dim: Axis) -> None:
        if isinstance(dim, Padded):
            for at, shape in o.shards:
                self.pad(o, dim, shape[k], at)
            return
        expected = axis_size(o.expression, dim, self.sizes, {})
        for at, shape in o.shards:
            if shape[k] != expected:
                verb = "sums to" if any(isinstance(a, Sum) for a in walk(dim)) else "is"
                raise o.expression.refuse(
                    dim,
                    f"'{spell(dim)}' {verb} {expected} ({self.sized(dim)}), but '{o.name}' has {shape[k]} in dimension "
                    f"{k}{_where(at)}",
                )

    def pad(self, o: Observed, dim: Padded, width: int, at: Coordinate) -> None:
        true = axis_size(o.expression, dim, self.sizes, {})
        if width < true:
            raise o.expression.refuse(dim, f"'{dim.name}' is {true}, but '{o.name}' has only {width} of it{_where(at)}")
        before = self.padded.setdefault(dim.name, (width, f"'{o.name}'"))
        if before[0] != width:
            raise o.expression.refuse(
                dim,
                f"'{dim.name}' is {before[0]} wide with its padding in {before[1]}, but {width} in '{o.name}'"
                f"{_where(at)}",
            )

    def extent(self, o: Observed, axis: Axis, key: str, width: int, at: Coordinate) -> int:
        """How wide the axis is on the rank ``at`` if the cut ``key`` is ``width`` there."""
        if isinstance(axis, Product):
            return numel([self.extent(o, f, key, width, at) for f in axis.factors])
        if isinstance(axis, Sum):
            return sum(self.extent(o, s, key, width, at) for s in axis.segments)
        if isinstance(axis, Cut):
            spelled = spell(axis)
            return width if spelled == key else self.fixed[spelled].widths[position(axis, self.mesh, at)]
        return axis_size(o.expression, axis, self.sizes, {})

    def one_cut(self, o: Observed, k: int, cut: Cut) -> bool:
        """Find the one cut of this dimension that is unknown (or check the only one) from the shards' widths.

        False if they don't show some rank's part, since another cut leaves nothing there.
        """
        dim, key = o.expression.dims[k], spell(cut)
        m = numel([self.mesh.get(d, 1) for d in cut.over])
        found: dict[int, tuple[int, Coordinate]] = {}
        hidden: set[int] = set()
        for at, shape in o.shards:
            none = self.extent(o, dim, key, 0, at)
            unit = self.extent(o, dim, key, 1, at) - none
            if unit == 0 and shape[k] == none:
                hidden.add(position(cut, self.mesh, at))
                continue
            if unit <= 0 or (shape[k] - none) % unit or shape[k] < none:
                more = f" after {none} that are not cut by it" if none else ""
                raise o.expression.refuse(
                    cut,
                    f"'{o.name}' has {shape[k]} in dimension {k}{_where(at)}, which is no multiple of {unit}{more}, "
                    f"so no cut of '{spell(cut.axis)}' makes it",
                )
            width, here = (shape[k] - none) // unit, position(cut, self.mesh, at)
            if found.setdefault(here, (width, at))[0] != width:
                raise o.expression.refuse(
                    cut,
                    f"'{o.name}' is {width} of '{spell(cut.axis)}' wide{_where(at)}, but {found[here][0]}"
                    f"{_where(found[here][1])}, and no cut tells these ranks apart",
                )
        if hidden - set(found):
            return key in self.fixed
        self.settle(o, cut, tuple(found.get(r, (0, {}))[0] for r in range(m)))
        return True

    def settle(self, o: Observed, cut: Cut, widths: tuple[int, ...]) -> None:
        key, m = spell(cut), len(widths)
        n = axis_size(o.expression, cut, self.sizes, {})
        total = sum(widths)
        if isinstance(cut.axis, Padded):
            if m > 1 and all(w == n for w in widths):
                self.replicas[o.name][key] = widths
                return
            if m > 1 and all(w == widths[0] > n for w in widths) and cut.axis.name not in self.given_padding:
                raise o.expression.refuse(
                    cut,
                    f"every rank holds {widths[0]} of '{o.name}' where '{cut.axis.name}' is {n}: that may be copies "
                    f"with padding, or a cut of {total}; give the width with its padding",
                )
            if m > 1 and total > n and len(set(widths)) == 1 and cut.axis.name in self.unpadded:
                raise o.expression.refuse(
                    cut,
                    f"every rank holds {widths[0]} of '{o.name}' where '{cut.axis.name}' is {n}: nothing pads it to "
                    f"{total}, and copies of another size would look so; say it by hand (sizes) if {n} is true",
                )
            self.pad(o, cut.axis, total, {})
        elif m > 1 and n and all(w == n for w in widths):
            self.replicas[o.name][key] = widths
            return
        elif total != n and not (cut.repeat and m > n > 0 and m % n == 0 and set(widths) == {1}):
            raise o.expression.refuse(cut, self.wrong_total(o, cut, widths, n))
        before = self.fixed.setdefault(key, _Fixed(widths, f"'{o.name}'"))
        if before.widths != widths:
            r = next(r for r in range(m) if before.widths[r] != widths[r])
            raise o.expression.refuse(
                cut,
                f"'{key}' is {before.widths[r]} wide on rank {r} in {before.by}, but {widths[r]} in '{o.name}'; one "
                "axis has one cut",
            )

    def wrong_total(self, o: Observed, cut: Cut, widths: tuple[int, ...], n: int) -> str:
        named = f"'{spell(cut.axis)}' is {n}, but the shards of '{o.name}' over {'/'.join(cut.over)} hold "
        return f"{named}{' + '.join(map(str, widths))} = {sum(widths)} of it; the size, the axis or the mesh is another"

    def verify(self, o: Observed, k: int, dim: Axis) -> None:
        for at, shape in o.shards:
            expected = self.extent(o, dim, "", 0, at)
            if shape[k] != expected:
                raise o.expression.refuse(
                    dim,
                    f"'{spell(dim)}' is {expected} wide by the cuts that other parameters show, but '{o.name}' has "
                    f"{shape[k]} in dimension {k}{_where(at)}",
                )


def _where(at: Coordinate) -> str:
    return " on " + ", ".join(f"{m} rank {r}" for m, r in at.items()) if at else ""
