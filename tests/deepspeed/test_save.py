"""Real engines save in the universal format: all that they held, to the bit, written once and evenly."""

from __future__ import annotations

import os
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

import ucp
from tests.deepspeed import save_jobs
from tests.deepspeed.agree import differences
from tests.deepspeed.pairs import CLOSE
from tests.engines import load_jobs
from tests.engines.configs import Case
from tests.engines.models import GLOBAL_BATCH
from tests.engines.pool import RankPool
from tests.engines.runs import CLIENT_STATE, STEPS
from tests.engines.sources import preload_for
from tests.engines.truth import Truth, compare, known
from ucp.job.data_order import GlobalOrder

pytestmark = pytest.mark.slow

# Each with a layout of another kind to resume on.
CASES: list[tuple[Case, Case]] = [
    (
        Case(stage=1, dp=3, groups=3, frozen=True, tied=True, scheduler=True),
        Case(stage=3, dp=2, groups=3, frozen=True, tied=True, scheduler=True),
    ),
    (
        Case(stage=3, dp=4, dtype="bf16", groups=2, frozen=True, sub_group_size=300),
        Case(stage=1, dp=2, dtype="bf16", groups=2, frozen=True),
    ),
    (Case(stage=0, dp=4, frozen=True), Case(stage=2, dp=3, frozen=True)),
    (Case(stage=0, dp=2, dtype="fp16", groups=2), Case(stage=3, dp=3, dtype="fp16", groups=2)),
    (
        Case(stage=2, dp=2, dtype="fp16", scale_power=16, optimizer="sgd"),
        Case(stage=1, dp=3, dtype="fp16", scale_power=16, optimizer="sgd"),
    ),
    (Case(stage=2, dp=3, dtype="bf16", round_robin=True, groups=2), Case(stage=1, dp=1, dtype="bf16", groups=2)),
    (Case(stage=1, dp=4, dtype="bf16", optimizer="muon"), Case(stage=3, dp=2, dtype="bf16", optimizer="muon")),
    (
        Case(stage=1, dp=2, dtype="bf16_optimizer", accumulation=2, clip=0.5),
        Case(stage=2, dp=4, dtype="bf16", accumulate_fp32=True, accumulation=2, clip=0.5),
    ),
    (Case(stage=3, dp=2, persistence=60, zero_init=True, wrapped=True), Case(stage=0, dp=1)),
    (
        Case(stage=1, dp=1, parameter_alignment=True, dtype="bf16", model="llama"),
        Case(stage=3, dp=3, dtype="bf16", model="llama"),
    ),
]


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def check_contents(folder: str, truth: Truth, case: Case) -> int:
    """What `ucp.open` reads is the truth, to the bit; returns the bytes of all tensors."""
    payload = 0
    with ucp.open(folder) as checkpoint:
        wanted: dict[tuple[str, str], torch.Tensor] = {
            (name, state): tensor for name, states in truth.params.items() for state, tensor in states.items()
        }
        wanted |= {(name, "param"): tensor for kind in (truth.frozen, truth.buffers) for name, tensor in kind.items()}
        assert set(checkpoint.catalog.tensors) == set(wanted)
        for key, tensor in wanted.items():
            found = checkpoint.read(*key)
            assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape), key
            assert bits(found) == bits(tensor), key
            payload += tensor.nbytes
        infos = checkpoint.parameters
        assert {name for name, info in infos.items() if info.kind == "buffer"} == set(truth.buffers)
        assert {name for name, info in infos.items() if info.kind == "frozen"} == set(truth.frozen)
        assert {alias: name for name, info in infos.items() for alias in info.aliases} == dict(truth.aliases)
        for name, scalars in truth.scalars.items():
            assert dict(infos[name].scalars) == {k: float(v) for k, v in scalars.items()}, name
        state = checkpoint.training_state
        assert {k: getattr(state, k) for k in truth.counters} == dict(truth.counters)
        assert [set(g.names) for g in state.param_groups] == [set(g["names"]) for g in truth.groups]
        for group, live in zip(state.param_groups, truth.groups, strict=True):
            assert group.options == {k: v for k, v in live.items() if k not in ("names", "step")}
        assert (checkpoint.layout.dp, checkpoint.layout.zero) == (case.dp, case.stage)
        assert checkpoint.verify() > 0
    return payload


