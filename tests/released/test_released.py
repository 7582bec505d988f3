"""Every checkpoint of every release, read for ever: all forms of our own format, as `make` made them, with their truth.

A later version may write otherwise; what these tests read may only grow by folders of newer releases.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import ucp
from tests.engines.truth import same
from tests.released.make import CLIENT_STATE, CLIENT_TENSOR, MTIME

HERE = Path(__file__).parent
RELEASES = sorted(p.parent.name for p in HERE.glob("*/index.json"))
CASES = [(release, name) for release in RELEASES for name in json.loads((HERE / release / "index.json").read_text())]


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The releases' folders with the modification times that virtual checkpoints remember, which no clone keeps."""
    root = tmp_path_factory.mktemp("released")
    for release in RELEASES:
        shutil.copytree(HERE / release, root / release)
    for file in root.rglob("*"):
        os.utime(file, (MTIME, MTIME))
    return root


def truth_of(folder: Path, name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    which = json.loads((folder / "index.json").read_text())[name]["truth"]
    said = json.loads((folder / f"truth/{which}.json").read_text())
    return load_file(folder / f"truth/{which}.safetensors"), said


def test_every_form_is_there() -> None:
    assert RELEASES[0] == "0.1.0"
    for release in RELEASES:
        names = {name for r, name in CASES if r == release}
        assert names >= {"zero1-bf16", "zero3-fp32", "fsdp2", "dtensors", "consolidated", "virtual"}


@pytest.mark.parametrize(("release", "name"), CASES)
def test_every_tensor(released: Path, release: str, name: str) -> None:
    tensors, said = truth_of(released / release, name)
    wanted = {key: t for key, t in tensors.items() if key.partition("|")[0] in said["kinds"]}
    with ucp.open(released / release / name) as checkpoint:
        check(checkpoint, wanted, said)
        assert checkpoint.verify() > 0


def check(checkpoint: ucp.Checkpoint, wanted: Mapping[str, Tensor], said: Mapping[str, Any]) -> None:
    """That every tensor of the truth is there, equal to the bit, and nothing else."""
    found = {f"{n}|{s}" for n, info in checkpoint.parameters.items() for s in info.states}
    assert found == set(wanted)
    for key, tensor in wanted.items():
        state = key.partition("|")[2]
        assert same(checkpoint.read(key.partition("|")[0], state), tensor), key
    kinds = {n: info.kind for n, info in checkpoint.parameters.items()}
    assert kinds == said["kinds"]
    assert {n: list(i.aliases) for n, i in checkpoint.parameters.items() if i.aliases} == said["aliases"]
    for alias, owner in ((a, n) for n, group in said["aliases"].items() for a in group):
        assert same(checkpoint.read(alias), wanted[f"{owner}|param"])
    if "step" in said:
        trained = [info for info in checkpoint.parameters.values() if info.kind == "parameter"]
        assert {info.scalars["step"] for info in trained} == {said["step"]}


@pytest.mark.parametrize(("release", "name"), CASES)
def test_the_training_state(released: Path, release: str, name: str) -> None:
    tensors, said = truth_of(released / release, name)
    with ucp.open(released / release / name) as checkpoint:
        state = checkpoint.training_state
    groups = [{"names": list(g.names), **(g.options or {})} for g in state.param_groups]
    assert len(groups) == len(said["groups"])
    for group, wanted in zip(groups, said["groups"], strict=True):
        # Within a group the optimizer's order is of no meaning.
        assert sorted(group["names"]) == sorted(wanted["names"])
        assert {k: plain(group[k]) for k in wanted if k != "names"} == {k: v for k, v in wanted.items() if k != "names"}
    assert {k: getattr(state, k) for k in said["counters"]} == said["counters"]
    assert plain(state.lr_scheduler) == said.get("lr_scheduler")
    if said.get("client_state"):
        assert same(dict(state.client_state), {**CLIENT_STATE, "tensor": CLIENT_TENSOR})
    each = state.extra.get("ranks", [])
    if said.get("generators"):
        wanted_states = [tensors[f"generator|{rank}"] for rank in range(len(each))]
        assert len(each) == sum(key.startswith("generator|") for key in tensors)
        for own, generator in zip(each, wanted_states, strict=True):
            assert np.array_equal(own["rng"]["torch"], generator.numpy())
    if "loaders" in said:
        assert [own["dataloader"] for own in each] == said["loaders"]


def plain(value: Any) -> Any:
    """As JSON has it: tuples are lists, and numbers in tensors numbers."""
    return json.loads(json.dumps(value, default=float))


@pytest.mark.parametrize("release", RELEASES)
def test_each_ranks_own_values(released: Path, release: str) -> None:
    _, said = truth_of(released / release, "dtensors")
    with ucp.open(released / release / "dtensors") as checkpoint:
        state = checkpoint.training_state
    assert [own["state_dict"]["mine"].tolist() for own in state.extra["ranks"]] == said["own"]
    assert state.extra["state_dict"] == {"numbers.epoch": 4, "numbers.rate": float("inf")}


@pytest.mark.parametrize(("release", "name"), CASES)
def test_it_converts(released: Path, release: str, name: str, tmp_path: Path) -> None:
    tensors, said = truth_of(released / release, name)
    wanted = {key: t for key, t in tensors.items() if key.partition("|")[0] in said["kinds"]}
    ucp.convert(released / release / name, tmp_path / "again")
    with ucp.open(tmp_path / "again") as checkpoint:
        check(checkpoint, wanted, said)


@pytest.mark.parametrize("release", RELEASES)
def test_it_loads_into_torch(released: Path, release: str) -> None:
    tensors, _ = truth_of(released / release, "dtensors")
    state: dict[str, Any] = {
        "model": {k.partition("|")[0]: torch.zeros_like(t) for k, t in tensors.items()},
        "numbers": {"epoch": 0, "rate": 0.0},
    }
    ucp.load(state, released / release / "dtensors")
    assert same(state["model"], {k.partition("|")[0]: t for k, t in tensors.items()})
    assert state["numbers"] == {"epoch": 4, "rate": float("inf")}


def test_they_stay_small() -> None:
    for release in RELEASES:
        assert sum(file.stat().st_size for file in (HERE / release).rglob("*") if file.is_file()) < 500_000
