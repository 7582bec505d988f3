"""The objects beside a folder's tensors: random generators, and the states that modules keep by themselves.

A module's state lies under its layer's key as its weight does, stacked or not, and an expert's by the expert's number:
the source's are moved to the places that the target has for the same modules.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from ucp.catalog import Catalog
from ucp.formats.megatron import keys
from ucp.formats.megatron.read.common import EXTRA
from ucp.formats.megatron.write.places import KeyPlace, Stacks

# Modules that keep a state of their own beside their tensors: Transformer Engine's linear layers, and Megatron's like.
_WITH_STATE = re.compile(r"(.+\.(?:linear_[a-z0-9_]+|mixer\.(?:in|out)_proj))\.weight")

# What only models with Mamba's mixers have. Their output layer asks for a state, and that of others does not
# (megatron/core/models/gpt/gpt_model.py: ``sharded_state_dict`` takes it out).
_HYBRID = "decoder.final_norm.weight"


def objects(catalog: Catalog, places: Mapping[str, KeyPlace], stacked: bool) -> dict[str, Any]:
    """Those that the source had, and an empty one for each other module that asks for one.

    places: of all parameters, by name. stacked: whether layers share keys.
    """
    kept = dict(catalog.training_state.extra.get(EXTRA, {}).get("objects", {}))
    out = {key: value for key, value in kept.items() if key.startswith("rng_state/")}
    stacks, blocks = Stacks(places), keys.layer_counts(places).keys()
    for key, value in kept.items():
        name = keys.module_state(key)
        if name is not None:
            known = stacked and keys.layer_counts([name]).keys() <= blocks
            out[_key(_place(name, places, stacks, known))] = value
    asked = [key for place in places.values() for key in _asked(place)]
    if _HYBRID in places:
        asked.append(_key(KeyPlace(f"output_layer{keys.MODULE_STATE}", (), ())))
    for key in asked:
        out.setdefault(key, None)
    return out


def _place(name: str, places: Mapping[str, KeyPlace], stacks: Stacks, stacked: bool) -> KeyPlace:
    """Where a module's state lies: where its weight does, or as what else its layer has."""
    beside = f"{name.removesuffix(keys.MODULE_STATE)}.weight"
    found = places.get(beside) or stacks.entry(beside, stacked)
    return KeyPlace(found.key.removesuffix(".weight") + keys.MODULE_STATE, found.at, found.counts)


def _key(place: KeyPlace) -> str:
    at, counts = (
        ".".join(map(str, numbers or default)) for numbers, default in ((place.at, (0,)), (place.counts, (1,)))
    )
    return f"{place.key}/shard_{at}_{counts}"


def _asked(place: KeyPlace) -> Iterator[str]:
    found = _WITH_STATE.fullmatch(place.key)
    if found is not None:
        yield _key(KeyPlace(found[1] + keys.MODULE_STATE, place.at, place.counts))
