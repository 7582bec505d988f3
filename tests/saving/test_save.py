"""Saving from several ranks without DeepSpeed: what is written, by whom, and what is refused."""

from __future__ import annotations

import os
import random
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import ucp
from tests.saving import save_jobs as jobs
from tests.slow_cases import slow_but
from ucp import limits
from ucp.errors import BadArgument, DamagedCheckpoint, DestinationError, NotACheckpoint, UcpError
from ucp.geometry import Blocks, coverage_fault, empty, whole
from ucp.job.stopwatch import Stopwatch
from ucp.saving import commit, share
from ucp.saving.save import write_share
from ucp.saving.source import Holding, Source
from ucp.storage import atomic
from ucp.storage.digests import digest_file


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """In memory, where there is such a place: these tests flush hundreds of files."""
    folder = Path(tempfile.mkdtemp(dir="/dev/shm" if os.path.isdir("/dev/shm") else None))
    yield folder
    shutil.rmtree(folder)


def sources(seed: int, world: int, small: bool = True) -> tuple[dict[tuple[str, str], torch.Tensor], list[Source]]:
    values = jobs.values(seed, small)
    return values, [jobs.source(values, rank, world, seed) for rank in range(world)]


def names(folder: Path) -> set[str]:
    return set(os.listdir(folder))


# --- what is saved ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("seed", "world"), slow_but([(0, 2), (1, 1), (2, 3), (3, 4)], product(range(4), range(1, 5))))
def test_a_saved_state_is_read_back_to_the_bit(tmp_path: Path, world: int, seed: int) -> None:
    values, made = sources(seed, world, small=seed > 0)
    assert jobs.save(tmp_path, "now", made).code == 0
    assert names(tmp_path) == {"now", "latest"}
    assert (tmp_path / "latest").read_text() == "now"
    assert jobs.digest_of(tmp_path) == jobs.digest(values)
    with ucp.open(tmp_path) as checkpoint:
        payload = sum(tensor.nbytes for tensor in values.values())
        assert payload <= checkpoint.verify() <= 1.02 * payload + 4096 * world
        assert {f"rank-{k:05d}-of-{world:05d}.safetensors" for k in range(world)} < names(tmp_path / "now")
        state = checkpoint.training_state
        assert state.global_steps == seed
        assert torch.equal(state.client_state["table"], torch.arange(5) + seed)
        assert [own["rank"] for own in state.extra["ranks"]] == list(range(world))
        for rank, own in enumerate(state.extra["ranks"]):
            assert own["rng"].tolist() == [rank, rank + 1, rank + 2]
            assert own["mine"].tolist() == [rank, rank]
        info = checkpoint.parameters["gain"]
        assert (info.scalars, info.aliases, info.kind) == ({"step": seed + 3}, ("tied.gain",), "parameter")
        assert str(checkpoint.layout) == f"dp={world},zero=1"


def test_the_files_are_safetensors_of_what_each_rank_holds(tmp_path: Path) -> None:
    """Read by that format's own library: all ranks' fragments of a tensor are its elements, each once."""
    values, made = sources(2, 3)
    jobs.save(tmp_path, "now", made)
    found: dict[str, list[torch.Tensor]] = {}
    for path in sorted((tmp_path / "now").glob("rank-*.safetensors")):
        for key, tensor in safetensors.torch.load_file(path).items():
            found.setdefault(key, []).append(tensor)
    assert set(found) == {f"{name}:{state}" for (name, state), tensor in values.items() if tensor.numel()}
    for (name, state), tensor in values.items():
        if tensor.numel():
            pieces = torch.cat(found[f"{name}:{state}"])
            assert torch.equal(pieces.sort().values, tensor.reshape(-1).sort().values)


def test_a_checkpoint_can_be_converted(tmp_path: Path) -> None:
    values, made = sources(1, 3)
    jobs.save(tmp_path / "runs", "now", made)
    ucp.convert(tmp_path / "runs", tmp_path / "whole")
    assert jobs.digest_of(tmp_path / "whole") == jobs.digest(values)
    with ucp.open(tmp_path / "whole") as checkpoint:
        assert [own["mine"].tolist() for own in checkpoint.training_state.extra["ranks"]] == [[0, 0], [1, 1], [2, 2]]


