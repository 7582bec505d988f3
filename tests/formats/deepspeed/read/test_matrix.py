"""The whole matrix, in one process: every source (stage, dtype, dp), read from its files, against what its engine held.

Two proofs. Read by ``ucp.open``, everything a checkpoint holds is what the source engine's own flat buffers held when
it saved, to the bit. And for every target (stage, dp) the partition of every rank, which the test makes of the truth by
flattening, padding and chunking with torch, equals what this project's copy engine gathers from the source's files into
the places that its geometry gives to that rank's elements.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import ucp
from tests.engines import releases
from tests.engines.configs import Case
from tests.engines.runs import CLIENT_STATE
from tests.engines.sources import Sources
from tests.engines.truth import Truth, known
from ucp.checkpoint import Checkpoint
from ucp.geometry import Blocks
from ucp.parallel.zero import ceil_partition, ceil_size, flat_offsets, flat_partition, partition_size
from ucp.storage.files import Files
from ucp.transfer.gather import Want, gather
from ucp.transfer.reader import Reader

pytestmark = pytest.mark.slow

# Every stage, dtype and dp; the options that change how files are laid out are spread over them.
MATRIX = [
    *(
        Case(stage=stage, dtype=dtype, dp=dp, groups=1 + (stage + dp) % 3, frozen=dp % 2 == 0, scheduler=dp == 3)
        for stage in range(4)
        for dtype in ("fp32", "bf16", "fp16")
        for dp in (1, 2, 3, 4)
    ),
    *(Case(dtype="bf16_optimizer", dp=dp, groups=2) for dp in (1, 2, 3, 4)),
]
OPTIONS = [
    Case(stage=1, dp=4, groups=4),
    Case(stage=2, dp=3, groups=4, dtype="bf16", round_robin=True),
    Case(stage=3, dp=4, groups=4),
    Case(stage=3, dp=2, sub_group_size=150, groups=3, dtype="bf16"),
    Case(stage=3, dp=4, sub_group_size=40, groups=3),
    Case(stage=2, dp=3, round_robin=True, groups=2, dtype="bf16"),
    Case(stage=1, dp=4, round_robin=True),
    Case(stage=1, dp=3, parameter_alignment=True, groups=2),
    Case(stage=2, dp=4, parameter_alignment=True, round_robin=True, dtype="bf16"),
    Case(stage=1, dp=3, elastic=True),
    Case(stage=2, dp=2, elastic=True, dtype="bf16"),
    Case(stage=0, dp=2, legacy_files=True, dtype="bf16"),
    Case(stage=1, dp=2, legacy_files=True),
    Case(stage=3, dp=3, legacy_files=True, frozen=True),
    Case(stage=2, dp=2, dtype="bf16", low_masters=True, low_states=True),
    Case(stage=0, dp=2, tied=True, dtype="bf16"),
    Case(stage=1, dp=3, tied=True, groups=2),
    Case(stage=3, dp=2, tied=True),
    Case(stage=1, dp=2, wrapped=True),
    Case(stage=3, dp=4, dtype="bf16", zero_init=True, persistence=50),
    Case(stage=2, dp=2, dtype="fp16", scale_power=30),
    Case(stage=3, dp=2, offload=True, offload_parameters=True),
    Case(stage=1, dp=3, optimizer="sgd", groups=2),
    Case(stage=0, dp=1, optimizer="plain_sgd"),
    Case(stage=3, dp=2, optimizer="rmsprop"),
    Case(stage=2, dp=4, optimizer="lion_reference"),
    Case(stage=0, dp=2, optimizer="nadam", dtype="bf16"),
    Case(stage=2, dp=2, optimizer="adagrad"),
    Case(stage=2, dp=3, optimizer="muon", dtype="bf16"),
    Case(stage=1, dp=4, optimizer="muon"),
    Case(stage=3, dp=3, optimizer="muon", dtype="bf16"),
    Case(stage=3, dp=3, model="llama", tied=True, dtype="bf16"),
]
TARGETS = [(stage, dp) for stage in range(4) for dp in (1, 2, 3, 4, 5, 7)]


def same(a: Tensor, b: Tensor) -> bool:
    """Equal to the bit, element types included."""
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(bits(a), bits(b))


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def tensors(truth: Truth) -> Iterator[tuple[str, str, Tensor]]:
    for name, states in truth.params.items():
        for state, tensor in states.items():
            yield name, state, tensor
    for kind in (truth.frozen, truth.buffers):
        for name, tensor in kind.items():
            yield name, "param", tensor


def param_names(case: Case, truth: Truth) -> list[list[str]] | None:
    """A stage-0 file does not name its parameters; where groups share shapes, the live engine's names decide."""
    return [list(g["names"]) for g in truth.groups] if case.stage == 0 else None


