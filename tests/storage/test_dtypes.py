"""The dtype table, against torch and safetensors themselves."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import _TYPES as SAFETENSORS_TYPES

from ucp.errors import Unsupported
from ucp.storage import dtypes

KNOWN = [name for name in dtypes.names() if hasattr(torch, name)]


@pytest.mark.parametrize("name", KNOWN)
def test_names_and_widths_are_torchs(name: str) -> None:
    dtype = dtypes.to_torch(name)
    assert str(dtype) == f"torch.{name}"
    assert dtypes.from_torch(dtype) == name
    assert dtypes.itemsize(name) == dtype.itemsize == dtypes.numpy_dtype(name).itemsize


@pytest.mark.parametrize("name", KNOWN)
def test_numpy_has_the_same_meaning_where_it_is_said_to(name: str) -> None:
    tensor = torch.tensor([1, 0, 3]).to(dtypes.to_torch(name)) if name != "complex32" else None
    if dtypes.is_numpy_native(name):
        assert tensor is not None
        raw = np.frombuffer(tensor.view(torch.uint8).numpy().tobytes(), dtypes.numpy_dtype(name))
        assert (raw == tensor.numpy()).all()
        assert raw.dtype == tensor.numpy().dtype
    else:
        assert dtypes.numpy_dtype(name).kind == "u"


def test_safetensors_codes_are_the_librarys() -> None:
    for code, dtype in SAFETENSORS_TYPES.items():
        assert dtypes.from_safetensors(code) == str(dtype).removeprefix("torch.")
        assert dtypes.to_safetensors(dtypes.from_torch(dtype)) == code


@pytest.mark.parametrize(
    "name",
    [
        n
        for n in dir(torch)
        if n.endswith("Storage") and hasattr(getattr(torch, n), "dtype") and n[0] != "Q" and n != "Storage"
    ],
)
def test_storage_classes_are_torchs(name: str) -> None:
    dtype = getattr(torch, name).dtype
    if isinstance(dtype, torch.dtype):
        assert dtypes.from_storage_class(name) == str(dtype).removeprefix("torch.")


def test_all_spellings_of_torch_are_understood() -> None:
    for name in dir(torch):
        if isinstance(getattr(torch, name), torch.dtype) and str(getattr(torch, name)).removeprefix("torch.") in KNOWN:
            assert dtypes.to_torch(dtypes.canonical(name)) == getattr(torch, name)
            assert dtypes.canonical(f"torch.{name}") == dtypes.canonical(name)


@pytest.mark.parametrize("name", ["qint8", "int4", "float31", ""])
def test_unknown_types_are_refused_by_name(name: str) -> None:
    for function in (dtypes.itemsize, dtypes.canonical, dtypes.to_torch, dtypes.numpy_dtype, dtypes.to_safetensors):
        with pytest.raises(Unsupported, match=f"'{name}' is not supported"):
            function(name)
    with pytest.raises(Unsupported, match="QInt8Storage"):
        dtypes.from_storage_class("QInt8Storage")
    with pytest.raises(Unsupported, match="'F6_E2M3'"):
        dtypes.from_safetensors("F6_E2M3")
    with pytest.raises(Unsupported, match="use 'float16'"):
        dtypes.itemsize("half")