def test_without_latest(tmp_path: Path) -> None:
    _, made = sources(0, 1)
    session = commit.begin(tmp_path, "now", 1, latest=False)
    write_share(session, 0, made[0])
    commit.commit(session)
    assert names(tmp_path) == {"now"}


# --- who writes what -------------------------------------------------------------------------------------------------


@st.composite
def _held(draw: st.DrawFn) -> tuple[int, list[tuple[tuple[int, ...], str, tuple[int, ...]]]]:
    world = draw(st.integers(1, 5))
    shape = st.lists(st.integers(0, 9), max_size=3).map(tuple)
    holders = st.sets(st.integers(0, world - 1), min_size=1).map(lambda found: tuple(sorted(found)))
    dtype = st.sampled_from(["float32", "bfloat16", "float64", "uint8"])
    return world, draw(st.lists(st.tuples(shape, dtype, holders), max_size=8))


@settings(max_examples=150, deadline=None)
@given(_held())
def test_what_several_ranks_hold_is_written_once_and_evenly(
    case: tuple[int, list[tuple[tuple[int, ...], str, tuple[int, ...]]]],
) -> None:
    world, tensors = case

    def holdings(rank: int) -> list[Holding]:
        return [
            Holding(
                str(k),
                "param",
                shape,
                dtype,
                torch.empty(0),
                whole(shape) if rank in ranks else empty(len(shape)),
                ranks,
            )
            for k, (shape, dtype, ranks) in enumerate(tensors)
        ]

    assigned = [share.assign(holdings(rank), rank) for rank in range(world)]
    for k, (shape, _, _) in enumerate(tensors):
        parts = [assigned[rank][k].blocks for rank in range(world)]
        together = Blocks(*(np.concatenate([getattr(p, f) for p in parts]) for f in Blocks.__dataclass_fields__))
        assert coverage_fault(shape, together) is None
    for ranks in {ranks for _, _, ranks in tensors}:
        written = [
            sum(share.nbytes_of(assigned[rank][k]) for k, t in enumerate(tensors) if t[2] == ranks) for rank in ranks
        ]
        assert max(written) - min(written) <= 2 * 8  # an element on either side


@settings(max_examples=80, deadline=None)
@given(st.lists(st.integers(0, 3 * 1024), max_size=12), st.data())
def test_bytes_are_written_and_digested_as_they_come(sizes: list[int], data: st.DataObject) -> None:
    scale = data.draw(st.sampled_from([1, 1024, 1500]))
    raw = os.urandom(1 << 20)
    parts = [
        (raw * (1 + n * scale >> 20 or 1))[: n * scale] if n * scale > len(raw) else raw[: n * scale] for n in sizes
    ]
    whole_file = b"".join(parts)
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as folder:
        digests = share.write_file(Path(folder, "f"), [memoryview(p) for p in parts], len(whole_file), Stopwatch())
        assert Path(folder, "f").read_bytes() == whole_file
        assert digests == digest_file(Path(folder, "f"))


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tag", ["", ".", "..", ".hidden", "a/b", "latest", "nul\0"])
def test_tags_that_cannot_be_used(tmp_path: Path, tag: str) -> None:
    with pytest.raises(BadArgument, match="cannot be used"):
        commit.begin(tmp_path, tag, 1)
    assert names(tmp_path) == set()


