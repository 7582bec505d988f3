"""Parts of reading Megatron's folders that need no Megatron: keys, stacked and flattened tensors, the older layout."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ucp.catalog import LogicalTensor
from ucp.errors import DamagedCheckpoint
from ucp.formats.megatron import keys
from ucp.formats.megatron.read import buckets, flattened, layout
from ucp.formats.megatron.read.unstack import joined, unstacked
from ucp.geometry import Blocks, numel, whole


def _read(tensor: LogicalTensor, buffers: list[np.ndarray]) -> np.ndarray:
    """The tensor by its blocks, element by element; bases count elements here."""
    out = np.full(tensor.shape, -1)
    b = tensor.blocks
    for k in range(len(b)):
        for at in np.ndindex(*b.sizes[k]):
            place = int(tensor.bases[k] + b.starts[k] + np.dot(at, b.strides[k]))
            out[tuple(b.offsets[k] + at)] = buffers[int(b.buffers[k])][place]
    return out


@pytest.mark.parametrize(
    ("key", "state", "name"),
    [
        ("embedding.word_embeddings.weight", "weight", "embedding.word_embeddings.weight"),
        ("decoder.layers.3.mlp.linear_fc2.weight", "weight", "decoder.layers.3.mlp.linear_fc2.weight"),
        ("decoder.layers.mlp.linear_fc2.weight", "weight", "decoder.layers.5.mlp.linear_fc2.weight"),
        ("optimizer.state.fp32_param.output_layer.weight", "param", "output_layer.weight"),
        ("chained_1.optimizer.state.exp_avg.output_layer.weight", "exp_avg", "output_layer.weight"),
        (
            "optimizer.state.exp_avg_sq.decoder.layers.mlp.experts.experts.linear_fc1.weight",
            "exp_avg_sq",
            "decoder.layers.5.mlp.experts.local_experts.6.linear_fc1.weight",
        ),
        (
            "decoder.layers.2.mlp.experts.experts.7.linear_fc1.weight",
            "weight",
            "decoder.layers.2.mlp.experts.local_experts.7.linear_fc1.weight",
        ),
    ],
)
def test_keys(key: str, state: str, name: str) -> None:
    parsed = keys.parse(key)
    stack = keys.stack(parsed.model)
    assert parsed.state == state
    assert stack.name(*(5, 6)[: len(stack.axes)]) == name


def test_prefixes_of_wrappers() -> None:
    assert keys.without_prefix(["module.a", "module.b"]) == "module."
    assert keys.without_prefix(["module.model.a", "module.model.b"]) == "module.model."
    assert keys.without_prefix(["module.a", "b"]) == ""
    assert keys.without_prefix([]) == ""


def test_stacked_tensors_come_apart() -> None:
    """Of chunks of one layer each, and of one chunk that has them all."""
    values = np.arange(3 * 2 * 4).reshape(3, 2, 4)
    one = LogicalTensor("decoder.layers.x", "", values.shape, "float32", whole(values.shape), np.zeros(1, np.int64))
    stack = keys.stack("decoder.layers.x")
    for k, layer in enumerate(unstacked(one, stack, "param")):
        assert layer.name == f"decoder.layers.{k}.x"
        assert np.array_equal(_read(layer, [values.reshape(-1)]), values[k])
    missing = LogicalTensor(one.name, "", (4, 2, 4), "float32", one.blocks, one.bases)
    with pytest.raises(DamagedCheckpoint, match="should hold 4 layers, and there are chunks of 3"):
        list(unstacked(missing, stack, "param"))
    huge = LogicalTensor(one.name, "", (2**40, 0), "float32", whole((2, 0)), np.zeros(0, np.int64))
    with pytest.raises(DamagedCheckpoint, match="should hold"):
        list(unstacked(huge, stack, "param"))


def test_parts_are_joined() -> None:
    gate, up = np.arange(6).reshape(3, 2), np.arange(6, 10).reshape(2, 2)
    parts = [
        LogicalTensor(f"fc1_{k}", "weight", v.shape, "float32", whole(v.shape, 0, k), np.zeros(1, np.int64))
        for k, v in enumerate((gate, up))
    ]
    assert keys.parts(["fc1_w", "fc1_v", "other_w"]) == {"fc1": ("fc1_w", "fc1_v")}
    found = _read(joined("fc1", 0, parts), [gate.reshape(-1), up.reshape(-1)])
    assert np.array_equal(found, np.concatenate([gate, up]))


@pytest.mark.parametrize(("shape", "grid"), [((4, 6), (2, 3)), ((3, 4, 2), (3, 2, 1)), ((6,), (2,))])
def test_flattened_ranges_get_their_shape_back(shape: tuple[int, ...], grid: tuple[int, ...]) -> None:
    """Against numpy: each shard's elements in a row, cut anywhere by data-parallel ranks."""
    values = np.arange(numel(shape)).reshape(shape)
    local = tuple(s // g for s, g in zip(shape, grid, strict=True))
    buffers, offsets, sizes = [], [], []
    for at in np.ndindex(*grid):
        shard = values[tuple(slice(a * n, (a + 1) * n) for a, n in zip(at, local, strict=True))].reshape(-1)
        for first, last in ((0, 1), (1, len(shard))):
            buffers.append(shard[first:last])
            offsets.append((*at, first))
            sizes.append((*[1] * len(grid), last - first))
    count = len(buffers)
    blocks = Blocks(
        np.array(offsets),
        np.array(sizes),
        np.zeros(count, np.int64),
        np.ones((count, len(grid) + 1), np.int64),
        np.arange(count),
    )
    saved = LogicalTensor("w", "", (*grid, numel(local)), "float32", blocks, np.zeros(count, np.int64))
    others = {"mcore_data": {"w": {"nd_reformulated_orig_global_shape": shape}}}
    assert np.array_equal(_read(flattened.as_they_were({"w": saved}, others)["w"], buffers), values)
    wrong = {"mcore_data": {"w": {"nd_reformulated_orig_global_shape": (shape[0] + 1, *shape[1:])}}}
    with pytest.raises(DamagedCheckpoint, match="which are no shards of its shape"):
        flattened.as_they_were({"w": saved}, wrong)


@pytest.mark.parametrize(
    ("ranks", "pp", "dp"),
    [((0, 0), 1, 1), ((0, 1), 2, 1), ((0, 2), 2, 2), ((1, 3), 2, 2), ((0, 4_000_000_000), 2, 2_000_000_001)],
)
def test_stages_are_those_of_the_ranks_that_wrote(ranks: tuple[int, ...], pp: int, dp: int) -> None:
    """Ranks that wrote nothing are counted; a number out of a hostile name ends the search at once."""
    name = "decoder.layers.mlp.linear_fc2.weight"
    blocks = Blocks(
        np.array([(0, 0, 0), (1, 0, 0)]),
        np.array([(1, 2, 2)] * 2),
        np.zeros(2, np.int64),
        np.array([(4, 2, 1)] * 2),
        np.arange(2),
    )
    stored = {name: LogicalTensor(name, "", (2, 2, 2), "float32", blocks, np.zeros(2, np.int64))}
    paths = [f"x/__{rank}_0.distcp" for rank in ranks]
    found = layout.of(Path("x"), {}, {}, stored, paths).layout
    assert (found.pp, found.tp) == (pp, 1)
    assert found.dp == dp


def test_virtual_stages_are_rows_of_layers() -> None:
    """Of a rank that has the layers 2, 3, 6 and 7, and the end of the model."""
    names = [f"decoder.layers.{k}.mlp.linear_fc2.weight" for k in (2, 3, 6, 7)] + ["output_layer.weight"]
    assert list(buckets.virtual_stages(names, 2).values()) == [0, 0, 1, 1, 1]
    assert list(buckets.virtual_stages(["embedding.word_embeddings.weight", *names], 1).values()) == [0] * 6
    with pytest.raises(Exception, match="3 buffers of one type, and 2 rows of layers"):
        buckets.virtual_stages(names, 3)
