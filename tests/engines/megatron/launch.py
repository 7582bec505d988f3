"""Start Megatron runs from a test, and what Megatron's own loader reads, under the parameters' names."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

_ROOT = Path(__file__).parents[3]


def launch(jobs: Sequence[dict[str, Any]], folder: Path, timeout: float = 500) -> None:
    """Run them one after the other; their ranks' errors are the error."""
    listed = folder / "jobs.json"
    listed.write_text(json.dumps(list(jobs)))
    environment = {**os.environ, "PYTHONPATH": str(_ROOT), "OMP_NUM_THREADS": "1"}
    with open(folder / "log", "w+") as log:
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-m", "tests.engines.megatron.main", str(listed)],
            stdout=log,
            stderr=log,
            cwd=_ROOT,
            env=environment,
            timeout=timeout,
            check=False,
        )
        log.seek(0)
        assert done.returncode == 0, log.read()[-6000:]


def by_name(path: Path) -> dict[tuple[str, str], torch.Tensor]:
    """The tensors that Megatron's loader read (`jobs.truths`), by parameter and state; stacked ones taken apart.

    The weight of a parameter that has a master is its master.
    """
    out: dict[tuple[str, str], torch.Tensor] = {}
    weights: dict[str, torch.Tensor] = {}
    for key, value in torch.load(path).items():
        if ".distributed." in key:
            continue
        found = re.fullmatch(r"(?:chained_\d+\.)?optimizer\.state\.([^.]+)\.(.*)", key)
        state, name = (found[1], found[2]) if found else (None, key)
        for one, tensor in _apart(name, value):
            if state is None:
                weights[one] = tensor
            else:
                out[one, "param" if state == "fp32_param" else state] = tensor
    return {**{(name, "param"): tensor for name, tensor in weights.items()}, **out}


def _apart(name: str, tensor: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
    if re.search(r"layers\.(?!\d)", name):
        layers = [re.sub(r"layers\.", f"layers.{k}.", name) for k in range(len(tensor))]
        return [one for k, layer in enumerate(layers) for one in _apart(layer, tensor[k])]
    if "experts.experts." in name:
        return [(name.replace("experts.experts.", f"experts.local_experts.{e}."), t) for e, t in enumerate(tensor)]
    return [(name, tensor)]
