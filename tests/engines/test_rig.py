"""The rig itself: ranks come and go cleanly, and what ``truth`` reads is what DeepSpeed holds."""

from __future__ import annotations

import dataclasses
import pickle
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.deepspeed.pairs import OPTIMIZERS
from tests.engines import models, operators, rig_jobs
from tests.engines.configs import Case, make_config
from tests.engines.packing import packed
from tests.engines.pool import ROOT, RankError, RankPool
from tests.engines.resume import resume
from tests.engines.runs import Run
from tests.engines.sources import Sources, preload_for, train
from tests.engines.truth import Truth, compare, fingerprint, known

# Layouts that DeepSpeed saves and restores exactly.
ROUND_TRIPS = [
    # As the matrix of what is read has them (`tests.formats.deepspeed.read`), so that they are trained once for both.
    *(
        Case(stage=stage, dtype=dtype, groups=1 + (stage + 2) % 3, frozen=True)
        for stage in range(4)
        for dtype in ("fp32", "bf16", "fp16")
    ),
    Case(dtype="bf16_optimizer", dp=3),
    # Every stage with several groups, frozen and tied parameters, a scheduler and clipping.
    *(
        Case(stage=stage, dtype=dtype, dp=dp, groups=3, frozen=True, tied=True, scheduler=True, clip=0.5)
        for stage, dtype, dp in ((0, "bf16", 2), (1, "bf16", 3), (2, "fp16", 4), (3, "bf16", 3), (3, "fp16", 4))
    ),
    Case(dtype="bf16_optimizer", dp=4, groups=3, frozen=True, tied=True, scheduler=True, clip=0.5),
    Case(stage=1, dtype="bf16", dp=3, groups=2, parameter_alignment=True),
    Case(stage=2, dp=3, groups=2, round_robin=True),
    Case(stage=2, dtype="bf16", dp=4, round_robin=True, parameter_alignment=True, frozen=True),
    Case(stage=2, dtype="bf16", dp=3, round_robin=True, offload=True),
    Case(stage=3, dtype="bf16", dp=3, groups=2, sub_group_size=200, persistence=0),
    Case(stage=3, dtype="bf16", dp=4, groups=2, sub_group_size=1, persistence=100),
    Case(stage=3, dtype="fp16", sub_group_size=300, offload=True),
    Case(stage=3, dtype="bf16", offload=True, offload_parameters=True),
    Case(stage=3, dtype="bf16", zero_init=True, frozen=True),
    *(Case(stage=stage, dtype="bf16", legacy_files=True, frozen=True) for stage in (0, 1, 3)),
    *(Case(stage=stage, dtype="bf16", dp=3, low_masters=True, low_states=True) for stage in (1, 2, 3)),
    Case(stage=1, dtype="bf16", low_masters=True, low_states=True, accumulate_fp32=True),
    Case(stage=3, dtype="bf16", accumulate_fp32=True, accumulation=2),
    *(Case(stage=stage, dtype="fp16", scale_power=19) for stage in (0, 2, 3)),  # the first step overflows
    Case(stage=1, dtype="fp16", scale_power=30),  # every step does
    Case(stage=3, dtype="fp16", static_scale=128.0),
    *(Case(stage=stage, dtype="bf16", wrapped=True, accumulation=2) for stage in (0, 1, 3)),
    *(
        Case(stage=stage, dtype="bf16", model="llama", groups=2, tied=tied, scheduler=True)
        for stage, tied in ((0, True), (1, False), (2, True), (3, False), (3, True))
    ),
    # Every optimizer in two or more stages; the pairs have trained them.
    *dict.fromkeys(
        pair.source
        for pair in OPTIMIZERS
        if pair.source.optimizer != "muon" and (pair.source.optimizer, pair.source.stage) != ("adagrad", 3)
    ),
    *(Case(stage=stage, optimizer="muon", dp=3) for stage in (0, 1, 2, 3)),
    Case(dtype="bf16_optimizer", optimizer="muon", cube=False),
    Case(stage=1, optimizer="muon", offload=True),
    Case(stage=1, optimizer="muon", dp=4, groups=2),
]

