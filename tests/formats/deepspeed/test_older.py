"""Checkpoints that an older DeepSpeed wrote, in an environment of its own (``older/make.py``), read exactly."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import ucp

OLDER = sorted(p.parent for p in Path(__file__).parent.glob("older/*/truth.safetensors"))


def test_there_are_some() -> None:
    assert {p.name.split("-")[1] for p in OLDER} == {"z0", "z1", "z2", "z3"}


@pytest.mark.parametrize("folder", OLDER, ids=lambda p: p.name)
def test_every_tensor_is_the_engines(folder: Path) -> None:
    truth = load_file(folder / "truth.safetensors")
    with ucp.open(folder) as checkpoint:
        found = {f"{n}|{s}" for n, i in checkpoint.parameters.items() if i.kind != "buffer" for s in i.states}
        assert found == set(truth)
        for key, tensor in truth.items():
            name, state = key.split("|")
            read = checkpoint.read(name, state)
            assert read.dtype == tensor.dtype
            assert torch.equal(read, tensor), key
        assert checkpoint.read("seen").item() == 3
        assert all(i.scalars["step"] == 3 for i in checkpoint.parameters.values() if i.kind == "parameter")
        state = checkpoint.training_state
        made = json.loads((folder / "made_with.json").read_text())
        ranks = made.get("ranks", 2)
        assert (state.global_steps, state.global_samples, state.dp_world_size) == (3, 6 * ranks, ranks)
        assert [g.options["weight_decay"] for g in state.param_groups if g.options][:2] == [0.1, 0.0]
        assert state.client_state == {"note": "older"}