@pytest.mark.parametrize(("case", "other"), CASES, ids=[case.label for case, _ in CASES])
def test_saves_exactly(ranks: RankPool, tmp_path: Path, case: Case, other: Case) -> None:
    folder = str(tmp_path / "runs")
    saved: list[save_jobs.Saved] = ranks.run(
        save_jobs.save_and_resume, case, folder, world_size=case.dp, preload=preload_for(case)
    )
    truth = known(saved[0].truth)
    payload = check_contents(folder, truth, case)
    tag = f"global_step{STEPS}"
    assert [rank.returned for rank in saved] == [True] * case.dp
    assert sorted(os.listdir(folder)) == sorted([tag, "latest"])
    # Each byte once, and as much by each rank: headers, and padding at the end of what is cut, make the difference.
    tensors = [
        (tmp_path / "runs" / tag / f"rank-{k:05d}-of-{case.dp:05d}.safetensors").stat().st_size for k in range(case.dp)
    ]
    assert [rank.written for rank in saved] == tensors
    headers = sum(
        _header(tmp_path / "runs" / tag / name)
        for name in os.listdir(tmp_path / "runs" / tag)
        if name.startswith("rank-")
    )
    assert sum(tensors) - headers == payload
    # Resumed where it was: the same to the bit in all that follows, and each rank's generators and client state.
    # (Muon's bf16 momentum is restored in fp32, as DeepSpeed's own load does; the next step makes it bf16 again.)
    assert differences(truth, known(saved[0].resumed)) == []
    assert case.optimizer == "muon" or compare(truth, known(saved[0].resumed)) == []
    assert saved[0].resumed_further == saved[0].further
    assert compare(known(saved[0].truth_after), known(saved[0].resumed_after)) == []
    for rank, found in enumerate(saved):
        assert found.resumed_draws == found.draws
        assert {k: found.client_state[k] for k in CLIENT_STATE} == CLIENT_STATE
        assert found.client_state["rank"] == rank
        assert found.client_state["table"].tolist() == [rank, rank + 1, rank + 2]
    assert len({found.draws for found in saved}) == case.dp
    # And on another layout.
    loaded: load_jobs.Resumed = ranks.run(
        load_jobs.resume, other.but(seed=5), folder, None, STEPS, world_size=other.dp, preload=preload_for(other)
    )[0]
    assert differences(truth, known(loaded.truth)) == []
    assert loaded.client_state["rank"] == 0
    assert loaded.further == pytest.approx(saved[0].further, rel=0, abs=CLOSE[other.dtype])


def _header(path: Path) -> int:
    return 8 + int.from_bytes(path.read_bytes()[:8], "little")


def test_ranks_write_equal_shares(ranks: RankPool, tmp_path: Path) -> None:
    """At stage 0 every rank holds everything, at stage 3 its piece of everything."""
    for stage in (0, 3):
        case = Case(stage=stage, dp=4, frozen=True, model="llama")
        folder = tmp_path / str(stage)
        ranks.run(save_jobs.save_and_resume, case, str(folder), world_size=4, preload=preload_for(case))
        paths = sorted((folder / f"global_step{STEPS}").glob("rank-*.safetensors"))
        shares = [path.stat().st_size - _header(path) for path in paths]
        assert max(shares) <= 1.02 * min(shares)


def test_tags(ranks: RankPool, tmp_path: Path) -> None:
    folder = str(tmp_path / "runs")
    found: list[Any] = ranks.run(save_jobs.save_twice, Case(stage=2, dp=2), folder, world_size=2)
    assert found[0] == [
        ["pytorch_model"],
        ["latest", "pytorch_model"],
        ["global_step3", "latest", "pytorch_model"],
        ["global_step3", "global_step4", "latest", "pytorch_model"],
    ]
    assert (tmp_path / "runs/latest").read_text() == "global_step4"
    for tag, steps in (("pytorch_model", 2), ("global_step3", 3), (None, 4)):
        with ucp.open(folder, tag=tag) as checkpoint:
            assert checkpoint.training_state.global_steps == steps


def test_only_the_newest_are_kept(ranks: RankPool, tmp_path: Path) -> None:
    names = ranks.run(save_jobs.save_and_keep_two, Case(stage=1, dp=2), str(tmp_path), world_size=2)[0]
    assert names == ["global_step3", "global_step4", "latest"]


def test_without_frozen_parameters(ranks: RankPool, tmp_path: Path) -> None:
    case = Case(stage=3, dp=2, frozen=True)
    ranks.run(save_jobs.save_without_frozen, case, str(tmp_path), world_size=2)
    with ucp.open(tmp_path) as checkpoint:
        assert {info.kind for info in checkpoint.parameters.values()} == {"parameter", "buffer"}


