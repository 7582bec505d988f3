"""Reading a DCP checkpoint: every record's place, and what its entry is to a training run."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from ucp.catalog import Catalog
from ucp.errors import DamagedCheckpoint
from ucp.formats.dcp import NAME, metadata
from ucp.formats.dcp.records import Records
from ucp.formats.dcp.records import tensors as tensors_of
from ucp.formats.shared.builder import Builder
from ucp.formats.shared.numbered_entries import name_numbers
from ucp.formats.shared.roles import StateEntry
from ucp.formats.shared.state_dicts import Entries
from ucp.formats.shared.two_saves import far_apart, uneven_steps
from ucp.formats.shared.unflatten import unflatten
from ucp.formats.shared.unknown_objects import REFUSED, UnknownObjects
from ucp.geometry import Shape
from ucp.parallel.mesh import Layout
from ucp.printable import logger
from ucp.storage import locations
from ucp.storage.files import Files

WRITER = "torch.distributed.checkpoint"

log = logger(__name__)

_RANK = re.compile(r"__(\d+)_\d+\.distcp")


def read(
    path: Path,
    files: Files,
    unknown: UnknownObjects = REFUSED,
    param_names: Sequence[Sequence[str]] | None = None,
    param_shapes: Mapping[str, Shape] | None = None,
) -> Catalog:
    """The folder's catalog.

    unknown: what becomes of objects of unknown classes.
    param_names: the names in each param group, in order, if the saved optimizer only numbers its parameters.
    param_shapes: of the module's parameters, in its order, for what FSDP1 has saved flat.

    Raises DamagedCheckpoint if files are missing, truncated or contradict the metadata, UnsafePickle, Unsupported.
    """
    folder = locations.locate(path)
    into = Entries(Builder(files))
    add_entries(folder, into, unknown)
    notes = [*unflatten(into, folder, param_shapes), *name_numbers(into, param_names)]
    catalog = into.catalog(NAME, WRITER, layout_of(into))
    catalog.check()
    told = (*notes, *(text for text in (far_apart(catalog.on_disk), uneven_steps(catalog)) if text is not None))
    for text in told:
        log.warning("%s: %s", folder, text)
    return replace(catalog, unchecked=(*catalog.unchecked, *told))


def add_entries(folder: Path, into: Entries, unknown: UnknownObjects = REFUSED, under: tuple[str, ...] = ()) -> None:
    """Enter what a DCP folder holds. Entries of another folder may be there already. under: keys before its own.

    Raises what `read` raises, and DamagedCheckpoint if both folders have an entry of the same name.
    """
    found = metadata.load(folder)
    with Records(folder, into.builder) as records:
        objects = {key: records.load(key, record, unknown) for key, record in found.objects.items()}
        tensors = tensors_of(found.tensors, records)
    names = (*found.tensors, *found.objects)
    place = {name: k for k, name in enumerate(found.paths)}  # in the order in which they were saved, if that is known
    for own in sorted(names, key=lambda name: place.get(name, len(place))):
        key = ".".join((*under, own))
        if key in into.entries:
            raise DamagedCheckpoint(f"{folder}: has an entry '{key}', which the folder beside it has, too")
        shape = found.tensors[own].shape if own in tensors else None
        into.entries[key] = StateEntry((*under, *found.paths.get(own, (own,))), shape, objects.get(own))
        if own in tensors:
            into.tensors[key] = tensors[own]


def layout_of(found: Entries) -> Layout:
    """The layout: as many ranks as the files' names tell, sharded like stage 3 if a tensor is in pieces."""
    names = [os.path.basename(file.path) for file in found.builder.sources]
    ranks = [int(match[1]) for name in names if (match := _RANK.fullmatch(name))]
    return Layout(dp=max(ranks, default=0) + 1, zero=3 if any(len(t.blocks) > 1 for t in found.tensors.values()) else 0)
