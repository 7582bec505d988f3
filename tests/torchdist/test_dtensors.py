"""A DTensor's placements as blocks, against the shards that torch itself cuts: all ranks of a mesh in one process."""

from __future__ import annotations

import gc
import inspect
import weakref
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.distributed.tensor import DeviceMesh, DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from ucp.errors import Unsupported
from ucp.geometry import Blocks, numel
from ucp.parallel.placements import product
from ucp.torchdist.dtensors import blocks_of, holders_of, layout_of, mesh_shape, shard_ranges


def gathered(whole: torch.Tensor, blocks: Blocks, sizes: list[int]) -> torch.Tensor:
    """The shard that blocks describe, cut out of the whole tensor by plain indexing."""
    out = torch.full((numel(sizes),), -1, dtype=whole.dtype)
    for k in range(len(blocks)):
        box = tuple(slice(o, o + n) for o, n in zip(blocks.offsets[k], blocks.sizes[k], strict=True))
        view = out.as_strided(tuple(blocks.sizes[k].tolist()), tuple(blocks.strides[k].tolist()), int(blocks.starts[k]))
        view.copy_(whole[box])
    return out.reshape(sizes)


def cut_by_torch(whole: torch.Tensor, placements: list[object], mesh: list[int], coordinate: list[int]) -> torch.Tensor:
    """The shard at a coordinate of the mesh, by the placements' own splitting, one mesh dimension after the other."""
    part = whole
    for placement, count, index in zip(placements, mesh, coordinate, strict=True):
        if isinstance(placement, Shard | _StridedShard):
            try:
                part = placement._split_tensor(part, count, with_padding=False, contiguous=True)[0][index]
            except AssertionError as error:
                assume("only allows even sharding" not in str(error))  # torch 2.6's _StridedShard
                raise
    return part


@st.composite
def placed(draw: st.DrawFn) -> tuple[list[int], list[object], list[int], list[int]]:
    shape = draw(st.lists(st.integers(0, 11), min_size=1, max_size=3))
    mesh = draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))
    axes = st.integers(0, len(shape) - 1)
    kinds = st.one_of(
        st.just(Replicate()),
        axes.map(Shard),
        st.tuples(axes, st.integers(1, 4)).map(lambda t: _StridedShard(t[0], split_factor=t[1])),
    )
    placements = [draw(kinds) for _ in mesh]
    coordinate = [draw(st.integers(0, n - 1)) for n in mesh]
    return shape, placements, mesh, coordinate


@settings(deadline=None, max_examples=150)
@given(placed())
def test_blocks_are_the_shards_that_torch_cuts(case: tuple[list[int], list[object], list[int], list[int]]) -> None:
    shape, placements, mesh, coordinate = case
    for k, placement in enumerate(placements):  # FSDP2's, see below
        if isinstance(placement, _StridedShard):
            later = [n for p, n in zip(placements[k + 1 :], mesh[k + 1 :], strict=True) if not isinstance(p, Replicate)]
            assume(placement.split_factor not in (1, *later, numel(later)))
    whole = torch.arange(numel(shape)).reshape(shape)
    truth = cut_by_torch(whole, placements, mesh, coordinate)
    ranges = shard_ranges("w", shape, placements, mesh, coordinate)
    sizes = [sum(n for _, n in along) for along in ranges]
    assert sizes == list(truth.shape)
    assert torch.equal(gathered(whole, product(ranges), sizes), truth)


@settings(deadline=None, max_examples=80)
@given(st.integers(0, 40), st.integers(1, 6), st.integers(1, 6))
def test_fsdp_over_tensor_parallelism_is_a_strided_shard(length: int, dp: int, tp: int) -> None:
    """FSDP2 cuts what tensor parallelism has left, uneven lengths included; its placements go from left to right."""
    assume(tp > 1)
    whole = torch.arange(length)
    for d in range(dp):
        for t in range(tp):
            theirs = Shard(0)._split_tensor(whole, tp, with_padding=False)[0][t]
            theirs = Shard(0)._split_tensor(theirs, dp, with_padding=False)[0][d]
            ranges = shard_ranges("w", [length], [_StridedShard(0, split_factor=tp), Shard(0)], [dp, tp], [d, t])
            assert torch.equal(gathered(whole, product(ranges), [sum(n for _, n in ranges[0])]), theirs)


