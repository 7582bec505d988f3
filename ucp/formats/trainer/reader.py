"""Reading a Trainer's ``checkpoint-N``, and whether its files are of one step."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ucp.catalog import Catalog
from ucp.errors import DamagedCheckpoint
from ucp.formats.accelerate import parts
from ucp.formats.accelerate.reader import by_rank, generators, others
from ucp.formats.nouns import FolderNames, ReadRequest
from ucp.formats.shared.malformed import malformed
from ucp.formats.trainer import NAME, STATE
from ucp.printable import logger
from ucp.storage import configs, locations
from ucp.storage.files import Files

log = logger(__name__)

KEPT = "trainer_state"
SCHEDULER, SCALER, GENERATORS = "scheduler.pt", "scaler.pt", "rng_state.pth"
_GENERATORS = re.compile(r"rng_state_(\d+)\.pth")


def state_of(path: Path) -> dict[str, Any]:
    """What the Trainer keeps of its progress. Raises DamagedCheckpoint."""
    return configs.read(path / STATE)


def step_of(state: Mapping[str, Any]) -> int | None:
    step = state.get("global_step")
    return step if type(step) is int and 0 <= step < 2**63 else None


def read(path: Path, files: Files, request: ReadRequest) -> Catalog:
    """The folder's catalog.

    Raises DamagedCheckpoint where parts are missing, or of two steps, UnsafePickle, Unsupported.
    """
    folder = locations.locate(path)
    names = locations.names(folder)
    found = parts.read(folder, files, request, names)
    catalog = found.catalog(NAME, "transformers' Trainer")
    scheduler = found.load(SCHEDULER) if SCHEDULER in names else None
    if scheduler is not None and not (catalog.training_state.param_groups or found.unnamed):
        raise DamagedCheckpoint(f"{folder}: has '{SCHEDULER}' and no optimizer; a part is missing")
    return _with_the_run(catalog, folder, names, found.load, scheduler)


def complete(catalog: Catalog, beside: FolderNames, request: ReadRequest) -> Catalog:
    """DeepSpeed's checkpoint, or one of ours in its place, with what the Trainer keeps of the run beside its folder.
    Its own scheduler and generators stay, where it has some. One that was converted from a Trainer's has all of that.

    Raises DamagedCheckpoint, UnsafePickle.
    """
    folder = beside.path
    if KEPT in catalog.training_state.client_state:
        return catalog

    def load(name: str) -> Any:
        return parts.load(folder / name, request)

    scheduler = load(SCHEDULER) if SCHEDULER in beside.names else None
    steps, said = catalog.training_state.global_steps, step_of(state_of(folder))
    if steps is not None and said is not None and steps != said:
        raise DamagedCheckpoint(
            f"{folder}: the checkpoint in it is of step {steps}, and '{STATE}' of step {said}; parts of two steps are "
            "mixed: move the checkpoint's folder elsewhere to have it by itself"
        )
    return _with_the_run(catalog, folder, beside.names, load, scheduler)


def _with_the_run(
    catalog: Catalog, folder: Path, names: Sequence[str], load: Callable[[str], Any], scheduler: Any
) -> Catalog:
    """The catalog with its scheduler, the Trainer's own state and the generators of all ranks."""
    progress, state = state_of(folder), catalog.training_state
    doubts = tuple(_doubts(folder, progress, scheduler, catalog))
    for doubt in doubts:
        log.warning("%s: %s", folder, doubt)
    kept: dict[str, Any] = {KEPT: progress}
    if SCALER in names:
        kept["scaler"] = load(SCALER)
    # Of a single rank the file has no number.
    states = by_rank(folder, _GENERATORS, names, load, max(catalog.layout.world_size, 2))
    if not states and GENERATORS in names:
        states = [load(GENERATORS)]
    with malformed(folder, "the states of its random number generators"):
        ranks = [
            {"rng": generators(own["cpu"], own["numpy"], own["python"], own.get("cuda"), rank)}
            for rank, own in enumerate(states)
        ]
        kept.update(others(states, ("cpu", "numpy", "python", "cuda")))
    return replace(
        catalog,
        unchecked=(*catalog.unchecked, *doubts),
        training_state=replace(
            state,
            lr_scheduler=scheduler if state.lr_scheduler is None else state.lr_scheduler,
            global_steps=step_of(progress),
            dp_world_size=state.dp_world_size or len(ranks) or None,
            client_state={**state.client_state, **kept},
            extra={**({"ranks": ranks} if ranks else {}), **state.extra},
        ),
    )


def _doubts(folder: Path, progress: Mapping[str, Any], scheduler: Any, catalog: Catalog) -> Iterator[str]:
    """What speaks against the files' being all, and of one step. Raises DamagedCheckpoint where they can't be of one.

    Scheduler and optimizer both count the steps that were taken. The Trainer also counts those that were skipped
    because of an overflow.
    """
    step = step_of(progress)
    if step is None:
        raise DamagedCheckpoint(f"{folder / STATE}: has no 'global_step'")
    counts = [info.scalars["step"] for info in catalog.parameters.values() if "step" in info.scalars]
    taken = max((int(count) for count in counts if isinstance(count, (int, float)) and count == count), default=None)
    last = scheduler.get("last_epoch") if isinstance(scheduler, Mapping) else None
    ended = isinstance(scheduler, Mapping) and scheduler.get("_step_count") == (last or 0) + 1
    scheduled = last if type(last) is int and ended else None
    for name, count in (("the optimizer", taken), (f"'{SCHEDULER}'", scheduled)):
        if count is not None and count > step:
            raise DamagedCheckpoint(
                f"{folder}: {name} is of step {count}, and '{STATE}' of step {step}; parts of two steps are mixed"
            )
    if taken is not None and scheduled is not None and taken != scheduled:
        raise DamagedCheckpoint(
            f"{folder}: the optimizer is of step {taken}, and '{SCHEDULER}' of step {scheduled}; parts of two steps "
            "are mixed"
        )
    if taken is not None and taken < step:
        yield (
            f"the optimizer has taken {taken} steps, and '{STATE}' counts {step}: the others were skipped for "
            "overflows, or parts of two steps are mixed"
        )
    state = catalog.training_state
    trained = state.param_groups or any(name.startswith(parts.OPTIMIZER) for name in state.client_state)
    if trained and scheduler is None and state.lr_scheduler is None:
        yield f"has an optimizer and no '{SCHEDULER}', which the Trainer writes with it; a part is missing"
