"""A spec against shards in memory, all of them at once: what the tests of specs ask of every one."""

from __future__ import annotations

from collections.abc import Mapping

from ucp.errors import Position, SpecError
from ucp.spec.bound import Bound
from ucp.spec.check import Shards, merge
from ucp.spec.evaluate import Cutting, Mesh
from ucp.spec.solve import Observed, solve_cuts


def check_shards(bound: Bound, mesh: Mesh, shards: Mapping[str, Shards]) -> dict[str, Cutting]:
    """Check a spec against the shards themselves, and return how every parameter is cut.

    shards: parameter -> its shards in memory with their mesh coordinates. Every shard's shape must follow from one cut
    of every axis, copies must be equal, parts must not be missing.

    Raises SpecError and Mismatch at the first thing that is wrong.
    """
    observed = []
    for name, held in shards.items():
        found = bound.find(name)
        if found is None:
            raise SpecError(f"no line under parameters: matches '{name}'; write one", Position(bound.spec.file, 1, 1))
        observed.append(Observed(name, found.expression, [(at, array.shape) for at, array in held]))
    cuttings = solve_cuts(observed, bound.sizes, mesh)
    for o in observed:
        merge(o.expression, bound.sizes, cuttings[o.name], shards[o.name], o.name)
    return cuttings
