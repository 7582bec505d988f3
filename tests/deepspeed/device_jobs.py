"""Checkpoints that ranks on the CPU write for `test_device` to resume from, and the other way round.

`python -m tests.deepspeed.device_jobs write FOLDER` writes them; `... resume FOLDER` loads what a GPU wrote (a folder
that the variable UCP_DEVICE_WRITES named) into engines of two CPU ranks and compares to the bit.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from tests.deepspeed import save_jobs
from tests.deepspeed.agree import differences
from tests.engines import load_jobs
from tests.engines.configs import Case
from tests.engines.pool import RankPool
from tests.engines.sources import train

# What differs between them is the layout; what is resumed has to fit all.
PLAIN = Case(dtype="bf16", groups=2, frozen=True, tied=True, scheduler=True)
NATIVE = {"z1dp2": PLAIN.but(stage=1, dp=2), "z3dp4": PLAIN.but(stage=3, dp=4), "z0dp2": PLAIN.but(stage=0, dp=2)}
FRAGMENTED = {"z2dp3": PLAIN.but(stage=2, dp=3), "z3dp3": PLAIN.but(stage=3, dp=3)}


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