def test_refusals_leave_everything_as_it_was(ranks: RankPool, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    found: list[Any] = ranks.run(
        save_jobs.refused_saves, Case(stage=1, dp=2), str(tmp_path), str(tmp_path / "good"), world_size=2
    )
    assert found[0][0][0] == found[1][0][0] == "BadArgument"
    assert [kind for kind, _ in found[0][1:]] == ["Unsupported", "Unsupported", "DestinationError"]
    assert [kind for kind, _ in found[1][1:]] == ["Unsupported", "Unsupported", "DestinationError"]
    assert "rank 1's client_state['socket']: a value of class builtins.object" in found[1][1][1]
    assert "rank 1's client_state['socket']: a value of class builtins.object" in found[0][2][1]
    assert sorted(os.listdir(tmp_path / "good")) == ["global_step1", "latest"]


@pytest.mark.parametrize(
    "case",
    [Case(stage=1, dp=2, dtype="bf16", frozen=True), Case(stage=3, dp=2), Case(stage=0, dp=3, dtype="fp16")],
    ids=lambda case: case.label,
)
def test_in_the_background(ranks: RankPool, tmp_path: Path, case: Case) -> None:
    folder = str(tmp_path / "runs")
    found = ranks.run(save_jobs.save_in_background, case, folder, world_size=case.dp)
    first, second, losses, names = found[0]
    assert names == ["global_step2", "global_step4", "latest"]
    check_contents(folder, known(second), case)
    check_contents(str(tmp_path / "runs/global_step2"), known(first), case)
    # Training is not disturbed.
    plain = ranks.run(save_jobs.plain_losses, case, 5, world_size=case.dp)
    assert plain[0] == losses


@pytest.mark.parametrize(
    "case",
    [
        Case(stage=0, dp=2),
        Case(stage=1, dp=2, dtype="bf16", frozen=True),
        Case(stage=2, dp=2, dtype="bf16", offload=True),
        Case(stage=3, dp=2, dtype="bf16", frozen=True),
    ],
    ids=lambda case: case.label,
)
def test_every_update_waits_for_the_copy_and_nothing_else(ranks: RankPool, tmp_path: Path, case: Case) -> None:
    found: save_jobs.Lazily = ranks.run(save_jobs.save_lazily, case, str(tmp_path), world_size=2)[0]
    for tag, truth in found.truths.items():
        check_contents(str(tmp_path / tag), known(truth), case)
        assert found.seconds[f"save {tag}"] < save_jobs.SLOW * 0.75 < found.seconds[tag]
    assert found.waits
    assert not any(found.waits)


@pytest.mark.parametrize("failing", [0, 1])
def test_a_failure_in_the_background(ranks: RankPool, tmp_path: Path, failing: int) -> None:
    found = ranks.run(save_jobs.failure_in_background, Case(stage=2, dp=2), str(tmp_path), failing, world_size=2)
    for told, loaded in found:
        assert told[0] == "SaveFailed"
        assert "OSError: the disk is gone" in told[1]
        assert loaded == ("", "again")
    assert sorted(os.listdir(tmp_path)) == ["again", "global_step1", "latest"]


def test_a_flipped_bit_is_found_at_load(ranks: RankPool, tmp_path: Path) -> None:
    case = Case(stage=3, dp=2, frozen=True)
    ranks.run(save_jobs.save_twice, case, str(tmp_path), world_size=2)
    files = len(os.listdir(tmp_path / "global_step4"))
    other = Case(stage=1, dp=1, frozen=True)
    refused, missed, changed = ranks.run(
        save_jobs.loads_of_damaged, other, str(tmp_path / "global_step4"), 10, world_size=1
    )[0]
    assert missed == []
    assert changed == []
    assert list(refused.values()) == [10] * files


def test_data_goes_on_where_it_was_on_other_ranks(ranks: RankPool, tmp_path: Path) -> None:
    """Global batches of 24 on 2 ranks, of 12 on 4, of 24 on 3: as if one rank had read all."""
    length, seen = 50, 0
    for case in (Case(stage=1, dp=2, accumulation=2), Case(stage=3, dp=4), Case(stage=2, dp=3, accumulation=2)):
        found = ranks.run(save_jobs.read_on, case, str(tmp_path / "runs"), length, 2, seen > 0, world_size=case.dp)
        per_step = case.accumulation * GLOBAL_BATCH
        alone = iter(GlobalOrder(length, 1, rank=0, world=1, seed=9, seen=seen))
        for step in range(2):
            together = sorted(index for rank in found for index in rank[step])
            assert together == sorted(islice(alone, per_step))
        seen += 2 * per_step
    with ucp.open(tmp_path / "runs") as checkpoint:
        assert checkpoint.training_state.global_samples == seen == 120
