"""The catalog: what a checkpoint holds, and where every element of it lies, no matter who wrote it.

A checkpoint is a set of logical tensors, one for each (parameter, state), plus the training state that is not a
tensor of a parameter. A format's reader makes a Catalog from files; everything else (reading a region, converting,
resuming, verifying) works on the Catalog and never asks which format it came from.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ucp.errors import DamagedCheckpoint
from ucp.geometry import Blocks, Ints, Shape, coverage_fault, coverage_holds, extents, joined, numel
from ucp.logical.record import Recorded
from ucp.parallel.mesh import Layout
from ucp.printable import short
from ucp.storage.crc32 import StoredCrc32
from ucp.storage.dtypes import itemsize

# Wrappers put these into names: DistributedDataParallel and DeepSpeed's older saves, torch.compile.
_WRAPPERS = ("module", "_orig_mod")


def bare(name: str) -> str:
    """The name without what wrappers put into it: ``module.`` at its beginning, and ``_orig_mod.`` anywhere."""
    parts = name.split(".")
    while len(parts) > 1 and parts[0] in _WRAPPERS:
        parts.pop(0)
    return ".".join([*(p for p in parts[:-1] if p != "_orig_mod"), parts[-1]])


@dataclass(frozen=True)
class SourceFile:
    """A file that fragments lie in. path: absolute; size: bytes; mtime_ns: when it was last written."""

    path: str
    size: int
    mtime_ns: int


@dataclass(frozen=True, slots=True)
class LogicalTensor:
    """One state of one parameter as a whole, without shards and padding, and where its fragments lie.

    blocks: its boxes. ``blocks.buffers`` is an index into the catalog's files.
    bases: (n,) int64, the byte of its file from which ``blocks.starts`` counts elements of this dtype, so that any byte
    offset can be expressed exactly.
    digest: of all its elements in this dtype, if the checkpoint has recorded it. None for a tensor that is a part of
    another one or is put together in another way.
    """

    name: str
    state: str
    shape: Shape
    dtype: str
    blocks: Blocks
    bases: Ints
    digest: Recorded | None = None

    def __reduce__(self) -> tuple[type[LogicalTensor], tuple[Any, ...]]:
        """As `Blocks.__reduce__`."""
        given = self.name, self.state, self.shape, self.dtype, self.blocks, self.bases, self.digest
        return LogicalTensor, given

    @property
    def nbytes(self) -> int:
        return numel(self.shape) * itemsize(self.dtype)

    def byte_ranges(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """(n,) each block's first byte in its file, and the byte after its last, gaps included."""
        first, ends = extents(self.blocks)
        width = itemsize(self.dtype)
        return self.bases + first * width, self.bases + ends * width

    def check_coverage(self) -> None:
        """Raise DamagedCheckpoint unless the fragments hold every element exactly once."""
        gap = coverage_fault(self.shape, self.blocks)
        if gap:
            raise DamagedCheckpoint(
                f"'{self.name}' ({self.state}, shape {list(self.shape)}): {gap}; the checkpoint is incomplete or its "
                "files do not belong together"
            )


@dataclass(frozen=True, slots=True)
class ParameterInfo:
    """A parameter or buffer of the model.

    Parameters
    ----------
    name: its name in the model.
    shape: of the whole parameter, unsharded and without padding.
    states: for each state kept for it, the state's name and the dtype of the logical tensor. The state ``param`` is
        the weight itself.
    kind: one of

        - 'parameter';
        - 'frozen': a parameter that no optimizer updates;
        - 'buffer';
        - 'padding': what a parameter's shards hold beyond its own end, such as a vocabulary padded for its ranks.
          Only a target with the same padding takes it.
    scalars: the optimizer's values for this parameter that are not tensors of its shape, such as ``step``.
    aliases: other names of the same storage (tied parameters).
    """

    name: str
    shape: Shape
    states: Mapping[str, str]
    kind: str = "parameter"
    scalars: Mapping[str, Any] = field(default_factory=dict)
    aliases: tuple[str, ...] = ()


@dataclass(frozen=True)
class ParamGroup:
    """An optimizer param group.

    Parameters
    ----------
    names: the parameters in it, in order.
    options: its hyperparameters by name, or None if the checkpoint did not record them (DeepSpeed's elastic
        checkpoints).
    """

    names: tuple[str, ...]
    options: Mapping[str, Any] | None


