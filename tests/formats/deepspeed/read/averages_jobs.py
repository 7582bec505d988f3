"""A job for ranks: tensor-parallel ranks whose copies of the norms drift apart, as some training schemes let them."""

from __future__ import annotations

import torch.distributed as dist
from deepspeed.utils import safe_get_full_fp32_param, safe_set_full_fp32_param

from tests.engines import packing
from tests.engines import truth as truths
from tests.engines.runs import STEPS
from tests.engines.tp_runs import TpCase, build_engine, continue_training
from tests.engines.truth import Truth


def drift_apart(tp: TpCase, folder: str) -> list[Truth] | None:
    """Train, let the norms differ, save; every tensor-parallel rank's own truth (on rank 0)."""
    engine = build_engine(tp)
    rank = dist.get_rank(engine.mpu.get_tensor_model_parallel_group())
    continue_training(engine, tp, 0, STEPS)
    for name, parameter in engine.module.named_parameters():
        if "layernorm" in name:  # only now: else everything that depends on them would drift too
            safe_set_full_fp32_param(parameter, safe_get_full_fp32_param(parameter) + 0.2501 * rank)
    engine.optimizer.update_lp_params()
    own = truths.gather(engine, engine.seq_data_parallel_group)
    engine.save_checkpoint(folder)
    everyone = packing.gather_object((rank, own))
    if everyone is None:
        return None
    return [found for _, found in sorted((e for e in everyone if e[1] is not None), key=lambda e: e[0])]
