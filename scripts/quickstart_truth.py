"""Reads and changes a live DeepSpeed engine's state, without any code of ucp: the quickstart's source of truth.

The masters and optimizer states are collected from the flat buffers that the optimizer itself works on, by the offsets
at which DeepSpeed places each parameter in them:

- stages 1 and 2 (deepspeed/runtime/zero/stage_1_and_2.py): every param group is one flat buffer, cut equally among the
  ranks; `round_robin_bit16_groups` has the order and `round_robin_bit16_offsets` the offsets in elements;
- stage 3 (deepspeed/runtime/zero/stage3.py): every rank's buffer of a subgroup holds, for each parameter in order, the
  rank's own `partition_numel()` elements.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

State = dict[str, dict[str, torch.Tensor]]
"""Parameter name -> state name (`param`, `exp_avg`, `exp_avg_sq`) -> whole tensor in the parameter's shape."""


def gather_state(engine: Any) -> State:
    """The engine's whole fp32 masters and optimizer states. Collective; every rank gets all of it."""
    gather = _gather_stage_3 if engine.zero_optimization_stage() == 3 else _gather_stage_1_or_2
    return gather(engine)


def describe_progress(engine: Any) -> dict[str, Any]:
    """What else must come back: step counts, each param group's hyperparameters, and the lr scheduler's state."""
    inner = engine.optimizer.optimizer
    return {
        "global_steps": engine.global_steps,
        "global_samples": engine.global_samples,
        "skipped_steps": engine.skipped_steps,
        "optimizer_steps": sorted({float(state["step"]) for state in inner.state.values() if "step" in state}),
        "param_groups": [
            {key: list(value) if isinstance(value, tuple) else value for key, value in group.items() if key in _HYPER}
            for group in engine.optimizer.param_groups
        ],
        "lr_scheduler": engine.lr_scheduler.state_dict(),
    }


_HYPER = ("name", "lr", "betas", "eps", "weight_decay")


def weights_that_are_not_the_rounded_masters(engine: Any, state: State) -> list[str]:
    """Names of the parameters whose low-precision weight is not its master rounded. Collective at stage 3."""
    import deepspeed

    wrong = []
    for name, parameter in engine.module.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter], enabled=engine.zero_optimization_stage() == 3):
            weight = parameter.detach().cpu()
        if not torch.equal(weight, state[name]["param"].to(weight.dtype)):
            wrong.append(name)
    return wrong


def zero_optimizer_states(engine: Any) -> None:
    """A control: what a resume does that forgets the optimizer (moments and step counts back to nothing)."""
    for state in engine.optimizer.optimizer.state.values():
        for value in state.values():
            if torch.is_tensor(value):
                value.zero_()


def swap_q_and_k(engine: Any) -> None:
    """A control: what a resume does that mixes up two parameters of equal shape, in each layer. Stages 1 and 2 only."""
    optimizer = engine.optimizer
    state = gather_state(engine)
    for name in [name for name in state if ".q_proj." in name]:
        other = name.replace(".q_proj.", ".k_proj.")
        state[name], state[other] = state[other], state[name]
    names = _names(engine)
    for index, mine in enumerate(optimizer.single_partition_of_fp32_groups):
        flat = torch.zeros(mine.numel() * dist.get_world_size(), dtype=mine.dtype)
        for parameter, offset in zip(
            optimizer.round_robin_bit16_groups[index], optimizer.round_robin_bit16_offsets[index], strict=True
        ):
            flat[offset : offset + parameter.numel()] = state[names[id(parameter)]]["param"].flatten()
        mine.data.copy_(flat[dist.get_rank() * mine.numel() :][: mine.numel()])
    optimizer.update_lp_params()


def _names(engine: Any) -> dict[int, str]:
    return {id(parameter): name for name, parameter in engine.module.named_parameters()}


def _from_all_ranks(mine: torch.Tensor) -> list[torch.Tensor]:
    pieces = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(pieces, mine.detach().contiguous())
    return [piece.cpu() for piece in pieces]


def _buffers(engine: Any, master: torch.Tensor) -> dict[str, torch.Tensor]:
    states = engine.optimizer.optimizer.state.get(master, {})
    return {"param": master, **{key: value for key, value in states.items() if key != "step"}}


def _gather_stage_1_or_2(engine: Any) -> State:
    optimizer = engine.optimizer
    names = _names(engine)
    state: State = {name: {} for name in names.values()}
    for index, master in enumerate(optimizer.single_partition_of_fp32_groups):
        places = list(
            zip(optimizer.round_robin_bit16_groups[index], optimizer.round_robin_bit16_offsets[index], strict=True)
        )
        for key, mine in _buffers(engine, master).items():
            flat = torch.cat(_from_all_ranks(mine))
            for parameter, offset in places:
                whole = flat[offset : offset + parameter.numel()].view(parameter.shape)
                state[names[id(parameter)]][key] = whole.clone()
    return state


def _gather_stage_3(engine: Any) -> State:
    optimizer = engine.optimizer
    names = _names(engine)
    state: State = {name: {} for name in names.values()}
    for index, master in enumerate(optimizer.fp32_partitioned_groups_flat):
        for key, mine in _buffers(engine, master).items():
            pieces = _from_all_ranks(mine)
            offset = 0
            for parameter in optimizer.fp16_groups[index]:
                length = parameter.partition_numel()
                padded = torch.cat([piece[offset : offset + length] for piece in pieces])
                state[names[id(parameter)]][key] = padded[: parameter.ds_numel].view(parameter.ds_shape).clone()
                offset += length
    return state
