"""Real torch.save files, read without torch; torch.load is the truth."""

from __future__ import annotations

import argparse
import collections
import os
import pathlib
import random
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.property import law
from tests.storage.torch_pt.graphs import FORMATS, assert_same, read_tensor, same_bits, save
from ucp.errors import DamagedCheckpoint, UcpError, UnsafePickle, Unsupported
from ucp.storage import dtypes
from ucp.storage.torch_pt.reader import TensorRef, load
from ucp.storage.torch_pt.values import Standin

each_format = pytest.mark.parametrize("file_format", FORMATS)


def random_tensor(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    """Random bits, so that NaNs and denormals come along."""
    if dtype == torch.bool:
        return torch.randint(0, 2, shape).bool()
    width = torch.empty(0, dtype=dtype).element_size()
    count = int(np.prod(shape, dtype=int)) * width
    return torch.randint(0, 256, (count,), dtype=torch.uint8).view(dtype).reshape(shape)


def tensor_graph() -> dict[str, Any]:
    torch.manual_seed(0)
    base = torch.randn(6, 8)
    with_attributes = torch.randn(3)
    with_attributes.ds_id = 4  # type: ignore[attr-defined]
    parameter = torch.nn.Parameter(torch.randn(2, 3))
    parameter_with_attributes = torch.nn.Parameter(torch.randn(2))
    parameter_with_attributes.ds_shape = torch.Size([2])  # type: ignore[attr-defined]
    return {
        "whole": base,
        "row": base[2],
        "column": base[:, 3],
        "box": base[1:4, 2:5],
        "transposed": base.t(),
        "repeated": torch.randn(1, 3).expand(4, 3),
        "scalar": torch.tensor(3.5),
        "bf16 scalar": torch.tensor(3.5, dtype=torch.bfloat16),
        "empty": torch.empty(0),
        "empty matrix": torch.empty(3, 0, 2),
        "empty view": base[3:3],
        "none left": base.new_zeros(0, 5).bfloat16(),
        "parameter": parameter,
        "parameter with attributes": parameter_with_attributes,
        "with attributes": with_attributes,
        "nested": [{"a": (base[0], [torch.arange(5)])}, {}],
        "state_dict": torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2)).state_dict(),
    }


def value_graph() -> dict[str, Any]:
    counts: collections.defaultdict[str, Any] = collections.defaultdict(list)
    counts["a"].append(1)
    return {
        "plain": [None, True, False, 0, -1, 255, 256, 65536, -(2**31), 2**31, 2**63, -(2**200), 1.5, float("inf"), ""],
        "text": ["abc", "ä€\U0001f600", "x" * 300, "lone \udc80"],
        "bytes": [b"", b"abc\xff", bytearray(b"de"), bytearray()],
        3: "int key",
        (1, "b"): "tuple key",
        "sets": [{1, 2}, set(), frozenset({"a"}), frozenset()],
        "others": [slice(1, None, 2), 2 - 3.5j, range(2, 9, 3)],
        "collections": [
            collections.OrderedDict(b=1, a=2),
            counts,
            collections.defaultdict(dict),
            collections.Counter("hello"),
            collections.deque([1, 2], maxlen=5),
        ],
        "namespace": argparse.Namespace(lr=1e-3, dtype=torch.bfloat16, inner=argparse.Namespace(x=[1])),
        "torch": [torch.Size([2, 3]), torch.Size([]), torch.device("cpu"), torch.device("cuda", 1), torch.float16],
        "paths": [pathlib.Path("a/b"), pathlib.PurePosixPath("/c")],
        "random": [random.getstate(), np.random.get_state(), torch.get_rng_state()],
        "numpy": [
            np.arange(6, dtype=np.int64).reshape(2, 3),
            np.asfortranarray(np.arange(6.0).reshape(2, 3)),
            np.float32(1.5),
            np.int64(7),
            np.bool_(True),
            np.array(["ab", "c"]),
            np.array([b"ab"]),
            np.zeros((0, 3), np.float16),
            np.array(4.5),
            np.dtype("float32"),
        ],
    }


