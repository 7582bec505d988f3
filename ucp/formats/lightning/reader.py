"""Reading Lightning's folder: the shards as DCP's, and the rest of the run from ``meta.pt``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from ucp.catalog import Catalog
from ucp.errors import DamagedCheckpoint
from ucp.formats.accelerate.parts import load
from ucp.formats.dcp.reader import add_entries, layout_of
from ucp.formats.lightning import META, NAME
from ucp.formats.nouns import ReadRequest
from ucp.formats.shared.builder import Builder
from ucp.formats.shared.state_dicts import Entries
from ucp.storage import locations
from ucp.storage.files import Files


def read(path: Path, files: Files, request: ReadRequest) -> Catalog:
    """The folder's catalog. Raises DamagedCheckpoint, UnsafePickle."""
    folder = locations.locate(path)
    meta = load(folder / META, request)
    if not isinstance(meta, Mapping):
        raise DamagedCheckpoint(f"{folder / META}: holds a {type(meta).__name__}, not Lightning's state of a run")
    into = Entries(Builder(files))
    add_entries(folder, into, bool(request.options.get("trust_client_state")))
    version = meta.get("pytorch-lightning_version", "of unknown version")
    catalog = into.catalog(NAME, f"lightning {version}", layout_of(into))
    catalog.check()
    schedulers = meta.get("lr_schedulers")
    single = schedulers[0] if isinstance(schedulers, list) and len(schedulers) == 1 else None
    step = meta.get("global_step")
    kept = {str(key): value for key, value in meta.items() if key != "lr_schedulers" or single is None}
    state = catalog.training_state
    return replace(
        catalog,
        training_state=replace(
            state,
            lr_scheduler=single,
            global_steps=step if type(step) is int and 0 <= step < 2**63 else None,
            client_state={**state.client_state, **kept},
        ),
    )