@pytest.fixture(scope="module")
def mesh() -> Iterator[DeviceMesh]:
    """A mesh of one rank, without communication."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=1, world_size=6)
    yield DeviceMesh("cpu", torch.arange(6).reshape(2, 3), mesh_dim_names=("dp", "tp"))
    dist.destroy_process_group()


@pytest.mark.parametrize("placements", [(Shard(0), Shard(1)), (Replicate(), Shard(0)), (Shard(-1), Replicate())])
def test_real_dtensors(mesh: DeviceMesh, placements: tuple[object, object]) -> None:
    whole = torch.arange(7 * 5).reshape(7, 5)
    normal = [Shard(p.dim % 2) if isinstance(p, Shard) else p for p in placements]
    local = cut_by_torch(whole, normal, [2, 3], list(mesh.get_coordinate() or ()))
    tensor = DTensor.from_local(local, mesh, placements, run_check=False, shape=whole.shape, stride=whole.stride())
    assert torch.equal(gathered(whole, blocks_of("w", tensor), list(local.shape)), local)


@pytest.mark.parametrize(
    ("placements", "ranks"),
    [
        ((Shard(0), Shard(1)), (1,)),
        ((Replicate(), Shard(0)), (1, 4)),
        ((Shard(-1), Replicate()), (0, 1, 2)),
        ((Replicate(), Replicate()), (0, 1, 2, 3, 4, 5)),
    ],
)
def test_who_holds_the_same(mesh: DeviceMesh, placements: tuple[object, object], ranks: tuple[int, ...]) -> None:
    tensor = DTensor.from_local(torch.zeros(2, 2), mesh, placements, run_check=False)
    assert holders_of(tensor, 6) == ranks
    assert holders_of(torch.zeros(2), 3) == (0, 1, 2)


def test_the_layout_that_meshes_tell(mesh: DeviceMesh) -> None:
    cut = [DTensor.from_local(torch.zeros(2), mesh, [Replicate(), Shard(0)], run_check=False)]
    whole = [DTensor.from_local(torch.zeros(2), mesh, [Shard(0), Replicate()], run_check=False)]
    assert str(layout_of(["no tensor", torch.zeros(1), *cut], 6)) == "dp=2,tp=3,zero=0"
    assert str(layout_of(whole, 6)) == "dp=2,tp=3,zero=3"
    assert str(layout_of([torch.zeros(1)], 4)) == "dp=4,zero=0"


def test_refusals(mesh: DeviceMesh) -> None:
    local = torch.zeros(2, 5)
    partial = DTensor.from_local(local, mesh, [Replicate(), Partial()], run_check=False)
    with pytest.raises(Unsupported, match=r"'w' is placed as Partial\("):
        blocks_of("w", partial)
    odd = DTensor.from_local(local, mesh, [Shard(0), Replicate()], run_check=False, shape=(7, 5), stride=(5, 1))
    with pytest.raises(Unsupported, match=r"'w' \[7, 5\].*shape \[2, 5\].*mean \[4, 5\]"):
        blocks_of("w", odd)


def test_a_mesh_is_not_kept_when_the_program_drops_it() -> None:
    options = {"_rank": 0} if "_rank" in inspect.signature(DeviceMesh.__init__).parameters else {}  # not in torch 2.6
    mesh = DeviceMesh("cpu", [[0, 1, 2], [3, 4, 5]], _init_backend=False, **options)
    assert mesh_shape(mesh) == mesh_shape(mesh) == (2, 3)
    gone = weakref.ref(mesh)
    del mesh
    gc.collect()
    assert gone() is None
