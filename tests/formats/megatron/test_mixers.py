"""Mamba's mixers: Megatron saves z, x, B, C and dt apart, and cuts each over its ranks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import ucp
from tests.engines.megatron import cases
from ucp.catalog import LogicalTensor, ParameterInfo
from ucp.errors import Unsupported
from ucp.formats.megatron.write import mixers

ROWS = {"z": 64, "x": 64, "B": 16, "C": 16, "dt": 8}  # of the mixers that tests/engines/megatron/mixers.py makes


def truth(tensor: LogicalTensor) -> np.ndarray:
    """The tensor's elements by the keys that Megatron gives its parts."""
    own = tensor.name.split(".mixer.")[1]
    parts = {"in_proj.weight": "zxBC", "conv1d.weight": "xBC", "conv1d.bias": "xBC"}.get(own, "")
    shapes = {f".{part}": (ROWS[part], *tensor.shape[1:]) for part in parts} or {"": tensor.shape}
    if own == "in_proj.weight":
        shapes[".dt"] = (ROWS["dt"], *tensor.shape[1:])
    ends = {end: cases.values("weight", tensor.name + end, (0,) * len(s), s, s) for end, s in shapes.items()}
    return np.concatenate(list(ends.values()))


@pytest.mark.slow
def test_they_are_read_whole_and_written_in_parts(written: Path, tmp_path: Path) -> None:
    """That stock Megatron loads what is written, strictly and in other cuts, is in test_write.py's fixture."""
    ucp.convert(written / "mixers tp2", tmp_path / "there", to="megatron", layout="tp=4")
    for path in (written / "mixers tp2", tmp_path / "there"):
        with ucp.open(path) as checkpoint:
            assert len(checkpoint.catalog.tensors) == 16
            for key, tensor in checkpoint.catalog.tensors.items():
                assert np.array_equal(checkpoint.read(*key).numpy(), truth(tensor)), key


def infos(**shapes: tuple[int, ...]) -> dict[str, ParameterInfo]:
    named = {f"decoder.layers.0.mixer.{key.replace('__', '.')}": shape for key, shape in shapes.items()}
    return {name: ParameterInfo(name, shape, "parameter", {"param": "float32"}) for name, shape in named.items()}


WHOLE = infos(in_proj__weight=(168, 32), conv1d__bias=(96,), out_proj__weight=(32, 64), A_log=(8,))


def test_the_other_tensors_tell_the_rows() -> None:
    found = mixers.parts("decoder.layers.0.mixer.in_proj.weight", WHOLE)
    assert [(part.ending[1:], part.count) for part in found] == list(ROWS.items())
    assert [part.first for part in found] == [0, 64, 128, 144, 160]
    found = mixers.parts("decoder.layers.0.mixer.conv1d.bias", WHOLE)
    assert [(part.ending, part.first, part.count) for part in found] == [(".x", 0, 64), (".B", 64, 16), (".C", 80, 16)]
    assert mixers.parts("decoder.layers.0.mixer.out_proj.weight", WHOLE) == mixers.WHOLE


@pytest.mark.parametrize(
    ("name", "changed", "said"),
    [
        ("in_proj.weight", infos(in_proj__weight=(169, 32)), "has 169 rows, and .* are expected"),
        ("conv1d.bias", infos(conv1d__bias=(95,)), "bias' has 95 rows, and 64 . 16 . 16 are expected"),
        ("in_proj.weight", infos(A_log=(8, 2)), "is told by A_log and out_proj"),
    ],
)
def test_another_kind_is_refused(name: str, changed: dict[str, ParameterInfo], said: str) -> None:
    with pytest.raises(Unsupported, match=said):
        mixers.parts(f"decoder.layers.0.mixer.{name}", {**WHOLE, **changed})
