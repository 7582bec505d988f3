"""The names of a DeepSpeed checkpoint's files, by ``runtime/engine.py`` (``_get_ckpt_name`` and its like)."""

from __future__ import annotations

import re

MODEL = re.compile(r"^(?:zero_pp_rank_(?P<dp>\d+)_)?mp_rank_(?P<mp>\d+)_model_states\.pt$")
OPTIM = re.compile(r"^(?P<bf16>bf16_)?zero_pp_rank_(?P<dp>\d+)_mp_rank_(?P<mp>\d+)_optim_states\.pt$")
LAYER = re.compile(r"^layer_(?P<layer>\d+)(?:-model_(?P<tp>\d+))?-model_states\.pt$")
EXPERT = re.compile(r"^(?:layer_(?P<layer>\d+)_)?expert_(?P<expert>\d+)_mp_rank_(?P<mp>\d+)_model_states\.pt$")
EXPERT_OPTIM = re.compile(r"^expp_rank_(?P<ep>\d+)_mp_rank_(?P<mp>\d+)_optim_states\.pt$")


def is_ours(name: str) -> bool:
    """Whether a file of this name says whose it is."""
    return any(pattern.match(name) for pattern in (MODEL, OPTIM, LAYER, EXPERT, EXPERT_OPTIM))
