"""What checkpoints say about how good they are: losses and steps, to weigh them by."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from ucp.checkpoint import Checkpoint
from ucp.errors import BadArgument, DamagedCheckpoint
from ucp.merging.weights import FORMS
from ucp.storage import locations

CLIENT_KEY = "ucp_metrics"
"""Where client state has metrics: ``{"loss": 2.31}``."""
TRAINER = "trainer_state.json"


def recorded(checkpoint: Checkpoint, form: str) -> float:
    """The checkpoint's metric. Client state may have it under ``ucp_metrics``. If not, 'step' is the step count, and
    'loss' is the last loss at or before the checkpoint's step in Hugging Face's ``trainer_state.json``.

    Raises
    ------
    BadArgument
        If the checkpoint does not say.
    """
    if form not in FORMS:
        raise BadArgument(f"metrics are weighed by {' or '.join(FORMS)}, found '{form}'")
    state = checkpoint.training_state
    own = state.client_state.get(CLIENT_KEY)
    if isinstance(own, Mapping) and _is_number(own.get(form)):
        return float(own[form])
    if form == "step" and state.global_steps:
        return float(state.global_steps)
    if form == "loss":
        found = _of_trainer(checkpoint, state.global_steps)
        if found is not None:
            return found
    raise BadArgument(
        f"{checkpoint.path}: says no {form} (client state '{CLIENT_KEY}', {TRAINER}); give one a source, such as "
        f"--metric {form}=2.0,1.0"
    )


def _of_trainer(checkpoint: Checkpoint, step: int | None) -> float | None:
    for folder in (checkpoint.path, checkpoint.path.parent):
        path = folder / TRAINER
        if not locations.is_file(path):
            continue
        try:
            state = json.loads(locations.read(path))
            history = [one for one in state["log_history"] if _is_number(one.get("loss"))]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise DamagedCheckpoint(f"{path}: is not what a Trainer writes: {error}") from error
        last = step if step is not None else state.get("global_step")
        losses = [one["loss"] for one in history if last is None or one.get("step", 0) <= last]
        return float(losses[-1]) if losses else None
    return None


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
