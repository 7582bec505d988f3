"""What Megatron-FSDP writes (``fsdp_dtensor``), against the values that each element's place makes."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp

import ucp
from tests.engines.megatron import cases
from tests.engines.megatron.written import UNDER_FSDP
from ucp.catalog import LogicalTensor
from ucp.errors import DamagedCheckpoint, Unsupported
from ucp.inspection.verify import verify
from ucp.parallel.mesh import Layout

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def truth(tensor: LogicalTensor) -> np.ndarray:
    """The tensor's elements by the names that Megatron gives them in other files."""
    expert = re.search(r"local_experts\.(\d+)\.", tensor.name)
    key = tensor.name.replace(f".local_experts.{expert[1]}.", ".experts.") if expert else tensor.name
    key = key.replace(".pre_mlp_layernorm.", ".mlp.linear_fc1.layer_norm_")
    shape = (cases.EXPERTS, *tensor.shape) if expert else tensor.shape
    what = "weight" if tensor.state == "param" else tensor.state
    found = cases.values(what, key, (0,) * len(shape), shape, shape)
    return found[int(expert[1])] if expert else found


@pytest.mark.slow
@pytest.mark.parametrize("name", UNDER_FSDP)
def test_every_element(written: Path, tmp_path: Path, name: str) -> None:
    case, sharding = UNDER_FSDP[name]
    stage = {"optim": 1, "optim_grads": 2, "optim_grads_params": 3}[sharding]
    ucp.convert(written / name, tmp_path / "there", to="megatron", layout="tp=2,dp=2")
    for path in (written / name, tmp_path / "there"):
        with ucp.open(path) as checkpoint:
            assert checkpoint.format == "megatron"
            if path != written / name:  # its chunks are rows: a line of the metadata says what it was written for
                assert checkpoint.layout == Layout(dp=2, tp=2, zero=1)
            tensors = checkpoint.catalog.tensors
            assert len(tensors) == 3 * len(checkpoint.parameters) > 80
            for key, tensor in tensors.items():
                assert np.array_equal(checkpoint.read(*key).numpy(), truth(tensor)), key
            state = checkpoint.training_state
            assert state.global_steps == 2
            assert state.lr_scheduler["num_steps"] == 16
            assert {info.scalars["step"] for info in checkpoint.parameters.values()} == {2.0}
            members = {n: g.options["wd_mult"] for g in state.param_groups for n in g.names}
            assert members == {n: float(len(i.shape) > 1) for n, i in checkpoint.parameters.items()}
            places = sorted(key for key in state.extra["megatron"]["objects"] if key.startswith("rng_state/"))
            assert places == [f"rng_state/shard_0.{tp}_1.{case.tp}" for tp in range(case.tp)]
    with ucp.open(written / name) as checkpoint:
        assert checkpoint.layout == Layout(case.dp, case.tp, 1, case.ep, stage)
    assert [finding for finding in verify(written / name).findings if finding.fault] == []


def saved(folder: Path, weights: dict[str, torch.Tensor], **args: Any) -> Path:
    """A state dict as Megatron's training program makes it, of one rank."""
    named = {f"module.{name}": value for name, value in weights.items()}
    under = {f"module.module.{key}": value for key, value in named.items()}
    moments = {
        key: {"exp_avg": value + 1, "exp_avg_sq": value + 2, "step": torch.tensor(2.0)} for key, value in under.items()
    }
    groups = {re.sub("_[wv]$", "", key): {"lr": 0.1, "betas": (0.9, 0.99)} for key in under}
    state = {
        "args": argparse.Namespace(**args),
        "checkpoint_version": 3.0,
        "iteration": 2,
        "model": named,
        "optimizer": {"state": moments, "param_to_group_meta": groups},
    }
    dcp.save(state, checkpoint_id=folder)
    return folder


FC1 = "decoder.layers.1.mlp.experts.linear_fc1.weight"


