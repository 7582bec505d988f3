"""Mutations by seed of configs: of a program's "ucp" section, and of a DeepSpeed config that a conversion is given.

A config is an argument and no file of a checkpoint, and yet it is refused by an error of ours, in one sentence.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ucp
from tests.attacks import formats, mutate
from ucp.deepspeed import config as plugin

SECTION: dict[str, Any] = {
    "enabled": True,
    "spec": "llama",
    "sizes": {"heads": 4},
    "load": {"verify": True, "read_once": "adaptive", "prove": "full", "allow_missing": ["a*"], "allow_unused": []},
    "save": {"format": "universal", "async": True, "keep_last": 3, "keep_every": 100, "timeout": 60.0},
    "memory": {"enabled": True, "every": 2, "group": "node", "limit": "4GiB", "network": "1GiB"},
    "elastic": {"layouts": ["dp=2,zero=3"], "min": 1, "micro": [1, 2], "batch": "keep"},
    "metrics": False,
}
DEEPSPEED: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": 2,
    "gradient_accumulation_steps": 1,
    "gradient_clipping": 1.0,
    "optimizer": {"type": "AdamW", "params": {"lr": 0.1, "betas": [0.9, 0.99], "torch_adam": True}},
    "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 7}},
    "fp16": {"enabled": False, "loss_scale": 0, "initial_scale_power": 8},
    "bf16": {"enabled": True},
    "zero_optimization": {"stage": 3, "sub_group_size": 1000, "offload_optimizer": {"device": "cpu"}},
}


def section(seed: int, number: int) -> Callable[[], str]:
    """Read a mutated section, and what is made of it."""

    def do() -> str:
        found = json.loads(_mutated(f"{seed}/section/{number}", {"ucp": SECTION}))
        if not isinstance(found, dict):
            return "no config"
        read = plugin.parse(found)
        read.memory.options()
        return "read"

    return do


def deepspeed(seed: int, number: int, place: Path) -> Callable[[], str]:
    """Plan a conversion to DeepSpeed's files with a mutated config."""
    run = place / "run"
    if not run.exists():
        formats.make("consolidated", place)

    def do() -> str:
        found = json.loads(_mutated(f"{seed}/deepspeed/{number}", DEEPSPEED))
        ucp.convert(run, place / "out", to="deepspeed", layout="dp=2,zero=3", ds_config=found, dry_run=True)
        return "planned"

    return do


def _mutated(seed: str, body: dict[str, Any]) -> bytes:
    """Still JSON, for bytes that are none are refused before."""
    rng = random.Random(seed)
    changed = mutate.of_json(rng, json.dumps(body).encode())
    try:
        json.loads(changed)
    except ValueError:
        return json.dumps(body).encode()
    return changed
