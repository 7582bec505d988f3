"""FSDP2 on real ranks: saved by this project and by stock DCP, resumed in other layouts, equal to the bit."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import ucp
from tests.engines.fsdp import Mesh, differences
from tests.engines.pool import RankPool
from tests.engines.truth import same
from tests.formats.dcp import states
from tests.torchdist import dtensor_jobs as jobs

pytestmark = pytest.mark.slow

SAVES = [
    (jobs.nested, jobs.save_ucp, "ucp"),
    (jobs.titan, jobs.save_ucp, "titan"),
    (jobs.app, jobs.save_ucp, "app"),
    (jobs.nested, jobs.save_async, "async"),
    (jobs.nested, jobs.save_dcp, "dcp"),
    (jobs.titan, jobs.save_dcp, "dcp-titan"),
    (jobs.nested, jobs.save_writer, "writer"),
    (jobs.nested, jobs.save_async_writer, "async-writer"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fsdp")


def under(folder: Path, steps: list[tuple[jobs.Make, jobs.Step, str]]) -> list[tuple[jobs.Make, jobs.Step, str]]:
    return [(make, step, str(folder / name)) for make, step, name in steps]


@pytest.fixture(scope="module")
def four(ranks: RankPool, folder: Path) -> list[jobs.Run]:
    """FSDP2 on 4 ranks, its state saved in every way."""
    return ranks.run(jobs.save, Mesh(4), under(folder, SAVES), str(folder / "training"), world_size=4)


def check(found: list[jobs.Run], truth: list[jobs.Run], count: int) -> None:
    """Every rank has loaded the same state as was saved, in every way, and trains on as the first run did."""
    for run in found:
        assert len(run.states) == count
        for name, state in run.states.items():
            assert differences(truth[0].states["saved"], state) == [], name
        assert run.further == pytest.approx(truth[0].further, rel=1e-5)


def test_four_ranks_to_two(ranks: RankPool, folder: Path, four: list[jobs.Run]) -> None:
    loads = [
        (jobs.shared, jobs.load_ucp, "ucp"),
        (jobs.titan, jobs.load_ucp, "titan"),
        (jobs.app, jobs.load_ucp, "app"),
        (jobs.shared, jobs.load_ucp, "async"),
        (jobs.shared, jobs.load_ucp, "dcp"),
        (jobs.titan, jobs.load_ucp, "dcp-titan"),
        (jobs.shared, jobs.load_ucp, "writer"),
        (jobs.shared, jobs.load_ucp, "async-writer"),
    ]
    found = ranks.run(jobs.load, Mesh(2, seed=1), under(folder, loads), again=str(folder / "two"), world_size=2)
    check(found, four, len(loads))
    assert all(run.extra == {"epoch": 7} for run in found)


def test_two_ranks_to_three(ranks: RankPool, folder: Path, four: list[jobs.Run]) -> None:
    """On from what 2 ranks have loaded; names nested or flattened, whatever the checkpoint's are; our loader, stock
    DCP's with our reader, and stock DCP by itself with what was converted for it."""
    ucp.convert(folder / "ucp", folder / "as-dcp", to="dcp")
    ucp.convert(folder / "two", folder / "two-as-dcp", to="dcp")
    loads = [
        (jobs.shared, jobs.load_dcp, "as-dcp"),
        (jobs.shared_model, jobs.load_dcp, "two-as-dcp"),
        (jobs.flat_only, jobs.load_reader, "two"),
        (jobs.shared_model, jobs.load_reader, "two"),
        (jobs.shared_model, jobs.load_ucp, "titan"),
        (jobs.shared_model, jobs.load_reader, "dcp-titan"),
        (jobs.app, jobs.load_ucp, "ucp"),
    ]
    found = ranks.run(jobs.load, Mesh(3, seed=1), under(folder, loads), world_size=3)
    check(found, four, len({name for *_, name in loads}))


