"""Which layout and which batches a run gets on a number of ranks, so that its global batch stays the same."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ucp.errors import BadArgument
from ucp.parallel.mesh import parse_layout


@dataclass(frozen=True)
class Fitted:
    """How a run continues. micro: samples of one rank in a micro-step. accumulation: micro-steps in a step."""

    dp: int
    stage: int
    micro: int
    accumulation: int

    @property
    def batch(self) -> int:
        return self.dp * self.micro * self.accumulation


def fitted(config: Mapping[str, Any], world: int) -> Fitted | None:
    """What the config's ``"ucp": {"elastic": {...}}`` says for this many ranks. None if it has no such section.

    Its ``layouts`` are texts such as "dp=2,zero=3", and the one with this many ranks is taken. Without them any number
    of ranks is allowed, and the ZeRO stage stays. Its ``micro`` has the sizes that a micro-batch may have. The config's
    own size is tried first.

    Raises BadArgument, with the numbers of ranks that are possible, if the global batch cannot be kept.
    """
    said = (config.get("ucp") or {}).get("elastic")
    if said is None:
        return None
    if (config.get("elasticity") or {}).get("enabled"):
        return None  # DeepSpeed itself chooses batches then, and refuses what does not fit
    batch = config.get("train_batch_size")
    if not isinstance(batch, int):
        raise BadArgument('"ucp": {"elastic"} keeps the global batch, so the config needs "train_batch_size"')
    stage = int((config.get("zero_optimization") or {}).get("stage", 0))
    found = _stages(said.get("layouts"), stage)
    sizes = _micro(config, said)
    stage = stage if found is None else found.get(world, -1)
    pair = _batches(batch, world, sizes)
    if stage < 0 or pair is None or world < said.get("min", 1):
        fit = [n for n in (found or range(said.get("min", 1), batch + 1)) if _batches(batch, n, sizes) is not None]
        raise BadArgument(
            f"{world} ranks cannot go on with the global batch of {batch}: "
            f"{'no layout has as many ranks' if stage < 0 else 'no micro-batch divides it'}; "
            f"these numbers of ranks would do: {', '.join(map(str, sorted(fit))) or 'none'}"
        )
    return Fitted(world, stage, *pair)


def adapted(config: Mapping[str, Any], world: int) -> Mapping[str, Any]:
    """The DeepSpeed config for this many ranks. It stays the same if it is not elastic. Raises BadArgument as `fitted`
    does."""
    what = fitted(config, world)
    if what is None:
        return config
    out = copy.deepcopy(dict(config))
    out["train_micro_batch_size_per_gpu"] = what.micro
    out["gradient_accumulation_steps"] = what.accumulation
    out.setdefault("zero_optimization", {})["stage"] = what.stage
    return out


def _stages(layouts: Sequence[str] | None, stage: int) -> dict[int, int] | None:
    """Number of ranks -> ZeRO stage."""
    if layouts is None:
        return None
    out = {}
    for text in layouts:
        layout = parse_layout(text)
        if layout.tp * layout.pp != 1:
            raise BadArgument(f"the elastic layout '{text}' has model parallelism, which the program builds itself")
        out[layout.dp] = layout.zero if "zero" in text else stage
    return out


def _micro(config: Mapping[str, Any], said: Mapping[str, Any]) -> list[int]:
    """Sizes that a micro-batch may have, in order of preference. An empty list allows any size."""
    own = config.get("train_micro_batch_size_per_gpu")
    allowed = [size for size in said.get("micro", ()) if isinstance(size, int) and size > 0]
    first = [own] if isinstance(own, int) else []
    return [*first, *(size for size in sorted(allowed, reverse=True) if size != own)] if allowed or first else []


def _batches(batch: int, world: int, sizes: Sequence[int]) -> tuple[int, int] | None:
    """Micro-batch and accumulation, whose product with the number of ranks is the batch. None if there are none."""
    if world < 1 or batch % world:
        return None
    each = batch // world
    for size in sizes or [each]:
        if each % size == 0:
            return size, each // size
    return None
