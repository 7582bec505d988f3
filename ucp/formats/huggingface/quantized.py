"""Weights that a model folder keeps quantised, as the numbers that the model's own code makes of them.

Two ways are known, each by the tensors' names:

- FP8 in blocks (DeepSeek-V3): ``X.weight`` in float8, or two 4-bit numbers a byte in int8, and ``X.weight_scale_inv``
  with one factor for each block. The weight is code times factor in float32, rounded once to the model's type
  (``weight_dequant`` in DeepSeek's ``inference/kernel.py``; ``Fp8Dequantize`` in transformers'
  ``integrations/finegrained_fp8.py``).
- MXFP4 (gpt-oss): ``X_blocks``, two 4-bit numbers a byte, the lower half first, and ``X_scales``, an exponent for each
  32 of them. The model's tensor has the last two dimensions swapped (``_convert_moe_packed_tensors`` in
  ``integrations/mxfp4.py``).

A tensor is computed as it is read, some rows at a time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ucp.catalog import ByteSource, Catalog, LogicalTensor, SourceFile, TrainingState
from ucp.errors import DamagedCheckpoint, Unsupported
from ucp.formats.shared.builder import Builder
from ucp.geometry import Blocks, Shape, empty, flat_ranges, numel, row_major, whole
from ucp.parallel.mesh import Layout
from ucp.printable import logger
from ucp.storage.crc32 import in_order
from ucp.storage.dtypes import FLOAT_SPELLINGS, itemsize
from ucp.storage.numbers import FLOATS, as_numbers
from ucp.storage.rounding import round_to
from ucp.storage.torch_pt.values import TensorRef
from ucp.transfer.gather import Want, gather
from ucp.transfer.reader import Reader

log = logger(__name__)

METHODS = ("fp8", "mxfp4")
"""The values of ``quantization_config.quant_method`` whose weights are read as plain numbers."""

_FP8, _BLOCKS, _SCALES, _INVERSE = "float8_e4m3fn", "_blocks", "_scales", "_scale_inv"
_ACTIVATIONS = (".activation_scale", ".input_scale")
_HALF_BYTES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_BATCH_ELEMENTS = 1 << 17


@dataclass(frozen=True)
class Packed:
    """A quantised tensor.

    codes, scales: as they lie in the files; scales have a row for ``block[0]`` rows of the tensor, and a column for
    ``block[1]`` columns.
    shape: of the numbers, in the codes' order.
    swapped: whether the model's tensor has the last two dimensions the other way round.
    """

    codes: TensorRef
    scales: TensorRef
    shape: Shape
    grid: Shape
    block: tuple[int, int]
    swapped: bool = False


@dataclass(frozen=True)
class PlainNumbers:
    """A `ucp.catalog.ByteSource`: a quantised tensor's numbers, row-major in the order of its codes. Thread-safe."""

    codes: LogicalTensor
    scales: LogicalTensor
    packed: Packed
    dtype: str
    reader: Reader

    def read_into(self, offset: int, parts: Sequence[NDArray[np.uint8]]) -> None:
        """Fill the parts, one after the other, with the bytes from ``offset`` on. Raises what reading raises."""
        width, columns = itemsize(self.dtype), self.packed.shape[-1]
        queue = [part for part in parts if len(part)]
        stop = offset + sum(map(len, queue))
        step = max(1, _BATCH_ELEMENTS // columns)
        first, last = offset // (width * columns), -(-stop // (width * columns))
        at = 0
        for row in range(first, last, step):
            end = min(row + step, last)
            raw = self._rows(row, end).reshape(-1).view(np.uint8)
            begin = row * columns * width
            mine = raw[max(offset - begin, 0) : stop - begin]
            while len(mine):
                count = min(len(mine), len(queue[0]) - at)
                queue[0][at : at + count] = mine[:count]
                mine, at = mine[count:], at + count
                if at == len(queue[0]):
                    queue.pop(0)
                    at = 0

    def _rows(self, first: int, last: int) -> NDArray[Any]:
        """The numbers of these rows of all matrices one below the other, as elements of the type or their bits."""
        rows, columns = self.packed.shape[-2:]
        high, wide = self.packed.grid[-2:]
        per_row = self.codes.shape[-1] if len(self.codes.shape) == len(self.packed.shape) else columns // 2
        numbers = _numbers(self._read(self.codes, first * per_row, last * per_row), self.codes.dtype)
        number = np.arange(first, last)
        lines = number // rows * high + number % rows // self.packed.block[0]
        begin = int(lines[0])
        raw = self._read(self.scales, begin * wide, (int(lines[-1]) + 1) * wide)
        numbers = numbers.reshape(last - first, columns)
        with np.errstate(all="ignore"):
            if self.packed.swapped:  # their code adds to the exponent; a power of two could be infinite by itself
                out = np.ldexp(numbers, self._spread(raw.astype(np.int32) - 127)[lines - begin])
            else:
                out = numbers * self._spread(_factors(raw, self.scales.dtype))[lines - begin]
        return out if self.dtype == "float32" else round_to(out, self.dtype)

    def _spread(self, scales: NDArray[Any]) -> NDArray[Any]:
        """Rows of scales, a column for each of the tensor's."""
        rows = scales.reshape(-1, self.packed.grid[-1])
        return np.repeat(rows, self.packed.block[1], axis=1)[:, : self.packed.shape[-1]]

    def _read(self, tensor: LogicalTensor, first: int, last: int) -> NDArray[np.uint8]:
        raw = np.empty((last - first) * itemsize(tensor.dtype), np.uint8)
        gather(self.reader, [Want(tensor, flat_ranges(tensor.shape, [first], [last], [0]), tensor.dtype)], [raw])
        return raw


_FOUR_BITS = np.array([*_HALF_BYTES, *(-value for value in _HALF_BYTES)], np.float32)
_PAIRS = np.stack([np.tile(_FOUR_BITS, 16), np.repeat(_FOUR_BITS, 16)], axis=-1)
"""Both numbers of every byte; the one in its lower half comes first."""


def _numbers(raw: NDArray[np.uint8], dtype: str) -> NDArray[np.float32]:
    """The codes' values. A float8_e4m3fn has a sign, four bits of exponent (bias 7), three of mantissa, no infinity."""
    if dtype != _FP8:
        return _PAIRS[raw].reshape(-1)
    bits = raw.view(np.int8).astype(np.int32)
    bits <<= 20
    bits &= np.int32(-0x78100000)  # the sign, and the other seven bits where float32 has the end of its exponent
    out = bits.view(np.float32)
    out *= np.float32(2.0**120)
    none = (raw & 127) == 127
    if none.any():
        out[none] = np.nan
    return out


def _factors(raw: NDArray[np.uint8], dtype: str) -> NDArray[np.float32]:
    """The scales' values; one byte each is an exponent of two."""
    if dtype in ("uint8", "float8_e8m0fnu"):
        out = np.ldexp(np.float32(1), raw.astype(np.int32) - 127)
        if dtype != "uint8":
            out[raw == 255] = np.nan
        return out
    return as_numbers(raw, dtype).astype(np.float32)


def find(path: Path, refs: Mapping[str, TensorRef], config: Mapping[str, Any] | None) -> dict[str, Packed]:
    """The folder's quantised tensors, by the names of what they become.

    Raises DamagedCheckpoint where codes and scales do not belong together, or a float8 weight has no scales though the
    config says so.
    """
    said = (config or {}).get("quantization_config")
    said = said if isinstance(said, Mapping) else {}
    method = said.get("quant_method")
    out: dict[str, Packed] = {}
    for name, ref in refs.items():
        stem = name.removesuffix(_BLOCKS)
        if stem != name and ref.dtype == "uint8" and stem + _SCALES in refs:
            out[stem] = _mxfp4(path, name, ref, refs[stem + _SCALES])
        elif ref.dtype in (_FP8, "int8") and name + _INVERSE in refs:
            out[name] = _fp8(path, name, ref, refs[name + _INVERSE], said.get("weight_block_size"))
        elif ref.dtype == _FP8 and method == "fp8":
            raise DamagedCheckpoint(f"{path}: '{name}' is quantised and has no '{name}{_INVERSE}'; a part is missing")
    if method is not None and method not in METHODS:
        log.warning(
            "%s: is quantised by '%s', which is not undone: its packed tensors are read as they lie in the files",
            path,
            method,
        )
    return out


def _mxfp4(path: Path, name: str, codes: TensorRef, scales: TensorRef) -> Packed:
    if scales.dtype != "uint8" or len(codes.shape) != 4 or scales.shape != codes.shape[:-1]:
        raise DamagedCheckpoint(
            f"{path}: '{name}' has shape {list(codes.shape)}, and its scales are {scales.dtype} of shape "
            f"{list(scales.shape)}; they do not belong together"
        )
    *outer, count, size = codes.shape
    return Packed(codes, scales, (*outer, count * size * 2), scales.shape, (1, size * 2), swapped=True)


def _fp8(path: Path, name: str, codes: TensorRef, scales: TensorRef, block: Any) -> Packed:
    shape = codes.shape if codes.dtype == _FP8 else (*codes.shape[:-1], codes.shape[-1] * 2 if codes.shape else 0)
    grid = scales.shape if len(scales.shape) >= 2 else (1,) * len(shape)
    fits = (
        len(shape) >= 2 and len(grid) == len(shape) and grid[:-2] == shape[:-2] and numel(scales.shape) == numel(grid)
    )
    if scales.dtype not in (*FLOATS, "uint8", "float8_e8m0fnu"):
        raise Unsupported(f"{path}: the scales of '{name}' are {scales.dtype}, which is not understood")
    said = isinstance(block, (list, tuple)) and len(block) == 2 and all(type(b) is int and b > 0 for b in block)
    if fits and said and grid[-2:] == tuple(-(-n // b) for n, b in zip(shape[-2:], block, strict=True)):
        return Packed(codes, scales, shape, grid, (block[0], block[1]))
    if not fits or 0 in grid or any(n % g for n, g in zip(shape[-2:], grid[-2:], strict=True)):
        raise DamagedCheckpoint(
            f"{path}: '{name}' has shape {list(shape)}, and its scales have shape {list(scales.shape)}, which are not "
            f"those of blocks of {block or 'one size'}; they do not belong together"
        )
    return Packed(codes, scales, shape, grid, (shape[-2] // grid[-2], shape[-1] // grid[-1]))


def left_out(found: Mapping[str, Packed], refs: Mapping[str, TensorRef]) -> set[str]:
    """The names of the folder's tensors that are codes and scales, and no tensors of the model."""
    out = set()
    for name, packed in found.items():
        out |= {name + _BLOCKS, name + _SCALES} if packed.swapped else {name + _INVERSE}
        out |= {name.removesuffix(".weight") + kind for kind in _ACTIVATIONS} & refs.keys()
    return out


def add(found: Mapping[str, Packed], config: Mapping[str, Any] | None, builder: Builder) -> dict[int, ByteSource]:
    """Enter the quantised tensors as plain ones, in the model's type. Returns where their bytes come from."""
    said = (config or {}).get("dtype") or (config or {}).get("torch_dtype")
    dtype = FLOAT_SPELLINGS.get(str(said).removeprefix("torch."), "bfloat16")
    dtype = "float32" if dtype == "float64" else dtype
    raw = {
        name: (builder.whole(name, "codes", p.codes), builder.whole(name, "scales", p.scales))
        for name, p in found.items()
    }
    bare = Catalog(
        "", "", Layout(), tuple(builder.sources), {}, {}, TrainingState(), crc_records=in_order(builder.records)
    )
    reader = Reader(bare, builder.files)
    computed: dict[int, ByteSource] = {}
    for name, packed in found.items():
        index, count = len(builder.sources), numel(packed.shape)
        tensor = LogicalTensor(name, "param", packed.shape, dtype, _blocks(packed, index), np.zeros(1, np.int64))
        if not count:
            tensor = replace(tensor, blocks=empty(len(packed.shape)), bases=np.zeros(0, np.int64))
        computed[index] = PlainNumbers(*raw[name], packed, dtype, reader)
        builder.sources.append(SourceFile(f"({name}, from its codes and scales)", count * itemsize(dtype), 0))
        shape = (*packed.shape[:-2], packed.shape[-1], packed.shape[-2]) if packed.swapped else packed.shape
        builder.add(name, "frozen", [replace(tensor, shape=shape)])
    log.info("%d weights are quantised, and read as %s", len(found), dtype)
    return computed


def _blocks(packed: Packed, index: int) -> Blocks:
    if not packed.swapped or not numel(packed.shape):
        return whole(packed.shape, 0, index)
    *outer, rows, columns = packed.shape
    *steps, _, _ = row_major(packed.shape)
    d = len(packed.shape)
    return Blocks(
        np.zeros((1, d), np.int64),
        np.array([[*outer, columns, rows]], np.int64),
        np.zeros(1, np.int64),
        np.array([[*steps, 1, columns]], np.int64),
        np.full(1, index),
    )