# Layouts that DeepSpeed saves, but restores with differences of its own making: what differs right after the load.
INEXACT = {
    # torch's load_state_dict casts optimizer states to the masters' or gradients' type.
    Case(
        stage=1, dtype="bf16", optimizer="muon", dp=3
    ): r"params\[.*\]\[momentum_buffer\]: torch.bfloat16 .* torch.float32",
    Case(stage=3, dtype="bf16", optimizer="muon"): r"params\[.*\]\[momentum_buffer\]: torch.bfloat16 .* torch.float32",
}

# Compiled optimizers. Their bias correction is a running product that no checkpoint holds, so that even DeepSpeed's
# own resume differs in the last bits of the steps after it; what it restores is exact.
COMPILED = [
    *(Case(stage=s, dtype=d, optimizer="fused_adam", groups=2) for s in (0, 1, 3) for d in ("fp32", "bf16", "fp16")),
    *(Case(stage=s, dtype="bf16", optimizer="cpu_adam", offload=True, groups=2) for s in (1, 2, 3)),
    *(
        Case(stage=s, dtype="bf16", optimizer="cpu_adam", offload=True, low_masters=True, low_states=True)
        for s in (1, 3)
    ),
]


def round_trip(ranks: RankPool, sources: Sources, case: Case, before: int = 0) -> tuple[Run, Run]:
    """The run of ``case``, and what DeepSpeed makes of its checkpoint in a fresh engine of the same layout."""
    run = sources.get(case)
    loaded = ranks.run(
        resume, case, run.folder, run.tag, run.steps, before=before, world_size=case.dp, preload=preload_for(case)
    )[0]
    return run, loaded


def test_cases_are_hashable_and_travel() -> None:
    case = Case(stage=3, zero=(("stage3_max_live_parameters", 7),))
    assert pickle.loads(pickle.dumps(case)) == case
    assert {case: 1}[case.but(dp=2)] == 1
    assert make_config(case)["zero_optimization"]["stage3_max_live_parameters"] == 7


@pytest.mark.parametrize("shape", [(), (0, 3), (2, 3)])
def test_packed_tensors_keep_their_bits(shape: tuple[int, ...]) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.bool, torch.complex64):
        value = torch.randint(0, 2, shape).to(dtype)
        for given in (value, value.T if value.dim() == 2 else value, torch.stack([value, value])[1]):
            (back,) = pickle.loads(packed((given,)))
            assert (back.dtype, back.shape) == (given.dtype, given.shape)
            assert torch.equal(back, given)
            back.zero_()  # may be changed


def test_the_shares_of_a_batch_make_up_the_whole() -> None:
    whole = models.batch("odd", 5, 0, 1)
    for world_size in (2, 3, 4):
        shares = [models.batch("odd", 5, rank, world_size) for rank in range(world_size)]
        for index in range(2):
            assert torch.equal(torch.cat([share[index] for share in shares]), whole[index])


def test_compare_sees_every_kind_of_difference() -> None:
    nan = torch.tensor([float("nan"), 1.0])
    truth = Truth(
        params={"w": {"param": nan, "exp_avg": torch.zeros(2)}},
        scalars={"w": {"step": torch.tensor(3.0)}},
        frozen={},
        buffers={"seen": torch.tensor(4)},
        module={"w": nan},
        aliases={},
        groups=({"names": ["w"], "lr": 0.1},),
        counters={"global_steps": 3},
        loss_scaler=None,
        lr_scheduler=None,
    )
    assert compare(truth, pickle.loads(packed(truth))) == []
    changes: tuple[dict[str, Any], ...] = (
        {"params": {"w": {"param": nan, "exp_avg": torch.tensor([0.0, -0.0])}}},
        {"params": {"w": {"param": nan}}},
        {"scalars": {"w": {"step": torch.tensor(4.0)}}},
        {"scalars": {"w": {"step": 3.0}}},
        {"buffers": {"seen": torch.tensor(4, dtype=torch.int32)}},
        {"groups": ({"names": ["w"], "lr": 0.2},)},
        {"counters": {"global_steps": 2}},
        {"loss_scaler": {}},
    )
    for change in changes:
        other = dataclasses.replace(truth, **change)
        assert len(compare(truth, other)) == 1, change
        if "params" in change or "buffers" in change:
            assert fingerprint(truth) != fingerprint(other)


@pytest.mark.slow
def test_any_world_size_follows_any_other(ranks: RankPool) -> None:
    for world_size in (4, 1, 3, 2, 4):
        total = float(sum(range(world_size)) + 10 * world_size)
        expected = [(rank, world_size, total) for rank in range(world_size)]
        assert ranks.run(rig_jobs.add_ranks, 10, world_size=world_size) == expected


