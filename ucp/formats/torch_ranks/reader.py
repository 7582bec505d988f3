"""Reading one file of each rank: what ranks have parts of is put together, and the rest is the first rank's.

Of plain values of which ranks have different ones, all ranks' are kept as client state, under ``of_ranks``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ucp.catalog import Catalog
from ucp.errors import DamagedCheckpoint, Unsupported
from ucp.formats.accelerate.parts import OPTIMIZER, Parts, add_module, add_optimizer, load
from ucp.formats.accelerate.ranks import differ_sentence, joined
from ucp.formats.nouns import ReadRequest
from ucp.formats.shared.builder import Builder
from ucp.formats.shared.roles import MODEL
from ucp.formats.shared.state_dicts import Entries
from ucp.formats.shared.unflatten import unflatten
from ucp.formats.torch_file.reader import FileRoles, find_roles, unwrapped, with_the_rest
from ucp.formats.torch_ranks import NAME, sets_of
from ucp.formats.torch_ranks.flat_states import in_parts, whole_states
from ucp.formats.torch_ranks.shard_metadata import is_metadata, units_of
from ucp.storage import locations
from ucp.storage.files import Files

OF_RANKS = "of_ranks"


def read(path: Path, files: Files, request: ReadRequest) -> Catalog:
    """The folder's catalog.

    Raises DamagedCheckpoint if a rank's file is missing or the files don't belong together, Unsupported for the files
    of several checkpoints and for what nothing tells the parameters of, and what reading one file does.
    """
    folder = locations.locate(path)
    paths = _paths(folder)
    graphs = [load(own, request, dtensors=True) for own in paths]
    roles = [find_roles(own, graph, request.options) for own, graph in zip(paths, graphs, strict=True)]
    for own, found in zip(paths, roles, strict=True):
        if (found.model, [key for key, _ in found.optimizers]) != (
            roles[0].model,
            [key for key, _ in roles[0].optimizers],
        ):
            raise DamagedCheckpoint(f"{own}: has other entries than '{paths[0].name}'; files of two runs are mixed")
    parts = Parts(folder, request, Entries(Builder(files)), ranks=len(paths))
    unequal: list[str] = []
    module = joined([found.module for found in roles], paths, parts.entries.builder, unequal, MODEL)
    add_module(parts, unwrapped(module, graphs[0]), paths[0].name)
    parts.units = units_of(graphs, paths, parts.entries)
    _add_optimizers(parts, roles, paths, unequal)
    parts.notes += unflatten(parts.entries, folder, request.options.get("param_shapes"), parts.units, f"{MODEL}.")
    left = _left(parts, module)
    unequal = [name for name in unequal if not name.startswith(f"{MODEL}.") or name in left]
    if unequal:
        parts.notes.append(differ_sentence(unequal))
    catalog = parts.catalog(NAME, "torch.save")
    return _with_the_rest(catalog, graphs, roles)


def _left(parts: Parts, module: Mapping[str, Any]) -> set[str]:
    """Names of the model's whole tensors that are still what the first rank has."""
    return {
        f"{MODEL}.{name}"
        for name, value in module.items()
        if (tensor := parts.entries.tensors.get(f"{MODEL}.{name}")) is not None
        and getattr(value, "shape", None) == tensor.shape
    }


def _paths(folder: Path) -> list[Path]:
    """The ranks' files, rank by rank. Raises DamagedCheckpoint if one is missing, Unsupported for several sets."""
    found = sets_of(locations.names(folder))
    if len(found) > 1:
        shown = ", ".join(f"'{ranks[min(ranks)]}'" for ranks in list(found.values())[:4])
        raise Unsupported(
            f"{folder}: holds the ranks' files of several checkpoints ({shown}); move each checkpoint's into a folder "
            "of its own"
        )
    (((_, of, _), ranks),) = found.items()
    world = int(of.removeprefix("-of-")) if of else max(ranks) + 1
    missing = next((rank for rank in range(world) if rank not in ranks), None)
    if missing is not None or len(ranks) != world:
        raise DamagedCheckpoint(
            f"{folder}: has the files of {len(ranks)} ranks ('{ranks[min(ranks)]}', …), and not that of rank "
            f"{world if missing is None else missing}; a rank's part is missing"
        )
    return [folder / ranks[rank] for rank in sorted(ranks)]


def _add_optimizers(parts: Parts, roles: Sequence[FileRoles], paths: Sequence[Path], unequal: list[str]) -> None:
    for index, (key, _) in enumerate(roles[0].optimizers):
        root = OPTIMIZER if not index else f"{OPTIMIZER}_{index}"
        states = [found.optimizers[index][1] for found in roles]
        if in_parts(states, parts.entries):
            parts.entries.add_tree((root,), whole_states(states, paths, parts))
        else:
            whole = joined(states, paths, parts.entries.builder, unequal, key)
            add_optimizer(parts, whole, paths[0].name, root, kept_as=key)


def _with_the_rest(catalog: Catalog, graphs: Sequence[Mapping[Any, Any]], roles: Sequence[FileRoles]) -> Catalog:
    """Scheduler and step as what they are, everything else as client state. FSDP1's metadata has done its part."""
    if roles[0].model is None:
        return catalog
    first = {key: value for key, value in graphs[0].items() if not is_metadata(value)}
    found = with_the_rest(catalog, first, roles[0])
    used = {roles[0].model, *(key for key, _ in roles[0].optimizers)}
    different = {
        str(key): [graph.get(key) for graph in graphs]
        for key, value in first.items()
        if key not in used and any(graph.get(key) != value for graph in graphs)
    }
    if not different:
        return found
    state = found.training_state
    return replace(found, training_state=replace(state, client_state={**state.client_state, OF_RANKS: different}))
