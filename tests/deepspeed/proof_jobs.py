"""Jobs that run on the ranks: what is proved of an engine whose frozen weights and buffers have fewer bits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from tests.engines.configs import Case
from tests.engines.load_jobs import build_target


def save_with_nans(case: Case, folder: str) -> None:
    """Train a step, and save with values that are no numbers among the masters (of rank 0) and the frozen weights."""
    engine = build_target(case, trained=1)
    masters = engine.optimizer.single_partition_of_fp32_groups[0]
    if torch.distributed.get_rank() == 0:
        masters.view(torch.int32)[1:4] = torch.tensor([0x7F800001, 0x7FC00000, -1], dtype=torch.int32)
    for _, weight in frozen(engine):
        weight.data.view(-1)[:1] = torch.nan
    engine.save_checkpoint(folder, "tag")
    engine.ucp.wait()


def frozen(engine: Any) -> list[tuple[str, Any]]:
    return [(n, p) for n, p in engine.module.named_parameters() if not p.requires_grad]


@dataclass(frozen=True)
class Proved:
    """What a load says of its proof, or the error's class and text. rounded: weights and buffers that are."""

    kind: str
    text: str
    unproved: tuple[str, ...] = ()
    rounded: tuple[str, ...] = ()


def load(case: Case, folder: str, spoil: Callable[[Any], None] | None = None) -> Proved:
    """Load, with rank 1's memory spoilt once everything is in place."""
    from ucp.deepspeed.live import LiveEngine
    from ucp.errors import UcpError

    engine = build_target(case, {"load": {"prove": "full"}})
    apply = LiveEngine.apply

    def spoiled(self: Any, loaded: Any) -> None:
        apply(self, loaded)
        if spoil is not None and torch.distributed.get_rank() == 1:
            spoil(engine)

    LiveEngine.apply = spoiled  # type: ignore[method-assign]
    try:
        engine.load_checkpoint(folder, "tag")
    except UcpError as error:
        return Proved(type(error).__name__, error.whole)
    finally:
        LiveEngine.apply = apply  # type: ignore[method-assign]
    report = engine.ucp.last_load
    return Proved("", str(report), tuple(report.proof.unproved), report.plan.rounded)


def _piece(weight: Any) -> torch.Tensor:
    """This rank's memory of a weight."""
    return getattr(weight, "ds_tensor", weight).data.view(-1)


def frozen_weight(engine: Any) -> None:
    """Another last bit."""
    weight = max((w for _, w in frozen(engine)), key=lambda w: _piece(w).numel())
    _piece(weight)[1:2].view(torch.int16).bitwise_xor_(1)


def trained_weight(engine: Any) -> None:
    """No number where there is one."""
    weight = max((w for w in engine.module.parameters() if w.requires_grad), key=lambda w: _piece(w).numel())
    _piece(weight)[:1] = torch.nan
