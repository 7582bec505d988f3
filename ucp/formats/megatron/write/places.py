"""Where a parameter lies in a folder: under which key, and where along the first axes of that key's tensor."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ucp.catalog import ParameterInfo
from ucp.geometry import Shape

_LAYER = re.compile(r"(.*?(?:^|\.)layers)\.(\d+)\.(.+)")
_EXPERT = re.compile(r"(.+)\.local_experts\.(\d+)\.(.+)")


@dataclass(frozen=True)
class KeyPlace:
    """A parameter's place: a key, and where it lies along that tensor's first axes. counts: the sizes of these axes."""

    key: str
    at: Shape
    counts: Shape


def entry(name: str, names: Iterable[str], stacked: bool) -> KeyPlace:
    """Where a parameter lies in a folder. names: of all parameters. stacked: whether layers share keys."""
    at: list[int] = []
    counts: list[int] = []
    key = name
    layer = _LAYER.fullmatch(name)
    if layer is not None and stacked:
        at.append(int(layer[2]))
        counts.append(_layers(layer[1], names))
        key = f"{layer[1]}.{layer[3]}"
    expert = _EXPERT.fullmatch(key)
    if expert is not None:
        at.append(int(expert[2]))
        counts.append(_experts(name, names))
        key = f"{expert[1]}.experts.{expert[3]}"
    return KeyPlace(key, tuple(at), tuple(counts))


def _layers(block: str, names: Iterable[str]) -> int:
    return 1 + max(int(m[2]) for n in names if (m := _LAYER.fullmatch(n)) is not None and m[1] == block)


def _experts(name: str, names: Iterable[str]) -> int:
    pattern = re.compile(re.sub(r"local_experts\\\.\d+", r"local_experts\\.(\\d+)", re.escape(name)))
    return 1 + max(int(m[1]) for n in names if (m := pattern.fullmatch(n)) is not None)


def alike(infos: Mapping[str, ParameterInfo]) -> bool:
    """Whether every block's layers have the same parameters, of the same shapes and states."""
    blocks: dict[str, dict[int, dict[str, Any]]] = {}
    for name, info in infos.items():
        m = _LAYER.fullmatch(name)
        if m is not None:
            blocks.setdefault(m[1], {}).setdefault(int(m[2]), {})[m[3]] = (info.shape, dict(info.states))
    return all(
        sorted(layers) == list(range(len(layers))) and all(layer == layers[0] for layer in layers.values())
        for layers in blocks.values()
    )
