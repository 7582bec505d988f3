"""What `scripts/bench plan` plans is right: at a size that plain numpy can cut by hand, and in time at its own."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ucp.geometry import runs
from ucp.parallel.mesh import Layout, parse_layout

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"
SMALL = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 32,
}
ROWS = ("embed_tokens", "q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "lm_head")
COLUMNS = ("o_proj", "down_proj")


@pytest.fixture(scope="module")
def bench() -> Any:
    sys.path.insert(0, str(SCRIPTS))
    try:
        return importlib.import_module("bench_plan")
    finally:
        sys.path.remove(str(SCRIPTS))


def ranks_of(arrays: dict[str, np.ndarray], layers: int, layout: Layout) -> dict[int, np.ndarray]:
    """Every rank's partition, cut by hand: rows or columns for tp, layers for pp, then ZeRO's rule. Padding is -1."""
    out = {}
    for stage in range(layout.pp):
        names = []
        for name in arrays:
            part = name.split(".")
            of = int(part[2]) * layout.pp // layers if "layers" in part else 0 if "embed" in name else layout.pp - 1
            if of == stage:
                names.append(name)
        for tp in range(layout.tp):
            local = []
            for name in names:
                axis = 0 if any(key in name for key in ROWS) else 1 if any(key in name for key in COLUMNS) else None
                array = arrays[name]
                local.append((array if axis is None else np.split(array, layout.tp, axis)[tp]).reshape(-1))
            for dp in range(layout.dp):
                if layout.zero == 3:
                    pieces = []
                    for flat in local:
                        n = -(-len(flat) // layout.dp)
                        piece = np.full(n, -1)
                        held = flat[dp * n : (dp + 1) * n]
                        piece[: len(held)] = held
                        pieces.append(piece)
                    partition = np.concatenate(pieces)
                else:
                    joined = np.concatenate(local)
                    size = -(-len(joined) // (2 * layout.dp)) * 2
                    partition = np.full(size, -1)
                    held = joined[dp * size : (dp + 1) * size]
                    partition[: len(held)] = held
                out[(stage * layout.dp + dp) * layout.tp + tp] = partition
    return out


@pytest.mark.parametrize(
    ("source", "target"),
    [
        ("dp=3,tp=2,pp=2,zero=1", "dp=5,tp=1,zero=3"),
        ("dp=2,tp=2,pp=4,zero=1", "dp=7,tp=2,zero=3"),
        ("dp=1,tp=1,pp=1,zero=1", "dp=3,tp=2,zero=3"),
    ],
)
def test_the_plan_moves_every_element_to_its_place(bench: Any, source: str, target: str) -> None:
    model = bench.model(SMALL)
    names = [name for name, _, _ in model.parameters]
    assert len(names) == 4 * 9 + 3
    arrays, at = {}, 0
    for name, expression, _ in model.parameters:
        shape = bench.shape_of(expression, model.bound.sizes)
        arrays[name] = np.arange(at, at + np.prod(shape)).reshape(shape)
        at += arrays[name].size
    here, there = parse_layout(source), parse_layout(target)
    held, wanted = ranks_of(arrays, 4, here), ranks_of(arrays, 4, there)
    found = {rank: np.full_like(partition, -1) for rank, partition in wanted.items()}
    cuts, goals = bench.Cuts(model, here), bench.Cuts(model, there)
    for name, expression, layer in model.parameters:
        source_blocks = cuts.blocks(name, expression, layer, copies=False)
        target_blocks = goals.blocks(name, expression, layer, copies=True)
        copies = bench.copies_of(source_blocks, target_blocks)
        for which, start, to, length in zip(*(column.tolist() for column in runs(copies)), strict=True):
            a = int(source_blocks.buffers[copies.source[which]])
            b = int(target_blocks.buffers[copies.target[which]])
            found[b][to : to + length] = held[a][start : start + length]
    for rank, partition in wanted.items():
        np.testing.assert_array_equal(found[rank], partition)
    counts = bench.plan_job(model, here, there)
    assert counts["elements a rank"][0] <= counts["elements a rank"][1] <= max(map(len, wanted.values()))
    total = sum(int((partition >= 0).sum()) for partition in wanted.values())
    one = sum(bench.plan_rank(model, here, there, rank)["copies"] for rank in range(there.world_size))
    assert one == counts["copies"]
    assert total >= at


def test_one_rank_of_eight_thousand_plans_in_two_seconds(bench: Any) -> None:
    """A quarter of a trillion parameters, so that it stays quick; `scripts/bench plan` has the whole."""
    source, target = parse_layout(bench.SOURCE), parse_layout(bench.TARGET)
    model = bench.model({**bench.DENSE, "num_hidden_layers": 48})
    assert model.numel > 0.25e12
    assert bench.plan_rank(model, source, target, 5000)["seconds"] < 2