def test_the_whole_training_state(ranks: RankPool, folder: Path, four: list[jobs.Run]) -> None:
    """As many ranks: schedulers, loaders and generators go on where they were, and losses are the same to the bit."""
    path = str(folder / "training")
    found = ranks.run(jobs.load, Mesh(4, seed=1), [], path, world_size=4)
    check(found, four, 1)
    for rank, (run, first) in enumerate(zip(found, four, strict=True)):
        step, extra, position, drawn, scheduler = run.extra
        assert (step, extra, position) == (jobs.STEPS, {"note": "kept"}, rank)
        assert torch.equal(drawn, first.extra)
        assert scheduler["last_epoch"] == jobs.STEPS
        assert run.further == first.further


def test_values_that_each_rank_has_for_itself(ranks: RankPool, folder: Path, four: list[jobs.Run]) -> None:
    loads = under(folder, [(jobs.nested, jobs.load_ucp, "ucp"), (jobs.nested, jobs.load_reader, "ucp")])
    found = ranks.run(jobs.load, Mesh(4), loads, world_size=4)
    check(found, four, 1)
    generators = [run.extra["rng"] for run in found]
    assert not torch.equal(generators[0], generators[1])
    for first, generator in zip(four, generators, strict=True):
        torch.set_rng_state(generator)
        assert torch.equal(torch.rand(3), first.extra)
    outcome = ranks.attempt(jobs.load, Mesh(2), loads[:1], world_size=2)
    assert outcome.all_raised
    assert "'rng' (each of 4 ranks has its own, and 2 load)" in outcome.failures[0].message


def test_tensor_parallelism(ranks: RankPool, folder: Path) -> None:
    """tp2.fsdp2, its lengths uneven, saved by us and by stock DCP, to fsdp4; and back."""
    saves = [
        (jobs.shared, jobs.save_ucp, "tp"),
        (jobs.titan, jobs.save_ucp, "tp-titan"),
        (jobs.shared, jobs.save_dcp, "tp-dcp"),
    ]
    first = ranks.run(jobs.save, Mesh(2, tp=2), under(folder, saves), world_size=4)
    loads = [
        (jobs.shared, jobs.load_ucp, "tp-dcp"),
        (jobs.shared, jobs.load_ucp, "tp"),
        (jobs.titan, jobs.load_reader, "tp-titan"),
    ]
    found = ranks.run(jobs.load, Mesh(4, seed=1), under(folder, loads), again=str(folder / "wide"), world_size=4)
    check(found, first, 3)
    loads = [(jobs.shared_model, jobs.load_ucp, "wide"), (jobs.shared, jobs.load_reader, "tp")]
    check(ranks.run(jobs.load, Mesh(2, tp=2, seed=1), under(folder, loads), world_size=4), first, 2)


@pytest.mark.parametrize("mesh", [Mesh(2, replicas=2), Mesh(1, tp=2, replicas=2)], ids=["2-d", "3-d"])
def test_hybrid_sharding(ranks: RankPool, tmp_path: Path, mesh: Mesh) -> None:
    """HSDP, and tensor parallelism under it, with a tied and with frozen parameters: replicas share the writing."""
    folder, mesh = tmp_path, replace(mesh, tied=True, frozen=True)
    saves = under(folder, [(jobs.shared, jobs.save_ucp, "hsdp"), (jobs.shared, jobs.save_writer, "hsdp-writer")])
    first = ranks.run(jobs.save, mesh, saves, world_size=4)
    sizes = [file.stat().st_size for file in (folder / "hsdp").glob("rank-*.safetensors")]
    assert max(sizes) < 1.5 * min(sizes)
    loads = [(jobs.shared, jobs.load_ucp, "hsdp"), (jobs.shared, jobs.load_ucp, "hsdp-writer")]
    found = ranks.run(jobs.load, Mesh(3, seed=1, tied=True, frozen=True), under(folder, loads), world_size=3)
    check(found, first, 2)


