"""Reading what ``save_state`` wrote: the parts, and what else a run continues with."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ucp.catalog import Catalog
from ucp.errors import DamagedCheckpoint
from ucp.formats.accelerate import NAME, STATES, parts
from ucp.formats.nouns import FolderNames, ReadRequest
from ucp.formats.shared.malformed import malformed
from ucp.storage import locations
from ucp.storage.files import Files

_SCHEDULER = re.compile(r"scheduler(_\d+)?\.bin")
_GENERATORS = ("step", "random_state", "numpy_random_seed", "torch_manual_seed", "torch_cuda_manual_seed")
# The program's own objects, and state that no resume here uses by itself.
_KEPT = re.compile(r"(custom_checkpoint_\d+)\.pkl|((?:sampler|dl_state_dict)(?:_\d+)?)\.bin|(scaler)\.pt")


def read(path: Path, files: Files, request: ReadRequest) -> Catalog:
    """The folder's catalog.

    Raises DamagedCheckpoint if parts are missing or contradict each other, UnsafePickle, Unsupported.
    """
    folder = locations.locate(path)
    names = locations.names(folder)
    found = parts.read(folder, files, request, names)
    catalog = found.catalog(NAME, "accelerate of unknown version")
    if any(map(_SCHEDULER.fullmatch, names)) and not (catalog.training_state.param_groups or found.unnamed):
        raise DamagedCheckpoint(f"{folder}: has an lr scheduler's state and no optimizer's; a part is missing")
    return _with_the_run(catalog, folder, names, found.load)


def complete(catalog: Catalog, beside: FolderNames, request: ReadRequest) -> Catalog:
    """DeepSpeed's checkpoint, or one of ours in its place, with what ``save_state`` keeps of the run beside its folder.
    Its own scheduler and generators stay, where it has some. One that was converted from such a state has all of that.

    Raises DamagedCheckpoint, UnsafePickle.
    """
    found = _with_the_run(catalog, beside.path, beside.names, lambda name: parts.load(beside.path / name, request))
    before, after = catalog.training_state, found.training_state
    return catalog if "ranks" in before.extra and after.client_state.keys() == before.client_state.keys() else found


def _with_the_run(catalog: Catalog, folder: Path, names: Sequence[str], load: Callable[[str], Any]) -> Catalog:
    """The catalog with schedulers, generators of all ranks, and as client state the program's own objects."""
    schedulers = [load(name) for name in names if _SCHEDULER.fullmatch(name)]
    kept = {
        next(filter(None, match.groups())): load(name) for name in names if (match := _KEPT.fullmatch(name)) is not None
    }
    state = catalog.training_state
    states = by_rank(folder, STATES, names, load, catalog.layout.world_size)
    if state.lr_scheduler is not None:
        schedulers.insert(0, state.lr_scheduler)
    for index, more in enumerate(schedulers[1:], start=1):
        kept[f"scheduler_{index}"] = more
    if states:
        kept["step"] = states[0].get("step")
    with malformed(folder, "its random states"):
        generators = [_generators(own, rank) for rank, own in enumerate(states)]
        kept.update(others(states, _GENERATORS))
    return replace(
        catalog,
        training_state=replace(
            state,
            lr_scheduler=schedulers[0] if schedulers else None,
            dp_world_size=state.dp_world_size or len(states) or None,
            client_state={**state.client_state, **kept},
            extra={**({"ranks": [{"rng": own} for own in generators]} if states else {}), **state.extra},
        ),
    )


def by_rank(
    folder: Path, pattern: re.Pattern[str], names: Sequence[str], load: Callable[[str], Any], least: int
) -> list[Any]:
    """What every rank's file of this kind holds, if there are any.

    least: so many ranks have certainly saved. Raises DamagedCheckpoint if a rank's file is missing.
    """
    ranks = {int(match[1]): name for name in names if (match := pattern.fullmatch(name)) is not None}
    count = max(len(ranks), least) if ranks else 0
    missing = next((rank for rank in range(count) if rank not in ranks), None)
    if missing is not None:
        shown = ranks[max(ranks)]
        raise DamagedCheckpoint(f"{folder}: has '{shown}' and no such file of rank {missing}; a part is missing")
    return [load(ranks[rank]) for rank in sorted(ranks)]


def others(states: Sequence[Mapping[str, Any]], known: Sequence[str]) -> dict[str, Any]:
    """As client state, what the ranks' files of generators have besides: those of other devices, for example."""
    more = [{key: value for key, value in own.items() if key not in known} for own in states]
    return {"other_generators": more} if any(more) else {}


def _generators(states: Mapping[str, Any], rank: int) -> dict[str, Any]:
    return generators(
        states["torch_manual_seed"],
        states["numpy_random_seed"],
        states["random_state"],
        states.get("torch_cuda_manual_seed"),
        rank,
    )


def generators(torch_state: Any, numpy_state: Any, python_state: Any, cuda: Any, rank: int) -> dict[str, Any]:
    """Random number generators as `ucp.job.generators` has them. cuda: one device's state, or a list with the states of
    all devices, of which a rank uses its own."""
    version, words, gauss = python_state
    out = {
        "torch": torch_state,
        "numpy": tuple(numpy_state.values()) if isinstance(numpy_state, Mapping) else tuple(numpy_state),
        "python": (version, np.array(words, np.uint32), gauss),
    }
    if isinstance(cuda, list):
        cuda = cuda[rank % len(cuda)] if cuda else None
    if cuda is not None:
        out["device"] = cuda
    return out
