"""Copies that drifted apart: refused as copies, and taken as their average where the spec says so."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch

import ucp
from tests.engines.configs import Case
from tests.engines.pool import RankPool
from tests.engines.tp_models import ARGS
from tests.engines.tp_runs import TpCase
from tests.engines.truth import Truth
from tests.formats.deepspeed.read import averages_jobs
from ucp.errors import Mismatch, Unsupported
from ucp.spec.shipped import FOLDER

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=["fp32", "bf16"])
def drifted(
    request: pytest.FixtureRequest, ranks: RankPool, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[Truth]]:
    folder = tmp_path_factory.mktemp("drifted")
    tp = TpCase("megatron", info=False, case=Case(stage=1, dp=2, dtype=request.param))
    truths = ranks.run(averages_jobs.drift_apart, tp, str(folder), world_size=4)[0]
    assert truths is not None
    return folder, truths


@pytest.fixture(scope="module")
def averaging(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The catalogue's spec, with averages for the norms."""
    text = (FOLDER / "megatron_gpt_plain.yaml").read_text()
    changed = text.replace("layernorm.weight: hidden", 'layernorm.weight: "average(hidden, tp)"').replace(
        "layernorm.bias: {axes: hidden,", 'layernorm.bias: {axes: "average(hidden, tp)",'
    )
    assert changed.count("average(hidden, tp)") == 4
    path = tmp_path_factory.mktemp("spec") / "averaging.yaml"
    path.write_text(changed)
    return path


def test_copies_that_differ_are_refused(drifted: tuple[Path, list[Truth]]) -> None:
    with pytest.raises(Mismatch, match=r"layernorm.* their copies have drifted apart"):
        ucp.open(drifted[0], spec="megatron_gpt_plain", model_config=ARGS)


def test_averages_are_the_means_of_all_copies(
    drifted: tuple[Path, list[Truth]], averaging: Path, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    folder, (first, second) = drifted
    with caplog.at_level(logging.WARNING, "ucp"), ucp.open(folder, spec=averaging, model_config=ARGS) as checkpoint:
        assert "are the averages of copies that differ" in caplog.text
        seen = 0
        for (name, state), tensor in checkpoint.catalog.tensors.items():
            if "layernorm" not in name:
                continue
            seen += 1
            a, b = first.params[name][state], second.params[name][state]
            assert a.equal(b) == (state != "param")
            wanted = ((a.double() + b.double()) / 2).to(a.dtype)
            assert checkpoint.read(name, state).equal(wanted), (name, state)
            assert checkpoint.read(name, state, (slice(3, 7),)).equal(wanted[3:7])
            assert tensor.shape == tuple(a.shape)
        assert seen == 3 * 2 * 5  # three states of weight and bias of five norms
    ucp.convert(folder, tmp_path / "whole", spec=averaging, model_config=ARGS)
    with ucp.open(tmp_path / "whole") as whole, ucp.open(folder, spec=averaging, model_config=ARGS) as checkpoint:
        assert all(torch.equal(whole.read(*key), checkpoint.read(*key)) for key in checkpoint.catalog.tensors)
    with pytest.raises(Unsupported, match="is the average of its copies, which lies in no file"):
        ucp.convert(folder, tmp_path / "pointer", spec=averaging, model_config=ARGS, virtual=True)
