"""The Hugging Face Trainer, Accelerate and Lightning on two GPUs: killed, resumed on one with another stage, and back.

Each is a program that trains on real GPUs under torchrun, unmodified but for ``import ucp.deepspeed.auto`` and the
config key, in fp32 with torch's AdamW and in bf16 with FusedAdam; skipped where there are fewer than two GPUs, and
where a program's library is missing. With one rank as with two, a step's samples are the same, so that the losses of
the whole story have to be an uninterrupted run's.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from tests.deepspeed.programs import apart, furthest, losses, start
from ucp.inspection.listing import listing

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]
# The library that a program needs, what its checkpoints' names begin with, and the last step said before step 5 kills.
PROGRAMS = {
    "trainer": ("transformers", "checkpoint-", 0),
    "accelerated": ("accelerate", "step_", 1),
    "lit": ("pytorch_lightning", "step=", 1),
}
# How far losses of about 4.5 may be apart, for one GPU adds up what two had added up apart.
APART = {"fp32": 1e-5, "bf16": 1e-3}


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("adapter", [(), ("--lora",)], ids=["whole", "lora"])
@pytest.mark.parametrize("dtype", APART)
def test_killed_and_resumed(tmp_path: Path, program: str, dtype: str, adapter: tuple[str, ...]) -> None:
    library, prefix, more = PROGRAMS[program]
    if importlib.util.find_spec(library) is None or (adapter and importlib.util.find_spec("peft") is None):
        pytest.skip("its library is not installed")
    options = (*adapter, "--bf16" if dtype == "bf16" else "--torch-adam")
    run = tmp_path / "run"
    uninterrupted = start(program, tmp_path / "whole", 2, 8, *options, gpus=2)
    first = start(program, run, 2, 8, "--die", 5, *options, gpus=2)
    expected, begun = losses(uninterrupted), losses(first, killed=True)
    assert sorted(expected) == list(range(1, 9))
    assert sorted(begun) == list(range(1, 5 + more))
    check(furthest(run, prefix), 4, "dp=2,zero=2")

    second = losses(start(program, run, 3, 8, "--die", 7, "--resume", *options, gpus=1), killed=True)
    assert sorted(second) == list(range(5, 7 + more))
    check(furthest(run, prefix), 6, "dp=1,zero=3")

    third = losses(start(program, run, 2, 8, "--resume", *options, gpus=2))
    assert sorted(third) == [7, 8]
    check(furthest(run, prefix), 8, "dp=2,zero=2")

    spread = [apart(found, expected) for found in (begun, second, third)]
    print(f"{program} {dtype} {adapter}: losses {expected[5]:.6f} to {expected[8]:.6f}, apart by {spread}")
    assert max(spread) <= APART[dtype]
    # They tell: without what was learnt in the first four steps the losses would be others.
    assert expected[1] - expected[8] > 3 * APART[dtype]


def check(folder: Path, step: int, layout: str) -> None:
    (saved,) = listing(folder).checkpoints
    assert (saved.format, saved.layout, saved.step, saved.whole) == ("universal", layout, step, True)
