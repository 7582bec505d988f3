"""Ways to write torch files, and to compare what our reader says with what torch.load makes of the same file."""

from __future__ import annotations

import argparse
import collections
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ucp.storage import dtypes
from ucp.storage.torch_pt.values import DeviceName, DtypeName, TensorRef

FORMATS = ["zip", "legacy"]


def save(obj: Any, path: Path, file_format: str = "zip", protocol: int = 2) -> Path:
    torch.save(obj, path, pickle_protocol=protocol, _use_new_zipfile_serialization=file_format == "zip")
    return path


def read_tensor(ref: TensorRef) -> torch.Tensor:
    """The tensor that lies where the reference says: plain file access, none of ours."""
    dtype = dtypes.to_torch(ref.dtype)
    if 0 in ref.shape:
        return torch.empty(ref.shape, dtype=dtype)
    with open(ref.file, "rb") as stream:
        stream.seek(ref.offset)
        last = sum((size - 1) * stride for size, stride in zip(ref.shape, ref.strides, strict=True))
        data = bytearray(stream.read((last + 1) * torch.empty(0, dtype=dtype).element_size()))
    return torch.frombuffer(data, dtype=dtype).as_strided(ref.shape, ref.strides)


def assert_same(ours: Any, truth: Any, where: str = "graph") -> int:
    """Assert that our reader's graph equals torch.load's, in every type, value and tensor; counts the tensors."""
    if isinstance(truth, torch.Tensor):
        assert type(ours) is TensorRef, where
        assert (ours.shape, ours.strides) == (tuple(truth.shape), truth.stride()), where
        assert ours.dtype == str(truth.dtype).removeprefix("torch."), where
        assert same_bits(read_tensor(ours), truth.detach()), where
        return 1
    if isinstance(truth, torch.Size):
        assert isinstance(ours, tuple), where
        assert ours == tuple(truth), where
    elif isinstance(truth, torch.dtype):
        assert ours == DtypeName(str(truth).removeprefix("torch.")), where
    elif isinstance(truth, torch.device):
        assert ours == DeviceName(str(truth)), where
    elif isinstance(truth, argparse.Namespace):
        assert type(ours) is argparse.Namespace, where
        return assert_same(vars(ours), vars(truth), where)
    elif isinstance(truth, dict):
        assert type(ours) is type(truth), where
        assert list(ours) == list(truth), where
        if isinstance(truth, collections.defaultdict):
            assert ours.default_factory is truth.default_factory, where
        return sum(assert_same(ours[key], truth[key], f"{where}[{key!r}]") for key in truth)
    elif isinstance(truth, list | tuple | collections.deque):
        assert type(ours) is type(truth), where
        assert len(ours) == len(truth), where
        return sum(assert_same(a, b, f"{where}[{i}]") for i, (a, b) in enumerate(zip(ours, truth, strict=True)))
    elif isinstance(truth, np.ndarray):
        assert type(ours) is np.ndarray, where
        assert (ours.dtype, ours.shape, ours.strides) == (truth.dtype, truth.shape, truth.strides), where
        assert ours.tobytes() == truth.tobytes(), where
    elif isinstance(truth, float | np.floating):
        assert type(ours) is type(truth), where
        assert pickle.dumps(ours) == pickle.dumps(truth), where
    else:
        assert type(ours) is type(truth), where
        assert ours == truth, where
    return 0


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors have the same shape, type and bits (NaN equals itself)."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return a.contiguous().reshape(-1).view(torch.uint8).equal(b.contiguous().reshape(-1).view(torch.uint8))
