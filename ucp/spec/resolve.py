"""Which spec counts for a model, and where that puts the local tensors of all its parts.

The one that the caller gives; else what the model or the checkpoint says of itself; else the catalogue's for its type.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from ucp.geometry import whole
from ucp.parallel.mesh import Coordinate, Layout
from ucp.spec.bound import Bound, bind
from ucp.spec.placement import Parts, Placed, Placements, place, uncut
from ucp.spec.select import Choice


def find_placements(
    choice: Choice,
    info: Any,
    recorded: Callable[[], Mapping[str, Any] | None],
    parts: Parts,
    layout: Layout,
    buffers: Collection[str],
    section: str,
    captures: Sequence[tuple[str, str]] = (),
) -> Placements | None:
    """Where every local tensor lies; None where tensor parallelism cuts the model, and nothing says how.

    info: the model's ``universal_checkpoint_info``, if it has one; recorded: finds its config, if there is one, and
    is asked only where that decides; section: the section under ``layouts:`` that counts. captures: as for
    `infer`. The other arguments and the errors are those of `place` and `infer`.
    """
    if choice.apart:
        return apart(parts)
    info = info if isinstance(info, Mapping) and choice.spec is None else None
    if layout.tp == 1:
        # Nothing is cut, and the spec is asked for nothing but padding.
        padded = choice.spec is not None and (choice.settings or _config(choice, recorded) is not None)
        if not padded and not (info and info.get("vocabulary_parameter_patterns")):
            return uncut(parts)
    bound = (
        choice.bound(_config(choice, recorded), section)
        if info is None
        else _inferred(choice, info, parts, layout, buffers, captures)
    )
    return None if bound is None else place(bound, parts, layout, buffers)


def _config(choice: Choice, recorded: Callable[[], Mapping[str, Any] | None]) -> Mapping[str, Any] | None:
    return choice.config if choice.config is not None else recorded()


def apart(parts: Parts) -> Placements:
    """Every local tensor under a name of its own, ``tp.pp.ep:name``, nothing put together."""
    return {
        (at, name): (Placed(name_of_shard(at, name), shape, whole(shape)),)
        for at, held in parts.items()
        for name, shape in held.items()
    }


def name_of_shard(at: Coordinate, name: str) -> str:
    """The name that `apart` gives to a rank's local tensor."""
    return f"{at.tp}.{at.pp}.{at.ep}:{name}"


def shard_of(name: str) -> tuple[Coordinate, str]:
    """The coordinate and the local name, of a name that `apart` has given."""
    at, _, local = name.partition(":")
    tp, pp, ep = map(int, at.split("."))
    return Coordinate(tp, pp, ep), local


def _inferred(choice: Choice, info: Mapping[str, Any], *model: Any) -> Bound:
    from ucp.spec.infer import infer  # only what describes itself needs it

    return bind(infer(info, *model), choice.config or {}, choice.settings)
