"""Mamba's mixers as Megatron-Core saves and loads them. Its kernels are not there, and nothing runs forward."""

from __future__ import annotations

import importlib
import os
import sys
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core import parallel_state as ps
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.transformer_config import TransformerConfig

from tests.engines.megatron import cases, run
from tests.engines.megatron.cases import Case

LAYERS, STATE, HEAD, GROUPS = 2, 8, 8, 2


class Norm(torch.nn.Module):
    """What mamba_ssm's gated norm has of tensors."""

    def __init__(self, size: int, *, dtype: torch.dtype, **_: Any) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(size, dtype=dtype))


def module(**kernels_that_run: Any) -> Any:
    """Megatron's module, with stand-ins for the kernels that it imports, which have tensors and do nothing but for
    those that are given."""
    contexts, kernels = "megatron.core.inference.contexts.attention_context.triton", "mamba_ssm.ops.triton"
    for name, what in (
        (f"{contexts}.tensor_ops", ("tensor_get_slice_after", "tensor_masked_update", "tensor_merge")),
        (f"{kernels}.selective_state_update", ("selective_state_update",)),
        (f"{kernels}.layernorm_gated", ("RMSNorm",)),
        (f"{kernels}.ssd_combined", ("mamba_chunk_scan_combined", "mamba_split_conv1d_scan_combined")),
    ):
        made = ModuleType(name)
        for one in what:
            setattr(made, one, kernels_that_run.get(one, Norm))
        sys.modules[name] = made
    return importlib.import_module("megatron.core.ssm.mamba_mixer")


def made(case: Case) -> dict[str, Any]:
    """A fresh sharded state dict of two layers' mixers."""
    mixer = module()
    ps.initialize_model_parallel(case.tp, create_gloo_process_groups=True)
    model_parallel_cuda_manual_seed(1)
    torch.cuda.current_device = lambda: "cpu"  # type: ignore[assignment, return-value]
    config = TransformerConfig(
        num_layers=LAYERS,
        hidden_size=cases.HIDDEN,
        num_attention_heads=cases.HEADS,
        mamba_state_dim=STATE,
        mamba_head_dim=HEAD,
        mamba_num_groups=GROUPS,
        tensor_model_parallel_size=case.tp,
        use_cpu_initialization=True,
    )
    groups = ProcessGroupCollection.use_mpu_process_groups()
    out: dict[str, Any] = {}
    for layer in range(LAYERS):
        one = mixer.MambaMixer(
            config,
            mixer.MambaMixerSubmodules(ColumnParallelLinear, RowParallelLinear),
            d_model=cases.HIDDEN,
            layer_number=layer + 1,
            pg_collection=groups,
        )
        metadata = {"dp_cp_group": ps.get_data_parallel_group(with_context_parallel=True)}
        out |= one.sharded_state_dict(prefix=f"decoder.layers.{layer}.mixer.", metadata=metadata)
    return {"model": out, "iteration": run.STEPS}


def save(job: dict[str, Any]) -> None:
    """Their values are made by hash."""
    state = made(Case(**job["case"]))
    with torch.no_grad():
        run.apply_factories(state)
        for part in run.parts(state):
            part.data.copy_(run.hashed("weight", part))
    path = os.path.join(job["save"], f"iter_{run.STEPS:07d}")
    if dist.get_rank() == 0:
        os.makedirs(path)
    dist.barrier()
    dist_checkpointing.save(state, path)


def load(job: dict[str, Any]) -> None:
    """A folder is loaded strictly, and every value compared."""
    case = Case(**job["case"])
    state = made(case)
    with torch.no_grad():
        for value in state["model"].values():
            if getattr(value, "data", None) is not None and torch.is_tensor(value.data):
                value.data.fill_(float("nan"))
    found = dist_checkpointing.load(state, job["load"], strict="raise_all")
    ps.destroy_model_parallel()
    again = made(case)
    loaded = {key: value for key, value in found["model"].items() if torch.is_tensor(value)}
    assert len(loaded) == LAYERS * 8, sorted(loaded)
    with torch.no_grad():
        for key, value in loaded.items():
            again["model"][key].data.copy_(value)
    run.apply_factories(again)
    for part in run.parts(again):
        assert torch.equal(part.data, run.hashed("weight", part)), part.key
