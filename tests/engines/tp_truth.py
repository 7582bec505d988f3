"""What tensor-parallel engines hold, as whole tensors: every rank's own truth, joined by hand-written rules.

What several ranks hold must be equal on them. Nothing here uses this project's library, or what DeepSpeed says of cuts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tests.engines import packing, tp_models
from tests.engines import truth as truths
from tests.engines.tp_models import VOCABULARY
from tests.engines.truth import Truth, same

PADDING = "[padding]"  # what lies beyond the vocabulary, as a tensor of its own

ROWS = (
    "q_proj.weight",
    "k_proj.weight",
    "v_proj.weight",
    "gate_proj.weight",
    "up_proj.weight",
    "query_key_value.weight",
    "lm_head.weight",
)
COLUMNS = ("o_proj.weight", "down_proj.weight", "self_attention.dense.weight", "dense_4h_to_h.weight")


def gather(engine: Any) -> Truth | None:
    """The truth on rank 0; None on the others. Collective; raises ValueError if ranks contradict each other."""
    own = truths.gather(engine, engine.seq_data_parallel_group)
    tp = dist.get_rank(engine.mpu.get_tensor_model_parallel_group()) if engine.mp_world_size > 1 else 0
    everyone = packing.gather_object((tp, own))
    if everyone is None:
        return None
    found = sorted(((t, f) for t, f in everyone if f is not None), key=lambda x: x[0])
    return _counted_once(_join([f for _, f in found]), engine)


def _counted_once(truth: Truth, engine: Any) -> Truth:
    """With the number of samples that the run has consumed: DeepSpeed counts each once for every rank of AutoTP."""
    counted = truth.counters["global_samples"]
    times = max(getattr(engine, "autotp_size", lambda: 1)(), 1)
    if counted % times:
        raise ValueError(f"{counted} samples, counted {times} times each")
    return replace(truth, counters={**truth.counters, "global_samples": counted // times})


def without_padding(truth: Truth) -> Truth:
    """What a layout with padding of another width has in common with this one."""

    def kept(values: Mapping[str, Any]) -> dict[str, Any]:
        return {n: v for n, v in values.items() if not n.endswith(PADDING)}

    groups = tuple({**g, "names": [n for n in g["names"] if not n.endswith(PADDING)]} for g in truth.groups)
    return replace(
        truth, params=kept(truth.params), scalars=kept(truth.scalars), module=kept(truth.module), groups=groups
    )


def _cat(name: str, shards: list[Tensor]) -> dict[str, Tensor]:
    """The whole tensor, and its padding if it has any, from the shards of all tensor-parallel ranks."""
    if name.endswith("word_embeddings.weight"):
        whole = torch.cat(shards)
        return {name: whole[:VOCABULARY]} | ({name + PADDING: p} if len(p := whole[VOCABULARY:]) else {})
    if name.endswith(("dense_h_to_4h.weight", "dense_h_to_4h.bias")):
        halves = [shard.chunk(2) for shard in shards]
        return {name: torch.cat([half[0] for half in halves] + [half[1] for half in halves])}
    if name.endswith("embed_tokens.weight") and sum(map(len, shards)) == VOCABULARY:  # it is tied to a head that is cut
        return {name: torch.cat(shards)}
    is_head = (
        name.endswith("lm_head.weight") and len(shards[0]) == tp_models.VOCABULARY
    )  # whole on each rank before 0.18
    if name.endswith((*ROWS, "query_key_value.bias")) and not is_head:
        return {name: torch.cat(shards)}
    if name.endswith(COLUMNS):
        return {name: torch.cat(shards, dim=1)}
    for shard in shards[1:]:
        if not same(shards[0], shard):
            raise ValueError(f"{name}: tensor-parallel ranks hold other values of it")
    return {name: shards[0]}


def _join(slices: list[Truth]) -> Truth:
    first = slices[0]
    for other in slices[1:]:
        for field in ("counters", "loss_scaler", "lr_scheduler", "aliases"):
            if not same(getattr(first, field), getattr(other, field)):
                raise ValueError(f"tensor-parallel ranks differ in {field}")
        for a, b in zip(first.groups, other.groups, strict=True):  # DeepSpeed leaves empty parameters out of its groups
            if not same({**a, "names": []}, {**b, "names": []}) or not set(a["names"]) >= set(b["names"]):
                raise ValueError(f"tensor-parallel ranks differ in a param group: {a}, {b}")
        if any(not same(first.scalars[name], found) for name, found in other.scalars.items()):
            raise ValueError("tensor-parallel ranks differ in their step counts")

    def join(tensors: list[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """A rank whose shard is empty may lack the name."""
        return {n: t for name in tensors[0] for n, t in _cat(name, [p[name] for p in tensors if name in p]).items()}

    params: dict[str, dict[str, Tensor]] = {}
    for state in dict.fromkeys(state for states in first.params.values() for state in states):
        for name, tensor in join([{n: p[state] for n, p in s.params.items() if state in p} for s in slices]).items():
            params.setdefault(name, {})[state] = tensor
    padded = {name.removesuffix(PADDING) for name in params if name.endswith(PADDING)}
    return replace(
        first,
        params=params,
        scalars={**first.scalars, **{n + PADDING: first.scalars[n] for n in padded}},
        groups=tuple(
            {**g, "names": [m for n in g["names"] for m in ([n, n + PADDING] if n in padded else [n])]}
            for g in first.groups
        ),
        frozen=join([s.frozen for s in slices]),
        buffers=join([s.buffers for s in slices]),
        module=join([s.module for s in slices]),
    )
