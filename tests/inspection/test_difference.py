"""Exactly the planted differences, across formats and layouts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import ucp
from tests.formats import raw
from tests.inspection.conftest import OLDER
from ucp import limits
from ucp.catalog import Catalog, LogicalTensor, ParamGroup
from ucp.checkpoint import Checkpoint
from ucp.inspection import stream
from ucp.inspection.difference import Difference, diff
from ucp.inspection.values import as_numbers, not_finite
from ucp.storage.dtypes import itemsize
from ucp.storage.files import Files


def compared(a: Path | Checkpoint, b: Path | Checkpoint, **options: object) -> Difference:
    opened = [one if isinstance(one, Checkpoint) else ucp.open(one) for one in (a, b)]
    with opened[0] as left, opened[1] as right:
        return diff(left, right, **options)  # type: ignore[arg-type]


def write(made: raw.Raw, name: str, state: str, at: int, value: bytes) -> None:
    """Overwrite one element of the raw files behind a catalog."""
    tensor = made.catalog.tensors[name, state]
    position = np.array(np.unravel_index(at, tensor.shape))
    b = tensor.blocks
    (k,) = np.flatnonzero(np.all((b.offsets <= position) & (position < b.offsets + b.sizes), axis=1))
    place = int(tensor.bases[k]) + int(b.starts[k] + ((position - b.offsets[k]) * b.strides[k]).sum()) * len(value)
    with open(made.catalog.files[int(b.buffers[k])].path, "r+b") as opened:
        opened.seek(place)
        opened.write(value)


def test_forms_and_layouts_of_the_same_state_are_the_same(tmp_path: Path, made: raw.Raw, consolidated: Path) -> None:
    for dp, stage in ((1, 1), (5, 3)):
        other = raw.make(tmp_path / f"other{dp}", dp=dp, stage=stage, aliases={"embed.weight": ("head.weight",)})
        found = compared(consolidated, raw.virtual_checkpoint(tmp_path / f"virtual{dp}", other))
        assert found.same
        assert (found.compared, found.equal, found.tensors) == (21, 21, ())
        assert found.bytes == sum(tensor.nbytes for tensor in made.catalog.tensors.values())


def test_native_checkpoints_of_the_same_run() -> None:
    """The same steps at stages 2 and 3, saved by DeepSpeed; torch compares the whole tensors."""
    folders = OLDER / "0.14.4-z2-fp32", OLDER / "0.14.4-z3-fp32"
    found = compared(*folders)
    with ucp.open(folders[0]) as a, ucp.open(folders[1]) as b:
        unequal = {
            (name, state)
            for name, info in a.parameters.items()
            for state in info.states
            if not torch.equal(a.read(name, state), b.read(name, state))
        }
    assert {(t.name, t.state) for t in found.tensors} == unequal
    assert found.same


@pytest.mark.parametrize("limit", [limits.STREAM_BATCH_BYTES, 64])
def test_a_changed_element(
    tmp_path: Path, made: raw.Raw, consolidated: Path, limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "STREAM_BATCH_BYTES", limit)
    old = made.truth["layer.0.weight", "exp_avg"].reshape(-1)
    write(made, "layer.0.weight", "exp_avg", 77, np.float32(old[77] + 1).tobytes())
    write(made, "layer.0.weight", "exp_avg", 130, np.float32(old[130] - 4).tobytes())
    found = compared(consolidated, Checkpoint(tmp_path, made.catalog, Files()))
    (tensor,) = found.tensors
    assert (tensor.name, tensor.state, tensor.different, tensor.elements) == ("layer.0.weight", "exp_avg", 2, 165)
    assert tensor.first == tuple(int(i) for i in np.unravel_index(77, (5, 3, 11)))
    assert tensor.absolute == pytest.approx(4, rel=1e-6)
    new = old.copy()
    new[77], new[130] = np.float32(old[77] + 1), np.float32(old[130] - 4)
    apart = np.abs(new.astype(float) - old)[[77, 130]] / np.maximum(np.abs(new), np.abs(old))[[77, 130]]
    assert tensor.relative == pytest.approx(apart.max())
    assert not found.same
    assert found.equal == 20
    tolerated = compared(consolidated, Checkpoint(tmp_path, made.catalog, Files()), absolute=4.1)
    assert tolerated.same
    assert len(tolerated.tensors) == 1


@pytest.mark.parametrize("limit", [1, 7, 64, 1000, 1 << 20])
def test_batches_hold_every_element_once_within_the_limit(made: raw.Raw, limit: int) -> None:
    tensors = list(made.catalog.tensors.values())
    held = [0] * len(tensors)
    for batch in stream.batches(tensors, limit):
        sizes = [(piece.last - piece.first) * itemsize(tensors[piece.index].dtype) for piece in batch]
        assert sum(sizes) <= limit or (len(batch) == 1 and batch[0].last - batch[0].first == 1)
        for piece in batch:
            assert piece.first == held[piece.index]
            held[piece.index] = piece.last
    assert held == [int(np.prod(tensor.shape)) for tensor in tensors]


def test_values_that_are_no_numbers(tmp_path: Path, made: raw.Raw, consolidated: Path) -> None:
    write(made, "scale", "param", 0, np.float32(np.nan).tobytes())
    (tensor,) = compared(consolidated, Checkpoint(tmp_path, made.catalog, Files()), absolute=1e9).tensors
    assert (tensor.unlike, tensor.beyond, tensor.first) == (1, 1, (0,))
    same = compared(Checkpoint(tmp_path, made.catalog, Files()), Checkpoint(tmp_path, made.catalog, Files()))
    assert same.same  # not a number, with the same bits


def test_the_sign_of_zero_counts_unless_tolerated(tmp_path: Path, made: raw.Raw) -> None:
    write(made, "scale", "param", 0, np.float32(0.0).tobytes())
    zero = raw.write_consolidated(tmp_path / "zero", made.catalog)
    write(made, "scale", "param", 0, np.float32(-0.0).tobytes())
    assert not compared(zero, Checkpoint(tmp_path, made.catalog, Files())).same
    assert compared(zero, Checkpoint(tmp_path, made.catalog, Files()), absolute=1e-9).same


def reshaped(catalog: Catalog, name: str, shape: tuple[int, ...]) -> Catalog:
    from ucp.geometry import whole

    tensors = dict(catalog.tensors)
    for state in raw.STATES:
        old = tensors[name, state]
        tensors[name, state] = LogicalTensor(name, state, shape, old.dtype, whole(shape), np.array([24], np.int64))
    return replace(
        catalog,
        tensors=tensors,
        parameters={**catalog.parameters, name: replace(catalog.parameters[name], shape=shape)},
    )


def test_names_shapes_and_training_state(tmp_path: Path, made: raw.Raw, consolidated: Path) -> None:
    catalog = reshaped(made.catalog, "layer.0.bias", (3,))
    infos = dict(catalog.parameters)
    tensors = dict(catalog.tensors)
    del infos["mask"], tensors["mask", "param"], tensors["scale", "exp_avg"]
    infos["scale"] = replace(
        infos["scale"], states={"param": "float32", "exp_avg_sq": "float32"}, scalars={"step": 8.0}
    )
    options = {"lr": 2e-3, "betas": [0.9, 0.95], "weight_decay": 0.0}
    state = replace(
        catalog.training_state,
        param_groups=(ParamGroup(catalog.training_state.param_groups[0].names, options),),
        dp_world_size=64,  # of the layout: no difference
        client_state={"epoch": 3},
    )
    catalog = replace(catalog, parameters=infos, tensors=tensors, training_state=state)
    found = compared(consolidated, Checkpoint(tmp_path, catalog, Files()))
    assert found.only_a == ("scale:exp_avg", "mask")
    assert found.only_b == ()
    assert found.shapes == {f"layer.0.bias:{state}": ((2,), (3,)) for state in raw.STATES}
    assert found.scalars == {"scale:step": ("7.0", "8.0")}
    assert found.training_state == {
        "param_groups[0].options.lr": ("0.001", "0.002"),
        "client_state.epoch": ("2", "3"),
    }
    assert found.tensors == ()
    backward = compared(Checkpoint(tmp_path, catalog, Files()), consolidated)
    assert (backward.only_a, backward.only_b) == ((), ("mask", "scale:exp_avg"))


def test_a_tied_parameter_is_found_under_its_other_name(tmp_path: Path, made: raw.Raw) -> None:
    shapes = {"head.weight" if name == "embed.weight" else name: shape for name, shape in raw.SHAPES.items()}
    other = raw.make(tmp_path / "other", shapes=shapes)
    a, b = (Checkpoint(tmp_path, one.catalog, Files()) for one in (made, other))
    for left, right in ((a, b), (b, a)):
        found = diff(left, right)
        assert (found.only_a, found.only_b, found.tensors, found.training_state) == ((), (), (), {})


def grouped(catalog: Catalog, *groups: tuple[str, float]) -> Checkpoint:
    """A checkpoint with groups of these names (parted by spaces) and learning rates."""
    state = replace(
        catalog.training_state, param_groups=tuple(ParamGroup(tuple(n.split()), {"lr": lr}) for n, lr in groups)
    )
    return Checkpoint(Path("/saved"), replace(catalog, training_state=state), Files())


@pytest.mark.parametrize(
    ("b", "found"),
    [
        # one parameter more, in front
        ([("new a b c", 0.1), ("d e", 0.2)], {"[0].names": ("3 names", "4 names, only here: 'new'")}),
        # another order, of groups and in them
        ([("e d", 0.2), ("a c b", 0.1)], {}),
        ([("e d", 0.2), ("a c b", 0.3)], {"[0].options.lr": ("0.1", "0.3")}),
        # one that has moved
        (
            [("a b", 0.1), ("c d e", 0.2)],
            {
                "[0].names": ("3 names, only here: 'c'", "2 names"),
                "[1].names": ("2 names", "3 names, only here: 'c'"),
            },
        ),
        # a group more, a group less, another one
        ([("a b c", 0.1), ("d e", 0.2), ("f g h i j", 0.3)], {"[2]": ("none", "5 names: 'f', 'g', 'h', …")}),
        ([("d e", 0.2)], {"[0]": ("3 names: 'a', 'b', 'c'", "none")}),
        ([("a b c", 0.1), ("x", 0.2)], {"[1]": ("2 names: 'd', 'e'", "1 name: 'x'")}),
        (
            [("a b c", 0.1), ("d", 0.3), ("e", 0.2)],
            {
                "[1].names": ("2 names, only here: 'e'", "1 name"),
                "[1].options.lr": ("0.2", "0.3"),
                "[2]": ("none", "1 name: 'e'"),
            },
        ),
    ],
)
def test_param_groups_are_compared_by_their_names(
    made: raw.Raw, b: list[tuple[str, float]], found: dict[str, tuple[str, str]]
) -> None:
    a = grouped(made.catalog, ("a b c", 0.1), ("d e", 0.2))
    named = {f"param_groups{key}": values for key, values in found.items()}
    assert diff(a, grouped(made.catalog, *b), values=False).training_state == named


def test_hyperparameters_that_one_has_not_recorded(made: raw.Raw) -> None:
    a = grouped(made.catalog, ("a b", 0.1), ("", 0.2))
    state = replace(a.training_state, param_groups=(ParamGroup(("a", "b"), None), ParamGroup((), {"lr": 0.2})))
    b = Checkpoint(Path("/saved"), replace(made.catalog, training_state=state), Files())
    found = diff(a, b, values=False).training_state
    assert found == {"param_groups[0].options": ("1 recorded", "not recorded")}


def test_element_types(tmp_path: Path) -> None:
    """The same values in bfloat16 and float32."""
    a = raw.make(tmp_path / "a", shapes={"w": (4, 6)}, states=("param",))
    rounded = torch.from_numpy(a.truth["w", "param"].copy()).bfloat16()
    (tmp_path / "low.bin").write_bytes(rounded.view(torch.uint8).numpy().tobytes())
    low = replace(a.catalog.files[0], path=str(tmp_path / "low.bin"), size=48)
    tensor = a.catalog.tensors["w", "param"]
    from ucp.geometry import whole

    files = (*a.catalog.files, low)
    blocks = whole((4, 6), 0, len(files) - 1)
    tensors = {
        **a.catalog.tensors,
        ("w", "param"): LogicalTensor("w", "param", (4, 6), "bfloat16", blocks, np.zeros(1, np.int64)),
    }
    b = replace(a.catalog, files=files, tensors=tensors)
    found = compared(Checkpoint(tmp_path, a.catalog, Files()), Checkpoint(tmp_path, b, Files()), params=["w"])
    (one,) = found.tensors
    assert one.dtypes == (tensor.dtype, "bfloat16")
    apart = (torch.from_numpy(a.truth["w", "param"].copy()) - rounded.float()).abs()
    assert one.different == int((apart > 0).sum())
    assert one.absolute == pytest.approx(float(apart.max()))
    assert not found.same
    assert compared(
        Checkpoint(tmp_path, a.catalog, Files()),
        Checkpoint(tmp_path, b, Files()),
        params=["w"],
        relative=0.01,
        types=False,
    ).same


def test_only_what_is_asked_for(tmp_path: Path, made: raw.Raw, consolidated: Path) -> None:
    write(made, "scale", "exp_avg", 0, b"\0\0\0\0")
    changed = Checkpoint(tmp_path, made.catalog, Files())
    assert compared(consolidated, changed, states=["param"]).same
    assert compared(consolidated, changed, params=["layer.*"]).compared == 6
    assert not compared(consolidated, changed, params=["scale"]).same
    assert compared(consolidated, changed, values=False).same


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_finite_and_values_agree_with_torch(dtype: torch.dtype) -> None:
    bits = torch.randint(
        0, 256, (4096 * dtype.itemsize,), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)
    )
    special = torch.tensor([float("inf"), -float("inf"), float("nan"), 0.0, -0.0, 1.5], dtype=dtype)
    values = torch.cat([bits.view(dtype), special])
    raw_bytes = values.view(torch.uint8).numpy()
    name = str(dtype).removeprefix("torch.")
    assert not_finite(raw_bytes, name).tolist() == (~torch.isfinite(values)).nonzero().flatten().tolist()
    numbers = as_numbers(raw_bytes, name)
    assert numbers is not None
    assert torch.equal(torch.nan_to_num(torch.from_numpy(numbers)), torch.nan_to_num(values.double()))


@pytest.mark.parametrize("name", ["float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz"])
def test_finite_small_types_agree_with_torch(name: str) -> None:
    every = torch.arange(256, dtype=torch.uint8)
    values = every.view(getattr(torch, name)).float()
    assert not_finite(every.numpy(), name).tolist() == (~torch.isfinite(values)).nonzero().flatten().tolist()
