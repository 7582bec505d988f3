"""Catalogs under other names: cut by ZeRO's rules, renamed, and read against what numpy makes of the whole tensors."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.formats import raw
from ucp.catalog import Catalog, ParameterInfo, ParamGroup, TrainingState
from ucp.errors import Mismatch, Unsupported
from ucp.formats.shared.renaming import rename
from ucp.geometry import whole
from ucp.spec.bound import Bound, bind
from ucp.spec.language import loads
from ucp.storage.dtypes import numpy_dtype
from ucp.storage.files import Files
from ucp.transfer.gather import Want, gather
from ucp.transfer.reader import Reader

SPEC = """
ucp: 1
model: test
sizes: {h: config.h, kv: config.kv, q: config.q, d: config.d, f: config.f, e: config.e}
parameters:
  embed: "h"
  blocks.{i}.qkv: "(kv/tp q d | kv/tp d | kv/tp d) h"
  blocks.{i}.out: "h (kv q d)"
  blocks.{i}.up: "e/ep (f/tp | f/tp) h"
names:
  other:
    wte: embed
    "{n}.attn.groups": {from: "blocks.{n-1}.qkv", as: "(kv (q | 1 | 1) d) h"}
    "{n}.attn.out": {from: "blocks.{n-1}.out", as: "(kv q d) h"}
    blocks.{i}.up: {to: ["{i+1}.experts.{e}.gate", "{i+1}.experts.{e}.up"], stack: {e: e}}