@pytest.mark.slow
def test_a_job_sees_nothing_of_an_earlier_one(ranks: RankPool) -> None:
    assert ranks.run(rig_jobs.leave_a_mark, world_size=2) == [1, 1]
    assert ranks.run(rig_jobs.leave_a_mark, world_size=2) == [1, 1]


@pytest.mark.slow
def test_a_refusal_by_all_ranks_is_told_apart(ranks: RankPool) -> None:
    outcome = ranks.attempt(rig_jobs.refuse, (0, 1, 2), world_size=3)
    assert outcome.all_raised
    assert [(f.rank, f.type_name, f.message) for f in outcome.failures] == [
        (rank, "builtins.LookupError", f"'rank {rank} refuses'".strip("'")) for rank in range(3)
    ]
    assert "rig_jobs.py" in outcome.failures[0].traceback
    assert ranks.run(rig_jobs.refuse, (), world_size=2) == ["fine", "fine"]


@pytest.mark.slow
def test_ranks_that_wait_for_a_failed_one_are_freed(ranks: RankPool) -> None:
    with pytest.raises(RankError) as caught:
        ranks.run(rig_jobs.refuse, (1,), world_size=3, grace=0.5)
    assert [(f.rank, f.kind) for f in caught.value.failures] == [(0, "blocked"), (1, "raised"), (2, "blocked")]
    assert not caught.value.outcome.all_raised
    outcome = ranks.attempt(rig_jobs.exit_at_once, 0, 9, world_size=2, grace=0.5)
    assert (outcome.failures[0].kind, outcome.failures[0].message) == ("died", "exit code 9")
    outcome = ranks.attempt(rig_jobs.exit_at_once, -1, 0, world_size=2, timeout=0.7)
    assert [f.kind for f in outcome.failures] == ["blocked", "blocked"]
    assert ranks.run(rig_jobs.add_ranks, 0, world_size=2)[1] == (1, 2, 1.0)


@pytest.mark.slow
def test_a_failure_shows_what_the_ranks_printed(ranks: RankPool) -> None:
    with pytest.raises(RankError, match="a word before the end"):
        ranks.run(rig_jobs.say, "a word before the end", world_size=1)


