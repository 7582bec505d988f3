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


class Stacks:
    """How many layers and experts there are where a folder stacks them, of the names of all parameters."""

    def __init__(self, names: Iterable[str]) -> None:
        self._layers: dict[str, int] = {}
        self._experts: dict[tuple[str, str], int] = {}
        for name in names:
            if (m := _LAYER.fullmatch(name)) is not None:
                self._layers[m[1]] = max(self._layers.get(m[1], 0), int(m[2]) + 1)
            if (m := _EXPERT.fullmatch(name)) is not None:
                self._experts[m[1], m[3]] = max(self._experts.get((m[1], m[3]), 0), int(m[2]) + 1)

    def entry(self, name: str, stacked: bool) -> KeyPlace:
        """Where a tensor lies in a folder, a parameter or one beside them. stacked: whether layers share keys."""
        at: list[int] = []
        counts: list[int] = []
        key = name
        layer = _LAYER.fullmatch(name)
        if layer is not None and stacked:
            at.append(int(layer[2]))
            counts.append(max(self._layers.get(layer[1], 0), int(layer[2]) + 1))
            key = f"{layer[1]}.{layer[3]}"
        expert = _EXPERT.fullmatch(name)
        if expert is not None:
            at.append(int(expert[2]))
            counts.append(max(self._experts.get((expert[1], expert[3]), 0), int(expert[2]) + 1))
            key = _EXPERT.sub(r"\1.experts.\3", key)
        return KeyPlace(key, tuple(at), tuple(counts))


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