"""
SIZES = {"h": 5, "kv": 2, "q": 3, "d": 4, "f": 7, "e": 3}
SHAPES = {
    "embed": (5,),
    "blocks.0.qkv": (40, 5),
    "blocks.0.out": (5, 24),
    "blocks.0.up": (3, 14, 5),
    "blocks.1.qkv": (40, 5),
    "blocks.1.out": (5, 24),
    "blocks.1.up": (3, 14, 5),
}
STATE = TrainingState(
    (
        ParamGroup(("embed", "blocks.0.up", "blocks.1.up", "blocks.0.qkv"), {"lr": 1e-3}),
        ParamGroup(("blocks.0.out", "blocks.1.qkv", "blocks.1.out"), {"lr": 2e-3}),
    )
)


@pytest.fixture
def bound() -> Bound:
    return bind(loads(SPEC), SIZES)


def named(shapes: dict[str, tuple[int, ...]], folder: Path, **options: Any) -> raw.Raw:
    """As `raw.make`, without the tensors that no line of the spec is about."""
    made = raw.make(folder, shapes=shapes, **options)
    parameters = {n: made.catalog.parameters[n] for n in shapes}
    tensors = {key: t for key, t in made.catalog.tensors.items() if key[0] in shapes}
    return raw.Raw(replace(made.catalog, parameters=parameters, tensors=tensors), made.truth)


def read(catalog: Catalog, name: str, state: str) -> NDArray[Any]:
    tensor = catalog.tensors[name, state]
    out = np.empty(tensor.shape, numpy_dtype(tensor.dtype))
    with Files() as files:
        gather(Reader(catalog, files), [Want(tensor, whole(tensor.shape), tensor.dtype)], [out.reshape(-1).view("u1")])
    return out


def others(name: str, own: NDArray[Any]) -> dict[str, NDArray[Any]]:
    """What a parameter is in the other framework, by numpy."""
    if name == "embed":
        return {"wte": own}
    _, number, kind = name.split(".")
    n = int(number) + 1
    if kind == "out":
        return {f"{n}.attn.out": own.T}
    if kind == "qkv":
        q, k, v = own[:24].reshape(2, 3, 4, 5), own[24:32].reshape(2, 1, 4, 5), own[32:].reshape(2, 1, 4, 5)
        return {f"{n}.attn.groups": np.concatenate([q, k, v], 1).reshape(40, 5)}
    return {f"{n}.experts.{e}.{w}": own[e, s] for e in range(3) for w, s in (("gate", np.s_[:7]), ("up", np.s_[7:]))}


@pytest.mark.parametrize(("stage", "dp"), [(1, 3), (3, 4)])
def test_all_states_of_fragments_there_and_back(bound: Bound, tmp_path: Path, stage: int, dp: int) -> None:
    made = named(SHAPES, tmp_path, stage=stage, dp=dp, training_state=STATE)
    renamed = rename(made.catalog, bound, "other", to_framework=True)
    renamed.check()
    expected = {
        (new, state): part for (name, state), own in made.truth.items() if name in SHAPES
        for new, part in others(name, own).items()
    }  # fmt: skip
    assert renamed.tensors.keys() == expected.keys()
    assert {(n, s) for n, info in renamed.parameters.items() for s in info.states} == expected.keys()
    for (name, state), array in expected.items():
        np.testing.assert_array_equal(read(renamed, name, state), array)
        assert renamed.parameters[name].shape == array.shape
        assert renamed.parameters[name].scalars == {"step": 7.0}
    groups = renamed.training_state.param_groups
    assert groups[0].names == ("wte", *(f"{n}.experts.{e}.{w}" for n in (1, 2) for e in range(3)
                                        for w in ("gate", "up")), "1.attn.groups")  # fmt: skip
    assert groups[1].names == ("1.attn.out", "2.attn.groups", "2.attn.out")
    assert [g.options for g in groups] == [{"lr": 1e-3}, {"lr": 2e-3}]
    again = rename(renamed, bound, "other", to_framework=False)
    again.check()
    assert again.parameters == made.catalog.parameters
    assert again.training_state == STATE
    for key in again.tensors:
        np.testing.assert_array_equal(read(again, *key), made.truth[key])


def test_what_no_line_is_about_is_kept_or_refused(bound: Bound, tmp_path: Path) -> None:
    made = named({**SHAPES, "head": (5, 5)}, tmp_path, training_state=TrainingState())
    assert "head" in rename(made.catalog, bound, "other", to_framework=True, keep=True).parameters
    with pytest.raises(Mismatch, match="no line under names: other: is about 'head'; write one"):
        rename(made.catalog, bound, "other", to_framework=True)


def test_tied_names_are_renamed_too_unless_they_would_be_rearranged(bound: Bound, tmp_path: Path) -> None:
    made = named({"x": (5,)}, tmp_path / "a", aliases={"x": ("embed",)}, training_state=TrainingState())
    renamed = rename(made.catalog, bound, "other", to_framework=True, keep=True)
    assert renamed.parameters["x"].aliases == ("wte",)
    made = named({"x": (5, 24)}, tmp_path / "b", aliases={"x": ("blocks.0.out",)}, training_state=TrainingState())
    with pytest.raises(Unsupported, match=r"'blocks\.0\.out' is tied \(x, blocks\.0\.out\)"):
        rename(made.catalog, bound, "other", to_framework=True, keep=True)


def test_parts_that_do_not_belong_together_are_refused(bound: Bound, tmp_path: Path) -> None:
    made = named(SHAPES, tmp_path, training_state=STATE)
    renamed = rename(made.catalog, bound, "other", to_framework=True)

    def but(name: str, **changes: Any) -> Catalog:
        info: ParameterInfo = replace(renamed.parameters[name], **changes)
        return replace(renamed, parameters={**renamed.parameters, name: info})

    for changes, message in (
        ({"scalars": {"step": 8.0}}, r"'blocks.0.up' can't be made of '1.experts.0.gate', which has the values"),
        ({"kind": "frozen"}, "which has kind parameter, and '1.experts.1.up', which has kind frozen"),
        ({"states": {"param": "float32"}}, "which has the states"),
        ({"shape": (7, 6)}, r"has shape \[7, 6\], and 'blocks.0.up' is made of one of \[7, 5\]"),
    ):
        with pytest.raises(Mismatch, match=message):
            rename(but("1.experts.1.up", **changes), bound, "other", to_framework=False)
    groups = (ParamGroup(("1.experts.0.up",), {}), ParamGroup(("1.experts.1.up",), {}))
    torn = replace(renamed, training_state=TrainingState(groups))
    with pytest.raises(Mismatch, match=r"'blocks\.0\.up' would be made of parameters of param groups 0 and 1"):
        rename(torn, bound, "other", to_framework=False)
    parameters = {**made.catalog.parameters, "wte": replace(made.catalog.parameters["embed"], name="wte")}
    twice = replace(made.catalog, parameters=parameters)
    with pytest.raises(Mismatch, match="would both be called 'wte'"):
        rename(twice, bound, "other", to_framework=True, keep=True)


def test_copies_and_padding_follow_their_parameters(bound: Bound, tmp_path: Path) -> None:
    made = named(
        {"embed": (5,), "embed[padding]": (3,), "blocks.0.out": (5, 24)}, tmp_path, training_state=TrainingState()
    )
    padding = replace(made.catalog.parameters["embed[padding]"], kind="padding")
    copies = (made.catalog.tensors["blocks.0.out", "param"], made.catalog.tensors["embed", "param"])
    catalog = replace(made.catalog, parameters={**made.catalog.parameters, "embed[padding]": padding}, copies=copies)
    renamed = rename(catalog, bound, "other", to_framework=True)
    assert set(renamed.parameters) == {"wte", "wte[padding]", "1.attn.out"}
    assert [c.name for c in renamed.copies] == ["1.attn.out", "wte"]
    np.testing.assert_array_equal(read(renamed, "wte[padding]", "param"), made.truth["embed[padding]", "param"])
    tensors = {("1.attn.out", "param"): renamed.copies[0]}
    copied = read(replace(renamed, tensors=tensors), "1.attn.out", "param")
    np.testing.assert_array_equal(copied, made.truth["blocks.0.out", "param"].T)