@dataclass(frozen=True, repr=False)
class TrainingState:
    """Everything of a training run that is not a tensor of a parameter. None means that the checkpoint has none.

    Its ``repr`` leaves out what is not there and cuts what is long, such as the states of random number generators.

    Parameters
    ----------
    param_groups: the optimizer's param groups, in order.
    lr_scheduler: the learning rate scheduler's state.
    loss_scaler: {'dynamic': bool, 'cur_scale': float, ...} with DeepSpeed's own attribute names.
    clip_grad: the norm that gradients are clipped to.
    global_steps: steps done so far.
    global_samples: samples seen.
    skipped_steps: steps skipped, such as those whose gradients overflowed.
    dp_world_size: data-parallel ranks of the run that saved it.
    global_batch_size: samples of one step of the run that saved it.
    extra: further state by name, such as data_sampler and random_ltd.
    client_state: what the caller gave to save_checkpoint (rank 0's).
    config: the run's configuration, as the checkpoint has it.
    """

    param_groups: tuple[ParamGroup, ...] = ()
    lr_scheduler: Any = None
    loss_scaler: Mapping[str, Any] | None = None
    clip_grad: float | None = None
    global_steps: int | None = None
    global_samples: int | None = None
    skipped_steps: int | None = None
    dp_world_size: int | None = None
    global_batch_size: int | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)
    client_state: Mapping[str, Any] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        kept = {f.name: value for f in fields(self) if (value := getattr(self, f.name)) not in (None, (), {})}
        return f"TrainingState({', '.join(f'{name}={short(value)}' for name, value in kept.items())})"


class ByteSource(Protocol):
    """Bytes that are in no file. They are kept in memory, or computed when they are read. Thread-safe."""

    def read_into(self, offset: int, parts: Sequence[NDArray[np.uint8]]) -> None:
        """Fill the parts, one after the other, with the bytes from ``offset`` on."""
        ...


@dataclass(frozen=True)
class InMemory:
    """A `ByteSource` whose bytes are kept in memory."""

    raw: bytes

    def read_into(self, offset: int, parts: Sequence[NDArray[np.uint8]]) -> None:
        for part in parts:
            part[:] = np.frombuffer(self.raw, np.uint8, len(part), offset)
            offset += len(part)


@dataclass(frozen=True)
class Zeros:
    """A `ByteSource` of zeros."""

    def read_into(self, offset: int, parts: Sequence[NDArray[np.uint8]]) -> None:
        for part in parts:
            part[:] = 0


