"""A Megatron program's rank that saves or loads, and says how much anonymous memory that took at the most.

python -m tests.megatron.memory_program FOLDER save|load MEMORY
"""

from __future__ import annotations

import sys
from typing import Any

import torch

from tests.loading.memory_program import peak

ROWS, WIDTH, LAYERS = 10_000, 512, 4
"""5M elements a tensor, 10 MB of weights and 20 MB of each state; four of these, and one of two parts."""


def state(fill: float) -> dict[str, Any]:
    """Stacked layers of 16-bit weights with masters and moments, and one tensor that is saved in two parts, as gate and
    up are. About 330 MB, all of whose pages are there."""
    from megatron.core.dist_checkpointing.mapping import ShardedTensor

    model: dict[str, Any] = {}
    states: dict[str, Any] = {}
    for k in range(LAYERS):
        key, place = "decoder.layers.mlp.linear_fc2.weight", (0, k, LAYERS)
        weight = torch.full((ROWS, WIDTH), fill, dtype=torch.bfloat16)
        model[f"{k}"] = ShardedTensor.from_rank_offsets(key, weight, place, prepend_axis_num=1)
        for one in ("param", "exp_avg", "exp_avg_sq"):
            tensor = torch.full((ROWS, WIDTH), fill)
            own = f"optimizer.state.{one}.{key}"
            states[f"{k} {one}"] = ShardedTensor.from_rank_offsets(own, tensor, place, prepend_axis_num=1)
    for half, tensor in enumerate(torch.full((2 * ROWS, WIDTH), fill).chunk(2)):
        key = "output_layer.weight"
        model[f"half {half}"] = ShardedTensor.from_rank_offsets(key, tensor, (0, half, 2))
    group = {"wd_mult": 1.0, "lr_mult": 1.0, "is_expert_parallel": False, "is_decoupled_lr": False, "step": 3}
    inner = {"optimizer": {"param_groups": [group]}, "param_state_sharding_type": "x", "param_state": states}
    return {"model": model, "optimizer": inner, "iteration": 3, "checkpoint_version": 3.0}


def tensors(held: dict[str, Any]) -> list[torch.Tensor]:
    parts = [*held["model"].values(), *held["optimizer"]["param_state"].values()]
    return [part if isinstance(part, torch.Tensor) else part.data for part in parts]


def main() -> None:
    folder, do, memory = sys.argv[1], sys.argv[2], int(sys.argv[3])
    import ucp.megatron

    live = state(7.0 if do == "load" else 3.0)
    small = {"model": {"0": live["model"]["half 0"], "1": live["model"]["half 1"]}, "iteration": 3}
    ucp.megatron.save_checkpoint(small, f"{folder}-small-{do}")  # imports what a save and a load import
    ucp.megatron.load_checkpoint(small, f"{folder}-small-{do}")
    with peak() as growth:
        if do == "save":
            ucp.megatron.save_checkpoint(live, folder)
            found, how = live, "written"
        else:
            found, report = ucp.megatron.load_checkpoint(live, folder, memory=memory)
            how = report.strategy
    right = all(bool((value == 3.0).all()) for value in tensors(found))
    print(f"{growth[0]} {right} {how}")


if __name__ == "__main__":
    main()
