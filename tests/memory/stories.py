"""Longer stories of runs that are killed: the tests tell them shortly, ``scripts/survive`` at length.

Ranks run in a folder in which they leave word of what they did, in files that outlive them: ``steps`` has a line for
each finished step with a digest of the live buffers, ``samples-RANK`` the samples' numbers and masks of each.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests.engines.build import build_engine
from tests.engines.configs import Case
from tests.engines.resume import continue_training
from tests.engines.truth import Truth, fingerprint, gather
from tests.memory.jobs import ON, at_home

BATCH = 12
FEATURES = 9


def told(folder: str, name: str) -> list[dict[str, Any]]:
    """The lines of a file that ranks have left; one that was cut off by a death is left out."""
    path = Path(folder, name)
    out = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            out.append(json.loads(line))
        except ValueError:
            continue
    return out


def tell(folder: str, name: str, record: Mapping[str, Any]) -> None:
    with open(Path(folder, name), "a") as stream:
        stream.write(json.dumps({**record, "at": time.time()}) + "\n")


def text_of(truth: Truth | None) -> str:
    """A digest of a truth; nothing on the ranks that have none."""
    return "" if truth is None else fingerprint(truth)


def die_at(seconds: float, jitter: float = 0.0) -> None:
    """End this process by SIGKILL after a while, in the middle of whatever it does."""

    def end() -> None:
        time.sleep(seconds + random.random() * jitter)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=end, daemon=True).start()


def reference(case: Case, steps: int) -> list[str]:
    """The digest of the live buffers after each step of an uninterrupted run."""
    engine = build_engine(case)
    out = []
    for step in range(steps):
        continue_training(engine, case, step, 1)
        out.append(text_of(gather(engine)))
    return out


def until_killed(case: Case, folder: str, keepers: str, nodes: Sequence[str], seconds: float, most: int) -> None:
    """Resume, tell what was found, and train until death comes, so many seconds after the resume."""
    at_home(keepers, nodes)
    memory = {**ON, "redundancy": 1}
    engine = build_engine(case, "ucp.deepspeed:initialize", {"ucp": {"enabled": True, "memory": memory}})
    began = time.monotonic()
    engine.load_checkpoint(folder)
    took = time.monotonic() - began
    truth = gather(engine)
    if dist.get_rank() == 0:
        tell(folder, "resumed", {"step": engine.global_steps, "digest": text_of(truth), "seconds": took})
    dist.barrier()
    die_at(seconds, 0.02)
    while engine.global_steps < most:
        continue_training(engine, case, engine.global_steps, 1)
        if dist.get_rank() == 0:
            tell(folder, "steps", {"step": engine.global_steps})
    time.sleep(seconds)


class Dropping(torch.nn.Module):
    """A small model with dropout that belongs to samples."""

    def __init__(self) -> None:
        super().__init__()
        from ucp.job.streams import SampleDropout

        torch.manual_seed(5)
        self.up = torch.nn.Linear(FEATURES, 32)
        self.drop = SampleDropout(0.25, "drop")
        self.down = torch.nn.Linear(32, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.drop(torch.nn.functional.gelu(self.up(x)))).squeeze(-1)


def whole_run(
    folder: str,
    keepers: str,
    nodes: Sequence[str],
    steps: int,
    seconds: float | None,
    bf16: bool,
    until: int | None = None,
    section: Mapping[str, Any] | None = None,
    lr: float = 1e-2,
) -> None:
    """A run of a program that is the same on any number of ranks: to its end, or until it is killed.

    until: the step that it ends at without a kill. It then has no memory, and goes on from what it saves there.
    section: DeepSpeed's ``elasticity``, which then decides on the batches.
    """
    import ucp.deepspeed

    at_home(keepers, nodes)
    world, rank = dist.get_world_size(), dist.get_rank()
    os.environ["WORLD_SIZE"] = str(world)
    layouts = ["dp=4,zero=1", "dp=3,zero=1", "dp=2,zero=3", "dp=1,zero=0" if not bf16 else "dp=1,zero=1"]
    config = {
        "train_batch_size": BATCH,
        "optimizer": {"type": "AdamW", "params": {"lr": lr, "torch_adam": True}},
        "zero_optimization": {"stage": 1},
        "bf16": {"enabled": bf16},
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 1_000_000,
        "ucp": {
            "enabled": True,
            "memory": {**ON, "enabled": until is None, "redundancy": 1},
            "elastic": {"layouts": layouts, "micro": [1, 2, 3], "rng": "per_sample", "seed": 11},
        },
    }
    if section is not None:
        del config["train_batch_size"]
        config["elasticity"] = section
    model = Dropping()
    engine, *_ = ucp.deepspeed.initialize(model=model, config=config, model_parameters=list(model.parameters()))
    engine.load_checkpoint(folder)
    micro = engine.train_micro_batch_size_per_gpu()
    length = BATCH * steps
    order = ucp.deepspeed.GlobalOrder(
        length, micro, rank=rank, world=world, seen=engine.ucp.samples_seen, seed=3, shuffle=True
    )
    numbers = iter(order)
    if seconds is not None:
        die_at(seconds, 0.02)
    while engine.global_steps < (until or steps):
        step, loss_sum, mine, bits = engine.global_steps, 0.0, [], {}
        while engine.global_steps == step:
            chosen = [next(numbers) for _ in range(micro)]
            generators = [torch.Generator().manual_seed(n) for n in chosen]
            x = torch.stack([torch.randn(FEATURES, generator=g) for g in generators])
            with engine.ucp.samples(chosen):
                masks = model.drop.mask((micro, 32))
            with engine.ucp.samples(chosen):
                loss = (engine(x.to(torch.bfloat16) if bf16 else x).float() - x.sum(-1)).square().mean()
            engine.backward(loss)
            engine.step()
            loss_sum += loss.item() * micro
            mine += chosen
            bits.update(
                {n: hashlib.sha256(m.numpy().tobytes()).hexdigest()[:16] for n, m in zip(chosen, masks, strict=True)}
            )
        tell(folder, f"samples-{rank}", {"step": step, "world": world, "loss": loss_sum / BATCH, "bits": bits})
    dist.barrier()
    if until is None:
        engine.ucp.memory.tier.end()
    else:
        engine.save_checkpoint(folder)
        engine.ucp.wait()


def schedule(folder: str) -> list[tuple[int, int]]:
    """On how many ranks the steps were done that counted in the end: (number of ranks, the step that they end at)."""
    last: dict[int, tuple[float, int]] = {}
    for path in sorted(Path(folder).glob("samples-*")):
        for record in told(folder, path.name):
            last[record["step"]] = max(last.get(record["step"], (0.0, 0)), (record["at"], record["world"]))
    out: list[tuple[int, int]] = []
    for step in sorted(last):
        world = last[step][1]
        if out and out[-1][0] == world:
            out.pop()
        out.append((world, step + 1))
    return out


def history(folder: str) -> dict[int, dict[str, Any]]:
    """What became of each step in the end: its loss over all ranks, and its samples with their masks.

    A step that was done twice has to have had the same samples and masks.
    """
    attempts: dict[tuple[int, int], list[dict[str, Any]]] = {}
    for path in sorted(Path(folder).glob("samples-*")):
        seen: dict[int, int] = {}
        for record in told(folder, path.name):
            step = record["step"]
            seen[step] = seen.get(step, 0) + 1
            attempts.setdefault((step, record["world"]), []).append(record)
    out: dict[int, dict[str, Any]] = {}
    for (step, world), records in attempts.items():
        bits: dict[str, str] = {}
        for record in records:
            for number, text in record["bits"].items():
                if bits.setdefault(number, text) != text:
                    raise AssertionError(f"step {step}: sample {number} had two masks")
        if len(bits) < BATCH:
            continue  # some ranks were killed before they could tell of it
        loss = sum({tuple(sorted(r["bits"])): r["loss"] for r in records}.values())
        known = out.setdefault(step, {"bits": bits, "losses": {}})
        if known["bits"] != bits:
            raise AssertionError(f"step {step} had other samples or masks on {world} ranks")
        known["losses"][world] = loss
    return out
