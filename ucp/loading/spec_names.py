"""A checkpoint with a live model's names, if a spec says what both sides call the same parameters."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

from ucp.catalog import Catalog, bare

if TYPE_CHECKING:
    from ucp.spec.bound import Bound


def in_names_of(catalog: Catalog, live: Collection[str], bound: Bound | None) -> Catalog:
    """The catalog, renamed by the lines under the spec's ``names:`` that give the most of the live names. It stays as
    it is without a spec, or if it already has no fewer of them.

    Raises what `ucp.formats.shared.renaming.rename` raises for parameters that don't fit the spec.
    """
    if bound is None:
        return catalog
    from ucp.formats.shared.renaming import best_names  # late, as the language of specs: most loads have no spec

    wanted = set(map(bare, live))
    return best_names(catalog, bound, lambda name: bare(name) in wanted)


def under_spec(catalog: Catalog, live: Collection[str], opening: Mapping[str, Any]) -> Catalog:
    """`in_names_of`, by the spec that a checkpoint was opened with. opening: as for `ucp.open`."""
    if opening.get("spec") is None:
        return catalog
    from ucp.spec.select import choose

    choice = choose(opening["spec"], opening.get("model_config"), opening.get("sizes"))
    return in_names_of(catalog, live, choice.bound(None))


def config_of(model: Any) -> Mapping[str, Any] | None:
    """The config of a transformers model, as in its config.json. None for other models."""
    config: Any = getattr(model, "config", None)
    found = config.to_dict() if hasattr(config, "to_dict") else config
    return found if isinstance(found, Mapping) else None


def shapes_of(model: Any) -> dict[str, tuple[int, ...]]:
    """The shapes of a module's parameters by name, in its order: of the whole tensors, where a DTensor or ZeRO stage 3
    has cut them."""
    return {name: tuple(getattr(own, "ds_shape", own.shape)) for name, own in model.named_parameters()}
