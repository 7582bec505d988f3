"""Collects logical tensors while a DeepSpeed checkpoint is read, and what every optimizer file has in common."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ucp.catalog import LogicalTensor, ParameterInfo, SourceFile
from ucp.errors import DamagedCheckpoint, Unsupported
from ucp.geometry import Blocks, Shape, box, compose, concat, empty, numel
from ucp.spec.placement import Placed
from ucp.storage import locations
from ucp.storage.dtypes import itemsize, numpy_dtype
from ucp.storage.files import Files
from ucp.storage.rounding import round_to
from ucp.storage.torch_pt.values import TensorRef

Scalar = int | float | bool


@dataclass
class Builder:
    """The files, parameters and tensors found so far. paths, sources: shared by the parts of one checkpoint."""

    files: Files
    paths: dict[str, int] = field(default_factory=dict)
    sources: list[SourceFile] = field(default_factory=list)
    parameters: dict[str, ParameterInfo] = field(default_factory=dict)
    tensors: dict[tuple[str, str], LogicalTensor] = field(default_factory=dict)

    def file(self, path: str | Path) -> int:
        """The index of a file, entered at first use."""
        path = str(path)
        if path not in self.paths:
            stat = locations.stat(path)
            self.paths[path] = len(self.sources)
            self.sources.append(SourceFile(path, stat.size, stat.mtime_ns))
        return self.paths[path]

    def whole(self, name: str, state: str, ref: TensorRef) -> LogicalTensor:
        """A tensor that lies in one piece in one file."""
        if numel(ref.shape):
            blocks = box([0] * len(ref.shape), ref.shape, 0, ref.strides, self.file(ref.file))
        else:
            blocks = empty(len(ref.shape))
        return LogicalTensor(name, state, ref.shape, ref.dtype, blocks, np.full(len(blocks), ref.offset, np.int64))

    def pieces(
        self, name: str, state: str, shape: Shape, blocks: Blocks, refs: Mapping[int, TensorRef]
    ) -> LogicalTensor:
        """A tensor cut over ranks: ``blocks.buffers`` are ranks, and ``refs[rank]`` is that rank's flat buffer."""
        ranks = np.unique(blocks.buffers).tolist()
        dtypes = {refs[r].dtype for r in refs}
        if len(dtypes) > 1:
            raise DamagedCheckpoint(
                f"{refs[min(refs)].file}: '{name}' ({state}) has element types {sorted(dtypes)} on different ranks; "
                "files of two runs are mixed"
            )
        file_of, base_of = np.zeros(max(refs) + 1, np.int64), np.zeros(max(refs) + 1, np.int64)
        for r in ranks:
            file_of[r], base_of[r] = self.file(refs[r].file), refs[r].offset
        placed = Blocks(blocks.offsets, blocks.sizes, blocks.starts, blocks.strides, file_of[blocks.buffers])
        return LogicalTensor(name, state, shape, next(iter(dtypes)), placed, base_of[blocks.buffers])

    def add(
        self,
        name: str,
        kind: str,
        tensors: Sequence[LogicalTensor],
        scalars: Mapping[str, Scalar] | None = None,
        aliases: Sequence[str] = (),
    ) -> None:
        """Enter a parameter or buffer with its states."""
        states = {t.state: t.dtype for t in tensors}
        shape = tensors[0].shape
        self.parameters[name] = ParameterInfo(name, shape, states, kind, dict(scalars or {}), tuple(aliases))
        for t in tensors:
            self.tensors[name, t.state] = t

    def add_placed(
        self,
        placed: Placed,
        kind: str,
        tensors: Sequence[LogicalTensor],
        scalars: Mapping[str, Scalar],
        aliases: Sequence[str] = (),
    ) -> None:
        """Enter a rank's tensors as their part of the whole model's; raises DamagedCheckpoint where parts differ."""
        lifted = []
        for tensor in tensors:
            blocks, index = compose(tensor.blocks, placed.blocks, tensor.shape, placed.shape)
            found = LogicalTensor(placed.name, tensor.state, placed.shape, tensor.dtype, blocks, tensor.bases[index])
            known = self.tensors.get((placed.name, tensor.state))
            if known is not None:
                if known.dtype != tensor.dtype or self.parameters[placed.name].scalars != scalars:
                    raise DamagedCheckpoint(
                        f"'{placed.name}' ({tensor.state}) has another element type or step on different ranks; files "
                        "of two runs are mixed"
                    )
                blocks, bases = concat((known.blocks, blocks), len(placed.shape)), [known.bases, found.bases]
                found = replace(found, blocks=blocks, bases=np.concatenate(bases))
            lifted.append(found)
        self.add(placed.name, kind, lifted, scalars, aliases)

    def bits(self, path: str, at: int, count: int, dtype: str) -> NDArray[Any]:
        """``count`` elements from byte ``at`` of a file, as unsigned integers."""
        size = itemsize(dtype)
        raw = np.empty(count * size, np.uint8)
        self.files.read_into(path, at, raw)
        return raw.view({1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}[size])

    def scalar(self, ref: TensorRef) -> Scalar:
        """The value of a 0-d tensor."""
        raw = np.empty(itemsize(ref.dtype), np.uint8)
        self.files.read_into(ref.file, ref.offset, raw)
        if ref.dtype == "bfloat16":
            return float((raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32)[0])
        return raw.view(numpy_dtype(ref.dtype))[0].item()


