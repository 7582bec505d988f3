"""The Hugging Face Trainer, Accelerate and Lightning with ``import ucp.deepspeed.auto``: what they call, find, delete.

On ranks of the CPU, which these frameworks are told are fit for DeepSpeed. `test_trainer_gpus` runs them on two GPUs.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any

import pytest

import ucp
from tests.deepspeed.programs import apart, furthest, losses, start, warm
from tests.engines.pool import RankPool
from tests.memory.conftest import keepers
from tests.memory.nodes import wait_for
from ucp.inspection.listing import ListedCheckpoint, listing

pytestmark = pytest.mark.slow(seconds=80)

CLOSE = 5e-5

__all__ = ["keepers"]


Launch = Callable[..., Any]


@pytest.fixture(scope="module")
def launch() -> Iterator[Launch]:
    """Starts a program by forking a process that has imported the frameworks, which takes longer than the training."""
    with RankPool() as pool:
        yield partial(warm, pool)


def story(launch: Launch, program: str, folder: Path, prefix: str, *options: str) -> ListedCheckpoint:
    """Killed in step 5 on two ranks, and resumed on one at another stage; returns the checkpoint that the killed run
    has left."""
    uninterrupted = launch(program, folder / "whole", 2, 6, *options, ranks=2)
    first = launch(program, folder / "run", 2, 6, "--die", 5, *options, ranks=2)
    expected, begun = losses(uninterrupted), losses(first, killed=True)
    assert sorted(expected) == [1, 2, 3, 4, 5, 6]
    assert set(begun) >= {1, 2, 3, 4}
    assert apart(begun, expected) == 0
    (saved,) = listing(furthest(folder / "run", prefix)).checkpoints
    assert (saved.format, saved.layout, saved.step, saved.whole) == ("universal", "dp=2,zero=2", 4, True)
    resumed = losses(launch(program, folder / "run", 3, 6, "--resume", *options))
    assert sorted(resumed) == [5, 6]
    assert apart(resumed, expected) < CLOSE
    assert min(abs(expected[1] - resumed[k]) for k in (5, 6)) > 2 * CLOSE  # the comparison tells something
    return saved


def has_adapters_only(folder: Path, tag: str) -> None:
    with ucp.open(folder, tag=tag) as checkpoint:
        assert checkpoint.parameters
        assert all("lora_" in name for name in checkpoint.parameters)


@pytest.mark.parametrize("adapter", [(), ("--lora",)], ids=["whole", "lora"])
def test_the_trainer(launch: Launch, tmp_path: Path, adapter: tuple[str, ...]) -> None:
    """Of an adapter it saves without frozen parameters, and loads with ``load_module_strict=False``."""
    pytest.importorskip("accelerate")
    # One story is of programs as their user starts them.
    story(launch if adapter else start, "trainer", tmp_path, "checkpoint-", *adapter)
    (kept,) = (tmp_path / "run").glob("checkpoint-*")  # save_total_limit=1
    assert kept.name == "checkpoint-6"
    with ucp.open(kept) as opened:
        assert (opened.format, opened.unread) == ("universal", ())
        assert opened.training_state.client_state["trainer_state"]["global_step"] == 6
    if adapter:
        has_adapters_only(kept, "global_step6")
        assert (kept / "adapter_model.safetensors").exists()


def test_the_trainer_with_snapshots_in_memory(launch: Launch, tmp_path: Path, keepers: Path) -> None:
    """It has saved step 4 and is killed in step 5, whose snapshot may be in. It counts its steps by its own file, so
    that it goes on at step 5 with the state of step 4, from wherever that is."""
    pytest.importorskip("accelerate")
    expected = losses(launch("trainer", tmp_path / "whole", 2, 6))
    begun = losses(launch("trainer", tmp_path / "run", 2, 6, "--die", 5, "--memory", keepers), killed=True)
    assert apart(begun, expected) == 0
    with ucp.open(f"memory://{tmp_path / 'run'}") as kept:
        assert kept.training_state.global_steps in (3, 4, 5)
        kept.verify()
    resumed = losses(launch("trainer", tmp_path / "run", 3, 6, "--resume", "--memory", keepers))
    assert sorted(resumed) == [5, 6]
    assert apart(resumed, expected) < CLOSE
    wait_for(lambda: list(keepers.glob("*-*")) == [], told=lambda: sorted(keepers.rglob("*")))


@pytest.mark.parametrize("adapter", [(), ("--lora",)], ids=["whole", "lora"])
def test_accelerate(launch: Launch, tmp_path: Path, adapter: tuple[str, ...]) -> None:
    pytest.importorskip("accelerate")
    assert story(launch, "accelerated", tmp_path, "step_", *adapter).tag == "pytorch_model"
    with ucp.open(tmp_path / "run/step_4") as opened:
        assert opened.format == "universal"
        assert "step" in opened.training_state.client_state  # of Accelerate's own random_states
    if adapter:
        has_adapters_only(tmp_path / "run/step_4", "pytorch_model")


@pytest.mark.parametrize("adapter", [(), ("--lora",)], ids=["whole", "lora"])
def test_lightning(launch: Launch, tmp_path: Path, adapter: tuple[str, ...]) -> None:
    pytest.importorskip("pytorch_lightning")
    assert story(launch, "lit", tmp_path, "step=", *adapter).tag == "checkpoint"
    kept = sorted((tmp_path / "run").glob("step=*"))  # save_top_k=1, and the one that was resumed
    assert [path.name for path in kept] == ["step=4.ckpt", "step=6.ckpt"]
    strategy = importlib.import_module("pytorch_lightning.strategies").DeepSpeedStrategy
    if adapter and "exclude_frozen_parameters" in signature(strategy).parameters:  # since Lightning 2.5
        has_adapters_only(kept[1], "checkpoint")