def test_experts_of_a_grouped_layer(tmp_path: Path) -> None:
    """Transformer Engine's: a weight of each expert, saved in gate and up."""
    parts = {f"{FC1}{e}_{half}": torch.full((2, 3), 10.0 * e + (half == "v")) for e in (0, 11) for half in "wv"}
    run = {"tensor_model_parallel_size": 2, "world_size": 8, "data_parallel_sharding_strategy": "optim"}
    with ucp.open(saved(tmp_path / "iter_0000002", parts, **run)) as checkpoint:
        assert checkpoint.layout == Layout(dp=4, tp=2, zero=1)
        names = [f"decoder.layers.1.mlp.experts.local_experts.{e}.linear_fc1.weight" for e in (0, 11)]
        assert list(checkpoint.parameters) == names
        assert checkpoint.read(names[1])[:, 0].tolist() == [110.0, 110.0, 111.0, 111.0]
        assert checkpoint.read(names[1], "exp_avg_sq")[:, 0].tolist() == [112.0, 112.0, 113.0, 113.0]
        assert checkpoint.training_state.param_groups[0].names == tuple(names)
        assert checkpoint.parameters[names[0]].scalars == {"step": 2.0}


WEIGHT = {"decoder.final_layernorm.weight": torch.ones(3)}


@pytest.mark.parametrize(
    ("weights", "args", "said"),
    [
        (WEIGHT, {"pipeline_model_parallel_size": 2}, r"saved by 2 pipeline stages.* one stage's layers stand for all"),
        ({"decoder.layers.0.mlp.experts.weight1": torch.ones(4, 6)}, {}, "experts.weight1' holds several experts"),
    ],
)
def test_refused_by_name(tmp_path: Path, weights: dict[str, torch.Tensor], args: dict[str, Any], said: str) -> None:
    with pytest.raises(Unsupported, match=said):
        ucp.open(saved(tmp_path / "iter_0000002", weights, **args))


def test_of_another_iteration_or_length(tmp_path: Path) -> None:
    folder = saved(tmp_path / "iter_0000003", WEIGHT)
    with pytest.raises(DamagedCheckpoint, match=r"is called by iteration 3.*is of iteration 2"):
        ucp.open(folder)
    deep = {f"decoder.layers.{k}.mlp.linear_fc2.weight": torch.ones(2, 2) for k in range(2)}
    with pytest.raises(DamagedCheckpoint, match="say 3 layers, and its decoder has 2"):
        ucp.open(saved(tmp_path / "iter_0000002", deep, num_layers=3))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    folder = saved(tmp_path / "iter_0000002", WEIGHT)
    (folder / "__0_0.distcp").unlink()
    with pytest.raises(DamagedCheckpoint, match=r"__0_0\.distcp: cannot be read"):
        ucp.open(folder)


def test_half_of_a_gated_layer_is_noticed(tmp_path: Path) -> None:
    with pytest.raises(DamagedCheckpoint, match="one half of a gated layer, and its other half is not there"):
        ucp.open(saved(tmp_path / "iter_0000002", {f"{FC1}0_w": torch.ones(2, 3)}))


def test_what_a_folder_was_written_for_is_known(tmp_path: Path) -> None:
    """Chunks that we write do not show it; arguments that say otherwise are of another run."""
    args = {"tensor_model_parallel_size": 1, "pipeline_model_parallel_size": 1, "world_size": 1}
    weights = {f"decoder.layers.{k}.mlp.linear_fc2.weight": torch.ones(4, 4) for k in range(2)}
    source = saved(tmp_path / "source", weights, **args)
    folders = []
    for k, text in enumerate(("tp=2,pp=2", "tp=4,pp=2", "tp=2,pp=1")):
        ucp.convert(source, tmp_path / str(k), to="megatron", layout=text)
        folders.append(tmp_path / str(k) / "iter_0000002")
    with ucp.open(folders[0]) as checkpoint:
        assert (checkpoint.layout.tp, checkpoint.layout.pp) == (2, 2)
    for other, said in ((1, "say 4 tensor-parallel ranks.* cut for 2"), (2, "say 1 pipeline stages.* cut for 2")):
        (folders[0] / "common.pt").write_bytes((folders[other] / "common.pt").read_bytes())
        with pytest.raises(DamagedCheckpoint, match=said):
            ucp.open(folders[0])
