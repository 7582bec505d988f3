"""Reading the ranks' files as one state dict. What the entries are to a training run is told as for DCP."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ucp.catalog import Catalog, LogicalTensor
from ucp.errors import DamagedCheckpoint, Unsupported
from ucp.formats.accelerate.parts import load
from ucp.formats.accelerate.ranks import differ_sentence, joined
from ucp.formats.nouns import ReadRequest
from ucp.formats.shared.builder import Builder
from ucp.formats.shared.numbered_entries import name_numbers
from ucp.formats.shared.state_dicts import Entries
from ucp.formats.shared.two_saves import far_apart, uneven_steps
from ucp.formats.shared.unflatten import unflatten
from ucp.formats.torch_checkpointing import FILE, METADATA, NAME
from ucp.parallel.mesh import Layout
from ucp.printable import logger
from ucp.storage import graphs, locations
from ucp.storage.files import Files
from ucp.storage.torch_pt.pickles import Unpickler

log = logger(__name__)

_SCHEDULERS = ("lr_scheduler", "scheduler", "lr_schedulers")
_STEPS = ("step", "global_step", "iteration")
_VERSIONS = ("2.0", "3.0")
_OF_RANKS = "of_ranks"
"""Items of which ranks have different values are client state under this name, too: item -> a value of each rank."""


def read(path: Path, files: Files, request: ReadRequest) -> Catalog:
    """The folder's catalog.

    Raises DamagedCheckpoint if a rank's file is missing or the files don't belong together, UnsafePickle, Unsupported;
    that also for several files of whole tensors without metadata, which may be anything's.
    """
    folder = locations.locate(path)
    names = locations.names(folder)
    items, told = _items(folder, names), METADATA in names
    into = Entries(Builder(files))
    kept: dict[str, Any] = {}
    different: dict[str, list[Any]] = {}
    unequal: list[str] = []
    for item, paths in items.items():
        held = [load(own, request, dtensors=True) for own in paths]
        if not all(map(_plain, held)):
            whole = joined(held, paths, into.builder, unequal, item)
            if len(held) > 1 and not told and not _cut(whole):
                raise Unsupported(
                    f"{folder}: '{paths[0].name}' and '{paths[1].name}' hold whole tensors, and no '{METADATA}' says "
                    "that they are ranks' files of one save and not, say, of two epochs; give the path of one of them"
                )
            into.add_tree((item,), whole)
            continue
        kept[item] = held[0]
        if any(own != held[0] for own in held[1:]):
            different[item] = held
    notes = unflatten(into, folder, request.options.get("param_shapes"))
    notes += name_numbers(into, request.options.get("param_names"))
    world = len(next(iter(items.values())))
    cut = any(len(tensor.blocks) > 1 for tensor in into.tensors.values())
    catalog = into.catalog(NAME, "torch_checkpointing", Layout(dp=world, zero=3) if cut else Layout(dp=world))
    catalog.check()
    notes += [text for text in (far_apart(catalog.on_disk), uneven_steps(catalog)) if text is not None]
    if different:
        notes.append(f"ranks have different values of {', '.join(map(repr, different))}; rank 0's are the item's")
    if unequal:
        notes.append(differ_sentence(unequal))
    for note in notes:
        log.warning("%s: %s", folder, note)
    state = catalog.training_state
    scheduler = next((kept.pop(key) for key in _SCHEDULERS if isinstance(kept.get(key), Mapping)), None)
    step = next((kept[key] for key in _STEPS if type(kept.get(key)) is int and 0 <= kept[key] < 2**63), None)
    return replace(
        catalog,
        unchecked=(*catalog.unchecked, *notes),
        training_state=replace(
            state,
            lr_scheduler=scheduler or state.lr_scheduler,
            global_steps=state.global_steps if step is None else step,
            client_state={**state.client_state, **kept, **({_OF_RANKS: different} if different else {})},
            dp_world_size=world,
        ),
    )


def _items(folder: Path, names: Sequence[str]) -> dict[str, list[Path]]:
    """The items' files, rank by rank. Raises DamagedCheckpoint if one of a rank is missing."""
    found: dict[str, dict[int, Path]] = {}
    for name in names:
        match = FILE.fullmatch(name)
        if match is not None:
            found.setdefault(match[1], {})[int(match[2])] = folder / name
    said = _said(folder) if METADATA in names else {}
    world = said.get("world_size", max(max(ranks) for ranks in found.values()) + 1)
    for item in (*found, *(item for item in said.get("metadata", {}) if item not in found)):
        ranks = found.get(item, {})
        if sorted(ranks) != list(range(world)):
            odd = min(set(range(world)) ^ set(ranks))
            raise DamagedCheckpoint(
                f"{folder}: has item '{item}' of the ranks {sorted(ranks)[:8]}, and {world} ranks wrote it; "
                f"'{item}_{odd}.pt' is {'missing' if odd < world else 'of another save'}"
            )
    return {item: [ranks[rank] for rank in sorted(ranks)] for item, ranks in found.items()}


def _said(folder: Path) -> dict[str, Any]:
    """What the metadata say. Raises DamagedCheckpoint, UnsafePickle, and Unsupported for files of other names."""
    path = folder / METADATA
    try:
        raw = locations.read(path)
    except OSError as error:
        raise DamagedCheckpoint(f"{path}: cannot be read: {error.strerror or error}") from error
    found = Unpickler(io.BytesIO(raw), str(path), len(raw), trust=None).load()
    graphs.check(str(path), found)
    world = found.get("world_size") if isinstance(found, Mapping) else None
    items = found.get("metadata") if isinstance(found, Mapping) else None
    if type(world) is not int or not 0 < world < 1 << 24 or not isinstance(items, Mapping):
        raise DamagedCheckpoint(f"{path}: is not torch_checkpointing's metadata")
    if found.get("version") not in _VERSIONS:
        raise Unsupported(f"{path}: is of version {found.get('version')!r}; known are {', '.join(_VERSIONS)}")
    for item, told in items.items():
        layouts = told.get("rank_to_layout_info") if isinstance(told, Mapping) else None
        other = [own for own in (layouts or {}).values() if own is not None and not _is_default(own, str(item))]
        if other:
            raise Unsupported(
                f"{path}: item '{item}' has a layout of its own ({other[0]}); read are files called '{item}_0.pt' that "
                "torch.save wrote"
            )
    return {"world_size": world, "metadata": items}


def _is_default(layout: Any, item: str) -> bool:
    """Whether an item's layout is the one that items have without any."""
    name = layout.get("file_path") if isinstance(layout, Mapping) else None
    match = FILE.fullmatch(name) if isinstance(name, str) else None
    return match is not None and match[1] == item and "TorchSerialization" in str(layout)


def _cut(value: Any) -> bool:
    """Whether a joined item has tensors that ranks hold parts of."""
    if isinstance(value, Mapping):
        return any(map(_cut, value.values()))
    return isinstance(value, LogicalTensor) or (isinstance(value, list) and any(map(_cut, value)))


def _plain(value: Any) -> bool:
    """Whether it is plain data, whose equality says all."""
    if isinstance(value, Mapping):
        return all(isinstance(key, (str, int)) and _plain(item) for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return all(map(_plain, value))
    return value is None or isinstance(value, (bool, int, float, str, bytes))
