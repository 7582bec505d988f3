"""What a repair is worth: a pipeline loses a stage at step N, and trains on from each way to fill it.

    .venv/bin/python scripts/checkfree_story.py --seeds 3 --json story.json

A small transformer of 8 layers on a synthetic Markov text, as a DeepSpeed PipelineModule of 4 stages with ZeRO-1 on the
CPU. The files of stage 2 are deleted; each method of ``ucp repair`` fills its layers, and one process without stages
trains on from the result. Told are the held-out loss right after the repair, and the steps until it is what it was.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

VOCABULARY, HIDDEN, HEADS, BLOCKS, LENGTH, BATCH = 16, 64, 4, 8, 32, 16
LOST = ("layer_05*", "layer_06*", "mp_rank_02_*", "*mp_rank_02_optim*")
METHODS = {
    "checkfree, power 2": {},
    "checkfree, power 1": {"norm_power": 1},
    "uniform": {"method": "uniform"},
    "copy-left": {"method": "copy-left"},
    "copy-right": {"method": "copy-right"},
    "random": {"method": "random"},
}


class Embed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(VOCABULARY, HIDDEN) * 0.1)
        self.places = nn.Parameter(torch.randn(LENGTH, HIDDEN) * 0.1)

    def forward(self, tokens: Tensor) -> Tensor:
        return F.embedding(tokens, self.weight) + self.places


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(HIDDEN), nn.LayerNorm(HIDDEN)
        self.qkv, self.out = nn.Linear(HIDDEN, 3 * HIDDEN), nn.Linear(HIDDEN, HIDDEN)
        self.up, self.down = nn.Linear(HIDDEN, 4 * HIDDEN), nn.Linear(4 * HIDDEN, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(2, (HEADS, -1)).transpose(1, 2) for t in self.qkv(self.first(x)).chunk(3, 2))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.second(x))))


class Plain(nn.Module):
    """The pipeline's layers one after the other, under the pipeline's names."""

    def __init__(self) -> None:
        super().__init__()
        for index, layer in enumerate(layers()):
            self.add_module(str(index), layer)

    def forward(self, tokens: Tensor) -> Tensor:
        for layer in self.children():
            tokens = layer(tokens)
        return tokens


def layers() -> list[nn.Module]:
    return [Embed(), *(Block() for _ in range(BLOCKS)), nn.LayerNorm(HIDDEN), nn.Linear(HIDDEN, VOCABULARY)]


def loss_of(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


class Text:
    """A Markov chain of order 2, drawn by seed."""

    def __init__(self) -> None:
        rows = np.random.default_rng(0).dirichlet(np.full(VOCABULARY, 0.1), VOCABULARY * VOCABULARY)
        self._cumulative = torch.from_numpy(rows.cumsum(1))

    def batch(self, rows: int, seed: int) -> tuple[Tensor, Tensor]:
        draw = torch.Generator().manual_seed(seed)
        out = list(torch.randint(VOCABULARY, (2, rows), generator=draw))
        for _ in range(LENGTH - 1):
            u = torch.rand(rows, 1, generator=draw, dtype=torch.float64)
            chances = self._cumulative[out[-2] * VOCABULARY + out[-1]]
            out.append((chances < u).sum(1).clamp(max=VOCABULARY - 1))
        text = torch.stack(out, 1)
        return text[:, :-1], text[:, 1:]


def train_ranks(folder: str, seed: int, steps: int) -> None:
    """One of the pipeline's ranks."""
    import deepspeed
    from deepspeed.pipe import PipelineModule

    import ucp.deepspeed

    deepspeed.init_distributed("gloo")
    torch.manual_seed(seed)
    config = {
        "train_micro_batch_size_per_gpu": BATCH // 2,
        "gradient_accumulation_steps": 2,
        "optimizer": {"type": "AdamW", "params": {"lr": 2e-3, "torch_adam": True}},
        "zero_optimization": {"stage": 1},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
        "ucp": {"enabled": True, "save": {"format": "deepspeed", "gradient_norms": steps}},
    }
    model = PipelineModule(layers(), num_stages=4, loss_fn=loss_of, partition_method="type:block")
    engine, *_ = ucp.deepspeed.initialize(model=model, config=config, model_parameters=model.parameters())
    text = Text()
    for step in range(steps):
        engine.train_batch(iter([text.batch(BATCH // 2, 10**6 * seed + 2 * step + k) for k in range(2)]))
    engine.save_checkpoint(folder, "end", client_state={"ucp_gradient_norms": engine.ucp.gradient_norms()})


def recovered(path: Path, text: Text, before: float, most: int, seed: int) -> tuple[float, int | None]:
    """The held-out loss right after a repair, and the steps until it is the one before; None for more than ``most``."""
    import ucp

    model = Plain()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    ucp.load_training(path, model=model, optimizer=optimizer, allow_approximate=True, rng=False)
    first = held_out(model, text)
    for step in range(1, most + 1):
        tokens, labels = text.batch(BATCH, 10**6 * seed + 500_000 + step)
        loss = loss_of(model(tokens), labels)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 5 == 0 and held_out(model, text) <= before:
            return first, step
    return first, None


@torch.no_grad()
def held_out(model: nn.Module, text: Text) -> float:
    tokens, labels = text.batch(256, 999)
    return float(loss_of(model(tokens), labels))


def story(seed: int, steps: int, most: int, folder: Path) -> dict[str, Any]:
    import ucp
    from ucp.repair import repair

    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=4", __file__]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    subprocess.run(
        [*launch, "--train", str(folder), "--seed", str(seed), "--steps", str(steps)],
        check=True,
        env=environment,
        capture_output=True,
    )
    model, text = Plain(), Text()
    ucp.load_training(folder, model=model, optimizer=torch.optim.AdamW(model.parameters(), lr=2e-3), rng=False)
    before = held_out(model, text)
    for pattern in LOST:
        for path in (folder / "end").glob(pattern):
            path.unlink()
    found: dict[str, Any] = {"seed": seed, "before": round(before, 4), "methods": {}}
    for name, settings in METHODS.items():
        fixed = folder / "fixed"
        repair(folder, fixed, tag="end", seed=seed, **settings)
        first, took = recovered(fixed, text, before, most, seed)
        shutil.rmtree(fixed)
        found["methods"][name] = {"right after": round(first, 4), "steps": took}
        print(f"seed {seed}, before {before:.4f}: {name}: {first:.4f} right after, {took} steps", file=sys.stderr)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=600, help="before the loss of the stage (default: 600)")
    parser.add_argument("--most", type=int, default=300, help="steps to wait for the loss before (default: 300)")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--first", type=int, default=0, help="the first seed (default: 0)")
    parser.add_argument("--train", help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.train is not None:
        train_ranks(args.train, args.seed, args.steps)
        return 0
    found = []
    for seed in range(args.first, args.first + args.seeds):
        with tempfile.TemporaryDirectory() as folder:
            found.append(story(seed, args.steps, args.most, Path(folder)))
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
