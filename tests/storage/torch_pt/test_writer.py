"""Planned torch files are read back by torch itself and by Python's zipfile."""

from __future__ import annotations

import argparse
import os
import sys
import zipfile
import zlib
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ucp.errors import Unsupported
from ucp.storage.crc32 import combine, combine_all
from ucp.storage.dtypes import itemsize
from ucp.storage.torch_pt.pickler import Placeholder, SharedStorage
from ucp.storage.torch_pt.values import DeviceName, DtypeName, Size, Standin, TensorRef
from ucp.storage.torch_pt.writer import plan_torch_file, scalar_tensor

DTYPES = [
    "float32",
    "float64",
    "float16",
    "bfloat16",
    "int64",
    "int32",
    "int8",
    "uint8",
    "bool",
    "float8_e4m3fn",
    "uint16",
]


def write(path: Path, obj: Any, data: dict[Placeholder, bytes] | None = None) -> None:
    """Write the planned file with these bytes in the placeholders, and the CRCs of what then lies in the storages."""
    planned = plan_torch_file(obj)
    raw = bytearray(planned.size)
    for offset, literal in planned.literals:
        raw[offset : offset + len(literal)] = literal
    for placeholder, content in (data or {}).items():
        at = planned.offsets[placeholder]
        raw[at : at + len(content)] = content
    for entry in planned.crc32_entries:
        crc = zlib.crc32(raw[entry.offset : entry.offset + entry.size])
        for position in entry.positions:
            raw[position : position + 4] = crc.to_bytes(4, "little")
    path.write_bytes(raw)


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