# --- what torch writes, read ------------------------------------------------------------------------------------------


@each_format
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_tensors_lie_where_the_references_say(tmp_path: Path, file_format: str, protocol: int) -> None:
    path = save(tensor_graph(), tmp_path / "a.pt", file_format, protocol)
    assert assert_same(load(path), torch.load(path, weights_only=False)) == 24


@each_format
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_plain_values_are_equal_in_type_and_value(tmp_path: Path, file_format: str, protocol: int) -> None:
    path = save(value_graph(), tmp_path / "a.pt", file_format, protocol)
    assert_same(load(path), torch.load(path, weights_only=False))


@each_format
@pytest.mark.parametrize("name", [name for name in dtypes.names() if hasattr(torch, name)])
def test_every_element_type_keeps_its_bits(tmp_path: Path, file_format: str, name: str) -> None:
    tensor = random_tensor(getattr(torch, name), 3, 5)
    path = save({"t": tensor, "part": tensor[1:, 2:]}, tmp_path / "a.pt", file_format)
    refs = load(path)
    assert refs["t"].dtype == name
    assert same_bits(read_tensor(refs["t"]), tensor)
    assert same_bits(read_tensor(refs["part"]), tensor[1:, 2:])


@each_format
def test_tensors_of_one_storage_are_recognisable(tmp_path: Path, file_format: str) -> None:
    a, b = torch.randn(4, 4), torch.randn(16)
    refs = load(save({"a": a, "a1": a[1], "b": b, "again": a}, tmp_path / "x.pt", file_format))
    assert refs["a"].storage == refs["a1"].storage == refs["again"].storage
    assert refs["a"].storage != refs["b"].storage
    assert refs["a"].storage[1] == 16
    assert refs["a1"].offset - refs["a"].offset == 16  # one row of four float32


@each_format
def test_state_dict_keeps_its_metadata(tmp_path: Path, file_format: str) -> None:
    state = torch.nn.BatchNorm1d(2).state_dict()
    read = load(save(state, tmp_path / "a.pt", file_format))
    assert read._metadata == state._metadata  # type: ignore[attr-defined]


@each_format
def test_shared_and_recursive_containers_stay_so(tmp_path: Path, file_format: str) -> None:
    inner: list[Any] = [1]
    inner.append(inner)
    read = load(save({"a": inner, "b": inner}, tmp_path / "a.pt", file_format))
    assert read["a"] is read["b"]
    assert read["a"][1] is read["a"]


@each_format
@law(40)
@given(
    st.recursive(
        st.none()
        | st.booleans()
        | st.integers()
        | st.floats(allow_nan=False)
        | st.text()
        | st.binary()
        | st.builds(lambda n, m: torch.arange(n * m).reshape(n, m), st.integers(0, 4), st.integers(0, 4)),
        lambda inner: (
            st.lists(inner, max_size=4)
            | st.tuples(inner, inner)
            | st.dictionaries(st.text() | st.integers(), inner, max_size=4)
        ),
        max_leaves=12,
    )
)
def test_any_graph_reads_as_torch_reads_it(
    tmp_path_factory: pytest.TempPathFactory, file_format: str, graph: Any
) -> None:
    path = save(graph, tmp_path_factory.getbasetemp() / f"any-{file_format}.pt", file_format)
    assert_same(load(path), torch.load(path, weights_only=False))


def test_archives_of_any_name_and_copies_of_files_open(tmp_path: Path) -> None:
    path = save({"w": torch.arange(4)}, tmp_path / "odd name.with dots.bin")
    copy = path.rename(tmp_path / "renamed")
    assert read_tensor(load(str(copy))["w"]).tolist() == [0, 1, 2, 3]


