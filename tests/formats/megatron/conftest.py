"""Folders that Megatron-Core wrote, and their tensors as its own loader reads them; made once for all tests here."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from tests.engines.megatron.cases import Case
from tests.engines.megatron.launch import by_name, launch

pytest.importorskip("megatron.core")

BUCKETS = {"distrib_optim_sharding_type": "dp_reshardable"}

# Name -> the run that wrote it. Those of one kind and type hold the same values.
WRITTEN: Mapping[str, Case] = {
    "llama": Case(dp=2, bf16=True, per_layer=True),
    "llama tp2 pp2": Case(tp=2, pp=2, bf16=True),
    "llama tp2 plain": Case(tp=2, bf16=True, sharding=None),
    "moe tp2 ep2": Case(tp=2, dp=2, ep=2, kind="moe"),
    "gpt tp4": Case(tp=4, kind="gpt"),
}


@pytest.fixture(scope="session")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with those of `WRITTEN` in it, ``NAME.pt`` with Megatron's own reading beside each, and ``NAME buckets``
    with the same run's optimizer in buckets where there is a distributed one."""
    folder = tmp_path_factory.mktemp("megatron")
    jobs = []
    for name, case in WRITTEN.items():
        also = {} if case.sharding is None else {str(folder / f"{name} buckets"): BUCKETS}
        jobs.append({"case": vars(case), "save": str(folder / name), "also": also})
    load = {str(folder / f"{name}.pt"): str(folder / name / "iter_0000002") for name in WRITTEN}
    jobs.append({"do": "truths", "case": vars(Case()), "load": load})
    launch(jobs, folder)
    return folder


@pytest.fixture(scope="session")
def truths(written: Path) -> Mapping[str, Mapping[tuple[str, str], torch.Tensor]]:
    return {name: by_name(written / f"{name}.pt") for name in WRITTEN}
