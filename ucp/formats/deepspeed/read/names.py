"""The names of a DeepSpeed checkpoint's files, by ``runtime/engine.py`` (``_get_ckpt_name`` and its like)."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

MODEL = re.compile(r"^(?:zero_pp_rank_(?P<dp>\d+)_)?mp_rank_(?P<mp>\d+)_model_states\.pt$")
OPTIM = re.compile(r"^(?P<bf16>bf16_)?zero_pp_rank_(?P<dp>\d+)_mp_rank_(?P<mp>\d+)_optim_states\.pt$")
LAYER = re.compile(r"^layer_(?P<layer>\d+)(?:-model_(?P<tp>\d+))?-model_states\.pt$")
EXPERT = re.compile(r"^(?:layer_(?P<layer>\d+)_)?expert_(?P<expert>\d+)_mp_rank_(?P<mp>\d+)_model_states\.pt$")
EXPERT_OPTIM = re.compile(r"^expp_rank_(?P<ep>\d+)_mp_rank_(?P<mp>\d+)_optim_states\.pt$")


def is_ours(name: str) -> bool:
    """Whether a file of this name says whose it is."""
    return any(pattern.match(name) for pattern in (MODEL, OPTIM, LAYER, EXPERT, EXPERT_OPTIM))


def owners(names: Sequence[str]) -> dict[str, str]:
    """Which rank wrote each file of the model or the optimizer. If there is just one model-parallel rank, it is not
    named."""
    found = {name: match for name in names for kind in (MODEL, OPTIM, EXPERT_OPTIM) if (match := kind.match(name))}
    is_cut = any(int(match["mp"]) for match in found.values())
    return {name: _owner(match.groupdict(), is_cut) for name, match in found.items()}


def _owner(numbers: Mapping[str, str | None], is_cut: bool) -> str:
    of_mp = f" of mp {int(numbers['mp'] or 0)}" if is_cut else ""
    if (expert := numbers.get("ep")) is not None:
        return f"expert rank {int(expert)}{of_mp}"
    rank = numbers.get("dp")
    return f"model file{of_mp}" if rank is None else f"rank {int(rank)}{of_mp}"
