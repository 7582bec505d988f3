"""What lost layers are filled with: neighbours offset by offset, copies at the ends, refusals; and the mark."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import ucp
from ucp.catalog import Catalog
from ucp.errors import BadArgument, DamagedCheckpoint, Mismatch, UcpError, Unsupported
from ucp.formats.nouns import Remains
from ucp.formats.universal import manifest
from ucp.layers import Layer, layer_of, shown
from ucp.repair import RepairSettings, outlook_of, repair
from ucp.repair.build import repaired
from ucp.storage.files import Files
from ucp.transfer.reader import Reader

LAYERS = 8


def weights() -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    out = {f"model.layers.{k}.up.weight": torch.randn(6, 5, generator=draw) for k in range(LAYERS)}
    out |= {f"model.layers.{k}.count": torch.tensor([k]) for k in range(LAYERS)}
    return out | {"model.embed.weight": torch.randn(7, 5, generator=draw)}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saved") / "whole"
    model = torch.nn.Module()
    for name, tensor in weights().items():
        at = model
        *parents, last = name.split(".")
        for part in parents:
            if not hasattr(at, part):
                at.add_module(part, torch.nn.Module())
            at = getattr(at, part)
        if tensor.is_floating_point():
            at.register_parameter(last, torch.nn.Parameter(tensor))
        else:
            at.register_buffer(last, tensor)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.5)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape)
    optimizer.step()
    ucp.save_training(path, model=model, optimizer=optimizer, step=1)
    return path


def without(path: Path, *layers: int, norms: Mapping[str, float] | None = None, named: bool = True) -> Remains:
    """The checkpoint as if it had lost these layers."""
    with ucp.open(path) as checkpoint:
        catalog = checkpoint.catalog

    def is_lost(name: str) -> bool:
        found = layer_of(name)
        return found is not None and found[0].index in layers

    state = dataclasses.replace(catalog.training_state, client_state={"ucp_gradient_norms": norms} if norms else {})
    kept = dataclasses.replace(
        catalog,
        parameters={n: i for n, i in catalog.parameters.items() if not is_lost(n)},
        tensors={k: t for k, t in catalog.tensors.items() if not is_lost(k[0])},
        training_state=state,
    )
    lost = {n: i for n, i in catalog.parameters.items() if is_lost(n)}
    return Remains(kept, (), lost if named else {}, () if named else layers)


def filled(remains: Remains, name: str, state: str = "param", **settings: Any) -> np.ndarray:
    """The tensor that a repair computes."""
    how = RepairSettings(**settings)
    with Files() as files:
        catalog = repaired(remains, outlook_of(remains, how), how, Reader(remains.catalog, files))
        checkpoint = ucp.checkpoint.Checkpoint(Path("fixed"), catalog, files)
        return checkpoint.read(name, state).numpy()


def both(remains: Remains, **settings: Any) -> dict[str, str]:
    return {str(each.layer): str(each) for each in outlook_of(remains, RepairSettings(**settings)).fillings}


def test_layers_by_names() -> None:
    assert layer_of("model.layers.4.mlp.experts.7.up.weight") == (Layer("model.layers.", 4), "mlp.experts.7.up.weight")
    assert layer_of("4.up.weight") == (Layer("", 4), "up.weight")
    assert layer_of("model.embed.weight") is None
    assert shown([Layer("h.", 2), Layer("h.", 1), Layer("h.", 5)]) == "h.1-2, h.5"


def test_neighbours_are_taken_offset_by_offset(saved: Path) -> None:
    norms = {f"model.layers.{k}": float(k + 1) for k in range(LAYERS)}
    found = both(without(saved, 3, 4, norms=norms), norm_power=1)
    at = "layer model.layers."
    assert found == {
        "model.layers.3": f"{2 / 8:.4g} of {at}1 + {6 / 8:.4g} of {at}5",
        "model.layers.4": f"{3 / 10:.4g} of {at}2 + {7 / 10:.4g} of {at}6",
    }
    assert both(without(saved, 0, 1)) == {"model.layers.0": f"copy of {at}2", "model.layers.1": f"copy of {at}3"}
    assert both(without(saved, 6, 7)) == {"model.layers.6": f"copy of {at}4", "model.layers.7": f"copy of {at}5"}
    assert both(without(saved, 3), method="copy-right") == {"model.layers.3": f"copy of {at}4"}
    # Two runs are filled apart, each from what is beside it.
    assert set(both(without(saved, 2, 5))) == {"model.layers.2", "model.layers.5"}


def test_values(saved: Path) -> None:
    x = {k: weights()[f"model.layers.{k}.up.weight"] for k in range(LAYERS)}
    with ucp.open(saved) as checkpoint:
        x = {k: checkpoint.read(f"model.layers.{k}.up.weight").double().numpy() for k in range(LAYERS)}
        m = {k: checkpoint.read(f"model.layers.{k}.up.weight", "exp_avg").double().numpy() for k in range(LAYERS)}
    name = "model.layers.3.up.weight"
    lost = without(saved, 3, norms={"model.layers.2": 3.0, "model.layers.4": 1.0})
    assert np.array_equal(filled(lost, name), ((9 * x[2] + x[4]) / 10).astype(np.float32))
    assert np.array_equal(filled(lost, name, norm_power=1), ((3 * x[2] + x[4]) / 4).astype(np.float32))
    assert np.array_equal(filled(lost, name, method="uniform"), ((x[2] + x[4]) / 2).astype(np.float32))
    assert np.array_equal(filled(lost, name, method="copy-left"), x[2].astype(np.float32))
    assert not filled(lost, name, "exp_avg").any()
    averaged = filled(lost, name, "exp_avg", moments="average")
    assert np.array_equal(averaged, ((9 * m[2] + m[4]) / 10).astype(np.float32))
    # Whole numbers are the left neighbour's.
    assert filled(lost, "model.layers.3.count").tolist() == [2]
    drawn = [filled(lost, name, method="random", seed=seed) for seed in (0, 0, 1)]
    assert np.array_equal(drawn[0], drawn[1])
    assert not np.array_equal(drawn[0], drawn[2])
    assert abs(drawn[0].std() - x[2].std()) < 0.5


def test_a_group_of_their_own(saved: Path) -> None:
    lost = without(saved, 3)
    how = RepairSettings(lr_scale=1.1)
    with Files() as files:
        catalog: Catalog = repaired(lost, outlook_of(lost, how), how, Reader(lost.catalog, files))
    old, new = catalog.training_state.param_groups
    assert new.names == ("model.layers.3.up.weight",)
    assert set(new.names).isdisjoint(old.names)
    assert (old.options or {})["lr"] == 0.5
    assert (new.options or {})["lr"] == 0.5 * 1.1
    assert catalog.parameters["model.layers.3.up.weight"].scalars["step"] == 0
    assert catalog.parameters["model.layers.2.up.weight"].scalars["step"] == 1


@pytest.mark.parametrize(
    ("layers", "settings", "kind", "message"),
    [
        (range(LAYERS), {}, Unsupported, "no neighbour that is like it"),
        ((1, 2, 3, 4, 5), {}, Unsupported, "both its neighbours"),
        ((0,), {"method": "copy-left"}, Unsupported, "has no layer model.layers.-1 to copy"),
        ((3,), {"method": "guess"}, BadArgument, "found 'guess'"),
        ((3,), {"norm_power": 3}, BadArgument, "1 or 2"),
        ((3,), {"moments": "half"}, BadArgument, "zero or average"),
        ((3,), {"lr_scale": -1.0}, BadArgument, "above 0"),
    ],
)
def test_refusals(
    saved: Path, layers: tuple[int, ...], settings: dict[str, Any], kind: type[UcpError], message: str
) -> None:
    with pytest.raises(kind, match=message):
        outlook_of(without(saved, *layers), RepairSettings(**settings))


def test_what_nothing_is_known_of(saved: Path) -> None:
    with pytest.raises(Mismatch, match="nothing tells which parameters layer 3 had"):
        outlook_of(without(saved, 3, named=False), RepairSettings())
    remains = dataclasses.replace(without(saved, 3), unknown="the last stage is lost")
    with pytest.raises(Unsupported, match="the last stage is lost, so it can't be repaired"):
        outlook_of(remains, RepairSettings())
    lost = without(saved)
    embed = lost.catalog.parameters["model.embed.weight"]
    with pytest.raises(Unsupported, match=r"embed\.weight' is lost and has no neighbour"):
        outlook_of(dataclasses.replace(lost, parameters={embed.name: embed}), RepairSettings())


def test_what_lost_nothing_and_a_mark_that_is_none(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(BadArgument, match="lost no file"):
        repair(saved, tmp_path / "fixed")
    body = {k: v for k, v in json.loads((saved / manifest.NAME).read_text()).items() if k != "digest"}
    for mark in ({"no such": "x"}, {"model.embed.weight": 3}, ["model.embed.weight"]):
        copy = tmp_path / "copy"
        copy.mkdir(exist_ok=True)
        for file in saved.iterdir():
            (copy / file.name).write_bytes(file.read_bytes())
        (copy / manifest.NAME).write_bytes(manifest.frame({**body, "approximate": mark}))
        with pytest.raises(DamagedCheckpoint, match="'approximate' should map"):
            ucp.open(copy)


def test_files_of_the_training_state_and_manifests_that_are_none(saved: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(saved, copy)
    body = {k: v for k, v in json.loads((saved / manifest.NAME).read_text()).items() if k != "digest"}
    for files in ({}, {"path": 3, "size": 4}, {"path": ["x"], "size": []}, []):
        (copy / manifest.NAME).write_bytes(manifest.frame({**body, "files": files}))
        with pytest.raises(DamagedCheckpoint):
            repair(copy, tmp_path / "fixed")
    kept = body["files"]
    named = {**kept, "path": [*kept["path"], "training-state.safetensors"], "size": [*kept["size"], 9]}
    named |= {"mtime_ns": [*kept["mtime_ns"], None], "digests": [*kept["digests"], None]}
    (copy / manifest.NAME).write_bytes(manifest.frame({**body, "files": named}))
    with pytest.raises(DamagedCheckpoint, match="training state's tensors"):
        repair(copy, tmp_path / "fixed")
    named["path"][-1] = "../../outside"
    (copy / manifest.NAME).write_bytes(manifest.frame({**body, "files": named}))
    with pytest.raises(DamagedCheckpoint, match="outside its own folder"):
        repair(copy, tmp_path / "fixed")


@pytest.mark.parametrize("norm", [float("nan"), float("inf"), -1.0, 0, 1e200, "3", True, None, [2.0]])
def test_norms_that_are_none_count_equally(saved: Path, norm: Any) -> None:
    norms = {"model.layers.2": norm, "model.layers.4": 1.0}
    outlook = outlook_of(without(saved, 3, norms=norms), RepairSettings())
    assert [share for _, share in outlook.fillings[0].shares] == [1.0, 1.0]
    assert "no gradient norms" in outlook.warnings[0]
