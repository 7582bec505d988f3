"""Mamba's mixers: which of their tensors Megatron saves in parts, each cut over ranks by itself.

``in_proj`` is z, x, B, C, dt one after the other, and ``conv1d`` x, B, C (megatron/core/ssm/mamba_mixer.py:
``sharded_state_dict``). How many rows each has is told by the mixer's other tensors.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from ucp.catalog import ParameterInfo
from ucp.errors import Unsupported

_SPLIT = re.compile(r"(.+\.mixer)\.(in_proj\.weight|conv1d\.weight|conv1d\.bias)")


@dataclass(frozen=True)
class RowsPart:
    """Some rows of a tensor under a key of their own. count: None for all of them."""

    ending: str
    first: int
    count: int | None


WHOLE = (RowsPart("", 0, None),)


def is_mixer(name: str) -> bool:
    """Whether it is a tensor of a Mamba mixer. Blocks with such layers are saved layer by layer."""
    return ".mixer." in name


def parts(name: str, infos: Mapping[str, ParameterInfo]) -> tuple[RowsPart, ...]:
    """The parts of a parameter. Raises Unsupported for a mixer whose tensors do not tell them."""
    found = _SPLIT.fullmatch(name)
    if found is None:
        return WHOLE
    rows = infos[name].shape[0]
    inner, heads = infos.get(f"{found[1]}.out_proj.weight"), infos.get(f"{found[1]}.A_log")
    whole = infos.get(f"{found[1]}.in_proj.weight")
    if inner is None or heads is None or whole is None or len(inner.shape) != 2 or len(heads.shape) != 1:
        raise Unsupported(
            f"'{name}': how many rows are z, x, B, C, dt is told by A_log and out_proj.weight of its mixer"
        )
    width, dt = inner.shape[1], heads.shape[0]
    groups, odd = divmod(whole.shape[0] - 2 * width - dt, 2)
    sizes = {".z": width, ".x": width, ".B": groups, ".C": groups, ".dt": dt}
    if found[2] != "in_proj.weight":
        del sizes[".z"], sizes[".dt"]
    if odd or groups < 1 or sum(sizes.values()) != rows:
        raise Unsupported(
            f"'{name}' has {rows} rows, and {' + '.join(map(str, sizes.values()))} are expected of a Mamba mixer; "
            "another kind is not written for Megatron"
        )
    out, first = [], 0
    for ending, count in sizes.items():
        out.append(RowsPart(ending, first, count))
        first += count
    return tuple(out)
