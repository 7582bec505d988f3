"""Folders that are written for Megatron-Core, loaded by it: strictly, at other layouts, with the optimizer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

import ucp
from tests.engines.megatron import transformer_engine
from tests.engines.megatron.cases import Case
from tests.engines.megatron.launch import by_name, launch
from tests.engines.megatron.written import SCALES, WRITTEN
from tests.engines.truth import same
from ucp.formats.megatron import FORMAT

pytestmark = pytest.mark.slow

# Source -> (the layout to write for, how it is written, the run that loads it).
LOADED: Mapping[str, tuple[str, dict[str, bool], Case]] = {
    "llama tp2 pp2": ("dp=2,pp=2", {}, Case(dp=2, pp=2, bf16=True)),
    "llama tp2 plain": ("tp=4", {"per_layer": True}, Case(tp=4, bf16=True, per_layer=True)),
    "moe tp2 ep2 buckets": ("dp=2,ep=2", {}, Case(dp=2, ep=2, kind="moe")),
    "gpt tp4 buckets": ("tp=2", {"plain_optimizer": True}, Case(tp=2, kind="gpt", sharding=None)),
}


@pytest.fixture(scope="module")
def loaded(written: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which each is written, as ``NAME``, and ``NAME again`` as Megatron saved what it had loaded."""
    folder = tmp_path_factory.mktemp("loaded")
    jobs = []
    for name, (layout, options, case) in LOADED.items():
        ucp.convert(written / name, folder / name, to="megatron", layout=layout, **options)
        jobs.append(
            {
                "do": "load",
                "case": vars(case),
                "load": str(folder / name / "iter_0000002"),
                "save": str(folder / f"{name} again"),
                "scales": name == SCALES,  # which the job compares, module by module
            }
        )
    ucp.convert(written / "mixers tp2", folder / "mixers", to="megatron", layout="tp=4")
    mixers = str(folder / "mixers" / "iter_0000002")
    jobs.append({"do": "load_mixers", "case": vars(Case()), "load": mixers})  # it compares every element
    load = {str(folder / f"{name}.pt"): str(folder / f"{name} again" / "iter_0000002") for name in LOADED}
    launch([*jobs, {"do": "truths", "case": vars(Case()), "load": load}], folder)
    return folder


@pytest.mark.parametrize("name", LOADED)
def test_stock_megatron_loads_it(
    loaded: Path, truths: Mapping[str, Mapping[tuple[str, str], torch.Tensor]], name: str
) -> None:
    """What Megatron has saved again of what it loaded is what the source's own writer had, bit for bit."""
    again, source = by_name(loaded / f"{name}.pt"), truths[name.removesuffix(" buckets")]
    assert again.keys() == source.keys()
    for key, value in source.items():
        assert same(again[key], value), key


@pytest.mark.parametrize("name", LOADED)
def test_the_way_back(written: Path, loaded: Path, name: str) -> None:
    """Opened again, what was written is the source, its training state too."""
    with ucp.open(written / name) as source, ucp.open(loaded / name) as copy:
        assert copy.catalog.tensors.keys() == source.catalog.tensors.keys()
        for key in source.catalog.tensors:
            assert same(copy.read(*key), source.read(*key)), key
        assert copy.parameters == source.parameters
        ours, theirs = copy.training_state, source.training_state
        assert (ours.global_steps, ours.lr_scheduler) == (theirs.global_steps, theirs.lr_scheduler)
        assert [group.names for group in ours.param_groups] == [group.names for group in theirs.param_groups]
        if "plain_optimizer" not in LOADED[name][1]:  # which has no masters of full-precision weights
            assert ours.extra["megatron"]["weights"] == theirs.extra["megatron"]["weights"]


def test_scales_lie_where_their_layers_do(written: Path, loaded: Path, tmp_path: Path) -> None:
    """From stacked layers to layers with keys of their own and back: each module's own, and no other object."""
    ucp.convert(written / SCALES, tmp_path / "apart", to="megatron", layout="pp=2", per_layer=True)
    ucp.convert(tmp_path / "apart", tmp_path / "stacked", to="megatron", layout="tp=4")
    forms = {
        "apart": "decoder.layers.{}.{}._extra_state/shard_0_1",
        "stacked": "decoder.layers.{1}._extra_state/shard_{0}_4",
    }
    modules = [
        f"{m}.linear_{n}" for m, ns in (("self_attention", ("qkv", "proj")), ("mlp", ("fc1", "fc2"))) for n in ns
    ]
    for folder, form in forms.items():
        with ucp.open(tmp_path / folder) as checkpoint:
            objects = checkpoint.training_state.extra["megatron"]["objects"]
            keys = {
                form.format(layer, m): f"decoder.layers.{layer}.{m}._extra_state" for layer in range(4) for m in modules
            }
            assert objects.keys() == keys.keys()
            for key, name in keys.items():
                assert transformer_engine.holds(objects[key], name), key
            (fp8,) = (text for title, text in FORMAT.facts(checkpoint.catalog).items() if title == "fp8")
            assert fp8.count("maxima of 8 steps: 8 modules") == 2
            assert "DelayedScaling (HYBRID)" in fp8


def test_scales_of_the_older_layout(written: Path) -> None:
    """Two tensor-parallel ranks have pickled the same in other bytes; that is told apart from other scales."""
    with ucp.open(written / f"{SCALES} ranks") as checkpoint:
        objects = checkpoint.training_state.extra["megatron"]["objects"]
        names = {key: key.removesuffix("/shard_0_1") for key in objects if "_extra_state" in key}
        assert len(names) == 16
        assert all(transformer_engine.holds(objects[key], name) for key, name in names.items())
        assert not any("_extra_state" in name for name in checkpoint.parameters)
        assert checkpoint.catalog.unchecked == ()


def test_which_runs_are_meant() -> None:
    assert {name.removesuffix(" buckets") for name in LOADED} <= set(WRITTEN)


@pytest.mark.parametrize(("to", "stage"), [("deepspeed", 1), ("deepspeed", 3), ("dcp", 0)])
def test_there_and_back(
    written: Path,
    truths: Mapping[str, Mapping[tuple[str, str], torch.Tensor]],
    tmp_path: Path,
    to: str,
    stage: int,
) -> None:
    """Another framework's checkpoint of a Megatron run holds the same, and so does Megatron's of that one."""
    config = {"train_micro_batch_size_per_gpu": 1, "bf16": {"enabled": True}, "zero_optimization": {"stage": stage}}
    given = {"layout": f"dp=2,zero={stage}", "ds_config": config} if to == "deepspeed" else {}
    ucp.convert(written / "llama tp2 pp2 buckets", tmp_path / "there", to=to, **given)
    ucp.convert(tmp_path / "there", tmp_path / "back", to="megatron", layout="tp=2,pp=2")
    for folder in ("there", "back"):
        with ucp.open(tmp_path / folder) as checkpoint:
            assert set(checkpoint.catalog.tensors) == set(truths["llama"])
            for key, value in truths["llama"].items():
                assert same(checkpoint.read(*key), value), (folder, key)
    with ucp.open(tmp_path / "back") as checkpoint:
        assert {info.scalars["step"] for info in checkpoint.parameters.values()} == {2}
        assert len(checkpoint.training_state.param_groups) == 2
        assert checkpoint.training_state.lr_scheduler["num_steps"] == 16
