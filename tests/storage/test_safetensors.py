"""safetensors files against the real library, both ways, and against everything that its format forbids."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from tests.property import law
from tests.storage.torch_pt.graphs import read_tensor, same_bits
from ucp.errors import BadArgument, DamagedCheckpoint, UcpError, Unsupported
from ucp.storage import dtypes, safetensors

SAVABLE = [n for n in dtypes.names() if hasattr(torch, n) and n not in ("complex32", "complex128", "float8_e8m0fnu")]


def tensor(name: str, *shape: int) -> torch.Tensor:
    dtype = dtypes.to_torch(name)
    if name == "bool":
        return torch.randint(0, 2, shape).bool()
    raw = torch.randint(0, 256, (int(np.prod(shape, dtype=int)) * dtype.itemsize,), dtype=torch.uint8)
    return raw.view(dtype).reshape(shape)


def write(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> safetensors.FilePlan:
    """Write what `plan_file` plans: each tensor by itself, the last first, the header at the end."""
    plan = safetensors.plan_file(
        [(name, dtypes.from_torch(t.dtype), tuple(t.shape)) for name, t in tensors.items()], metadata
    )
    with open(path, "wb") as stream:
        stream.truncate(plan.size)
        for name in reversed(list(tensors)):
            os.pwrite(
                stream.fileno(), tensors[name].reshape(-1).view(torch.uint8).numpy().tobytes(), plan.offsets[name]
            )
        os.pwrite(stream.fileno(), plan.header, 0)
    return plan


def test_what_the_library_writes_is_read(tmp_path: Path) -> None:
    tensors = {f"{name} ä": tensor(name, 3, 5) for name in SAVABLE}
    tensors |= {"scalar": torch.tensor(3.5), "empty": torch.empty(0, 4), "row": torch.arange(7)}
    path = tmp_path / "a.safetensors"
    save_file(tensors, path, {"format": "pt", "x": "é"})
    header = safetensors.read_header(path)
    assert header.metadata == {"format": "pt", "x": "é"}
    assert header.file_size == path.stat().st_size
    assert set(header.tensors) == set(tensors)
    for name, ref in header.tensors.items():
        assert ref.is_contiguous
        assert same_bits(read_tensor(ref), tensors[name])


def test_what_is_planned_opens_in_the_library(tmp_path: Path) -> None:
    tensors = {f"{name} ä": tensor(name, 3, 5) for name in SAVABLE}
    tensors |= {"scalar": torch.tensor(3.5), "empty": torch.empty(0, 4), "row": torch.arange(7)}
    path = tmp_path / "a.safetensors"
    plan = write(path, tensors, {"format": "pt"})
    assert len(plan.header) % safetensors.ALIGNMENT == 0
    assert plan.size == path.stat().st_size
    for name, offset in plan.offsets.items():
        assert offset % tensors[name].dtype.itemsize == 0
    loaded = load_file(path)
    assert set(loaded) == set(tensors)
    assert all(same_bits(loaded[name], tensors[name]) for name in tensors)
    with safe_open(path, "pt") as opened:
        assert opened.metadata() == {"format": "pt"}


@law(60)
@given(
    tensors=st.dictionaries(
        st.text(st.characters(exclude_categories=["Cs"]), max_size=8).filter(lambda name: name != "__metadata__"),
        st.tuples(st.sampled_from(SAVABLE), st.lists(st.integers(0, 4), max_size=3).map(tuple)),
        max_size=6,
    ),
    metadata=st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), st.text("ab", max_size=3), max_size=2),
)
def test_any_plan_is_a_file_that_both_readers_agree_on(
    tmp_path_factory: pytest.TempPathFactory,
    tensors: dict[str, tuple[str, tuple[int, ...]]],
    metadata: dict[str, str],
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.safetensors"
    content = {name: tensor(dtype, *shape) for name, (dtype, shape) in tensors.items()}
    plan = write(path, content, metadata)
    loaded = load_file(path)
    assert set(loaded) == set(content)
    header = safetensors.read_header(path)
    assert header.metadata == metadata
    for name, expected in content.items():
        assert same_bits(loaded[name], expected)
        assert header.tensors[name].offset == plan.offsets[name]
        assert same_bits(read_tensor(header.tensors[name]), expected)


def raw(path: Path, header: Any, data: bytes, length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def entry(start: int, stop: int, shape: Any = None, dtype: Any = "U8") -> dict[str, Any]:
    return {"dtype": dtype, "shape": [stop - start] if shape is None else shape, "data_offsets": [start, stop]}


ATTACKS: dict[str, tuple[Any, bytes, str]] = {
    "hole at the start": ({"a": entry(1, 3)}, b"...", "hole"),
    "hole between": ({"a": entry(0, 1), "b": entry(2, 3)}, b"...", "hole"),
    "overlap": ({"a": entry(0, 2), "b": entry(1, 3)}, b"...", "overlap"),
    "same bytes twice": ({"a": entry(0, 3), "b": entry(0, 3)}, b"...", "overlap"),
    "bytes after the end": ({"a": entry(0, 3)}, b"....", "longer"),
    "truncated": ({"a": entry(0, 3)}, b"..", "truncated"),
    "negative offset": ({"a": entry(-1, 2)}, b"...", "damaged description"),
    "backwards": ({"a": {"dtype": "U8", "shape": [0], "data_offsets": [3, 0]}}, b"...", "hold -3"),
    "shape too large": ({"a": entry(0, 3, [4])}, b"...", "4 bytes"),
    "shape overflows": ({"a": entry(0, 3, [2**40, 2**40])}, b"...", "bytes"),
    "negative shape": ({"a": entry(0, 3, [-1, -3])}, b"...", "damaged description"),
    "shape no list": ({"a": entry(0, 3, 3)}, b"...", "damaged description"),
    "shape of bools": ({"a": entry(0, 1, [True])}, b".", "damaged description"),
    "three offsets": ({"a": {**entry(0, 3), "data_offsets": [0, 1, 3]}}, b"...", "damaged description"),
    "missing field": ({"a": {"dtype": "U8", "shape": [3]}}, b"...", "should have"),
    "entry no object": ({"a": 3}, b"", "should have"),
    "metadata no text": ({"__metadata__": {"a": 1}}, b"", "text to text"),
    "metadata no object": ({"__metadata__": ["a"]}, b"", "text to text"),
    "no JSON": (b"{x}", b"", "not valid"),
    "JSON list": (b"[]", b"", "begin with"),
    "leading space": (b" {}", b"", "begin with"),
    "no UTF-8": (b'{"\xff":1}', b"", "not valid"),
    "name twice": (b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"a":{}}', b".", "twice"),
    "deep JSON": (b'{"a":' + b"[" * 100_000, b"", "not valid"),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_files_that_the_format_forbids_are_damaged(tmp_path: Path, attack: str) -> None:
    header, data, word = ATTACKS[attack]
    path = raw(tmp_path / "a.safetensors", header, data)
    with pytest.raises(DamagedCheckpoint, match=rf"a\.safetensors: .*{word}"):
        safetensors.read_header(path)
    if attack != "leading space":  # the format's README forbids it, and the library reads it
        with pytest.raises(SafetensorError):
            load_file(path)


def test_lengths_that_cannot_be_are_damaged(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    for length in (3, 2**63, 2**64 - 1):
        with pytest.raises(DamagedCheckpoint, match=rf"header of {length} bytes in a file of 10"):
            safetensors.read_header(raw(path, b"{}", b"", length))
    path.write_bytes(b"")
    with pytest.raises(DamagedCheckpoint, match="file of 0"):
        safetensors.read_header(path)
    with open(path, "wb") as stream:  # a hole: it takes no space
        stream.write((safetensors.MAX_HEADER + 1).to_bytes(8, "little"))
        stream.truncate(safetensors.MAX_HEADER + 100)
    with pytest.raises(DamagedCheckpoint, match="more than the 100000000 allowed"):
        safetensors.read_header(path)
    with pytest.raises(DamagedCheckpoint, match="No such file"):
        safetensors.read_header(tmp_path / "none")


def test_a_file_cut_anywhere_is_damaged(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"a": torch.arange(5), "b": torch.ones(2, 2)}, path)
    data = path.read_bytes()
    for length in range(len(data)):
        path.write_bytes(data[:length])
        with pytest.raises(DamagedCheckpoint, match=r"a\.safetensors: "):
            safetensors.read_header(path)


def test_types_of_the_future_are_unsupported(tmp_path: Path) -> None:
    path = raw(tmp_path / "a.safetensors", {"a": entry(0, 3, [4], "F6_E2M3")}, b"...")
    with pytest.raises(Unsupported, match=r"a\.safetensors: tensor 'a': .*'F6_E2M3'"):
        safetensors.read_header(path)


@law(150)
@given(data=st.data())
def test_any_damage_is_reported_or_harmless(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzz.safetensors"
    whole = {"a": torch.arange(5), "b": torch.ones(2, 2), "c": torch.empty(0)}
    save_file(whole, path, {"m": "x"})
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    try:
        header = safetensors.read_header(path)
    except UcpError:
        return
    # What passes covers the file exactly, whatever the damage has made of the names.
    spans = sorted(ref.span for ref in header.tensors.values() if ref.numel)
    assert [start for start, _ in spans] == [header.data_start, *(stop for _, stop in spans[:-1])]
    assert spans[-1][1] == len(content)


def test_names_that_clash_are_refused() -> None:
    with pytest.raises(BadArgument, match="'a' cannot be used twice"):
        safetensors.plan_file([("a", "float32", (1,)), ("a", "float32", (1,))])
    with pytest.raises(BadArgument, match="__metadata__"):
        safetensors.plan_file([("__metadata__", "float32", (1,))])
    with pytest.raises(Unsupported, match="complex128"):
        safetensors.plan_file([("a", "complex128", (1,))])
