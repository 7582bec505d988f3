"""What Transformer Engine's modules put into a state dict for FP8, in its documented form: it does not run here.

Two forms (transformer_engine/pytorch/module/base.py: ``get_extra_state``): release 2 pickles into a tensor of bytes,
with the recipe; release 1 saved with torch into a stream, without one. Its recipes are a module of dataclasses
(transformer_engine/common/recipe/__init__.py), of which what these pickles name is made here while they are made.
"""

from __future__ import annotations

import enum
import io
import pickle
import sys
import types
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

MODULE = "transformer_engine.common.recipe"
HISTORY = 8


class _FormatHelper(NamedTuple):
    max_fwd: float
    max_bwd: float


class Format(enum.Enum):
    E4M3 = _FormatHelper(448, 448)
    HYBRID = _FormatHelper(448, 57344)


@dataclass
class DelayedScaling:
    margin: int = 0
    fp8_format: Format = Format.HYBRID
    amax_history_len: int = HISTORY
    amax_compute_algo: Any = "max"
    reduce_amax: bool = True
    fp8_dpa: bool = False


@dataclass(frozen=True)
class MMParams:
    use_split_accumulator: bool = True


@dataclass
class Float8CurrentScaling:
    fp8_format: Format = Format.E4M3
    fp8_gemm_fprop: MMParams = field(default_factory=MMParams)


@dataclass
class CustomRecipe:
    qfactory: Any = None


@contextmanager
def importable() -> Iterator[None]:
    """While these classes are importable under Transformer Engine's names, so that pickle takes them."""
    module = types.ModuleType(MODULE)
    for kind in (_FormatHelper, Format, DelayedScaling, MMParams, Float8CurrentScaling, CustomRecipe):
        setattr(module, kind.__name__, kind)
        kind.__module__ = MODULE
    names = [".".join(MODULE.split(".")[: k + 1]) for k in range(3)]
    sys.modules.update({name: types.ModuleType(name) for name in names[:2]} | {MODULE: module})
    try:
        yield
    finally:
        for name in names:
            del sys.modules[name]


def content(name: str, recipe: Any = None) -> dict[str, Any]:
    """The state of the module of this name: scales of its three tensors forward and two backward."""
    made = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    state: dict[str, Any] = {} if recipe is None else {"recipe": recipe}
    if recipe is None or isinstance(recipe, (DelayedScaling, CustomRecipe)):
        for way, count in (("fwd", 3), ("bwd", 2)):
            state[f"scale_{way}"] = torch.rand(count, generator=made) + 1
            state[f"amax_history_{way}"] = torch.rand(HISTORY, count, generator=made)
            if recipe is None:
                state[f"scale_inv_{way}"] = 1 / state[f"scale_{way}"]
    state["extra_fp8_variables"] = {"num_gemms": 1, "fp8_checkpoint": True, "fp8_max_fwd": 448.0}
    return state


def pickled(state: dict[str, Any]) -> torch.Tensor:
    """As release 2 has it."""
    with importable():
        return torch.frombuffer(bytearray(pickle.dumps(state)), dtype=torch.uint8)


def saved(state: dict[str, Any]) -> io.BytesIO:
    """As release 1 had it."""
    stream = io.BytesIO()
    torch.save(state, stream)
    return stream


def state(name: str) -> Any:
    """Of attention's modules as release 1 had it, of others as release 2 has it."""
    if ".self_attention." in name:
        return saved(content(name))
    return pickled(content(name, DelayedScaling()))


def holds(value: Any, name: str) -> bool:
    """Whether an object is what the module of that name has saved, as Transformer Engine would load it. The bytes are
    others in every process: torch numbers a tensor's storage by its address."""
    with importable():
        if isinstance(value, io.BytesIO):
            found = torch.load(io.BytesIO(value.getvalue()), weights_only=False)
        else:
            found = pickle.loads(value.numpy().tobytes())
    wanted = content(name, found.get("recipe"))
    assert (found.get("recipe") is None) == (".self_attention." in name), name
    return found.keys() == wanted.keys() and all(
        torch.equal(found[key], value) if isinstance(value, torch.Tensor) else found[key] == value
        for key, value in wanted.items()
    )
