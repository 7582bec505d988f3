"""A run under Megatron-FSDP, and its checkpoint in the form ``fsdp_dtensor``."""

from __future__ import annotations

import argparse
import os
import random
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from megatron.core import parallel_state as ps
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.distributed.fsdp import mcore_fsdp_adapter as adapter
from megatron.core.distributed.fsdp.src.megatron_fsdp.uneven_dtensor import preprocess_state_dict_for_uneven_dtensor
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.transformer import fsdp_dtensor_checkpoint as form
from megatron.core.transformer.module import Float16Module
from torch.distributed import DeviceMesh

from tests.engines.megatron import cases, run
from tests.engines.megatron.cases import Case

STATES = ("exp_avg", "exp_avg_sq")


def save(job: dict[str, Any]) -> None:
    """A run whose weights and moments are made by hash, as Megatron's training program saves it
    (megatron/training/checkpointing.py: ``preprocess_fsdp_dtensor_state_dict``). sharding: what is sharded."""
    case = Case(**job["case"])
    _on_the_processor()
    model, config = run.bare(case)
    wanted = _by_hash(run.Run(case, model, None, None))
    module = Float16Module(config, model) if case.bf16 else model
    ddp = DistributedDataParallelConfig(
        use_distributed_optimizer=True, use_megatron_fsdp=True, data_parallel_sharding_strategy=job["sharding"]
    )
    wrapped = adapter.FullyShardedDataParallel(config, ddp, module, device=torch.device("cpu"))
    precision = {"bf16": case.bf16, "params_dtype": config.params_dtype}
    optimizer = get_megatron_optimizer(
        OptimizerConfig(optimizer="adam", lr=1e-3, use_distributed_optimizer=True, clip_grad=0.0, **precision),
        [wrapped],
    )
    content = {"metadata": {"distrib_optim_sharding_type": "fsdp_dtensor"}}
    for parameter in wrapped.parameters():  # those with nothing on this rank, too, as after a step of training
        parameter.grad = torch.zeros_like(parameter)
    optimizer.optimizer.step()
    _fill(wrapped, optimizer, wanted)
    inner = wrapped.module
    state = {
        "args": argparse.Namespace(
            tensor_model_parallel_size=case.tp,
            pipeline_model_parallel_size=case.pp,
            expert_model_parallel_size=case.ep,
            world_size=case.world,
            num_layers=cases.LAYERS,
            num_experts=cases.EXPERTS if case.kind == "moe" else None,
            ckpt_format="fsdp_dtensor",
            data_parallel_sharding_strategy=job["sharding"],
        ),
        "checkpoint_version": 3.0,
        "iteration": run.STEPS,
        "model": inner.state_dict(),
        "optimizer": optimizer.sharded_state_dict(**content),
        "opt_param_scheduler": {"max_lr": 1e-3, "lr_warmup_steps": 2, "num_steps": 16, "lr_decay_style": "linear"},
        "rng_state": {f"({ps.get_pipeline_model_parallel_rank()}, {ps.get_tensor_model_parallel_rank()})": [_rng()]},
        "num_floating_point_operations_so_far": 0,
    }
    form.handle_fp8_extra_state_case(state["model"])
    if case.kind != "gpt":
        both = form.handle_swiglu_in_state_dict(inner, state["model"], state["optimizer"])
        state["model"], state["optimizer"] = both
    if case.kind == "moe":
        state["model"] = form.handle_experts_in_state_dict(state["model"], cases.EXPERTS)
    preprocess_state_dict_for_uneven_dtensor(state)
    path = os.path.join(job["save"], f"iter_{run.STEPS:07d}")
    dcp.save(state, storage_writer=dcp.FileSystemWriter(path))
    if dist.get_rank() == 0:
        with open(os.path.join(job["save"], "latest_checkpointed_iteration.txt"), "w") as file:
            file.write(str(run.STEPS))


def _on_the_processor() -> None:
    """Meshes of processors, where Megatron-FSDP asks for GPUs."""
    real = DeviceMesh.from_group

    def from_group(group: Any, device_type: str, *args: Any, **kwargs: Any) -> DeviceMesh:
        return real(group, "cpu", *args, **kwargs)

    setattr(DeviceMesh, "from_group", staticmethod(from_group))  # noqa: B010 (it is a class's)
    adapter.TELinear = type("TELinear", (), {})  # a class that nothing is of
    setattr(torch.cuda, "current_device", lambda: 0)  # noqa: B010


def _by_hash(plain: run.Run) -> dict[str, dict[str, torch.Tensor]]:
    """What the rank's parameters have to hold, by their names: the weights and the moments."""
    names = {id(p): name for name, p in plain.model.named_parameters()}
    out: dict[str, dict[str, torch.Tensor]] = {}
    for what in ("weight", *STATES):
        for part, owner in plain.local():
            held = out.setdefault(names[id(owner)], {}).setdefault(what, torch.empty(owner.shape))
            at = (part.data.data_ptr() - owner.data_ptr()) // part.data.element_size()
            held.as_strided(part.data.shape, part.data.stride(), at).copy_(run.hashed(what, part))
    return out


def _fill(wrapped: Any, optimizer: Any, wanted: dict[str, dict[str, torch.Tensor]]) -> None:
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            whole = wanted[name[name.index("module.") :].replace("module.", "")]
            _copy(parameter, parameter, whole["weight"])
            for owned, state in optimizer.state.items():
                if owned is parameter:
                    for key in STATES:
                        _copy(state[key], parameter, whole[key])
                    state["step"] = torch.tensor(float(run.STEPS))


def _copy(to: Any, parameter: Any, whole: torch.Tensor) -> None:
    local = to.to_local()
    local.view(-1).copy_(whole.reshape(-1)[parameter.megatron_fsdp_slice][: local.numel()])


def _rng() -> dict[str, Any]:
    return {
        "random_rng_state": random.getstate(),
        "np_rng_state": np.random.get_state(),
        "torch_rng_state": torch.get_rng_state(),
        "cuda_rng_state": torch.get_rng_state(),
        "rng_tracker_states": {"model-parallel-rng": torch.get_rng_state()},
    }
