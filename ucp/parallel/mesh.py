"""The layout of a training run: its mesh dimensions and ZeRO stage."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import NamedTuple

from ucp.errors import BadArgument

_FIELDS = ("dp", "tp", "pp", "ep", "zero")
# What other programs call them.
_MEANT = {"stage": "zero", "zero_stage": "zero", "z": "zero", "world_size": "dp", "ranks": "dp", "gpus": "dp"}


@dataclass(frozen=True)
class Layout:
    """How many ranks each mesh dimension has, and the ZeRO stage.

    Parameters
    ----------
    dp: ranks of data parallelism.
    tp: ranks of tensor parallelism.
    pp: stages of the pipeline.
    ep: ranks of expert parallelism. It divides ``dp`` and adds no ranks of its own.
    zero: DeepSpeed's ZeRO stage, 0 to 3.
    """

    dp: int = 1
    tp: int = 1
    pp: int = 1
    ep: int = 1
    zero: int = 0

    @property
    def world_size(self) -> int:
        return self.dp * self.tp * self.pp

    def __str__(self) -> str:
        parts = [f"dp={self.dp}"]
        parts += [f"{name}={getattr(self, name)}" for name in ("tp", "pp", "ep") if getattr(self, name) != 1]
        return ",".join([*parts, f"zero={self.zero}"])


class Coordinate(NamedTuple):
    """A rank's place in the mesh dimensions that cut the model itself. Data parallelism copies it and is left out."""

    tp: int = 0
    pp: int = 0
    ep: int = 0

    def __str__(self) -> str:
        of_stage = f" of pipeline stage {self.pp}" if self.pp else ""
        return f"tp rank {self.tp}{of_stage}" + (f" with the experts of rank {self.ep}" if self.ep else "")


def parse_layout(text: str) -> Layout:
    """Read text such as ``dp=4,tp=2,zero=3``. A dimension that is not named is 1, and the ZeRO stage is 0.

    Raises BadArgument for an unknown or repeated name, for a value that is no number or is out of range, and for an
    ``ep`` that does not divide ``dp``.
    """
    values: dict[str, int] = {}
    for part in filter(None, (p.strip() for p in text.split(","))):
        name, number = (side.strip() for side in part.partition("=")[::2])
        if name not in _FIELDS:
            joined = None if number else re.fullmatch(r"([a-z_]+?)([0-9]+)", name.lower())  # such as zero3
            said, value = (name.lower(), number) if joined is None else joined.groups()
            meant = said if said in _FIELDS else _MEANT.get(said)
            hint = f"use {', '.join(_FIELDS)}" if meant is None else f"did you mean '{meant}={value}'?"
            raise BadArgument(f"layout '{text}': unknown name '{name}'; {hint}")
        if name in values:
            raise BadArgument(f"layout '{text}': '{name}' is given twice")
        if not re.fullmatch("-?[0-9]{1,18}", number):
            raise BadArgument(f"layout '{text}': '{name}' needs a whole number, found '{number}'")
        values[name] = int(number)
        low, high = (0, 3) if name == "zero" else (1, 2**31)
        if not low <= values[name] <= high:
            raise BadArgument(f"layout '{text}': {name}={number} is out of range ({low} to {high})")
    layout = Layout(**values)
    if layout.dp % layout.ep:
        raise BadArgument(f"layout '{text}': ep={layout.ep} does not divide dp={layout.dp}")
    return layout
