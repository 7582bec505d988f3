"""The specs' names of Megatron-Core's, proven by running: the same weights give the same logits in both models."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import ucp
from tests.engines.megatron import families
from tests.engines.megatron.cases import Case
from tests.engines.megatron.launch import launch
from tests.optional import skip_without
from ucp.storage import safetensors

skip_without("megatron.core")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``NAME``: transformers' folder; ``NAME megatron``: the same for Megatron; ``logits.pt``: of Megatron's models."""
    folder = tmp_path_factory.mktemp("families")
    load = {}
    for name in families.FAMILIES:
        families.transformers_model(name).save_pretrained(folder / name)
        ucp.convert(folder / name, folder / f"{name} megatron", to="megatron", layout="tp=1", per_layer=True)
        load[name] = str(folder / f"{name} megatron" / "release")
    live = {name: str(folder / name) for name in load}
    job = {"do": "logits", "case": vars(Case()), "load": load, "live": live, "save": str(folder / "logits.pt")}
    launch([job], folder)
    return folder


@pytest.mark.parametrize("how", ["", " live"])
@pytest.mark.parametrize("name", families.FAMILIES)
def test_logits_are_the_same(both: Path, name: str, how: str) -> None:
    """By a conversion and Megatron's own loader; and of a live model that transformers' folder fills."""
    with torch.no_grad():
        wanted = families.transformers_model(name)(families.tokens()).logits
    found = torch.load(both / "logits.pt")[name + how]
    assert found.shape == wanted.shape
    assert (found - wanted).abs().max().item() <= 1e-5 * max(wanted.abs().max().item(), 1.0)


@pytest.mark.parametrize("name", families.FAMILIES)
def test_the_way_back_is_byte_for_byte(both: Path, tmp_path: Path, name: str) -> None:
    ucp.convert(both / f"{name} megatron", tmp_path / "back", to="huggingface", like=both / name)
    with ucp.open(both / name) as first, ucp.open(tmp_path / "back") as second:
        assert first.parameters.keys() == second.parameters.keys()
        for parameter in first.parameters:
            assert torch.equal(first.read(parameter), second.read(parameter)), parameter
    names = [set(safetensors.read_header(p / "model.safetensors").tensors) for p in (both / name, tmp_path / "back")]
    assert names[0] == names[1]