@st.composite
def structures(draw: st.DrawFn) -> tuple[Any, Any, dict[Placeholder, bytes]]:
    """(object with placeholders, the same with real tensors, the placeholders' bytes)."""
    data: dict[Placeholder, bytes] = {}
    plain = st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.floats(allow_nan=False),
        st.text(max_size=5),
        st.binary(min_size=1, max_size=5),  # torch's own weights_only refuses empty bytes of protocol 2
    ).map(lambda value: (value, value))

    @st.composite
    def tensor(draw: st.DrawFn) -> tuple[Any, Any]:
        dtype = draw(st.sampled_from(DTYPES))
        shape = tuple(draw(st.lists(st.integers(0, 5), max_size=3)))
        count = int(np.prod(shape, dtype=np.int64))
        raw = bytes(draw(st.lists(st.integers(0, 1 if dtype == "bool" else 255), min_size=count, max_size=count)))
        raw = b"".join(bytes([b]) * itemsize(dtype) for b in raw)
        real = (
            torch.frombuffer(bytearray(raw), dtype=torch.uint8).view(getattr(torch, dtype)).reshape(shape)
            if raw
            else (torch.empty(shape, dtype=getattr(torch, dtype)))
        )
        known = draw(st.booleans())
        placeholder = Placeholder(shape, dtype, data=raw if known else None)
        if not known:
            data[placeholder] = raw
        return placeholder, real

    def containers(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
        lists = st.lists(inner, max_size=3)
        keyed = st.lists(st.tuples(st.text(max_size=3), inner), max_size=3, unique_by=lambda item: item[0])
        return st.one_of(
            lists.map(lambda items: ([a for a, _ in items], [b for _, b in items])),
            lists.map(lambda items: (tuple(a for a, _ in items), tuple(b for _, b in items))),
            keyed.map(lambda items: ({k: a for k, (a, _) in items}, {k: b for k, (_, b) in items})),
            keyed.map(
                lambda items: (
                    OrderedDict((k, a) for k, (a, _) in items),
                    OrderedDict((k, b) for k, (_, b) in items),
                )
            ),
        )

    planned, real = draw(st.recursive(st.one_of(plain, tensor()), containers, max_leaves=8))
    used = plan_torch_file(planned).offsets  # keys drawn twice are drawn again, and leave placeholders behind
    return planned, real, {placeholder: raw for placeholder, raw in data.items() if placeholder in used}


def assert_same(found: Any, wanted: Any) -> None:
    if isinstance(wanted, torch.Tensor):
        assert isinstance(found, torch.Tensor)
        assert found.dtype == wanted.dtype
        assert found.shape == wanted.shape
        assert bits(found) == bits(wanted)
    elif isinstance(wanted, dict):
        assert type(found) is type(wanted)
        assert list(found) == list(wanted)
        for key in wanted:
            assert_same(found[key], wanted[key])
    elif isinstance(wanted, list | tuple):
        assert type(found) is type(wanted)
        assert len(found) == len(wanted)
        for a, b in zip(found, wanted, strict=True):
            assert_same(a, b)
    else:
        assert type(found) is type(wanted)
        assert found == wanted


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(structures())
def test_torch_loads_what_was_planned(tmp_path: Path, made: tuple[Any, Any, dict[Placeholder, bytes]]) -> None:
    planned, real, data = made
    path = tmp_path / "a.pt"
    write(path, planned, data)
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
    assert_same(torch.load(path, weights_only=True), real)
    assert_same(torch.load(path, weights_only=False), real)
    assert_same(torch.load(path, weights_only=True, mmap=True), real)


def test_storages_lie_on_aligned_bytes_and_meta_loads_know_where(tmp_path: Path) -> None:
    tensors = {f"t{i}": Placeholder((i, 3), "bfloat16") for i in range(1, 20)}
    data = {p: os.urandom(p.extent) for p in tensors.values()}
    path = tmp_path / "a.pt"
    write(path, tensors, data)
    planned = plan_torch_file(tensors)
    assert [offset % 64 for offset in planned.offsets.values()] == [0] * len(tensors)
    for name, meta in torch.load(path, map_location="meta", weights_only=True).items():
        offset = getattr(meta.untyped_storage(), "_checkpoint_offset", None)
        if offset is None:
            pytest.skip("this torch does not tell where storages lie")
        assert offset == planned.offsets[tensors[name]]


def test_shared_storages_strides_and_repeated_tensors_stay_so(tmp_path: Path) -> None:
    storage = SharedStorage(24 * 4)
    first = Placeholder((2, 3), "float32", storage=storage)
    second = Placeholder((3, 2), "float32", (2, 4), storage, 6)
    whole = np.arange(24, dtype="<f4")
    path = tmp_path / "a.pt"
    write(path, {"a": first, "b": second, "again": first}, {first: whole.tobytes()})
    loaded = torch.load(path, weights_only=True)
    assert torch.equal(loaded["a"], torch.arange(6.0).reshape(2, 3))
    assert torch.equal(loaded["b"], torch.arange(24.0).as_strided((3, 2), (2, 4), 6))
    assert loaded["again"] is loaded["a"]
    assert loaded["b"].untyped_storage().data_ptr() == loaded["a"].untyped_storage().data_ptr()


def test_values_of_torch_numpy_and_python(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    array = np.arange(6, dtype=np.int16).reshape(2, 3)
    tensor = torch.arange(5)
    write(
        path,
        {
            "size": Size((2, 3)),
            "dtype": DtypeName("bfloat16"),
            "device": DeviceName("cuda:1"),
            "cpu": DeviceName("cpu"),
            "step": scalar_tensor(3.0),
            "parameter": Placeholder((2,), "float32", is_parameter=True, data=b"\0" * 8),
            "array": array,
            "number": np.float64(0.5),
            "namespace": argparse.Namespace(lr=0.1),
            "tensor": tensor,
            "again": [tensor],
        },
    )
    loaded = torch.load(path, weights_only=False)
    assert loaded["size"] == torch.Size((2, 3))
    assert type(loaded["size"]) is torch.Size
    assert loaded["dtype"] is torch.bfloat16
    assert loaded["device"] == torch.device("cuda", 1)
    assert loaded["cpu"] == torch.device("cpu")
    assert loaded["step"].dtype == torch.float32
    assert loaded["step"].shape == ()
    assert loaded["step"] == 3
    assert isinstance(loaded["parameter"], torch.nn.Parameter)
    assert loaded["array"].dtype == np.int16
    assert (loaded["array"] == array).all()
    assert loaded["number"] == 0.5
    assert loaded["namespace"].lr == 0.1
    assert torch.equal(loaded["tensor"], tensor)
    assert loaded["again"][0] is loaded["tensor"]


def test_deepspeed_objects_without_deepspeed(tmp_path: Path) -> None:
    scaler = {"cur_scale": 256.0, "dynamic": True, "cur_iter": 3, "dtype": DtypeName("float16")}
    stage = Standin("deepspeed.runtime.zero.config", "ZeroStageEnum", (2,))
    path = tmp_path / "a.pt"
    write(
        path,
        {
            "scaler": Standin("deepspeed.runtime.fp16.loss_scaler", "DynamicLossScaler", (), scaler),
            "stage": stage,
            "address": Standin("deepspeed.utils.tensor_fragment", "fragment_address", (), {"numel": 5, "start": 7}),
            "again": stage,
        },
    )
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    loaded = torch.load(path, weights_only=False)
    assert type(loaded["scaler"]) is DynamicLossScaler
    assert vars(loaded["scaler"]) == {**scaler, "dtype": torch.float16}
    assert loaded["stage"] is ZeroStageEnum.gradients
    assert loaded["again"] is ZeroStageEnum.gradients
    assert loaded["address"] == fragment_address(numel=5, start=7)


def test_neither_torch_nor_deepspeed_is_imported() -> None:
    code = (
        "import sys; from ucp.storage.torch_pt.writer import *; from ucp.storage.torch_pt.values import *;"
        "plan_torch_file([Placeholder((2,), 'bfloat16'), Standin('deepspeed.a', 'B'), DtypeName('float16')]);"
        "sys.exit(bool({'torch', 'deepspeed'} & set(sys.modules)))"
    )
    root = Path(__file__).resolve().parents[3]
    shim = "import sys, types; p = types.ModuleType('ucp'); p.__path__ = ['ucp']; sys.modules['ucp'] = p;"
    assert (
        os.spawnv(os.P_WAIT, sys.executable, [sys.executable, "-c", f"import os; os.chdir({str(root)!r});{shim}{code}"])
        == 0
    )


def test_a_reference_into_another_file_is_refused() -> None:
    ref = TensorRef("model.pt", 0, "float32", (2,), (1,), "cpu", ("0", 2))
    with pytest.raises(Unsupported, match=r"model\.pt: a tensor of shape \[2\]"):
        plan_torch_file({"a": ref})


def test_records_beyond_4_gib_have_zip64_numbers(tmp_path: Path) -> None:
    """A sparse file: five billion zeros that cost no disk, and a small tensor behind them."""
    huge, small = (
        Placeholder((5 << 30,), "uint8"),
        Placeholder((4,), "float32", data=np.arange(4, dtype="<f4").tobytes()),
    )
    planned = plan_torch_file({"huge": huge, "small": small})
    path = tmp_path / "a.pt"
    with path.open("wb") as file:
        file.truncate(planned.size)
        for offset, literal in planned.literals:
            file.seek(offset)
            file.write(literal)
    with zipfile.ZipFile(path) as archive:
        assert archive.getinfo("archive/data/0").file_size == 5 << 30
        assert archive.getinfo("archive/data/1").header_offset > 5 << 30
        assert np.frombuffer(archive.read("archive/data/1"), "<f4").tolist() == [0, 1, 2, 3]
    loaded = torch.load(path, weights_only=True, mmap=True)
    assert loaded["huge"].numel() == 5 << 30
    assert loaded["huge"][-1] == 0
    assert loaded["small"].tolist() == [0, 1, 2, 3]


@pytest.mark.slow
def test_more_than_65535_records(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    write(path, [Placeholder((1,), "uint8", data=bytes([k % 256])) for k in range(66_000)])
    with zipfile.ZipFile(path) as archive:
        assert len(archive.infolist()) == 66_003
    loaded = torch.load(path, weights_only=False)  # weights_only takes ten seconds for so many
    assert [int(t) for t in loaded[-300:]] == [k % 256 for k in range(66_000)][-300:]


@given(st.lists(st.binary(max_size=300), max_size=6))
def test_crcs_combine(pieces: list[bytes]) -> None:
    whole = b"".join(pieces)
    assert combine_all((zlib.crc32(piece), len(piece)) for piece in pieces) == zlib.crc32(whole)
    half = len(whole) // 3
    assert combine(zlib.crc32(whole[:half]), zlib.crc32(whole[half:]), len(whole) - half) == zlib.crc32(whole)
