"""What a plan says that each rank reads, against partitions cut with plain numpy."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import ucp
from tests.formats import raw
from tests.spec.models import MODELS, config_of, names_of
from ucp.errors import Unsupported
from ucp.inspection.planning import balance, plan
from ucp.parallel.mesh import Layout, parse_layout
from ucp.spec import catalogue
from ucp.spec.bound import bind


def naive(made: raw.Raw, dp: int, stage: int) -> list[int]:
    """Bytes for each rank: element by element, by ZeRO's rules in prose."""
    counts = [0] * dp
    trained = [name for name, info in made.catalog.parameters.items() if info.kind == "parameter"]
    if stage in (1, 2):
        flat = [name for name in trained for _ in range(made.truth[name, "param"].size)]
        size = -(-len(flat) // (2 * dp)) * 2
        for at in range(len(flat)):
            counts[at // size] += 3 * 4
    else:
        for name in trained:
            n = made.truth[name, "param"].size
            piece = -(-n // dp)
            for at in range(n):
                for rank in range(dp) if stage == 0 else [at // piece]:
                    counts[rank] += 3 * 4
    for name in ("frozen.weight", "mask", "steps"):
        array = made.truth[name, "param"]
        if stage == 3 and name == "frozen.weight":
            piece = -(-array.size // dp)
            for at in range(array.size):
                counts[at // piece] += array.itemsize
        else:
            counts = [count + array.nbytes for count in counts]
    return counts


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("dp", [1, 2, 7])
def test_bytes_of_every_rank(virtual: Path, made: raw.Raw, dp: int, stage: int) -> None:
    with ucp.open(virtual) as checkpoint:
        found = plan(checkpoint, Layout(dp=dp, zero=stage))
    assert [rank.bytes for rank in found.ranks] == naive(made, dp, stage)
    assert found.bytes == found.moved.sum() == sum(rank.bytes for rank in found.ranks)
    assert found.stored == sum(array.nbytes for array in made.truth.values())
    assert found.ranks[found.largest].bytes == max(rank.bytes for rank in found.ranks)
    assert found.moved.shape == (4, dp)
    assert found.moved.sum(axis=0).tolist() == [rank.bytes for rank in found.ranks]


def test_the_same_layout_reads_its_own_files(tmp_path: Path) -> None:
    """Rank by rank, but for what all ranks have (the last file)."""
    made = raw.make(tmp_path / "raw", dp=4, stage=1)
    with ucp.open(raw.virtual_checkpoint(tmp_path / "v", made)) as checkpoint:
        found = plan(checkpoint, Layout(dp=4, zero=1))
    own = found.moved[[found.sources.index(f"rank{r}.bin") for r in range(4)]]
    assert np.count_nonzero(own - np.diag(np.diag(own))) == 0
    assert all(rank.files == 2 for rank in found.ranks)


def test_time_and_memory(virtual: Path) -> None:
    with ucp.open(virtual) as checkpoint:
        found = plan(checkpoint, Layout(dp=4, zero=0), rank_bandwidth=100.0, storage_bandwidth=1e9, ranks_per_node=2)
        largest = max(rank.bytes for rank in found.ranks)
        assert (found.seconds, found.bound_by) == (largest / 100.0, "rank")
        assert found.node_memory == 2 * largest
        found = plan(checkpoint, Layout(dp=4, zero=0), rank_bandwidth=1e9, storage_bandwidth=100.0)
        assert (found.seconds, found.bound_by) == (found.bytes / 100.0, "storage")
        assert plan(checkpoint, Layout(dp=4, zero=3)).seconds is None
    assert balance(found.ranks) == {"smallest": largest, "mean": largest, "largest": largest}


def test_tensor_parallel_by_a_spec(tmp_path: Path) -> None:
    """Every element of a cut parameter goes to one tensor-parallel rank, of a replicated one to all."""
    model = MODELS["llama-bias-tied"].make()
    names = names_of(model)
    shapes = {n: s for n, s in names.shapes.items() if n not in names.buffers}
    made = raw.make(tmp_path / "raw", shapes=shapes, states=("param",))
    bound = bind(catalogue.find("llama"), config_of(model))
    layout = parse_layout("dp=1,tp=2,zero=0")
    with ucp.open(raw.virtual_checkpoint(tmp_path / "v", made)) as checkpoint:
        found = plan(checkpoint, layout, bound=bound)
        with pytest.raises(Unsupported, match="give a spec"):
            plan(checkpoint, layout)
    copied = sum(
        4 * int(np.prod(s)) for n, s in shapes.items() if "norm" in n or n.endswith(("o_proj.bias", "down_proj.bias"))
    )
    everything = sum(4 * int(np.prod(s)) for s in shapes.values())
    beside = 60 + 9 + 8  # the frozen parameter and the buffers, on both
    assert found.bytes == everything + copied + 2 * beside


def test_what_a_layout_alone_does_not_say(virtual: Path) -> None:
    with ucp.open(virtual) as checkpoint, pytest.raises(Unsupported, match="which stage or rank has which parameters"):
        plan(checkpoint, Layout(dp=2, pp=2))
