"""What a plan says that each rank reads, against partitions cut with plain numpy."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ucp
from tests.formats import raw
from tests.spec.models import MODELS, config_of, names_of
from ucp.checkpoint import Checkpoint
from ucp.errors import SpecError, UcpError, Unsupported
from ucp.formats.deepspeed.division import balanced
from ucp.inspection.planning import balance, plan
from ucp.parallel.mesh import Layout, parse_layout
from ucp.storage.files import Files


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
    own = found.moved[[found.sources.index(f"rank {r}") for r in range(4)]]
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
    how = {"spec": "llama", "model_config": config_of(model)}
    layout = parse_layout("dp=1,tp=2,zero=0")
    with ucp.open(raw.virtual_checkpoint(tmp_path / "v", made)) as checkpoint:
        with pytest.raises(Unsupported, match="give a spec"):
            plan(checkpoint, layout)
        with pytest.raises(SpecError, match=r"no line under parameters: matches 'frozen\.weight'"):
            plan(checkpoint, layout, **how)
    known = replace(
        made.catalog,
        parameters={n: i for n, i in made.catalog.parameters.items() if n != "frozen.weight"},
        tensors={k: t for k, t in made.catalog.tensors.items() if k[0] != "frozen.weight"},
    )
    found = plan(Checkpoint(tmp_path, known, Files()), layout, **how)
    copied = sum(
        4 * int(np.prod(s)) for n, s in shapes.items() if "norm" in n or n.endswith(("o_proj.bias", "down_proj.bias"))
    )
    everything = sum(4 * int(np.prod(s)) for s in shapes.values())
    beside = 9 + 8  # the buffers, on both
    assert found.bytes == everything + copied + 2 * beside
    # Without AutoTP the vocabulary of 101 would have to be padded.
    with pytest.raises(SpecError, match="cuts 101 in equal parts for 2 ranks"):
        plan(Checkpoint(tmp_path, known, Files()), layout, ds_config={}, **how)


LAYERS: dict[str, tuple[int, ...]] = {
    "tied_modules.embed.w": (7, 5),
    "1.w": (11, 3),
    "1.b": (3,),
    "2.w": (4, 4),
    "4.w": (17,),
    "5.w": (2, 9),
}


def only(made: raw.Raw, names: Collection[str]) -> Checkpoint:
    """What was made, without the frozen parameter and the buffers that are beside."""
    catalog = replace(
        made.catalog,
        parameters={n: i for n, i in made.catalog.parameters.items() if n in names},
        tensors={k: t for k, t in made.catalog.tensors.items() if k[0] in names},
    )
    return Checkpoint(Path("/saved"), catalog, Files())


def flat(sizes: Sequence[int], dp: int) -> list[int]:
    """Elements of each rank's partition of parameters of these sizes, by counting."""
    owners = [at for at, size in enumerate(sizes) for _ in range(size)]
    size = -(-len(owners) // (2 * dp)) * 2
    return [len(owners[r * size : (r + 1) * size]) for r in range(dp)]


@pytest.mark.parametrize("dp", [1, 3])
@pytest.mark.parametrize("partition", [None, [0, 2, 7]])
@pytest.mark.parametrize("stage", [0, 1])
def test_pipelines(tmp_path: Path, dp: int, partition: list[int] | None, stage: int) -> None:
    """Every stage has its layers, tied ones again; the first stage's ranks come first."""
    checkpoint = only(raw.make(tmp_path / "raw", shapes=LAYERS), LAYERS)
    section = {"tied": {"embed": [0, 6]}} | ({} if partition is None else {"partition": partition})
    found = plan(checkpoint, Layout(dp=dp, pp=2, zero=stage), ds_config={"pipeline": section})
    # 35 + 36 + 16 + 0 + 17 + 18 + 35 elements by layer
    bounds = partition or [0, 2, 7]
    assert found.stages == tuple(bounds)
    first = ["tied_modules.embed.w", "1.w", "1.b"]
    second = ["tied_modules.embed.w", "2.w", "4.w", "5.w"]
    expected = []
    for names in (first, second):
        sizes = [int(np.prod(LAYERS[name])) for name in names]
        expected += flat(sizes, dp) if stage else [sum(sizes)] * dp
    assert [rank.bytes for rank in found.ranks] == [3 * 4 * n for n in expected]


@pytest.mark.parametrize(
    ("layout", "config", "words"),
    [
        ("dp=1,pp=2,zero=1", None, "'tied_modules.embed.w' lies in the tied module 'embed', and nothing says which"),
        ("dp=1,pp=2,zero=2", {"tied": {"embed": [0, 6]}}, "work with ZeRO stages 0 and 1 only"),
        ("dp=1,pp=2,zero=1", {"tied": {"embed": [0, 6]}, "partition": [0, 6]}, "pp=2 needs 3 rising numbers"),
        ("dp=1,pp=2,zero=1", {"tied": {"embed": [0, 6]}, "partition": [0, 0, 7]}, "no parameter on pipeline stage 0"),
        ("dp=2,ep=2,zero=1", None, "has no experts of DeepSpeed's own layers"),
    ],
)
def test_what_cannot_be_planned(tmp_path: Path, layout: str, config: Any, words: str) -> None:
    checkpoint = only(raw.make(tmp_path / "raw", shapes=LAYERS), LAYERS)
    with pytest.raises(UcpError, match=words):
        plan(checkpoint, parse_layout(layout), ds_config=config and {"pipeline": config})


def test_names_that_are_no_pipelines(virtual: Path) -> None:
    with ucp.open(virtual) as checkpoint, pytest.raises(Unsupported, match=r"'embed.weight' is no name of a pipeline"):
        plan(checkpoint, Layout(dp=2, pp=2))


EXPERT = "moe.deepspeed_moe.experts.deepspeed_experts"


@pytest.mark.parametrize("data_first", [False, True])
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_experts(tmp_path: Path, data_first: bool, stage: int) -> None:
    """Two ranks share each pair of experts, and all ranks the rest."""
    shapes: dict[str, tuple[int, ...]] = {
        "gate": (9,),
        **{f"{EXPERT}.{e}.w": (5, 2 + e) for e in range(4)},
        "head": (6,),
    }
    made = raw.make(tmp_path / "raw", shapes=shapes)
    layout = Layout(dp=4, ep=2, zero=stage)
    config = {"use_data_before_expert_parallelism": data_first}
    found = plan(Checkpoint(tmp_path, made.catalog, Files()), layout, ds_config=config)
    shared = flat([9, 6], 4) if stage else [15] * 4
    for ep in range(2):
        sizes = [10 + 5 * e for e in (2 * ep, 2 * ep + 1)]
        own = flat(sizes, 2) if stage else [sum(sizes)] * 2
        for at, rank in enumerate([2 * ep, 2 * ep + 1] if data_first else [ep, ep + 2]):
            shared[rank] += own[at]
    beside = 60 + 9 + 8  # the frozen parameter and the buffers, on all
    assert [rank.bytes for rank in found.ranks] == [3 * 4 * n + beside for n in shared]
    with pytest.raises(Unsupported, match="do not train at ZeRO stage 3"):
        plan(Checkpoint(tmp_path, made.catalog, Files()), replace(layout, zero=3))
    with pytest.raises(UcpError, match=r"the 4 experts of .* cannot be spread over 3 ranks"):
        plan(Checkpoint(tmp_path, made.catalog, Files()), replace(layout, dp=3, ep=3))


SLICED = """\
ucp: 1
model: sliced
sizes: {inner: 8, size: 3, experts: 4}
parameters:
  "{n}.w": "inner/tp size"
  "{n}.gate": experts
"""


@pytest.mark.parametrize("tp", [1, 2])
def test_experts_in_stages(tmp_path: Path, tp: int) -> None:
    """Two stages of two ranks with two experts each, beside slices or not, and a stage without experts at stage 0."""
    shapes: dict[str, tuple[int, ...]] = {"0.w": (8, 3), "1.gate": (4,)}
    shapes |= {f"1.{EXPERT}.{e}.w": (5, 2 + e) for e in range(4)} | {"2.w": (8, 3), "3.gate": (4,)}
    shapes |= {f"3.{EXPERT}.{e}.w": (5, 2 + e) for e in range(4)}
    checkpoint = only(raw.make(tmp_path / "raw", shapes=shapes), shapes)
    (tmp_path / "sliced.yaml").write_text(SLICED)
    spec = tmp_path / "sliced.yaml" if tp > 1 else None
    layout = Layout(dp=2 // tp, tp=tp, pp=2, ep=2, zero=1)
    found = plan(checkpoint, layout, spec=spec, ds_config={"pipeline": {"partition": [0, 2, 4]}})
    shared = [16] * 2 if tp > 1 else flat([24, 4], 2)  # a slice of the weight beside a whole gate
    expected = [n + sum(10 + 5 * e for e in (2 * k, 2 * k + 1)) for k, n in enumerate(shared)]
    assert [rank.bytes for rank in found.ranks] == [3 * 4 * n for n in expected * 2]
    assert found.stages == (0, 2, 4)
    # Layers divided by their parameters, of which a rank has half of the experts: 24, 4 + 35, 24, 4 + 35 elements.
    assert plan(checkpoint, layout, spec=spec, ds_config={}).stages == (0, 2, 4)
    uneven = {"pipeline": {"partition": [0, 1, 4]}}
    if tp == 1:
        found = plan(checkpoint, replace(layout, zero=0), ds_config=uneven)
        assert [rank.bytes for rank in found.ranks] == [3 * 4 * n for n in (24, 24, 32 + 2 * 25, 32 + 2 * 45)]
    with pytest.raises(Unsupported, match=r"stage 0 would have no experts.* ZeRO stage 0 only"):
        plan(checkpoint, layout, spec=spec, ds_config=uneven)


@pytest.mark.parametrize("stage", [1, 3])
def test_stacks_of_experts(tmp_path: Path, stage: int) -> None:
    """AutoEP: every expert-parallel rank has its rows of the stack."""
    made = raw.make(tmp_path / "raw", shapes={"gate": (9,), "mlp.experts.w1": (4, 5, 3)})
    layout = Layout(dp=4, ep=2, zero=stage)
    config = {"expert_parallel": {"enabled": True, "autoep_size": 2}}
    found = plan(Checkpoint(tmp_path, made.catalog, Files()), layout, ds_config=config)
    frozen = [16, 16, 16, 12] if stage == 3 else [60] * 4  # 30 elements of two bytes
    shared = [3, 3, 3, 0] if stage == 3 else flat([9], 4)
    own = [15] * 4 if stage == 3 else [n for n in flat([30], 2) for _ in range(2)]  # of ranks 0 and 2, and 1 and 3
    assert [rank.bytes for rank in found.ranks] == [
        3 * 4 * (n + m) + beside + 9 + 8 for n, m, beside in zip(shared, own, frozen, strict=True)
    ]
    with pytest.raises(UcpError, match=r"autoep_size.*change one of them"):
        plan(Checkpoint(tmp_path, made.catalog, Files()), replace(layout, ep=4), ds_config=config)
    with pytest.raises(Unsupported, match="how tensor parallelism cuts the model is not known"):
        plan(Checkpoint(tmp_path, made.catalog, Files()), replace(layout, tp=2), ds_config=config)
    with pytest.raises(Unsupported, match="with ep > 1 and without pipeline parallelism only"):
        plan(Checkpoint(tmp_path, made.catalog, Files()), replace(layout, tp=2, pp=2), ds_config=config)


@pytest.mark.slow
def test_layers_are_divided_as_deepspeed_does() -> None:
    from deepspeed.runtime.utils import partition_balanced

    rng = np.random.default_rng(0)
    for count in (1, 2, 3, 5, 8):
        for layers in (1, 2, 7, 12, 26):
            for high in (2, 10, 1000):
                weights = rng.integers(0, high, layers).tolist()
                assert balanced(weights, count) == [int(b) for b in partition_balanced(weights, count)]
