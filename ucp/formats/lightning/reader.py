"""Reading Lightning's folder: the shards as DCP's, and the rest of the run from ``meta.pt``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ucp.catalog import Catalog
from ucp.errors import DamagedCheckpoint
from ucp.formats.accelerate.parts import load
from ucp.formats.dcp.reader import add_entries, layout_of
from ucp.formats.lightning import META, NAME, VERSION
from ucp.formats.nouns import ReadRequest
from ucp.formats.shared.builder import Builder
from ucp.formats.shared.state_dicts import Entries
from ucp.formats.shared.unflatten import unflatten
from ucp.formats.shared.unknown_objects import UnknownObjects
from ucp.printable import logger
from ucp.storage import locations
from ucp.storage.files import Files

log = logger(__name__)


def read(path: Path, files: Files, request: ReadRequest) -> Catalog:
    """The folder's catalog. Raises DamagedCheckpoint, UnsafePickle."""
    folder = locations.locate(path)
    meta = load(folder / META, request)
    if not isinstance(meta, Mapping):
        raise DamagedCheckpoint(f"{folder / META}: holds a {type(meta).__name__}, not Lightning's state of a run")
    into = Entries(Builder(files))
    add_entries(folder, into, UnknownObjects.of(request.options))
    notes = unflatten(into, folder, request.options.get("param_shapes"))
    version = meta.get(VERSION, "of unknown version")
    catalog = into.catalog(NAME, f"lightning {version}", layout_of(into))
    catalog.check()
    for note in notes:
        log.warning("%s: %s", folder, note)
    single = _scheduler(meta)
    step = meta.get("global_step")
    kept = {str(key): value for key, value in meta.items() if key != "lr_schedulers" or single is None}
    state = catalog.training_state
    return replace(
        catalog,
        unchecked=(*catalog.unchecked, *notes),
        training_state=replace(
            state,
            lr_scheduler=single,
            global_steps=step if type(step) is int and 0 <= step < 2**63 else None,
            client_state={**state.client_state, **kept},
        ),
    )


def complete(catalog: Catalog) -> Catalog:
    """DeepSpeed's checkpoint, with Lightning's scheduler out of the client state as its own. It stays there, too, since
    Lightning looks for it there."""
    state = catalog.training_state
    if state.lr_scheduler is not None:
        return catalog
    return replace(catalog, training_state=replace(state, lr_scheduler=_scheduler(state.client_state)))


def _scheduler(kept: Mapping[str, Any]) -> Any:
    """The state of the only lr scheduler; None if there is none, or several."""
    found = kept.get("lr_schedulers")
    return found[0] if isinstance(found, list) and len(found) == 1 else None
