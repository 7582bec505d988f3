"""Mutations by seed of configs: of a program's "ucp" section, of a DeepSpeed config that a conversion is given, of
declared changes, of a file with parameters' names, of a merge file.

These are arguments and no files of a checkpoint, and yet they are refused by an error of ours, in one sentence.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ucp
from tests.attacks import formats, mutate
from tests.merging.test_language import FILE as merge_text
from ucp.deepspeed import config as plugin
from ucp.merging import language
from ucp.spec import changes as declared

SECTION: dict[str, Any] = {
    "enabled": True,
    "spec": "llama",
    "sizes": {"heads": 4},
    "load": {
        "verify": True,
        "read_once": "adaptive",
        "prove": "full",
        "allow_missing": ["a*"],
        "allow_unused": [],
        "memory": "256MiB",
        "changes": {"frozen": ["a.*"], "dtype": {"*": "bfloat16"}},
        "options": {"skip_unknown_objects": True, "model_key": "model"},
        "override": {"lr": 0.1, "betas": [0.9, 0.99]},
    },
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


CHANGES: dict[str, Any] = {
    "changes": 1,
    "sizes": {"hidden": 7},
    "parameters": {"embed.weight": "rows hidden"},
    "names": {"model.{rest}": "{rest}"},
    "resized": {"model.embed.weight": [20, 7]},
    "new_rows": "zeros",
    "frozen": ["model.norm.*"],
    "removed": ["*.bias"],
    "dtype": {"*:exp_avg": "bfloat16"},
    "states": "dequantised",
    "workers": {"averaged": 4},
    "adapters": {"merged": 2.0},
}
NAMES: list[list[str]] = [["0.weight", "1.weight"], ["0.bias", "2.weight", "2.bias"]]


def section(seed: int, number: int, place: Path) -> Callable[[], str]:
    """Read a mutated section, and what is made of it."""

    def do() -> str:
        found = json.loads(_mutated(f"{seed}/section/{number}", {"ucp": SECTION}))
        if not isinstance(found, dict):
            return "no config"
        read = plugin.parse(found)
        read.memory.options()
        if isinstance(read.load.changes, dict):
            declared.read(read.load.changes)
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


def changes(seed: int, number: int, place: Path) -> Callable[[], str]:
    """Read mutated changes, some of them at once, and plan a conversion with them."""
    run = place / "run"
    if not run.exists():
        formats.make("consolidated", place)

    def do() -> str:
        rng = random.Random(f"{seed}/changes/{number}")
        few = {"changes": 1, **{key: CHANGES[key] for key in rng.sample(sorted(CHANGES), rng.randrange(1, 4))}}
        found = json.loads(_mutated(f"{seed}/changes/{number}", few if rng.random() < 0.7 else CHANGES))
        if not isinstance(found, dict):
            return "no changes"
        ucp.convert(run, place / "out", changes=found, dry_run=True)
        return "planned"

    return do


def names(seed: int, number: int, place: Path) -> Callable[[], str]:
    """Open a checkpoint whose optimizer numbers its parameters, with mutated names for them."""
    run, file = place / "run", place / "names.json"
    if not run.exists():
        formats.make("zero0", place)

    def do() -> str:
        rng = random.Random(f"{seed}/names/{number}")
        file.write_bytes((mutate.of_json if rng.random() < 0.6 else mutate.of_bytes)(rng, json.dumps(NAMES).encode()))
        return repr(formats.everything(run, param_names=file))

    return do


def merge_file(seed: int, number: int, place: Path) -> Callable[[], str]:
    """Read a mutated merge file, and what it says for some parameters."""

    def do() -> str:
        text = mutate.several_of_text(random.Random(f"{seed}/merge/{number}"), merge_text.encode())
        if text is None:
            return "no text"
        recipe = language.loads(text, "merge.yaml")
        for name in ("model.layers.3.self_attn.q_proj.weight", "model.norm.weight", "lm_head.weight", "x"):
            recipe.operation(name)
        return "read"

    return do


MAKERS: dict[str, Callable[[int, int, Path], Callable[[], str]]] = {
    "section": section,
    "config": deepspeed,
    "changes": changes,
    "names": names,
    "merge file": merge_file,
}


def _mutated(seed: str, body: dict[str, Any]) -> bytes:
    """Still JSON, for bytes that are none are refused before."""
    rng = random.Random(seed)
    changed = mutate.of_json(rng, json.dumps(body).encode())
    try:
        json.loads(changed)
    except ValueError:
        return json.dumps(body).encode()
    return changed
