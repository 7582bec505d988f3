"""Checkpoints that ranks on the CPU write for `test_device` to resume from, and the other way round.

`python -m tests.deepspeed.device_jobs write FOLDER` writes them; `... resume FOLDER` loads what a GPU wrote (a folder
that the variable UCP_DEVICE_WRITES named) into engines of two CPU ranks and compares to the bit.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from tests.deepspeed import save_jobs
from tests.deepspeed.agree import differences
from tests.engines import load_jobs
from tests.engines.build import build_engine
from tests.engines.configs import Case
from tests.engines.pool import RankPool
from tests.engines.resume import continue_training
from tests.engines.runs import FURTHER, STEPS
from tests.engines.sources import train
from tests.engines.truth import Truth, gather

# What differs between them is the layout; what is resumed has to fit all.
PLAIN = Case(dtype="bf16", groups=2, frozen=True, tied=True, scheduler=True)
NATIVE = {"z1dp2": PLAIN.but(stage=1, dp=2), "z3dp4": PLAIN.but(stage=3, dp=4), "z0dp2": PLAIN.but(stage=0, dp=2)}
FRAGMENTED = {"z2dp3": PLAIN.but(stage=2, dp=3), "z3dp3": PLAIN.but(stage=3, dp=3)}


@dataclass(frozen=True, eq=False)
class Left:
    """What a save or a load left on the ranks of a device. Truths on rank 0 only; further, after: of the steps that
    followed; draws: numbers that the rank's generators gave right after it."""

    truth: Truth | None
    draws: tuple[float, ...]
    further: tuple[float, ...]
    after: Truth | None


def engine_of(case: Case, section: dict[str, Any] | None = None) -> Any:
    extra = {"ucp": {"enabled": True, **(section or {})}}
    return build_engine(case, "ucp.deepspeed:initialize", extra)


def settled(truth: Truth) -> Truth:
    """FusedAdam steps a group as one, and counts in its last parameter's state: what all of the group's mean."""
    scalars = {name: dict(values) for name, values in truth.scalars.items()}
    for group in truth.groups:
        if "bias_correction" in group:
            last = max(scalars[name].get("step", 0) for name in group["names"])
            for name in group["names"]:
                scalars[name] = {key: last if key == "step" else v for key, v in scalars[name].items()}
    return replace(truth, scalars=scalars)


def _known(engine: Any) -> Truth | None:
    truth = gather(engine)
    return None if truth is None else settled(truth)


def save_both(case: Case, folder: str) -> Left:
    """Train, save as DeepSpeed does (``folder/native``) and, while training goes on, as this project (``.../lazy``)."""
    engine = engine_of(case)
    continue_training(engine, case, 0, STEPS)
    save_jobs.unequal_generators()
    truth = _known(engine)
    type(engine).save_checkpoint(engine, f"{folder}/native")
    engine.save_checkpoint(f"{folder}/lazy")
    drawn = save_jobs.draws()
    further = continue_training(engine, case, STEPS, FURTHER)
    after = _known(engine)
    engine.ucp.wait()
    engine.destroy()
    return Left(truth, drawn, tuple(further), after)


def load_each(folder: str, forms: Sequence[str], targets: Sequence[Case], further: int = FURTHER) -> list[list[Left]]:
    """Resume from each of these checkpoints in ``folder``, in every layout: for each target, for each form.

    An engine at stage 3 replaces ``torch.nn.functional.linear`` for the rest of the process; in bf16 stage 0 computes
    other losses after it. So stage 0 comes first, if losses are to be equal to the bit.
    """
    return [[_load(case, f"{folder}/{form}", further) for form in forms] for case in targets]


def _load(case: Case, folder: str, further: int) -> Left:
    engine = engine_of(case.but(seed=5))
    engine.load_checkpoint(folder)
    drawn = save_jobs.draws()
    truth = _known(engine)
    losses = continue_training(engine, case, STEPS, further)
    left = Left(truth, drawn, tuple(losses), _known(engine))
    engine.destroy()
    return left


def write(folder: Path) -> None:
    with RankPool() as pool:
        for name, case in NATIVE.items():
            run = pool.run(train, case, str(folder / name), world_size=case.dp)[0]
            torch.save(run.truth, folder / f"{name}.truth")
        for name, case in FRAGMENTED.items():
            saved = pool.run(save_jobs.save_and_resume, case, str(folder / name), world_size=case.dp)[0]
            torch.save(saved.truth, folder / f"{name}.truth")


def resume(folder: Path) -> None:
    with RankPool() as pool:
        for path in sorted(folder.glob("*.truth")):
            truth = torch.load(path, weights_only=False)
            for stage in (1, 3):
                case = PLAIN.but(stage=stage, dp=2, seed=5)
                loaded = pool.run(
                    load_jobs.resume, case, str(path.with_suffix("")), None, 3, 1, world_size=2, preload=()
                )[0]
                found = differences(truth, loaded.truth)
                print(path.stem, f"-> stage {stage}, 2 CPU ranks:", found or "equal to the bit")


if __name__ == "__main__":
    {"write": write, "resume": resume}[sys.argv[1]](Path(sys.argv[2]))