def test_a_folder_that_is_no_checkpoint_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "now").mkdir()
    (tmp_path / "now/thesis.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for tag in ("now", "file"):
        with pytest.raises(DestinationError, match="exists already"):
            commit.begin(tmp_path, tag, 1)
    assert names(tmp_path) == {"now", "file"}
    assert (tmp_path / "now/thesis.txt").read_text() == "mine"


def saved_before(tmp_path: Path, world: int) -> str:
    values, made = sources(7, world)
    jobs.save(tmp_path, "before", made)
    return jobs.digest(values)


def check_untouched(folder: Path, digest: str) -> None:
    assert jobs.digest_of(folder) == digest
    assert names(folder) == {"before", "latest"}


def wrong(made: list[Source], rank: int, **changes: Any) -> list[Source]:
    return [replace(s, **changes) if k == rank else s for k, s in enumerate(made)]


def altered(holding: Holding, **changes: Any) -> Holding:
    return replace(holding, **changes)


def test_a_rank_that_cannot_save_is_named_at_once(tmp_path: Path) -> None:
    digest = saved_before(tmp_path, 3)
    _, made = sources(1, 3)
    started = time.monotonic()
    ended = jobs.save(tmp_path, "now", wrong(made, 2, own={"socket": object()}), timeout=500)
    assert time.monotonic() - started < 100
    assert ended.code == 3
    assert ended.text.startswith("Unsupported: ")
    assert "rank 2 failed" in ended.text
    check_untouched(tmp_path, digest)


def test_a_rank_that_hangs(tmp_path: Path) -> None:
    digest = saved_before(tmp_path, 3)
    ended = jobs.save(tmp_path, "now", sources(1, 3)[1], hangs=1, timeout=0.5)
    assert ended.text.startswith("SaveFailed: ")
    assert "1 of 3 ranks (1) left no receipt within 0.5 seconds" in ended.text
    check_untouched(tmp_path, digest)


def test_ranks_that_contradict_each_other(tmp_path: Path) -> None:
    digest = saved_before(tmp_path, 2)
    _, made = sources(1, 2)
    infos = dict(made[1].parameters)
    held = made[1].holdings
    gain = next(k for k, h in enumerate(held) if h.name == "gain")
    mine = next(k for k, h in enumerate(held) if h.holders == (1,) and len(h.blocks))
    twice = [altered(h, holders=(1,)) if len(h.holders) > 1 else h for h in held]
    cases = {
        "no rank has the weights of 'extra'": {
            "parameters": infos | {"extra": replace(infos["gain"], name="extra", aliases=())}
        },
        "'embed.weight' is .* on rank 1 and .* on an earlier one": {
            "parameters": infos | {"embed.weight": replace(infos["embed.weight"], kind="frozen")}
        },
        "'embed.weight' has step 1 on rank 1 and 4 on an earlier one": {
            "parameters": infos | {"embed.weight": replace(infos["embed.weight"], scalars={"step": 1})}
        },
        "'gain' .* is float32 on rank 0 and int32 on rank 1": {
            "holdings": [altered(h, dtype="int32") if k == gain else h for k, h in enumerate(held)]
        },
        "elements are missing": {
            "holdings": [altered(h, blocks=empty(len(h.shape))) if k == mine else h for k, h in enumerate(held)]
        },
        "elements are held more than once": {"holdings": twice},
    }
    for text, changes in cases.items():
        ended = jobs.save(tmp_path, "now", wrong(made, 1, **changes))
        assert ended.code == 3, text
        assert ended.text.startswith("SaveFailed: ")
        assert re.search(text, ended.text), ended.text
        check_untouched(tmp_path, digest)


def test_a_receipt_of_another_save(tmp_path: Path) -> None:
    _, made = sources(1, 1)
    one = commit.begin(tmp_path, "one", 1)
    write_share(one, 0, made[0])
    other = commit.begin(tmp_path, "other", 1)
    shutil.copytree(one.temporary, other.temporary, dirs_exist_ok=True)
    with pytest.raises(ucp.errors.SaveFailed, match="not the receipt of rank 0"):
        commit.commit(other)
    assert commit.commit(one) > 0  # and the sweep of the other left it alone
    assert names(tmp_path) == {"one", "latest"}


# --- storage that fails ----------------------------------------------------------------------------------------------


@pytest.fixture
def mounted() -> Iterator[Any]:
    """Mounts small real file systems."""
    folders: list[Path] = []

    def mount(options: str) -> Path:
        folder = Path(tempfile.mkdtemp(prefix="mounted-"))
        command = ["mount", "-t", "tmpfs", "-o", options, "none", str(folder)]
        if not shutil.which("mount") or subprocess.run(command, check=False, capture_output=True).returncode:
            folder.rmdir()
            pytest.skip("mounting a file system is not allowed here")
        folders.append(folder)
        return folder

    yield mount
    for folder in folders:
        subprocess.run(["umount", str(folder)], check=True)
        folder.rmdir()


def test_a_full_disk(mounted: Any) -> None:
    place = mounted("size=4m")
    digest = saved_before(place, 3)
    ended = jobs.save(place, "now", sources(1, 3, small=False)[1], timeout=60)
    assert ended.code == 3
    assert ended.text.startswith("DestinationError: ")
    assert "became full" in ended.text
    check_untouched(place, digest)


def test_a_file_system_that_is_read_only(mounted: Any) -> None:
    place = mounted("size=4m")
    digest = saved_before(place, 2)
    subprocess.run(["mount", "-o", "remount,ro", str(place)], check=True)
    ended = jobs.save(place, "now", sources(1, 2)[1])
    assert ended.text.startswith("DestinationError: ")
    assert "now: cannot be made" in ended.text
    check_untouched(place, digest)


# --- damage and leftovers --------------------------------------------------------------------------------------------


def test_a_flipped_bit_anywhere_is_found(tmp_path: Path) -> None:
    _, made = sources(3, 2)
    jobs.save(tmp_path, "now", made)
    randomly = random.Random(1)
    for path in sorted((tmp_path / "now").iterdir()):
        raw = path.read_bytes()
        for _ in range(12):
            damaged = bytearray(raw)
            damaged[randomly.randrange(len(raw))] ^= 1 << randomly.randrange(8)
            path.write_bytes(damaged)
            with pytest.raises(UcpError), ucp.open(tmp_path / "now") as checkpoint:
                checkpoint.verify()
        path.write_bytes(raw)
    with ucp.open(tmp_path / "now") as checkpoint:
        checkpoint.verify()


def test_a_missing_file_is_found(tmp_path: Path) -> None:
    _, made = sources(3, 2)
    jobs.save(tmp_path, "now", made)
    (tmp_path / "now/rank-00001-of-00002.safetensors").unlink()
    with pytest.raises(DamagedCheckpoint, match="rank-00001"):
        ucp.open(tmp_path / "now")


def test_leftovers(tmp_path: Path) -> None:
    """Those of dead processes here go at once, those of another machine once nobody has written them for long."""
    _, made = sources(3, 1)
    here, elsewhere = atomic.machine_of_process(), "00000000"
    dead = subprocess.Popen(["true"])
    dead.wait()
    kept = tmp_path / f".ucp-tmp-now-{dead.pid}-{elsewhere}01234567"
    gone = [
        tmp_path / f".ucp-tmp-other-tag-{dead.pid}-{here}01234567",
        tmp_path / f".ucp-tmp-now-{os.getpid()}-{here}01234567",
        tmp_path / f".ucp-tmp-now-{dead.pid}-{elsewhere}89abcdef",
    ]
    for folder in (kept, *gone):
        folder.mkdir()
        (folder / "rank-00000-of-00001.safetensors").write_bytes(b"half")
    (tmp_path / f".ucp-tmp-latest-{dead.pid}-{here}01234567").write_text("no")
    old = time.time() - limits.STALE_FOLDER_SECONDS - 60
    os.utime(gone[2] / "rank-00000-of-00001.safetensors", (old, old))
    os.utime(gone[2], (old, old))
    with pytest.raises(NotACheckpoint):
        ucp.open(tmp_path)
    session = commit.begin(tmp_path, "now", 1)
    assert names(tmp_path) == {kept.name, os.path.basename(session.temporary)}
    write_share(session, 0, made[0])
    commit.commit(session)
    assert names(tmp_path) == {kept.name, "now", "latest"}


@pytest.mark.parametrize("what", ["weights", "new states"])
def test_a_load_of_some_kinds_of_tensors_reads_little_else(tmp_path: Path, what: str) -> None:
    """Tensors of one state lie together in a file: chunks are verified whole, and few hold what is not wanted."""

    def training() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
        model = torch.nn.ModuleList(torch.nn.Linear(600, 600) for _ in range(40))
        return model, torch.optim.AdamW(model.parameters())

    model, optimizer = training()
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    ucp.save_training(tmp_path / "run", model=model, optimizer=optimizer)
    fresh, its_optimizer = training()
    if what == "weights":
        report = ucp.load({"model": fresh.state_dict()}, tmp_path / "run")
    else:
        report = ucp.load_training(tmp_path / "run", model=fresh, optimizer=its_optimizer).tensors
        for ours, truth in zip(fresh.parameters(), model.parameters(), strict=True):
            found, wanted = its_optimizer.state[ours], optimizer.state[truth]
            assert found.keys() == wanted.keys()
            assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert all(map(torch.equal, fresh.parameters(), model.parameters()))
    assert report.bytes_read <= 1.1 * report.nbytes
