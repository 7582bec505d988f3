"""What our own commands leave, to be attacked: merges, virtual checkpoints of merges, repairs, runs of local SGD.

Their manifests say where and when they were made, so a mutation's seed means nearly the same elsewhere, not quite.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

import ucp
from ucp.formats.universal import manifest
from ucp.merging.combine import merge


def merged(run: Path) -> None:
    sources = []
    for k in range(2):
        drawn = torch.Generator().manual_seed(k)
        model = {"model.layers.0.w": torch.randn(6, 4, generator=drawn), "norm": torch.randn(4, generator=drawn)}
        ucp.save({"model": model}, run.parent / f"source{k}")
        sources.append(run.parent / f"source{k}")
    merge(sources, run, weights=(0.25, 0.75))


def virtual(run: Path) -> None:
    """A virtual checkpoint whose source is a merge."""
    merged(run.parent / "merged")
    ucp.convert(run.parent / "merged", run, virtual=True)


def repaired(run: Path) -> None:
    """As a repair marks what it has filled in."""
    merged(run)
    body = json.loads((run / manifest.NAME).read_bytes())
    del body["digest"]
    body["approximate"] = {"model.layers.0.w": "mean: of layers 1 and 2"}
    (run / manifest.NAME).write_bytes(manifest.frame(body))


def workers(run: Path) -> None:
    rows = torch.arange(24.0).reshape(3, 4, 2)
    state = {"model": {"w": torch.ones(4, 2)}, "workers": {"model": {"w": rows}, "state": {"w": {"m": rows + 1}}}}
    ucp.save(state, run)


MAKERS: Mapping[str, Callable[[Path], None]] = {
    "merged": merged,
    "virtual of a merge": virtual,
    "repaired": repaired,
    "workers": workers,
}
