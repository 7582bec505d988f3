"""Save a Megatron-Core program's sharded state dict: every rank writes its own fragments, digested and committed.

    ucp.megatron.save_checkpoint(sharded_state_dict, "runs/step-1000")

It stands where ``megatron.core.dist_checkpointing.save`` does. What it writes opens, converts and resumes like every
universal checkpoint, under Megatron at any layout, under DeepSpeed and under FSDP2.
"""

from __future__ import annotations

import os
from typing import Any

from ucp import limits
from ucp.job import ranks
from ucp.megatron.parts import take_apart
from ucp.megatron.source import make_source
from ucp.saving.save import SaveReport
from ucp.saving.source import Source
from ucp.torchdist.save import PendingSave, write, write_in_background


def save_checkpoint(
    sharded_state_dict: dict[str, Any],
    path: str | os.PathLike[str],
    *,
    timeout: float = limits.SAVE_TIMEOUT_SECONDS,
    metrics: bool = False,
) -> SaveReport:
    """Save a sharded state dict as the checkpoint ``path``, as `ucp.save` does. Collective over all ranks.

    Parameters
    ----------
    sharded_state_dict
        As ``megatron.core.dist_checkpointing.save`` takes it: ShardedTensors, ShardedObjects, ShardedTensorFactories
        and plain values, such as {"model": model.sharded_state_dict(), "optimizer": optimizer.sharded_state_dict(...),
        "iteration": 1000}. The optimizer's is made with metadata={"distrib_optim_sharding_type": "fully_reshardable"}.
    path, timeout, metrics
        As for `ucp.save`.

    Returns
    -------
    SaveReport

    Raises
    ------
    BadArgument, Unsupported
        The state dict is none, or holds something, which the message names, that cannot be kept exactly.
    DestinationError, SaveFailed
        As for `ucp.save`. SaveFailed also if weights are not their masters, rounded.

    Every rank raises the same error.
    """
    return write(_source(sharded_state_dict), path, timeout, metrics)


def async_save_checkpoint(
    sharded_state_dict: dict[str, Any],
    path: str | os.PathLike[str],
    *,
    lazy: bool = False,
    memory: int = limits.STAGING_BYTES,
    timeout: float = limits.SAVE_TIMEOUT_SECONDS,
    metrics: bool = False,
) -> PendingSave:
    """Save as `save_checkpoint` does, but return once everything is copied to host memory. Collective.

    Parameters
    ----------
    sharded_state_dict, path, timeout, metrics
        As for `save_checkpoint`.
    lazy, memory
        As for `ucp.async_save`. memory: in bytes.

    Returns
    -------
    PendingSave
        Its ``result()`` waits for the report.

    Raises
    ------
    BadArgument, Unsupported, DestinationError, SaveFailed
        As for `save_checkpoint`, as far as the call itself finds them. The rest is raised by ``result()`` or by the
        next save.
    """
    source = _source(sharded_state_dict)
    return write_in_background(source, path, lazy=lazy, memory=memory, timeout=timeout, metrics=metrics)


def _source(sharded_state_dict: dict[str, Any]) -> Source:
    return make_source(ranks.all_or_none(lambda: take_apart(sharded_state_dict)))
