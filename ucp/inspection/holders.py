"""Which rank wrote a file: read from the name, since every format that ranks write in parallel numbers its files.

DeepSpeed ``runtime/engine.py: _get_ckpt_name, _get_zero_ckpt_name``; torch ``distributed/checkpoint/filesystem.py``
(``__{rank}_{n}.distcp``); the universal format's fragmented form. A file of any other name stands for itself.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence

from ucp.catalog import SourceFile

_NUMBERED = (
    (re.compile(r"(?:bf16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_(?:optim|model)_states\.pt"), "dp {0} mp {1}"),
    (re.compile(r"expp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt"), "expert dp {0} mp {1}"),
    (re.compile(r"mp_rank_(\d+)_model_states\.pt"), "mp {0}"),
    (re.compile(r"rank-(\d+)-of-\d+\.safetensors"), "rank {0}"),
    (re.compile(r"__(\d+)_\d+\.distcp"), "rank {0}"),
)


def holder(path: str) -> str:
    """The rank that wrote this file, in a word or two, or the file's own name."""
    name = os.path.basename(path)
    for pattern, words in _NUMBERED:
        match = pattern.fullmatch(name)
        if match:
            return words.format(*(int(n) for n in match.groups()))
    return name


def holders(files: Sequence[SourceFile]) -> tuple[list[str], list[int]]:
    """Every holder once, ranks in order of their numbers, and for each file the position of its holder."""
    found = [holder(file.path) for file in files]
    order = sorted(set(found), key=_natural)
    position = {name: k for k, name in enumerate(order)}
    return order, [position[name] for name in found]


def _natural(text: str) -> list[tuple[int, int, str]]:
    """Sorts numbers in a text by their value."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", text) if part]
