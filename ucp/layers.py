"""Layers by their parameters' names.

A layer is the first number in a name, with what stands before it: ``model.layers.4.mlp.up.weight`` is of the layer
``model.layers.4``, and a pipeline's ``4.up.weight`` of ``4``.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass

_NAME = re.compile(r"(?P<before>(?:.*?\.)??)(?P<index>[0-9]{1,9})\.(?P<rest>.+)", re.DOTALL)


@dataclass(frozen=True, order=True)
class Layer:
    """before: what its parameters' names begin with, the dot included; index: its number."""

    before: str
    index: int

    def __str__(self) -> str:
        return f"{self.before}{self.index}"

    def named(self, rest: str) -> str:
        """The whole name of one of its parameters."""
        return f"{self}.{rest}"

    def moved(self, by: int) -> Layer:
        return Layer(self.before, self.index + by)


def layer_of(name: str) -> tuple[Layer, str] | None:
    """The layer that a parameter is of, and its name in the layer; None for one outside layers."""
    found = _NAME.fullmatch(name)
    return None if found is None else (Layer(found["before"], int(found["index"])), found["rest"])


def by_layer(names: Iterable[str]) -> dict[Layer, set[str]]:
    """Each layer's parameters by their names in it; those outside layers are left out."""
    out: dict[Layer, set[str]] = {}
    for name in names:
        if (found := layer_of(name)) is not None:
            out.setdefault(found[0], set()).add(found[1])
    return out


def runs(layers: Collection[Layer]) -> Iterator[list[Layer]]:
    """The layers in runs that follow one another."""
    current: list[Layer] = []
    for layer in sorted(layers):
        if current and layer != current[-1].moved(1):
            yield current
            current = []
        current.append(layer)
    if current:
        yield current


def shown(layers: Collection[Layer]) -> str:
    """Layers for people: ``4-5, 9``, with what stands before each run."""
    texts = []
    for run in runs(layers):
        texts.append(str(run[0]) + (f"-{run[-1].index}" if len(run) > 1 else ""))
    return ", ".join(texts)