@pytest.mark.slow
def test_a_rank_of_the_pool_equals_a_fresh_process(ranks: RankPool, sources: Sources, tmp_path: Path) -> None:
    cases = (Case(stage=3, dtype="bf16", dp=1), Case(stage=2, dp=1, groups=2))
    script = (
        "import os, pickle, sys\n"
        "from tests.engines.zygote import ENVIRONMENT\n"
        "os.environ.update(ENVIRONMENT, RANK='0', WORLD_SIZE='1', LOCAL_RANK='0')\n"
        "os.environ.update(MASTER_ADDR='127.0.0.1', MASTER_PORT='0')\n"
        "import deepspeed, torch\n"
        "torch.set_num_threads(1)\n"
        "deepspeed.ops.__compatible_ops__['deepspeed_shm_comm'] = False  # compiled for minutes, and not needed\n"
        f"deepspeed.init_distributed('gloo', init_method='file://{tmp_path}/store', rank=0, world_size=1)\n"
        "from tests.engines.sources import train\n"
        f"cases = pickle.loads({pickle.dumps(cases)!r})\n"
        f"runs = [train(case, {str(tmp_path)!r} + '/' + case.label) for case in cases]\n"
        f"pickle.dump(runs, open({str(tmp_path)!r} + '/runs.pickle', 'wb'))\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT, timeout=120, capture_output=True)
    found: list[Run] = pickle.loads((tmp_path / "runs.pickle").read_bytes())
    for case, fresh in zip(cases, found, strict=True):
        pooled = sources.get(case)
        assert fresh.losses + fresh.further == pooled.losses + pooled.further
        assert compare(known(fresh.truth), known(pooled.truth)) == []
        assert compare(known(fresh.truth_after), known(pooled.truth_after)) == []


@pytest.mark.slow
def test_the_same_case_gives_the_same_truth_again(ranks: RankPool, tmp_path: Path) -> None:
    case = Case(stage=3, dtype="bf16", dp=4, groups=2, frozen=True)
    first = ranks.run(train, case, str(tmp_path / "a"), world_size=4)[0]
    second = ranks.run(train, case, str(tmp_path / "b"), world_size=4)[0]
    assert compare(first.truth, second.truth) == []
    assert first.losses == second.losses


@pytest.mark.slow
@pytest.mark.parametrize("case", ROUND_TRIPS, ids=lambda case: case.label)
def test_deepspeed_restores_the_same_truth_in_the_same_layout(ranks: RankPool, sources: Sources, case: Case) -> None:
    """Saved and loaded by DeepSpeed alone, so that ``truth`` is proved without this project."""
    run, loaded = round_trip(ranks, sources, case)
    assert compare(known(run.truth), known(loaded.truth)) == []
    assert loaded.further == run.further
    assert compare(known(run.truth_after), known(loaded.truth_after)) == []


@pytest.mark.slow
def test_an_engine_that_has_trained_is_restored_as_well(ranks: RankPool, sources: Sources) -> None:
    case = Case(stage=2, dtype="bf16", dp=3, groups=2)
    run, loaded = round_trip(ranks, sources, case, before=2)
    assert compare(known(run.truth), known(loaded.truth)) == []
    assert loaded.further == run.further


@pytest.mark.slow
@pytest.mark.parametrize("case", INEXACT, ids=lambda case: case.label)
def test_what_deepspeed_restores_inexactly(ranks: RankPool, sources: Sources, case: Case) -> None:
    run, loaded = round_trip(ranks, sources, case)
    lines = compare(known(run.truth), known(loaded.truth))
    assert lines
    assert [line for line in lines if not re.match(INEXACT[case], line)] == []


@pytest.mark.slow
@pytest.mark.parametrize("case", COMPILED, ids=lambda case: case.label)
def test_compiled_optimizers(ranks: RankPool, sources: Sources, case: Case) -> None:
    if not operators.are_built(case.optimizer):
        pytest.skip("its operator is not built; python -m tests.engines.operators builds it")
    run, loaded = round_trip(ranks, sources, case)
    assert compare(known(run.truth), known(loaded.truth)) == []
    assert loaded.further == pytest.approx(run.further, abs=1e-5)


@pytest.mark.slow
def test_what_deepspeed_cannot_load_again(ranks: RankPool, sources: Sources) -> None:
    """Its own failures, which this project need not share: the checkpoints are there, and so is the truth."""
    for case, message in (
        (Case(stage=3, optimizer="adagrad"), "doesn't match the size of optimizer's group"),
        (Case(stage=1, elastic=True, dp=3), "BASE_OPTIMIZER_STATE_STEP"),
    ):
        with pytest.raises(RankError, match=message):
            round_trip(ranks, sources, case)
        assert known(sources.get(case).truth).params["gain"]["param"].shape == (1,)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("reference", "others"),
    [
        (
            Case(stage=1, dp=2),
            [Case(stage=2, dp=2), Case(stage=3, dp=3), Case(stage=0, dp=4), Case(stage=1, dp=1)],
        ),
        (
            Case(stage=0, dp=1, groups=2, optimizer="sgd"),
            [
                Case(stage=2, dp=3, groups=2, optimizer="sgd", round_robin=True, parameter_alignment=True),
                Case(stage=3, dp=4, groups=2, optimizer="sgd", sub_group_size=100),
            ],
        ),
        # Not stage 0: DeepSpeed's Muon takes other steps there.
        (Case(stage=1, dp=1, optimizer="muon"), [Case(stage=2, dp=3, optimizer="muon")]),
        (Case(stage=1, dp=4, optimizer="muon"), [Case(stage=3, dp=2, optimizer="muon")]),
    ],
    ids=["adamw", "sgd", "muon-2", "muon-3"],
)
def test_layouts_agree_up_to_rounding(sources: Sources, reference: Case, others: list[Case]) -> None:
    """Every element of every state lies where it belongs: the same training in other layouts puts it there too."""
    expected = sources.get(reference)
    for other in others:
        run = sources.get(other)
        assert run.losses == pytest.approx(expected.losses, abs=1e-5)
        for name, states in known(expected.truth).params.items():
            assert known(run.truth).params[name].keys() == states.keys()
            for state, tensor in states.items():
                found = known(run.truth).params[name][state]
                # Adam divides by the root of a tiny second moment: a rounding difference may become one of lr's size.
                torch.testing.assert_close(found, tensor, atol=1e-4, rtol=1e-3)
