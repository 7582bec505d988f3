"""Jobs for the ranks: partial offload (``offload_optimizer.ratio``), where two optimizers step a model's subgroups.

DeepSpeed gives those of the device to the second one, and where the host is the device, none. So the subgroups are told
another device of the same kind, by which DeepSpeed's own step takes the second optimizer for them.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from tests.engines.configs import Case
from tests.engines.load_jobs import build_target
from tests.engines.resume import continue_training
from tests.engines.runs import FURTHER, STEPS


def engine(case: Case, section: dict[str, Any]) -> Any:
    live = build_target(case, section)
    zero = live.optimizer
    if hasattr(zero, "backup_optimizer"):
        count = len(zero.fp32_partitioned_groups_flat)
        on_device = int((1 - zero.partial_offload) * count)
        zero.subgroup_to_device = {s: torch.device("cpu") if s < on_device else "cpu" for s in range(count)}
    return live


def whole(live: Any) -> dict[str, torch.Tensor]:
    """Every state of every parameter, put together from the ranks' pieces in whichever optimizer has them."""
    zero, out = live.optimizer, {}
    for s, flat in enumerate(zero.fp32_partitioned_groups_flat):
        held = {"param": flat}
        for one in (zero.optimizer, getattr(zero, "backup_optimizer", None)):
            held |= {k: v for k, v in (one.state.get(flat, {}) if one else {}).items() if k != "step"}
        at = 0
        for param in zero.fp16_groups[s]:
            piece = param.partition_numel()
            for state, tensor in held.items():
                parts: list[Any] = [None] * dist.get_world_size()
                dist.all_gather_object(parts, tensor.detach()[at : at + piece].clone())
                full = torch.cat(parts)[: param.ds_numel].view(param.ds_shape)
                out[f"{live.param_names[param]}:{state}"] = full
            at += piece
    return out


def stepped_by(live: Any) -> tuple[int, int]:
    """How many subgroups have states in the first and in the second optimizer."""
    zero = live.optimizer
    flats = zero.fp32_partitioned_groups_flat
    return (
        sum(flat in zero.optimizer.state for flat in flats),
        sum(flat in zero.backup_optimizer.state for flat in flats),
    )


def save(case: Case, folder: str) -> Any:
    live = engine(case, {"save": {"async": False}})
    continue_training(live, case, 0, STEPS)
    live.save_checkpoint(f"{folder}/ours")
    truth, counts = whole(live), stepped_by(live)
    type(live).save_checkpoint(live, f"{folder}/theirs")
    return truth, counts, continue_training(live, case, STEPS, FURTHER)


def resume(case: Case, folder: str) -> Any:
    """What a fresh engine gets: states, which optimizer has them, and further losses; or the refusal."""
    from ucp.errors import UcpError

    live = engine(case, {"load": {"prove": "always"}})
    try:
        live.load_checkpoint(folder)
    except UcpError as error:
        return f"{type(error).__name__}: {error}"
    assert live.ucp.last_load.proof.complete
    return whole(live), stepped_by(live), continue_training(live, case, STEPS, FURTHER)