def open_source(case: Case, sources: Sources) -> tuple[Checkpoint, Truth]:
    run = sources.get(case)
    truth = known(run.truth)
    return ucp.checkpoint.open(run.folder, tag=run.tag, param_names=param_names(case, truth)), truth


def layout_of(case: Case) -> str:
    """As the files have it: releases before 0.17.6 take BF16_Optimizer at stage 0 in bf16, which is ZeRO-1."""
    partitioned = case.stage == 0 and case.dtype == "bf16" and not releases.knows("DDP_BFLOAT16")
    return f"dp={case.dp},zero={1 if partitioned else case.stage}"


@pytest.mark.parametrize("case", [*MATRIX, *OPTIONS], ids=lambda case: case.label)
def test_everything_read_is_what_the_engine_held(sources: Sources, case: Case) -> None:
    checkpoint, truth = open_source(case, sources)
    with checkpoint:
        assert checkpoint.format == "deepspeed"
        assert str(checkpoint.layout) == layout_of(case)
        check_tensors(checkpoint, truth)
        check_regions(checkpoint, truth)
        check_parameters(checkpoint, truth)
        check_training_state(checkpoint, truth, case)


def check_tensors(checkpoint: Checkpoint, truth: Truth) -> None:
    expected = {(name, state) for name, state, _ in tensors(truth)}
    assert {(name, state) for name, info in checkpoint.parameters.items() for state in info.states} == expected
    for name, state, tensor in tensors(truth):
        assert same(checkpoint.read(name, state), tensor), (name, state)
    for alias, owner in truth.aliases.items():
        assert same(checkpoint.read(alias), truth.params[owner]["param"])


def check_regions(checkpoint: Checkpoint, truth: Truth) -> None:
    choose = random.Random(0)
    for name, state, tensor in tensors(truth):
        for _ in range(3):
            region = []
            for n in tensor.shape[: choose.randint(0, tensor.dim())]:
                first = choose.randint(0, n)
                region.append(slice(first, choose.randint(first, n)))
            assert same(checkpoint.read(name, state, tuple(region)), tensor[tuple(region)].clone()), (
                name,
                state,
                region,
            )


def check_parameters(checkpoint: Checkpoint, truth: Truth) -> None:
    kinds = {**dict.fromkeys(truth.params, "parameter"), **dict.fromkeys(truth.frozen, "frozen")}
    kinds |= dict.fromkeys(truth.buffers, "buffer")
    kinds |= {name: "padding" for name in truth.params if name.endswith("[padding]")}
    assert {name: info.kind for name, info in checkpoint.parameters.items()} == kinds
    owned: dict[str, set[str]] = {}
    for alias, owner in truth.aliases.items():
        owned.setdefault(owner, set()).add(alias)
    for name, info in checkpoint.parameters.items():
        assert set(info.aliases) == owned.get(name, set())
        values = {k: float(v) for k, v in truth.scalars.get(name, {}).items()}
        assert {k: float(v) for k, v in info.scalars.items()} == values


def check_training_state(checkpoint: Checkpoint, truth: Truth, case: Case) -> None:
    state = checkpoint.training_state
    for counter, value in truth.counters.items():
        assert getattr(state, counter) == value
    assert state.dp_world_size == case.dp
    assert state.global_batch_size == 12 * case.accumulation
    assert dict(state.client_state) == CLIENT_STATE
    assert state.lr_scheduler == truth.lr_scheduler
    check_groups(checkpoint, truth, case)
    if truth.loss_scaler is not None and case.dtype == "fp16":
        assert state.loss_scaler is not None
        for key in ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis"):
            if key in truth.loss_scaler and key in state.loss_scaler:
                assert state.loss_scaler[key] == truth.loss_scaler[key]
        assert "cur_scale" in state.loss_scaler


def check_groups(checkpoint: Checkpoint, truth: Truth, case: Case) -> None:
    groups = checkpoint.training_state.param_groups
    assert [sorted(g.names) for g in groups] == [sorted(g["names"]) for g in truth.groups]
    for group, expected in zip(groups, truth.groups, strict=True):
        if case.elastic:  # DeepSpeed does not write them
            assert group.options is None
            continue
        assert group.options is not None
        # Names are written beside the options; a missing step is kept with the parameters.
        for key, value in expected.items():
            if key not in ("names", "param_names", "step"):
                assert plain(group.options[key]) == plain(value), key


def plain(value: object) -> object:
    return value.tolist() if isinstance(value, Tensor) else list(value) if isinstance(value, tuple) else value


def flat_partitions(values: Mapping[str, Tensor], dp: int) -> list[Tensor]:
    """Stages 1 and 2, in prose: end to end, zeros up to a multiple of 2 * dp, cut into dp equal parts."""
    flat = torch.cat([tensor.reshape(-1) for tensor in values.values()])
    padded = torch.nn.functional.pad(flat, (0, -flat.numel() % (2 * dp)))
    return list(padded.chunk(dp))