@dataclass(frozen=True)
class Catalog:
    """All logical tensors of a checkpoint, with the files that their fragments lie in.

    format: the name of the format it was read from.
    writer: framework and version, for people.
    chunk_digests: index into files -> ChunkDigests, for files whose digests the checkpoint recorded.
    crc_records: index into files -> the records in it that have a CRC-32, in their order; for files without digests.
    copies: further fragments that hold again what those of ``tensors`` hold, such as the copies of a norm that every
    tensor-parallel rank keeps.
    computed: index into files -> where the bytes come from, for "files" that are not on disk (averages, for example).
    unchecked: sentences on what opening could not check.
    approximate: parameter -> how a repair has filled it in; no run has had these tensors.
    """

    format: str
    writer: str
    layout: Layout
    files: tuple[SourceFile, ...]
    parameters: Mapping[str, ParameterInfo]
    tensors: Mapping[tuple[str, str], LogicalTensor]
    training_state: TrainingState
    chunk_digests: Mapping[int, Any] = field(default_factory=dict)
    crc_records: Mapping[int, tuple[StoredCrc32, ...]] = field(default_factory=dict)
    copies: tuple[LogicalTensor, ...] = ()
    computed: Mapping[int, ByteSource] = field(default_factory=dict)
    unchecked: tuple[str, ...] = ()
    approximate: Mapping[str, str] = field(default_factory=dict)

    @property
    def on_disk(self) -> tuple[SourceFile, ...]:
        """The files that really exist as files."""
        return tuple(file for k, file in enumerate(self.files) if k not in self.computed)

    def check(self) -> None:
        """Raise DamagedCheckpoint unless every tensor is covered exactly once by ranges that exist in its files."""
        self._check_names()
        sizes = np.array([f.size for f in self.files], np.float64)
        by_ndim: dict[int, list[LogicalTensor]] = {}
        for tensor in self.tensors.values():
            by_ndim.setdefault(len(tensor.shape), []).append(tensor)
        for ndim, tensors in by_ndim.items():
            if not _all_whole(tensors, ndim, sizes):
                for tensor in tensors:  # one by one, to say what is wrong
                    tensor.check_coverage()
                    self.check_ranges(tensor, sizes)

    def _check_names(self) -> None:
        """Raise DamagedCheckpoint for a name that is not valid text: nothing could write it."""
        names: list[Any] = [*self.parameters]
        for info in self.parameters.values():
            names += info.states
            if info.aliases:
                names += info.aliases
        if set(map(type, names)) <= {str} and "".join(names).isascii():
            return
        for name in names:
            if not isinstance(name, str) or not (name.isascii() or _is_unicode(name)):
                raise DamagedCheckpoint(f"the name {name!r} is no text; the checkpoint's metadata is damaged")

    def check_ranges(self, tensor: LogicalTensor, sizes: NDArray[np.float64]) -> None:
        """Raise DamagedCheckpoint unless the tensor's fragments lie within its files; sizes: of all files, in bytes."""
        b = tensor.blocks
        if not len(b):
            return
        label = f"'{tensor.name}' ({tensor.state})"
        unknown = np.flatnonzero((b.buffers < 0) | (b.buffers >= len(sizes)))
        if len(unknown):
            raise DamagedCheckpoint(
                f"{label} lies in file {int(b.buffers[unknown[0]])}, and there are {len(sizes)}; the checkpoint's "
                "metadata is damaged"
            )
        first, ends = tensor.byte_ranges()
        over = np.flatnonzero((first < 0) | (ends > sizes[b.buffers]))
        if len(over):
            k = over[0]
            file = self.files[int(b.buffers[k])]
            if first[k] < 0:
                raise DamagedCheckpoint(
                    f"{file.path}: {label} needs bytes that lie {int(-first[k])} before the file's beginning; the "
                    "checkpoint's metadata is damaged"
                )
            raise DamagedCheckpoint(
                f"{file.path}: {label} needs bytes up to {int(ends[k])}, but the file has {file.size}; it is truncated "
                "or not the file that was saved"
            )

    def resolve(self, name: str) -> str:
        """The name under which a parameter is kept: itself, or the owner of a tied alias. KeyError if unknown."""
        if name in self.parameters:
            return name
        for info in self.parameters.values():
            if name in info.aliases:
                return info.name
        raise KeyError(name)


def _is_unicode(name: str) -> bool:
    return not any("\ud800" <= letter <= "\udfff" for letter in name)


def _all_whole(tensors: Sequence[LogicalTensor], ndim: int, sizes: NDArray[np.float64]) -> bool:
    """Whether these tensors of ``ndim`` dimensions are covered exactly once, by ranges within the files.

    This is what `check_coverage` and `check_ranges` ask of each tensor. Asking it of all at once, and once of all that
    share their blocks, takes a hundredth of the time.
    """
    different = {(t.shape, id(t.blocks)): t for t in tensors}.values()
    # The states of a parameter are cut alike, wherever they lie: they share the arrays of their boxes.
    alike = {(t.shape, id(t.blocks.offsets), id(t.blocks.sizes)): t for t in different}
    cut = joined([t.blocks for t in alike.values()], ndim)
    if not coverage_holds([t.shape for t in alike.values()], cut.blocks.take(cut.rows), cut.owners):
        return False
    held = joined([t.blocks for t in tensors], ndim)
    blocks = held.blocks
    if np.any((blocks.buffers < 0) | (blocks.buffers >= len(sizes))):
        return False
    widths = np.array([itemsize(t.dtype) for t in tensors], np.int64)[held.owners]
    bases = np.concatenate([t.bases for t in tensors])
    first, ends = (bases + found[held.rows] * widths for found in extents(blocks))
    return not np.any((first < 0) | (ends > sizes[blocks.buffers[held.rows]]))
