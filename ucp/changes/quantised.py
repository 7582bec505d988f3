"""Optimizer states of few bits as the float32 values that they stand for, for an optimizer that keeps them so.

bitsandbytes keeps for a parameter the codes ``state1`` and ``state2``, maps ``qmap1`` and ``qmap2`` of 256 values, and
``absmax1`` and ``absmax2``, one for each block of 256 elements in the tensor's flat order; torchao keeps ``codes``,
``qmap`` and ``scale`` in place of each state. In both a code stands for ``qmap[code] * absmax``, which is computed in
float32 as the libraries do, so nothing is lost. torchao's codes of 4 bits lie two in a byte, the first in the upper
half; its codes of Fp8 are numbers themselves, and have no map. Small tensors are float32 already.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ucp.catalog import LogicalTensor, ParameterInfo
from ucp.changes.build import PARAM, Build, few
from ucp.errors import DamagedCheckpoint, Unsupported
from ucp.formats.shared.apart import name_apart
from ucp.geometry import flat_ranges, numel
from ucp.storage.numbers import Bytes
from ucp.transfer.gather import Reader, Want, gather
from ucp.units import counted

_BLOCK = 256  # bitsandbytes' elements of a block
_STATES = {"state1": "exp_avg", "state2": "exp_avg_sq"}
_WRAPPER = r"(?:\.__bnb_optimizer_quant_state__)?"  # what its state dicts put around a parameter's states
_OF_BITSANDBYTES = re.compile(rf"(?P<root>.*?state\.)(?P<name>.+?){_WRAPPER}\.(?P<state>state[12])")
_OF_TORCHAO = re.compile(r"(?P<root>.*?state\.)(?P<name>.+)\.(?P<state>[^.]+)\.codes")
_PIECE_ELEMENTS = 1 << 20
_FP8 = "float8_e4m3fn"


@dataclass(frozen=True)
class _QuantisedState:
    """A quantised state: whose it is, what it is called, and the names of the tensors that it is kept as. Fp8 has no
    qmap."""

    name: str
    state: str
    codes: str
    qmap: str
    absmax: str
    block: int | None


def dequantised(build: Build) -> list[str]:
    """Give parameters float32 states in place of quantised ones. Returns what was changed.

    Raises Unsupported for states of other kinds, and of optimizers that are not Adam's.
    """
    _codes_by_themselves(build)
    known = build.catalog.parameters
    found = [one for name in known if (one := _quantised(name)) is not None and one.name in known]
    owners: dict[str, list[LogicalTensor]] = {}
    gone: list[str] = []
    for one in found:
        owners.setdefault(one.name, []).append(_state(build, one))
        gone += [one.codes, one.qmap, one.absmax]
    made = []
    for name, tensors in owners.items():
        made.append((known[name], [*build.tensors_of(known[name]), *tensors]))
    _check_adam({info.name: {t.state for t in tensors} for info, tensors in made})
    build.put(made)
    build.drop(gone)
    if not made:
        return []
    names = few([info.name for info, _ in made])
    return [f"states: those of {counted(len(made), 'parameter')} are float32 now, exactly ({names})"]


def _codes_by_themselves(build: Build) -> None:
    """Take codes that a checkpoint has as states of their parameter, which their shape is, for tensors by themselves,
    as their maps are."""
    made: list[tuple[ParameterInfo, list[LogicalTensor]]] = []
    for info in build.catalog.parameters.values():
        codes = [(info.name, state) for state in _STATES if state in info.states]
        if not codes:
            continue
        kept = [tensor for tensor in build.tensors_of(info) if tensor.state not in _STATES]
        made.append((info, kept))
        for key in codes:
            name, tensor = name_apart(*key), build.catalog.tensors[key]
            made.append((ParameterInfo(name, tensor.shape, {}, "buffer"), [replace(tensor, name=name, state=PARAM)]))
    build.put(made)


def _quantised(name: str) -> _QuantisedState | None:
    if match := _OF_BITSANDBYTES.fullmatch(name):
        base, number = name[:-1].removesuffix("state"), name[-1]
        state = _STATES[match["state"]]
        return _QuantisedState(match["name"], state, name, f"{base}qmap{number}", f"{base}absmax{number}", _BLOCK)
    if match := _OF_TORCHAO.fullmatch(name):
        base = name.removesuffix("codes")
        return _QuantisedState(match["name"], match["state"], name, f"{base}qmap", f"{base}scale", None)
    return None


def _state(build: Build, one: _QuantisedState) -> LogicalTensor:
    shape = build.catalog.parameters[one.name].shape
    codes, qmap, absmax = (build.catalog.tensors.get((n, PARAM)) for n in (one.codes, one.qmap, one.absmax))
    if codes is not None and qmap is None and (codes.dtype, codes.shape) == ("float32", shape):
        return replace(codes, name=one.name, state=one.state)  # too small to be quantised
    if codes is None or absmax is None or (qmap is None and codes.dtype != _FP8):
        raise Unsupported(f"'{one.codes}' lacks its map or its scales, so what it stands for is not known")
    width = 2 if qmap is not None and qmap.shape == (16,) else 1
    count, scales = numel(codes.shape) * width, numel(absmax.shape)
    block = one.block or count // max(scales, 1)
    fits = codes.shape == (shape if width == 1 else (numel(shape) // 2,)) and count == numel(shape)
    if (qmap is not None and (codes.dtype != "uint8" or qmap.shape not in ((256,), (16,)))) or not fits:
        raise Unsupported(
            f"'{one.codes}' is {codes.dtype} {list(codes.shape)} with a map of {list(qmap.shape if qmap else ())}; "
            "states of 8 and 4 bits and of Fp8 in their parameter's shape are dequantised, others are not"
        )
    if (
        not block
        or scales != -(-count // block)
        or {absmax.dtype, "float32" if qmap is None else qmap.dtype} != {"float32"}
    ):
        raise DamagedCheckpoint(
            f"'{one.codes}' has {count} elements in blocks of {block}, and {scales} scales; they do not belong together"
        )
    source = Dequantised(build.reader(), codes, qmap, absmax, block, width)
    return build.computed(one.name, one.state, shape, "float32", source, f"dequantised {one.codes}")


def _fp8() -> NDArray[np.float32]:
    """What each code of Fp8 (e4m3fn: a sign, 4 bits of exponent, 3 of fraction) stands for."""
    codes = np.arange(256)
    exponent, fraction = (codes >> 3) & 15, (codes & 7) / 8
    size = np.where(exponent == 0, np.ldexp(fraction, -6), np.ldexp(1 + fraction, exponent - 7))
    size[(codes & 127) == 127] = np.nan
    return np.where(codes >> 7, -size, size).astype(np.float32)


def _check_adam(states: dict[str, set[str]]) -> None:
    for name, kept in states.items():
        if "exp_avg" in kept and "exp_avg_sq" not in kept:
            raise Unsupported(
                f"'{name}' has one quantised state, so its optimizer is not Adam, and its meaning is not known"
            )


@dataclass
class Dequantised:
    """The bytes of a dequantised state (a `ucp.catalog.ByteSource`). Thread-safe. qmap: None for codes of Fp8. width:
    codes in a byte."""

    reader: Reader
    codes: LogicalTensor
    qmap: LogicalTensor | None
    absmax: LogicalTensor
    block: int
    width: int = 1
    _lock: Any = field(default_factory=Lock)
    _tables: tuple[NDArray[np.float32], NDArray[np.float32]] | None = None

    def read_into(self, offset: int, parts: Sequence[Bytes]) -> None:
        at = offset
        for part in parts:
            done = 0
            while done < len(part):
                first = (at + done) // 4
                last = min(-(-(at + len(part)) // 4), first + _PIECE_ELEMENTS)
                raw = self._elements(first, last).view(np.uint8)[at + done - 4 * first :]
                count = min(len(raw), len(part) - done)
                part[done : done + count] = raw[:count]
                done += count
            at += len(part)

    def _elements(self, first: int, last: int) -> NDArray[np.float32]:
        with self._lock:
            if self._tables is None:
                qmap = _fp8() if self.qmap is None else self._all(self.qmap)
                self._tables = qmap, self._all(self.absmax)
            qmap, absmax = self._tables
        codes = self._codes(first, last)
        found: NDArray[np.float32] = qmap[codes] * absmax[np.arange(first, last) // self.block]
        return found

    def _codes(self, first: int, last: int) -> Bytes:
        if self.width == 1:
            return self._read(self.codes, first, last)
        packed = self._read(self.codes, first // 2, -(-last // 2))
        codes = np.stack([packed >> 4, packed & 15], axis=1).reshape(-1)
        return codes[first % 2 :][: last - first]

    def _all(self, tensor: LogicalTensor) -> NDArray[np.float32]:
        return self._read(tensor, 0, numel(tensor.shape)).view(np.float32)

    def _read(self, tensor: LogicalTensor, first: int, last: int) -> Bytes:
        width = 1 if tensor is self.codes else 4
        raw = np.empty((last - first) * width, np.uint8)
        blocks = flat_ranges(tensor.shape, [first], [last], [0])
        gather(self.reader, [Want(tensor, blocks, tensor.dtype)], [raw], 1)
        return raw
