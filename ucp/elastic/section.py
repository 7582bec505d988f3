"""DeepSpeed's ``elasticity`` section, whether or not the DeepSpeed that is installed still knows it (0.19 does not).

The section names the largest global batch and the sizes that a micro-batch may have. Of batches that are one of these
sizes, or their least common multiple, times a number with many divisors, that one is taken which the most numbers of
ranks divide (elasticity/elasticity.py of DeepSpeed 0.18). So a run keeps its batch on each of these numbers.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from typing import Any

from ucp.errors import BadArgument

# The numbers that DeepSpeed multiplies by. They are its own choice: the next ones are beyond any batch.
_DIVISIBLE = (
    *(1, 2, 4, 6, 12, 24, 36, 48, 60, 120, 180, 240, 360, 720, 840, 1260, 1680, 2520, 5040, 7560, 10080, 15120, 20160),
    *(25200, 27720, 45360, 50400, 55440, 83160, 110880, 166320, 221760, 277200, 332640, 498960, 554400, 665280, 720720),
)
_BATCHES = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
KEY, LARGEST, SIZES = "elasticity", "max_train_batch_size", "micro_batch_sizes"


def section_of(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The config's section if it is enabled and says what is needed. Otherwise None: DeepSpeed refuses it by itself."""
    found = config.get(KEY)
    if not isinstance(found, Mapping) or not found.get("enabled"):
        return None
    return found if LARGEST in found and SIZES in found else None


def batches_of(config: Mapping[str, Any], section: Mapping[str, Any], world: int) -> tuple[int, int, int]:
    """The global batch, the micro-batch and the accumulation for this many ranks.

    Raises BadArgument if the section does not allow this number, with those that it does, or is not understood.
    """
    sizes = _sizes(section)
    largest, per_node = _whole(section, LARGEST, None), _whole(section, "num_gpus_per_node", 1)
    version = float(section.get("version", 0.2))
    own = [key for key in _BATCHES if key in config]
    if own and not section.get("ignore_non_elastic_batch_info", False):
        raise BadArgument(
            f'"{KEY}" decides on batches, and the config has "{own[0]}" as well; leave that out, or allow both with '
            '"ignore_non_elastic_batch_info"'
        )
    if version not in (0.1, 0.2) or _whole(section, "model_parallel_size", 1) > 1:
        raise BadArgument(f'"{KEY}" of version 0.1 or 0.2 without model parallelism is understood, found {version:g}')
    node = per_node if version == 0.2 else 1
    bounds = _whole(section, "min_gpus", 1) // node or 1, _whole(section, "max_gpus", 10_000) // node
    larger = bool(section.get("prefer_larger_batch", True))
    if max(sizes) > largest // node:
        raise BadArgument(f'"{KEY}": the micro-batch {max(sizes)} is larger than a batch of {largest // node} allows')
    batch, counts = _chosen(sizes, largest // node, bounds, larger)
    batch, worlds = batch * node, [n * node for n in counts]
    if world not in worlds and version == 0.2:  # as DeepSpeed does, a batch of this number's own
        own_batches = [largest // (size * world) * size * world for size in sizes]
        batch = max(own_batches) if larger else min(own_batches)
    if batch < world or not worlds or (world not in worlds and version == 0.1):
        raise BadArgument(
            f'{world} ranks are none of those that "{KEY}" allows with its batch of {batch}: '
            f"{', '.join(map(str, worlds)) or 'none'}"
        )
    micro = max((size for size in sizes if batch // world % size == 0), default=0)
    if not micro:
        raise BadArgument(f'"{KEY}": no micro-batch of {sizes} divides the {batch // world} samples of a rank')
    return batch, micro, batch // world // micro


def _chosen(sizes: Sequence[int], largest: int, bounds: tuple[int, int], larger: bool) -> tuple[int, list[int]]:
    """The batch that the most numbers of ranks divide, and these numbers."""
    found = {_multiple(base, largest) for base in (*sizes, math.lcm(*sizes))}
    worlds = {batch: _worlds(batch, sizes, bounds) for batch in found}
    batch = max(found, key=lambda one: (len(worlds[one]), one if larger else -one))
    return batch, worlds[batch]


def _multiple(base: int, largest: int) -> int:
    return base if base >= largest else base * _DIVISIBLE[bisect_right(_DIVISIBLE, largest // base) - 1]


def _worlds(batch: int, sizes: Sequence[int], bounds: tuple[int, int]) -> list[int]:
    most = [batch // size for size in sizes if batch % size == 0]
    low, high = bounds
    return [n for n in range(low, min(high, max(most, default=0)) + 1) if any(one % n == 0 for one in most)]


def _sizes(section: Mapping[str, Any]) -> list[int]:
    found = section[SIZES]
    if not isinstance(found, list) or not found or any(type(size) is not int or size < 1 for size in found):
        raise BadArgument(f'"{KEY}": "{SIZES}" is a list of whole numbers above 0, found {found!r}')
    return list(found)


def _whole(section: Mapping[str, Any], key: str, default: int | None) -> int:
    found = section.get(key, default)
    if type(found) is not int or found < 1:
        raise BadArgument(f'"{KEY}": "{key}" is a whole number above 0, found {found!r}')
    return found
