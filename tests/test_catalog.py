"""The catalog's own checks: coverage, and ranges that exist in the files."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given

from tests import property as p
from ucp.catalog import Catalog, LogicalTensor, ParameterInfo, SourceFile, TrainingState
from ucp.errors import DamagedCheckpoint
from ucp.geometry import Blocks, box, concat, empty, numel, whole
from ucp.parallel.mesh import Layout


def tensor(blocks: Blocks, shape: tuple[int, ...], dtype: str = "float32", base: int = 0) -> LogicalTensor:
    return LogicalTensor("w", "param", shape, dtype, blocks, np.full(len(blocks), base, np.int64))


def catalog(tensors: list[LogicalTensor], sizes: list[int]) -> Catalog:
    return Catalog(
        format="raw",
        writer="numpy",
        layout=Layout(),
        files=tuple(SourceFile(f"/there/{i}.bin", size, 0) for i, size in enumerate(sizes)),
        parameters={},
        tensors={(t.name, t.state): t for t in tensors},
        training_state=TrainingState(),
    )


@given(p.shapes, p.generators)
@p.law(60)
def test_files_that_are_just_long_enough_pass_and_shorter_ones_do_not(shape, rng) -> None:
    blocks, _ = p.partitions(rng, shape)
    base = int(rng.integers(100))
    needed = [0, 0, 0]
    for i, (_, where) in enumerate(p.held(blocks, shape)):
        f = int(blocks.buffers[i])
        needed[f] = max(needed[f], base + (int(where.max()) + 1) * 2)
    held = tensor(blocks, shape, "bfloat16", base)
    catalog([held], needed).check()
    f = int(blocks.buffers[0])
    needed[f] -= 1
    with pytest.raises(DamagedCheckpoint, match=rf"/there/{f}\.bin: 'w' \(param\) needs bytes up to .*truncated"):
        catalog([held], needed).check()


def test_holes_and_overlaps_name_the_tensor() -> None:
    with pytest.raises(DamagedCheckpoint, match=r"'w' \(param, shape \[4, 3\]\): 3 of 12 elements are missing"):
        catalog([tensor(box((0, 0), (3, 3)), (4, 3))], [48]).check()
    with pytest.raises(DamagedCheckpoint, match="6 elements are held more than once"):
        catalog([tensor(concat([whole((4, 3)), box((1, 0), (2, 3))], 2), (4, 3))], [48]).check()
    with pytest.raises(DamagedCheckpoint, match="outside"):
        catalog([tensor(box((1, 0), (4, 3)), (4, 3))], [48]).check()


def test_a_range_before_the_file_begins_is_damaged() -> None:
    for start, base in [(-1, 0), (-3, 4), (-2, 4), (0, -1)]:
        with pytest.raises(DamagedCheckpoint, match="before"):
            catalog([tensor(whole((4,), start), (4,), base=base)], [100]).check()
    catalog([tensor(whole((4,), -1), (4,), base=4)], [16]).check()


def test_strides_that_walk_out_of_the_file_are_damaged() -> None:
    top = np.iinfo(np.int64).max
    for strides in [(-3, 1), (1, -4), (top, 1), (top // 3 + 1, 1), (1 << 62, 1 << 62), (-top, top)]:
        with pytest.raises(DamagedCheckpoint, match=r"0\.bin"):
            catalog([tensor(box((0, 0), (4, 3), 0, strides), (4, 3))], [48]).check()
    with pytest.raises(DamagedCheckpoint, match=r"0\.bin"):
        catalog([tensor(whole((4, 3), top), (4, 3))], [48]).check()
    with pytest.raises(DamagedCheckpoint, match=r"0\.bin"):
        catalog([tensor(whole((4, 3)), (4, 3), base=top)], [48]).check()


def test_a_fragment_in_a_file_that_is_not_there_is_damaged() -> None:
    for file in (-1, 2):
        with pytest.raises(DamagedCheckpoint, match=f"'w' .param. lies in file {file}, and there are 2"):
            catalog([tensor(whole((4,), 0, file), (4,))], [16, 16]).check()


def test_tensors_without_elements_need_no_file() -> None:
    catalog([tensor(empty(2), (0, 3))], []).check()


def test_a_scalar_is_one_element() -> None:
    catalog([tensor(whole((), 2), (), "float64", 5)], [29]).check()
    with pytest.raises(DamagedCheckpoint):
        catalog([tensor(whole((), 2), (), "float64", 5)], [28]).check()


@pytest.mark.parametrize(("dtype", "width"), [("bfloat16", 2), ("bool", 1), ("float64", 8)])
def test_nbytes(dtype: str, width: int) -> None:
    assert tensor(whole((5, 7)), (5, 7), dtype).nbytes == 35 * width
    assert tensor(whole(()), (), dtype).nbytes == width
    assert numel((5, 7)) == 35


def test_an_alias_resolves_to_its_owner() -> None:
    held = dataclasses.replace(
        catalog([], []),
        parameters={
            "embed": ParameterInfo("embed", (4,), {"param": "float32"}, aliases=("head", "tail")),
            "norm": ParameterInfo("norm", (4,), {"param": "float32"}),
        },
    )
    assert [held.resolve(n) for n in ("embed", "head", "tail", "norm")] == ["embed", "embed", "embed", "norm"]
    with pytest.raises(KeyError, match="nobody"):
        held.resolve("nobody")
