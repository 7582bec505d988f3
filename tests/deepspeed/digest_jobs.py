"""Jobs for ranks: the digests of what engines and FSDP2 runs hold after a load, tensor by tensor, without names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import ucp
from tests.deepspeed import every_layout_jobs
from tests.engines import load_jobs, moe
from tests.engines.configs import Case
from tests.engines.fsdp import Live, Mesh
from tests.engines.moe import MoeCase
from tests.engines.pipe_runs import PipeCase

Found = tuple[tuple[str, str, tuple[int, ...], str], ...]
"""State, element type, shape and digest of every tensor, sorted: frameworks have names of their own for one tensor."""


def nameless(digests: Any) -> Found:
    return tuple(sorted((t.state, t.dtype, tuple(t.shape), str(t.digest)) for t in digests.tensors))


def engines(cases: Sequence[Case], folder: str, tag: str) -> list[Found]:
    """Of engines of these cases, one after the other."""
    out = []
    for case in cases:
        engine = load_jobs.build_target(case)
        engine.load_checkpoint(folder, tag)
        out.append(nameless(engine.ucp.digest()))
    return out


def kinds(cases: Sequence[tuple[PipeCase, int]], folder: str, spec: str) -> list[Found]:
    """Of engines of pipelines, tensor and sequence parallelism: (case, ranks of sequences)."""
    out = []
    for pipe, sp in cases:
        engine = every_layout_jobs.build_engine(pipe, sp, {"spec": spec})
        engine.load_checkpoint(folder)
        out.append(nameless(engine.ucp.digest()))
    return out


def experts(cases: Sequence[MoeCase], folder: str, tag: str) -> list[Found]:
    out = []
    for case in cases:
        engine = moe.build_engine(case, moe.INITIALIZE, {"ucp": {"enabled": True}})
        engine.load_checkpoint(folder, tag)
        out.append(nameless(engine.ucp.digest()))
    return out


def fsdp(meshes: Sequence[Mesh], path: str) -> list[Found]:
    """Of FSDP2 runs, with tensor parallelism and replicas."""
    from torch.distributed.checkpoint.state_dict import get_state_dict

    out = []
    for mesh in meshes:
        live = Live(mesh)
        ucp.load_training(path, model=live.model, optimizer=live.optimizer)
        weights, states = get_state_dict(live.model, live.optimizer)
        out.append(nameless(ucp.digest({"model": weights, "optim": states})))
    return out
