"""What the ranks of a Megatron run are told to do."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import dist_checkpointing

from tests.engines.megatron import run
from tests.engines.megatron.cases import Case


def save(job: dict[str, Any]) -> None:
    """Two steps from values by hash, and a save; ``also``: another save, with another content."""
    made = run.made(Case(**job["case"]))
    made.fill()
    for number in range(run.STEPS):
        made.step(number)
    made.save(job["save"])
    for folder, content in job.get("also", {}).items():
        made.save(folder, **content)


def truths(job: dict[str, Any]) -> None:
    """Every tensor of some folders by Megatron's own loader, each as a file of torch's. load: file -> folder."""
    for file, folder in job["load"].items():
        found = dist_checkpointing.load_plain_tensors(folder)
        torch.save({key: value for key, value in found.items() if isinstance(value, torch.Tensor)}, file)


def load(job: dict[str, Any]) -> None:
    """Stock Megatron loads a folder into a run, everything in it and nothing else, and saves it again."""
    made = run.made(Case(**job["case"]))
    made.step(9)  # without Transformer Engine, Megatron's optimizer says its state only when it has one
    found = made.load(job["load"], **job.get("content", {}))
    assert found["iteration"] == run.STEPS
    made.save(job["save"])