def rounds_to(high: NDArray[Any], source: str, low: NDArray[Any], target: str) -> bool | None:
    """Whether masters (bits of ``source`` elements) round to these weights, bit for bit; None if that says nothing.

    A not-a-number is any not-a-number: its bits depend on the torch that rounded it.
    """
    if source == target:
        return bool(np.array_equal(high, low))
    if source != "float32" or target not in ("bfloat16", "float16"):
        return None
    found = round_to(high.view(np.float32), target).view(np.uint16)
    return bool(np.all((found == low) | np.isnan(high.view(np.float32))))


@dataclass(frozen=True)
class FlatState:
    """A flat buffer's optimizer states on one rank, told apart. tensors: as long as the buffer; scalars: the rest."""

    tensors: Mapping[str, TensorRef]
    scalars: Mapping[str, Scalar]


def split_state(
    builder: Builder, path: Path, where: str, state: Mapping[str, Any], lengths: Sequence[int]
) -> FlatState:
    """Tell tensors of one of these lengths from scalars; refuse by name what is neither.

    Adafactor's factors and block-quantised states, for example, have a shape that a flat buffer's cut says nothing of.
    """
    tensors: dict[str, TensorRef] = {}
    scalars: dict[str, Scalar] = {}
    for key, value in state.items():
        if value is None:
            continue
        if isinstance(value, TensorRef) and value.shape == ():
            scalars[key] = builder.scalar(value)
        elif isinstance(value, TensorRef) and len(value.shape) == 1 and value.shape[0] in lengths:
            tensors[key] = value
        elif isinstance(value, (bool, int, float)):
            scalars[key] = value
        else:
            found = f"shape {list(value.shape)}" if isinstance(value, TensorRef) else type(value).__name__
            raise Unsupported(
                f"{path}: optimizer state '{key}' of {where} has {found}, neither the parameters' shape nor a single "
                "value; checkpoints of this optimizer cannot be resharded"
            )
    return FlatState(tensors, scalars)


def same_on_all_ranks(what: str, values: Mapping[Path, Any]) -> Any:
    """The common value. Raises DamagedCheckpoint naming two files that disagree."""
    first_path, first = next(iter(values.items()))
    for path, value in values.items():
        if value != first:
            raise DamagedCheckpoint(
                f"{path}: {what} is {_short(value)}, but '{first_path.name}' says {_short(first)}; files of two runs "
                "are mixed"
            )
    return first


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 120 else text[:117] + "..."


def join_states(
    what: str, ranks: Mapping[int, tuple[Path, FlatState]]
) -> tuple[dict[str, dict[int, TensorRef]], dict[str, Scalar]]:
    """One flat group's states over all ranks: state -> rank -> buffer, and the scalars that all ranks agree on."""
    names = same_on_all_ranks(
        f"the list of optimizer states of {what}", {p: sorted(s.tensors) for p, s in ranks.values()}
    )
    scalars = same_on_all_ranks(f"the optimizer values of {what}", {p: dict(s.scalars) for p, s in ranks.values()})
    return {n: {r: s.tensors[n] for r, (_, s) in ranks.items()} for n in names}, scalars


def flat_refs(path: Path, key: str, value: Any) -> list[TensorRef]:
    """A list of flat 1-d buffers, checked to be that."""
    if not isinstance(value, (list, tuple)):
        raise DamagedCheckpoint(f"{path}: '{key}' is missing or no list of flat buffers")
    for i, ref in enumerate(value):
        if not isinstance(ref, TensorRef):
            raise Unsupported(
                f"{path}: '{key}[{i}]' is {type(ref).__name__}, not a tensor; states offloaded to NVMe are not in the "
                "checkpoint's own files and cannot be read"
            )
        if len(ref.shape) != 1 or not ref.is_contiguous:
            raise DamagedCheckpoint(f"{path}: '{key}[{i}]' has shape {list(ref.shape)}; a flat buffer is expected")
    return list(value)


def options_of(group: Mapping[str, Any]) -> dict[str, Any]:
    """A param group's hyperparameters: everything but its parameters."""
    return {k: v for k, v in group.items() if k not in ("params", "param_names")}
