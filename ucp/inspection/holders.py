"""Which rank wrote a file: read from the name, since every format that ranks write in parallel numbers its files.

DeepSpeed ``runtime/engine.py: _get_ckpt_name, _get_zero_ckpt_name``; torch ``distributed/checkpoint/filesystem.py``
(``__{rank}_{n}.distcp``); the universal format's fragmented form. A file of any other name stands for itself.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ucp.catalog import SourceFile

_DEEPSPEED = re.compile(r"(?P<kind>bf16_zero_pp|zero_pp|expp)_rank_(\d+)_mp_rank_(\d+)_(?:optim|model)_states\.pt")
_MODEL = re.compile(r"mp_rank_(\d+)_model_states\.pt")
_RANK = re.compile(r"rank-(\d+)-of-\d+\.safetensors|__(\d+)_\d+\.distcp")


@dataclass(frozen=True)
class Holders:
    """names: every holder once, ranks in order of their numbers. of_file: for each file, which of them wrote it."""

    names: tuple[str, ...]
    of_file: NDArray[np.int64]

    def __getitem__(self, file: int) -> str:
        return self.names[int(self.of_file[file])]


def holders(files: Sequence[SourceFile]) -> Holders:
    """Who wrote these files. A data-parallel rank is named without its model-parallel one where there is just one."""
    names = [os.path.basename(file.path) for file in files]
    cut = any(int(m[3]) for m in map(_DEEPSPEED.fullmatch, names) if m) or any(
        int(m[1]) for m in map(_MODEL.fullmatch, names) if m
    )
    found = [_holder(name, cut) for name in names]
    order = sorted(set(found), key=_natural)
    position = {name: k for k, name in enumerate(order)}
    return Holders(tuple(order), np.array([position[name] for name in found], np.int64))


def _holder(name: str, cut: bool) -> str:
    match = _DEEPSPEED.fullmatch(name)
    if match:
        what = "expert rank" if match["kind"] == "expp" else "rank"
        return f"{what} {int(match[2])}" + (f" of mp {int(match[3])}" if cut else "")
    match = _MODEL.fullmatch(name)
    if match:
        return f"model file of mp {int(match[1])}" if cut else "model file"
    match = _RANK.fullmatch(name)
    return f"rank {int(match[1] or match[2])}" if match else name


def _natural(text: str) -> list[tuple[int, int, str]]:
    """Sorts numbers in a text by their value."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", text) if part]
