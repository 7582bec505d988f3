"""Live Megatron-Core programs: what we save of them, and runs of any layout filled from any checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

import ucp
from tests.engines.megatron.cases import Case
from tests.engines.megatron.launch import by_name, launch
from tests.engines.megatron.written import SCALES, WRITTEN
from tests.engines.truth import same

pytestmark = pytest.mark.slow

Truths = Mapping[str, Mapping[tuple[str, str], torch.Tensor]]

# What is loaded -> (whose values it has, the run that loads it).
LOADED: Mapping[str, tuple[str, Case]] = {
    "llama tp2 pp2 ours": ("llama", Case(dp=2, bf16=True, per_layer=True)),
    "llama tp2 pp2 buckets": ("llama", Case(pp=2, dp=2, bf16=True)),
    "llama tp2 plain ours": ("llama", Case(tp=2, pp=2, bf16=True, sharding=None)),
    "llama deepspeed": ("llama", Case(tp=2, pp=2, bf16=True)),
    "moe tp2 ep2 ours": ("moe tp2 ep2", Case(dp=4, ep=4, kind="moe")),
    "gpt tp4 ours": ("gpt tp4", Case(tp=2, kind="gpt")),
}


@pytest.mark.parametrize("name", WRITTEN)
def test_what_is_saved_is_what_megatron_saves(written: Path, truths: Truths, name: str) -> None:
    """Against Megatron's own save of the same run, read by its own loader."""
    with ucp.open(written / f"{name} ours") as ours, ucp.open(written / name) as theirs:
        assert ours.format == "universal"
        assert set(ours.catalog.tensors) == set(truths[name])
        for key, value in truths[name].items():
            assert same(ours.read(*key), value), key
        assert ours.parameters == theirs.parameters
        assert ours.training_state.param_groups == theirs.training_state.param_groups
        assert ours.training_state.lr_scheduler == theirs.training_state.lr_scheduler
        assert ours.training_state.global_steps == 2


@pytest.fixture(scope="module")
def resumed(written: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``NAME.pt`` of each of `LOADED`: by Megatron's loader, of what Megatron saved of that run."""
    folder = tmp_path_factory.mktemp("resumed")
    config = {"train_micro_batch_size_per_gpu": 1, "bf16": {"enabled": True}, "zero_optimization": {"stage": 1}}
    ucp.convert(written / "llama", folder / "llama deepspeed", to="deepspeed", layout="dp=2,zero=1", ds_config=config)
    jobs = []
    for name, (_, case) in LOADED.items():
        source = folder / name if name.endswith("deepspeed") else written / name
        jobs.append(
            {
                "do": "resume",
                "case": vars(case),
                "load": str(source),
                "save": str(folder / f"{name} again"),
                "scales": name.startswith(SCALES),  # which the job compares, module by module
            }
        )
    load = {str(folder / f"{name}.pt"): str(folder / f"{name} again" / "iter_0000002") for name in LOADED}
    launch([*jobs, {"do": "truths", "case": vars(Case()), "load": load}], folder)
    return folder


@pytest.mark.parametrize("name", LOADED)
def test_a_run_of_another_layout_goes_on(resumed: Path, truths: Truths, name: str) -> None:
    found, wanted = by_name(resumed / f"{name}.pt"), truths[LOADED[name][0]]
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        assert same(found[key], value), key