def ceil_pieces(values: Mapping[str, Tensor], dp: int) -> list[Tensor]:
    """Stage 3, in prose: every parameter for itself, zeros up to a multiple of dp, cut into dp equal parts."""
    cut = []
    for tensor in values.values():
        flat = tensor.reshape(-1)
        cut.append(torch.nn.functional.pad(flat, (0, -flat.numel() % dp)).reshape(dp, -1))
    return [torch.cat([piece[rank] for piece in cut]) for rank in range(dp)]


def held_blocks(shapes: Mapping[str, tuple[int, ...]], stage: int, dp: int) -> tuple[dict[str, Blocks], int]:
    """By this project's geometry: where each rank's elements of each parameter lie, and a partition's length."""
    counts = [int(np.prod(shape, dtype=np.int64)) for shape in shapes.values()]
    if stage == 3:
        offsets, length = flat_offsets([ceil_size(n, dp) for n in counts])
        return {n: ceil_partition(s, at, dp) for (n, s), at in zip(shapes.items(), offsets, strict=True)}, length
    offsets, total = flat_offsets(counts)
    length = partition_size(total, dp)
    return {n: flat_partition(s, at, length) for (n, s), at in zip(shapes.items(), offsets, strict=True)}, length


@pytest.mark.parametrize("case", MATRIX, ids=lambda case: case.label)
def test_every_target_rank_gets_its_partition(sources: Sources, case: Case) -> None:
    checkpoint, truth = open_source(case, sources)
    states = sorted(set.union(*(set(s) for s in truth.params.values())))
    names = list(truth.params)
    random.Random(case.label).shuffle(names)  # the target's flat order is its own
    with checkpoint, Files() as files:
        reader = Reader(checkpoint.catalog, files)
        for stage, dp in TARGETS:
            ranks = range(dp if stage else 1)
            shapes = {n: tuple(truth.params[n]["param"].shape) for n in names}
            places, length = held_blocks(shapes, stage, dp if stage else 1)
            buffers: list[np.ndarray] = []
            wants = []
            for state in states:
                for name in names:
                    blocks = places[name]
                    moved = Blocks(
                        blocks.offsets, blocks.sizes, blocks.starts, blocks.strides, blocks.buffers + len(buffers)
                    )
                    wants.append(Want(checkpoint.catalog.tensors[name, state], moved, "float32"))
                buffers += [np.zeros(length * 4, np.uint8) for _ in ranks]
            gather(reader, wants, buffers)
            for k, state in enumerate(states):
                values = {n: truth.params[n][state].float() for n in names}
                if stage == 0:
                    expected = flat_partitions(values, 1)
                elif stage == 3:
                    expected = ceil_pieces(values, dp)
                else:
                    expected = flat_partitions(values, dp)
                for rank in ranks:
                    found = torch.from_numpy(buffers[k * len(ranks) + rank]).view(torch.float32)
                    assert same(found, expected[rank]), (stage, dp, state, rank)


@pytest.mark.parametrize("case", [Case(stage=1, dp=2), Case(stage=3, dp=3), Case(stage=0, dp=2)], ids=lambda c: c.label)
def test_reading_one_row_reads_about_that_row(sources: Sources, case: Case) -> None:
    checkpoint, truth = open_source(case, sources)
    with checkpoint:
        before = checkpoint.bytes_read
        row = checkpoint.read("middle.weight", "exp_avg", (slice(20, 21),))
        assert same(row, truth.params["middle.weight"]["exp_avg"][20:21].clone())
        assert checkpoint.bytes_read - before == 53 * 4
        before = checkpoint.bytes_read
        column = checkpoint.read("middle.weight", "param", (slice(None), slice(3, 5)))
        assert same(column, truth.params["middle.weight"]["param"][:, 3:5].clone())
        assert checkpoint.bytes_read - before <= 37 * 53 * 4


def test_opening_reads_no_tensor(sources: Sources) -> None:
    """Pickles and zip directories only: a small part of the files, and of large files next to nothing."""
    run = sources.get(Case(stage=1, dp=2, model="llama"))
    size = sum(p.stat().st_size for p in (Path(run.folder) / run.tag).iterdir())
    with ucp.open(run.folder, tag=run.tag) as checkpoint:
        assert checkpoint.bytes_read < size / 20


def test_latest_and_folders(sources: Sources) -> None:
    run = sources.get(Case(stage=1, dp=2))
    for path, tag in ((run.folder, None), (Path(run.folder) / run.tag, None), (run.folder, run.tag)):
        with ucp.open(path, tag=tag) as checkpoint:
            assert checkpoint.path == Path(run.folder) / run.tag