def test_ranks_with_entries_of_their_own(ranks: RankPool, tmp_path: Path) -> None:
    """Pipeline stages' layers join into one checkpoint; what ranks contradict each other in is refused by all."""
    found = ranks.run(jobs.stages, str(tmp_path), world_size=3)
    everything = jobs.stage(0, 1)
    everything["model"] |= {k: v for rank in (1, 2) for k, v in jobs.stage(rank, 1)["model"].items()}
    everything["optim"]["state"] |= {k: v for rank in (1, 2) for k, v in jobs.stage(rank, 1)["optim"]["state"].items()}
    everything["optim"]["param_groups"][0]["params"] = list(everything["optim"]["state"])
    loaded = states.blank(everything)
    ucp.load(loaded, tmp_path / "stages")
    assert same(loaded, everything)
    for messages in found:
        for message, text in zip(
            messages,
            (
                "'model.shared.w' is trained and not sharded, but ranks 0 and 1 hold different values",
                "rank 1 has other param groups than rank 0",
                r"'model.mean' is float32 \[3\] on rank 0 and float32 \[4\] on rank 1",
                "epoch: a value of class tests.engines.fsdp.Mesh cannot be stored",
                "1 are not in the checkpoint: 'model.more'",
            ),
            strict=True,
        ):
            assert re.search(text, message), message
    assert sorted(path.name for path in tmp_path.iterdir()) == ["stages"]


def test_what_replicas_want_alike_is_read_once(ranks: RankPool, tmp_path: Path) -> None:
    """HSDP: each shard lies on two ranks, of which each reads half; buffers and step counts lie on all."""
    path = str(tmp_path / "hsdp")
    mesh = Mesh(2, replicas=2)
    first = ranks.run(jobs.save, mesh, [(jobs.shared_model, jobs.save_ucp, path)], world_size=4)[0]
    alone = ranks.run(jobs.load_once, replace(mesh, seed=1), path, False, world_size=4)
    once = ranks.run(jobs.load_once, replace(mesh, seed=1), path, True, world_size=4)
    little = ranks.run(jobs.load_once, replace(mesh, seed=1), path, "adaptive", world_size=4)
    for found in (alone, once, little):
        assert all(differences(first.states["saved"], state) == [] for *_, state in found)
    assert [exchanged for _, _, exchanged, _ in once] == [True] * 4
    assert not any(exchanged for _, _, exchanged, _ in (*alone, *little))  # not worth it for so little
    state = first.states["saved"]
    trained = sum(t.nbytes for states in state.params.values() for k, t in states.items() if t.dim() or k == "param")
    everything = trained + sum(b.nbytes for b in state.buffers.values())
    assert everything <= sum(read for _, read, _, _ in once) <= 1.05 * everything
    assert sum(read for _, read, _, _ in alone) >= 2 * trained
    assert sum(nbytes for nbytes, *_ in once) == sum(nbytes for nbytes, *_ in alone) >= 2 * trained


def test_a_model_that_all_ranks_hold_is_read_once(ranks: RankPool, tmp_path: Path) -> None:
    """Plain tensors, and a new optimizer's states, which are read straight to where they stay."""
    weights = 4 * (40 * 30 + 30 + 30 * 20 + 20)
    alone = ranks.run(jobs.resume_once, str(tmp_path / "alone"), False, world_size=3)
    once = ranks.run(jobs.resume_once, str(tmp_path / "once"), True, world_size=3)
    assert [(nbytes, exchanged) for nbytes, _, exchanged in (*alone, *once)] == [
        (3 * weights, k) for k in (False, True) for _ in range(3)
    ]
    assert all(read >= 3 * weights for _, read, _ in alone)
    assert sum(read for _, read, _ in once) <= 1.01 * 3 * weights
    assert all(read <= 1.1 * weights for _, read, _ in once)


def test_ranks_of_one_machine_exchange_through_shared_memory(ranks: RankPool, tmp_path: Path) -> None:
    """Where they share memory, collectives only tell that all have come; where not, all bytes go through them."""
    shared = ranks.run(jobs.exchanged, str(tmp_path), world_size=3)
    assert [(right, left) for right, _, left in shared] == [(True, [])] * 3
    assert all(most <= 8 for _, most, _ in shared)
    for folder, is_apart in ((tmp_path / "none", False), (tmp_path, True)):
        apart = ranks.run(jobs.exchanged, str(folder), is_apart, world_size=3)
        assert [(right, left) for right, _, left in apart] == [(True, [])] * 3
        assert all(most == 400_000 for _, most, _ in apart)
