"""Which spec counts for a model, and where it puts the local tensors of all the model's parts.

The spec that the caller gives counts, else what the model or the checkpoint says of itself, else the catalogue's spec
for the model's type.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ucp.errors import Unsupported
from ucp.geometry import whole
from ucp.parallel.mesh import Coordinate, Layout
from ucp.spec.places import NO_FACTORS, Factors, Parts, Placed, Placements, uncut
from ucp.spec.select import Choice

if TYPE_CHECKING:
    from ucp.spec.bound import Bound

AUTOTP = "autotp"
"""The section of cuts that DeepSpeed makes itself, which pads nothing."""


def find_placements(
    choice: Choice,
    info: Any,
    recorded: Callable[[], Mapping[str, Any] | None],
    parts: Parts,
    layout: Layout,
    buffers: Collection[str],
    section: str,
    captures: Sequence[tuple[str, str]] = (),
    factors: Factors = NO_FACTORS,
) -> Placements | None:
    """Where every local tensor lies; None if tensor parallelism cuts the model and nothing says how.

    info: the model's ``universal_checkpoint_info``, if it has one.
    recorded: finds the model's config, if there is one. It is only called if the config matters.
    section: the section under ``layouts:`` that counts.
    captures: as for `infer`.

    The other arguments and the errors are those of `place` and `infer`.
    """
    if choice.apart:
        return apart(parts)
    info = info if isinstance(info, Mapping) and choice.spec is None else None
    if layout.tp == 1:
        # Nothing is cut, and only padding is looked up in the spec.
        sized = choice.settings or choice.old
        padded = choice.spec is not None and (sized or _config(choice, recorded) is not None)
        if not padded and not (info and info.get("vocabulary_parameter_patterns")):
            return {**uncut(parts), **(_pieced(info, parts) if info else {})}
    if info is not None:
        return _said(choice, info, parts, layout, buffers, captures, factors)
    config = _config(choice, recorded)
    bound = choice.bound(config, section)
    if bound is None:
        return None
    from ucp.spec.outgrown import outgrown  # late, as all that reads specs
    from ucp.spec.placement import place

    padless = section == AUTOTP
    if choice.resized and (found := outgrown(bound, parts, layout, choice, padless)):
        bound = replace(choice, old={**choice.old, **found}).bound(config, section) or bound
    return place(bound, parts, layout, buffers, factors, _unpadded(bound, choice) if padless else ())


def _config(choice: Choice, recorded: Callable[[], Mapping[str, Any] | None]) -> Mapping[str, Any] | None:
    return choice.config if choice.config is not None else choice.config_of(recorded())


def _unpadded(bound: Bound, choice: Choice) -> set[str]:
    """The axes that have no padding where nothing is padded: AutoTP cuts what a model has, and its config says how much
    that is. Sizes that are given by hand may say less, and the rest is padding then."""
    from ucp.spec.grammar import Padded, names

    if any(name.startswith("config.") for name in choice.settings):
        return set()
    axes = {axis.name for line in bound.lines for axis in names(line.expression) if isinstance(axis, Padded)}
    return axes - choice.settings.keys()


def apart(parts: Parts) -> Placements:
    """Every local tensor under a name of its own, ``tp.pp.ep:name``. Nothing is put together."""
    return {
        (at, name): (Placed(name_of_shard(at, name), shape, whole(shape)),)
        for at, held in parts.items()
        for name, shape in held.items()
    }


def name_of_shard(at: Coordinate, name: str) -> str:
    """The name that `apart` gives to a rank's local tensor."""
    return f"{at.tp}.{at.pp}.{at.ep}:{name}"


def shard_of(name: str) -> tuple[Coordinate, str]:
    """The coordinate and the local name behind a name that `apart` has given."""
    at, _, local = name.partition(":")
    tp, pp, ep = map(int, at.split("."))
    return Coordinate(tp, pp, ep), local


def _said(
    choice: Choice,
    info: Mapping[str, Any],
    parts: Parts,
    layout: Layout,
    buffers: Collection[str],
    captures: Sequence[tuple[str, str]],
    factors: Factors,
) -> Placements:
    """What the model says of itself: by axes, and by an affine map's pieces where no axes say it."""
    from ucp.spec.bound import bind
    from ucp.spec.infer import infer  # only models that describe themselves need it
    from ucp.spec.placement import place

    weights = {at: {name: shape for name, shape in held.items() if name not in factors} for at, held in parts.items()}
    own = _pieced(info, weights)
    rest = {at: {name: shape for name, shape in held.items() if (at, name) not in own} for at, held in parts.items()}
    for owner, state in factors.values():
        if any(owner == name for _, name in own):
            raise Unsupported(
                f"optimizer state '{state}' of '{owner}' is of another shape, and the affine map cuts that parameter "
                "into boxes that no axes say; checkpoints of this optimizer cannot be resharded there"
            )
    if not any(rest.values()):
        return own
    told = {at: {name: shape for name, shape in held.items() if name in weights[at]} for at, held in rest.items()}
    bound = bind(infer(info, told, layout, buffers, captures), choice.config or {}, choice.settings)
    return {**place(bound, rest, layout, buffers, factors), **own}


def _pieced(info: Mapping[str, Any], parts: Parts) -> Placements:
    """The local tensors of which an affine map says what no axes can say."""
    from ucp.spec.infer import pieced

    found = pieced(info, parts)
    return {(at, name): found[name].placed(name, at.tp) for at, held in parts.items() for name in held if name in found}
