"""A checkpoint as a torch.distributed program has its model now, by the changes that it declares."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from ucp.catalog import Catalog
from ucp.changes.changed import Changed
from ucp.formats.shared.roles import PARAM, StateEntry, assign
from ucp.geometry import Shape
from ucp.job import ranks
from ucp.storage.dtypes import from_torch

if TYPE_CHECKING:
    from ucp.changes import Outline

Given = str | os.PathLike[str] | Mapping[str, Any] | None
"""Declared changes: a mapping or a file."""

DECLARE = "changes=%s"
"""How a caller declares them, for refusals."""


def as_changed(
    catalog: Catalog,
    changes: Given,
    entries: Callable[[], Mapping[str, StateEntry]],
    opening: Mapping[str, Any],
    quantises: bool | None = None,
) -> Changed:
    """The checkpoint as the model has it now, by the changes that are declared. All ranks call it, or none.
    entries: gives those of the state dict, and may refuse them. quantises: as for `Outline`."""
    if changes is None:
        return Changed(catalog)
    # Imported late, as the language of specs is: most loads declare nothing.
    from ucp.changes import applied
    from ucp.spec.changes import read
    from ucp.spec.select import choose

    config = choose(None, opening.get("model_config")).config
    return ranks.all_or_none(
        lambda: applied(catalog, read(changes), replace(_outline(entries()), quantises=quantises), config)
    )


def are_requantised(changes: Given) -> bool:
    """Whether optimizer states are to be quantised again by the live optimizer."""
    if changes is None:
        return False
    from ucp.spec.changes import REQUANTISED, read

    return read(changes).states == REQUANTISED


def _outline(entries: Mapping[str, StateEntry]) -> Outline:
    """The model and its optimizers as a state dict has them."""
    from ucp.changes import LiveParameter, Outline

    roles = assign(entries, complete=False)
    shapes: dict[str, Shape] = {}
    dtypes: dict[str, str] = {}
    states: dict[str, dict[str, str]] = {}
    values: dict[str, set[str]] = {}
    for key, (name, state) in roles.tensors.items():
        if state == PARAM:
            shapes[name] = tuple(entries[key].value.shape)
            dtypes[name] = from_torch(entries[key].value.dtype)
    for key, (name, state) in (*roles.tensors.items(), *roles.scalars.items()):
        value = entries[key].value
        if state != PARAM and isinstance(value, torch.Tensor) and tuple(value.shape) == shapes.get(name):
            states.setdefault(name, {})[state] = from_torch(value.dtype)
        elif state != PARAM:
            values.setdefault(name, set()).add(state)
    return Outline(
        {
            name: LiveParameter(
                name,
                shape,
                "parameter" if name in roles.trained else "frozen",
                states.get(name, {}),
                frozenset(values.get(name, ())),
                dtype=dtypes[name],
            )
            for name, shape in shapes.items()
        }
    )
