"""Which layout and which batches a run gets on a number of ranks, so that its global batch stays the same."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ucp.elastic import section
from ucp.errors import BadArgument
from ucp.parallel.mesh import parse_layout
from ucp.printable import short

_LISTED_COUNT = 128  # numbers of ranks that a refusal tries, unless there are twice as many ranks
_BATCH_MAX_COUNT = 2**31 - 1
_KEYS = ("layouts", "min", "micro", "batch", "uneven", "rng", "seed")


@dataclass(frozen=True)
class Fitted:
    """How a run continues. micro: the most samples of one rank in a micro-step. accumulation: micro-steps in a step.
    samples: of a step on all ranks; None for dp x micro x accumulation. Fewer are divided as evenly as may be."""

    dp: int
    stage: int
    micro: int
    accumulation: int
    samples: int | None = None

    @property
    def batch(self) -> int:
        return self.places if self.samples is None else self.samples

    @property
    def places(self) -> int:
        """Samples of a step if each micro-batch were full."""
        return self.dp * self.micro * self.accumulation

    @property
    def is_uneven(self) -> bool:
        return self.batch != self.places

    def counts(self, micro_step: int) -> tuple[int, ...]:
        """How many samples each rank takes in one of a step's micro-steps. The first ones take one more."""
        each, more = divmod(self.batch, self.dp * self.accumulation)
        first = micro_step % self.accumulation * self.dp
        return tuple(each + (first + rank < more) for rank in range(self.dp))

    def weight(self, count: int) -> float:
        """What the mean loss of a micro-batch of so many samples is multiplied by, so that each sample of the step
        counts alike. The program, like DeepSpeed, averages over ranks and micro-steps."""
        return count * self.dp * self.accumulation / self.batch


def fitted(config: Mapping[str, Any], world: int) -> Fitted | None:
    """What the config's ``"ucp": {"elastic": {...}}`` says for this many ranks. None if it has no such section.

    Its ``layouts`` are texts such as "dp=2,zero=3", and the one with this many ranks is taken. Without them any number
    of ranks is allowed, and the ZeRO stage stays. DeepSpeed's own ``elasticity``, if enabled, decides on the batches
    (`ucp.elastic.section`). Its ``micro`` has the sizes that a micro-batch may have. The config's
    own size is tried first.

    Raises BadArgument, with the numbers of ranks that are possible, if the global batch cannot be kept.
    """
    said = (config.get("ucp") or {}).get("elastic")
    stage = int((config.get("zero_optimization") or {}).get("stage", 0))
    theirs = section.section_of(config) if (config.get("ucp") or {}).get("enabled") else None
    if theirs is not None:
        _, micro, accumulation = section.batches_of(config, theirs, world)
        stages = _stages((said or {}).get("layouts"), stage) or {}
        return Fitted(world, stages.get(world, stage), micro, accumulation)
    if said is None or (config.get(section.KEY) or {}).get("enabled"):
        return None  # DeepSpeed refuses the other section by itself
    if config.get("train_batch_size") is None:
        raise BadArgument('"ucp": {"elastic"} keeps the global batch, so the config needs "train_batch_size"')
    batch = _whole(config["train_batch_size"], "train_batch_size")
    _refuse_unknown(said)
    least = _whole(said.get("min", 1), "min")
    found = _stages(said.get("layouts"), stage)
    sizes = _micro(config, said)
    stage = stage if found is None else found.get(world, -1)
    uneven = said.get("uneven", False) is True
    pair = _batches(batch, world, sizes, uneven)
    if stage < 0 or pair is None or world < least:
        known = found or range(least, min(batch, _tried(world)) + 1)
        fit = [n for n in known if n >= least and _batches(batch, n, sizes, uneven) is not None]
        raise BadArgument(
            f"{world} ranks cannot go on with the global batch of {batch}: "
            f"{'no layout has as many ranks' if stage < 0 else _why(uneven, world, least)}; these numbers of ranks "
            f"would do{'' if found or batch <= _tried(world) else f' (of those up to {_tried(world)})'}: "
            f"{', '.join(map(str, sorted(fit))) or 'none'}"
        )
    made = Fitted(world, stage, *pair)
    return made if made.places == batch else replace(made, samples=batch)


def _tried(world: int) -> int:
    """Up to which number of ranks a refusal looks for some that would do."""
    return max(_LISTED_COUNT, min(2 * world, _LISTED_COUNT**2))


def _refuse_unknown(said: Any) -> None:
    for key in said if isinstance(said, Mapping) else [short(said)]:
        if key not in _KEYS:
            raise BadArgument(f'"elastic" is an object with {", ".join(_KEYS)}, found {short(key)}')
    for key in ("layouts", "micro"):
        if not isinstance(said.get(key) or (), list | tuple):
            raise BadArgument(f'"elastic": "{key}" needs a list, found {short(said[key])}')
    if not isinstance(said.get("uneven", False), bool):
        raise BadArgument(f'"elastic": "uneven" needs true or false, found {short(said["uneven"])}')


def _whole(value: object, key: str) -> int:
    if type(value) is not int or not 1 <= value <= _BATCH_MAX_COUNT:
        raise BadArgument(f'"{key}" is a whole number from 1 to {_BATCH_MAX_COUNT}, found {short(value)}')
    return value


def _why(uneven: bool, world: int, least: int) -> str:
    if world < least:
        return f'"min" is {least}'
    return "there is not a sample for each of them" if uneven else "no micro-batch divides it"


def adapted(config: Mapping[str, Any], world: int) -> Mapping[str, Any]:
    """The DeepSpeed config for this many ranks. It stays the same if it is not elastic. Raises BadArgument as `fitted`
    does."""
    what = fitted(config, world)
    if what is None:
        return config
    out = copy.deepcopy(dict(config))
    out.pop(section.KEY, None)  # obeyed, and unknown to DeepSpeed from 0.19 on
    out["train_batch_size"] = what.places
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
        if not isinstance(text, str):
            raise BadArgument(f'an elastic layout is text such as "dp=2,zero=3", found {short(text)}')
        layout = parse_layout(text)
        if layout.tp * layout.pp != 1:
            raise BadArgument(f"the elastic layout '{text}' has model parallelism, which the program builds itself")
        if layout.dp in out:
            raise BadArgument(f"two elastic layouts are for {layout.dp} ranks; the second is '{text}'")
        out[layout.dp] = layout.zero if "zero" in text else stage
    return out


def _micro(config: Mapping[str, Any], said: Mapping[str, Any]) -> list[int]:
    """Sizes that a micro-batch may have, in order of preference. An empty list allows any size."""
    own = config.get("train_micro_batch_size_per_gpu")
    allowed = [_whole(size, "micro") for size in said.get("micro") or ()]
    first = [] if own in (None, "auto") else [_whole(own, "train_micro_batch_size_per_gpu")]
    return [*first, *(size for size in sorted(allowed, reverse=True) if size != own)] if allowed or first else []


def _batches(batch: int, world: int, sizes: Sequence[int], uneven: bool) -> tuple[int, int] | None:
    """Micro-batch and accumulation, whose product with the number of ranks is the batch. None if there are none.

    uneven: where there are none, the product may be larger, with a sample for each rank in each micro-step.
    """
    if world < 1:
        return None
    each = batch // world
    for size in (sizes or [each]) if batch % world == 0 else []:
        if each % size == 0:
            return size, each // size
    if not uneven or batch < world:
        return None
    steps = min(-(-batch // (world * max(sizes, default=-(-batch // world)))), each)
    micro = -(-batch // (world * steps))
    return (micro, steps) if not sizes or micro <= max(sizes) else None
