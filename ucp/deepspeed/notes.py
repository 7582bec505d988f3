"""What people are told of after a load."""

from __future__ import annotations

from typing import Any

from ucp.catalog import Catalog
from ucp.deepspeed.live.gradients import gradients_of
from ucp.formats.shared import gradients
from ucp.loading.report import LoadReport


def gradients_note(engine: Any, catalog: Catalog) -> list[str]:
    """A warning if the checkpoint's moments are of gradients that were divided otherwise than this engine's."""
    if all(tensor.state == "param" for tensor in catalog.tensors.values()):
        return []
    text = gradients.note(gradients.recorded(catalog.training_state), gradients_of(engine))
    return [text] if text else []


def overridden(engine: Any) -> list[str]:
    """Set the hyperparameters that the config overrides. Returns notes about that for the log."""
    said = engine.ucp.config.load
    for group in engine.optimizer.param_groups if said.override else ():
        group.update(said.override)
    notes = [
        f"{name} is {value!r} for all param groups, by the config's override" for name, value in said.override.items()
    ]
    return [*notes, "the lr scheduler is the program's own, by the config"] if said.lr_scheduler == "reset" else notes


def weights_notes(report: LoadReport) -> list[str]:
    rounded = report.plan.rounded
    if not rounded:
        return []
    return [
        f"{len(rounded)} frozen parameters or buffers are kept in fewer bits here than in the checkpoint "
        f"('{rounded[0]}'{', …' if len(rounded) > 1 else ''}): rounded"
    ]
