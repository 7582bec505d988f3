"""Reading a Trainer's ``checkpoint-N``, and whether its files are of one step."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ucp.catalog import Catalog
from ucp.errors import DamagedCheckpoint
from ucp.formats.accelerate import parts
from ucp.formats.accelerate.reader import by_rank, generators, others
from ucp.formats.nouns import ReadRequest
from ucp.formats.shared.malformed import malformed
from ucp.formats.trainer import NAME, STATE
from ucp.storage import configs, locations
from ucp.storage.files import Files

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
    progress = state_of(folder)
    found = parts.read(folder, files, request, names)
    catalog = found.catalog(NAME, "transformers' Trainer")
    scheduler = found.load(SCHEDULER) if SCHEDULER in names else None
    if scheduler is not None and not (catalog.training_state.param_groups or found.unnamed):
        raise DamagedCheckpoint(f"{folder}: has '{SCHEDULER}' and no optimizer; a part is missing")
    _check_steps(folder, progress, scheduler, catalog)
    kept: dict[str, Any] = {"trainer_state": progress}
    if SCALER in names:
        kept["scaler"] = found.load(SCALER)
    # Of a single rank the file has no number.
    several = max(catalog.layout.dp, 2)
    states = by_rank(folder, _GENERATORS, names, found, several)
    if not states and GENERATORS in names:
        states = [found.load(GENERATORS)]
    with malformed(folder, "the states of its random number generators"):
        ranks = [
            {"rng": generators(own["cpu"], own["numpy"], own["python"], own.get("cuda"), rank)}
            for rank, own in enumerate(states)
        ]
        kept.update(others(states, ("cpu", "numpy", "python", "cuda")))
    state = catalog.training_state
    return replace(
        catalog,
        training_state=replace(
            state,
            lr_scheduler=scheduler,
            global_steps=step_of(progress),
            dp_world_size=len(ranks) or None,
            client_state={**state.client_state, **kept},
            extra={**state.extra, **({"ranks": ranks} if ranks else {})},
        ),
    )


def _check_steps(folder: Path, progress: Mapping[str, Any], scheduler: Any, catalog: Catalog) -> None:
    """Raise DamagedCheckpoint where the files can't be of one step.

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