def test_archives_without_checksums_open(tmp_path: Path) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        path = save(tensor_graph(), tmp_path / "a.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    assert_same(load(path), torch.load(path, weights_only=False))


def test_archives_of_more_than_4_gib_open(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    big = torch.empty(5 << 30, dtype=torch.uint8, device="cpu")
    with torch.serialization.skip_data():  # leaves a hole in the file where the data belong
        torch.save({"big": big, "after": torch.empty(7)}, path)
    del big
    refs = load(path)
    assert refs["after"].offset > 5 << 30
    # torch's own reader is the judge of both places.
    reader = torch._C.PyTorchFileReader(str(path))
    assert refs["big"].offset == reader.get_record_offset("data/0")
    assert refs["after"].offset == reader.get_record_offset("data/1")


def test_opening_reads_no_data_and_is_quick(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    state = {f"layer.{i}.weight": torch.empty(512, 512) for i in range(1000)}
    with torch.serialization.skip_data():
        torch.save(state, path)
    del state
    assert path.stat().st_size > 1000 << 20
    program = (
        "import sys, time\n"
        "from ucp.storage.torch_pt.reader import load\n"
        "def read():\n"
        "    return int(open('/proc/self/io').read().split('rchar: ')[1].split()[0])\n"
        "start, before = time.perf_counter(), read()\n"
        "assert len(load(sys.argv[1])) == 1000\n"
        "print(time.perf_counter() - start, read() - before, 'torch' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", program, str(path)], capture_output=True, text=True, check=True)
    seconds, count, torch_is_there = done.stdout.split()
    assert float(seconds) < 2  # 0.05 s on an idle machine
    assert int(count) < 1 << 20
    assert torch_is_there == "False"


def test_deepspeed_objects_become_stand_ins(tmp_path: Path) -> None:
    loss_scaler = pytest.importorskip("deepspeed.runtime.fp16.loss_scaler")
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    scaler = loss_scaler.DynamicLossScaler(
        init_scale=2**12,
        scale_window=7,
        min_scale=1,
        delayed_shift=2,
        consecutive_hysteresis=False,
        dtype=torch.float16,
    )
    graph = {
        "loss_scaler": scaler,
        "zero_stage": ZeroStageEnum.weights,
        "param_slice_mappings": [collections.OrderedDict(w=fragment_address(numel=5, start=3))],
    }
    read = load(save(graph, tmp_path / "a.pt"))
    standin = read["loss_scaler"]
    assert isinstance(standin, Standin)
    assert (standin.class_module, standin.class_name) == ("deepspeed.runtime.fp16.loss_scaler", "DynamicLossScaler")
    expected = {key: value for key, value in vars(scaler).items() if key != "dtype"}
    assert {key: value for key, value in standin.state.items() if key != "dtype"} == expected
    assert standin.cur_scale == 2**12
    assert str(standin.dtype) == "float16"
    assert read["zero_stage"].value == 3
    fragment = read["param_slice_mappings"][0]["w"]
    assert (fragment.numel, fragment.start) == (5, 3)
    with pytest.raises(AttributeError, match="fragment_address object has no attribute 'stop'"):
        fragment.stop  # noqa: B018


# --- refused by name --------------------------------------------------------------------------------------------------


def refused_graphs() -> dict[str, tuple[Any, str]]:
    return {
        "sparse": (torch.eye(3).to_sparse(), "sparse"),
        "sparse csr": (torch.eye(3).to_sparse_csr(), "sparse"),
        "quantised": (torch.quantize_per_tensor(torch.randn(3), 0.1, 0, torch.qint8), "quantised"),
        "meta": (torch.empty(3, device="meta"), "meta"),
        "conjugate": (torch.randn(3, dtype=torch.complex64).conj(), "conjugate"),
        "objects": (np.array([{}, None], object), "'O8'"),
        "structured": (np.zeros(2, [("a", "f4")]), "'V4'"),
        "big-endian array": (np.zeros(2, ">f4"), "big-endian"),
    }


@pytest.mark.filterwarnings("ignore")
@each_format
@pytest.mark.parametrize("kind", refused_graphs())
def test_what_is_no_plain_tensor_is_refused_by_name(tmp_path: Path, file_format: str, kind: str) -> None:
    graph, word = refused_graphs()[kind]
    path = save({"x": [graph]}, tmp_path / "a.pt", file_format)
    with pytest.raises(Unsupported, match=word) as caught:
        load(path)
    assert str(caught.value).startswith(str(path))


def rewrite(path: Path, changes: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> Path:
    """The same archive with other contents for some entries; `method` is used for those."""
    out = path.with_name("rewritten.pt")
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(out, "w") as new:
        for info in old.infolist():
            name = info.filename.split("/", 1)[1]
            content = changes.get(name, old.read(info))
            new.writestr(info.filename, content, method if name in changes else zipfile.ZIP_STORED)
    return out


def test_big_endian_compressed_and_torchscript_archives_are_refused(tmp_path: Path) -> None:
    path = save({"w": torch.arange(40)}, tmp_path / "a.pt")
    with pytest.raises(Unsupported, match="big-endian"):
        load(rewrite(path, {"byteorder": b"big"}))
    data = torch.arange(40).numpy().tobytes()
    with pytest.raises(Unsupported, match="'data/0' is compressed"):
        load(rewrite(path, {"data/0": data}, zipfile.ZIP_DEFLATED))
    script = tmp_path / "script.pt"
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), script)
    with pytest.raises(Unsupported, match="TorchScript"):
        load(script)


def test_pickled_modules_are_refused(tmp_path: Path) -> None:
    path = save(torch.nn.Linear(2, 2), tmp_path / "a.pt")
    with pytest.raises(UnsafePickle, match=r"torch\.nn\.modules\.linear\.Linear"):
        load(path)


# --- damage -----------------------------------------------------------------------------------------------------------


@each_format
def test_a_file_cut_anywhere_is_damaged(tmp_path: Path, file_format: str) -> None:
    data = save(
        {"w": torch.randn(30), "v": torch.randn(3), "n": [1, "text"]}, tmp_path / "a.pt", file_format
    ).read_bytes()
    cut = tmp_path / "cut.pt"
    for length in sorted({*range(0, len(data), 37), *range(20), *range(len(data) - 40, len(data))}):
        cut.write_bytes(data[:length])
        with pytest.raises(DamagedCheckpoint) as caught:
            load(cut)
        assert str(cut) in str(caught.value)


@each_format
def test_the_message_says_which_file_and_how_long_it_is(tmp_path: Path, file_format: str) -> None:
    data = save({"w": torch.randn(30)}, tmp_path / "a.pt", file_format).read_bytes()
    path = tmp_path / "cut.pt"
    path.write_bytes(data[:-10])
    with pytest.raises(DamagedCheckpoint, match=rf"cut\.pt: .*truncated.*\b{len(data) - 10}\b"):
        load(path)


def test_empty_missing_and_foreign_files_are_damaged(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    with pytest.raises(DamagedCheckpoint, match=r"x\.pt: there is no such file"):
        load(path)
    path.write_bytes(b"")
    with pytest.raises(DamagedCheckpoint, match=r"x\.pt: the file is empty \(0 bytes\)"):
        load(path)
    path.write_bytes(b"#!/bin/sh\necho no\n")
    with pytest.raises(DamagedCheckpoint, match=r"x\.pt: not a file that torch\.save wrote \(18 bytes"):
        load(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("hello.txt", "hello")
    with pytest.raises(DamagedCheckpoint, match=r"not one that torch\.save wrote"):
        load(path)
    with pytest.raises(DamagedCheckpoint, match="directory"):
        load(tmp_path)


def test_a_storage_of_another_length_than_the_pickle_says_is_damaged(tmp_path: Path) -> None:
    path = save({"w": torch.arange(40)}, tmp_path / "a.pt")
    for length in (0, 319, 328):
        with pytest.raises(
            DamagedCheckpoint, match=rf"'0' should be 40 elements of int64 \(320 bytes\).* {length} bytes"
        ):
            load(rewrite(path, {"data/0": bytes(length)}))


def test_tensors_beyond_their_storage_are_damaged(tmp_path: Path) -> None:
    path = save({"w": torch.arange(40)}, tmp_path / "a.pt")
    with zipfile.ZipFile(path) as archive:
        pickled = archive.read("a/data.pkl")
    # The shape (40,) is a small int in the pickle (K, 40) and a tuple of one; the storage's length is no tuple.
    larger = pickled.replace(b"K(\x85", b"K)\x85")
    assert larger != pickled
    with pytest.raises(DamagedCheckpoint, match=r"shape \(41,\).* 328 bytes.* has 320"):
        load(rewrite(path, {"data.pkl": larger}))


def test_entries_of_the_same_name_are_damaged(tmp_path: Path) -> None:
    path = save({"w": torch.arange(40)}, tmp_path / "a.pt")
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr("a/data/0", bytes(320))
    with pytest.raises(DamagedCheckpoint, match="same name"):
        load(path)


@pytest.mark.parametrize("value", [1, 129, 255])
def test_offsets_that_point_out_of_the_file(tmp_path: Path, value: int) -> None:
    """Each byte of a zip archive's end records, among them the high ones of 64-bit offsets."""
    content = save({"w": torch.arange(40)}, tmp_path / "a.pt").read_bytes()
    path = tmp_path / "broken.pt"
    told = []
    for at in range(len(content) - 98, len(content)):
        path.write_bytes(content[:at] + bytes([value]) + content[at + 1 :])
        try:
            load(path)
        except UcpError as error:
            told.append(str(error))
    assert len(told) > 20
    assert all(text.startswith(str(path)) for text in told)


@each_format
@law(150)
@given(data=st.data())
def test_any_damage_is_reported_as_ours(
    tmp_path_factory: pytest.TempPathFactory, file_format: str, data: st.DataObject
) -> None:
    folder = tmp_path_factory.getbasetemp()
    path = folder / f"fuzz-{file_format}.pt"
    if not path.exists():
        save({**value_graph(), "w": torch.randn(5), "p": torch.nn.Parameter(torch.ones(2))}, path, file_format)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 6))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    broken = folder / f"broken-{file_format}.pt"
    broken.write_bytes(content)
    message = ""
    try:
        load(broken)
    except UcpError as error:
        message = str(error)
    assert not message or message.startswith(str(broken))


def test_importing_the_reader_does_not_import_torch() -> None:
    root = Path(dtypes.__file__).parent
    modules = [f"ucp.storage.{path.stem}" for path in root.glob("[a-z]*.py")]
    modules += [f"ucp.storage.torch_pt.{path.stem}" for path in root.glob("torch_pt/[a-z]*.py")]
    assert len(modules) >= 10
    program = f"import sys, {', '.join(modules)}; assert 'torch' not in sys.modules and 'deepspeed' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True, env={**os.environ})


def test_spans_and_contiguity() -> None:
    ref = TensorRef("f", 100, "bfloat16", (2, 3), (8, 1), "cpu", ("0", 99))
    assert not ref.is_contiguous
    assert ref.span == (100, 100 + (8 + 2 + 1) * 2)
    assert (ref.numel, ref.nbytes) == (6, 12)
    assert TensorRef("f", 0, "int8", (1, 3), (77, 1), "cpu", ("0", 3)).is_contiguous
    assert TensorRef("f", 4, "int8", (0, 3), (3, 1), "cpu", ("0", 0)).span == (4, 4)
