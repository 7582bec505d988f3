"""Checkpoints of no framework: flat files cut by ZeRO's rules with plain numpy, their catalogs, and the truth.

The arrays are made first; each is flattened, joined, padded and cut the way the rules say it in prose, without this
project's geometry. So a region that is read through a catalog can be compared with a slice of the array.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ucp import limits
from ucp.catalog import Catalog, LogicalTensor, ParameterInfo, ParamGroup, SourceFile, TrainingState
from ucp.formats.universal import consolidated, manifest, virtual
from ucp.geometry import whole
from ucp.parallel.mesh import Layout
from ucp.parallel.zero import ceil_partition, flat_partition
from ucp.storage.digests import ChunkDigests
from ucp.storage.dtypes import numpy_dtype, to_torch
from ucp.storage.files import Files
from ucp.transfer.pieces import create_files, seal_files
from ucp.transfer.reader import Reader
from ucp.transfer.targets import TargetFile
from ucp.transfer.windows import shares
from ucp.transfer.write import Progress, write_share

Array = NDArray[Any]
STATES = ("param", "exp_avg", "exp_avg_sq")
# Prime sizes, fewer elements than ranks, one element, no dimension, no element.
SHAPES: Mapping[str, tuple[int, ...]] = {
    "embed.weight": (13, 7),
    "layer.0.weight": (5, 3, 11),
    "layer.0.bias": (2,),
    "scale": (1,),
    "temperature": (),
    "nothing": (0, 4),
}
HEADER = 24  # bytes before the data of each file


@dataclass(frozen=True)
class Raw:
    """A catalog, and what every logical tensor in it really is (bfloat16 as uint16 bits)."""

    catalog: Catalog = field(repr=False)
    truth: Mapping[tuple[str, str], Array] = field(repr=False)

    def tensor(self, name: str, state: str) -> torch.Tensor:
        """The truth as torch has it."""
        found = self.catalog.tensors[name, state]
        out = torch.empty(found.shape, dtype=to_torch(found.dtype))
        if out.numel():
            out.reshape(-1).view(torch.uint8).numpy()[:] = np.array(self.truth[name, state]).reshape(-1).view(np.uint8)
        return out


def make(
    folder: Path,
    *,
    dp: int = 3,
    stage: int = 1,
    shapes: Mapping[str, tuple[int, ...]] = SHAPES,
    states: Sequence[str] = STATES,
    seed: int = 0,
    training_state: TrainingState | None = None,
    aliases: Mapping[str, tuple[str, ...]] | None = None,
    mtime_ns: int | None = None,
) -> Raw:
    """Write rank files in ``folder`` and describe them. mtime_ns: when they were written, by default now.

    Beside the trained float32 parameters there are a frozen bfloat16 one and two buffers (bool, and a 0-d int64).
    """
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    truth: dict[tuple[str, str], Array] = {
        (name, state): rng.standard_normal(shape).astype(np.float32)
        for name, shape in shapes.items()
        for state in states
    }
    counts = {name: int(np.prod(shape, dtype=np.int64)) for name, shape in shapes.items()}
    pieces: dict[tuple[int, str], Array] = {}
    places = {}
    if stage == 3:
        length = 0
        for name, shape in shapes.items():
            places[name] = ceil_partition(shape, length, dp)
            length += -(-counts[name] // dp)
        for state in states:
            parts: list[list[Array]] = [[] for _ in range(dp)]
            for name in shapes:
                share = -(-counts[name] // dp)
                flat = np.full(share * dp, np.float32(np.nan))
                flat[: counts[name]] = truth[name, state].reshape(-1)
                for rank in range(dp):
                    parts[rank].append(flat[rank * share : (rank + 1) * share])
            for rank in range(dp):
                pieces[rank, state] = np.concatenate(parts[rank])
    else:
        total = sum(counts.values())
        length = -(-total // (2 * dp)) * 2
        at = 0
        for name, shape in shapes.items():
            places[name] = flat_partition(shape, at, length)
            at += counts[name]
        for state in states:
            flat = np.full(length * dp, np.float32(np.nan))
            flat[:total] = np.concatenate([truth[name, state].reshape(-1) for name in shapes])
            for rank in range(dp):
                pieces[rank, state] = flat[rank * length : (rank + 1) * length]
    files = []
    for rank in range(dp):
        path = folder / f"rank{rank}.bin"
        path.write_bytes(b"h" * HEADER + b"".join(pieces[rank, state].tobytes() for state in states))
        files.append(_source(path, mtime_ns))
    extra = {
        ("frozen.weight", "param"): (rng.integers(0, 1 << 16, (6, 5), dtype=np.uint16), "bfloat16", "frozen"),
        ("mask", "param"): (rng.integers(0, 2, (3, 3)).astype(bool), "bool", "buffer"),
        ("steps", "param"): (np.array(2**40 + 1, np.int64), "int64", "buffer"),
    }
    tensors, parameters = {}, {}
    for name, shape in shapes.items():
        for k, state in enumerate(states):
            blocks = places[name]
            bases = np.full(len(blocks), HEADER + k * length * 4, np.int64)
            tensors[name, state] = LogicalTensor(name, state, shape, "float32", blocks, bases)
        other = (aliases or {}).get(name, ())
        parameters[name] = ParameterInfo(
            name, shape, dict.fromkeys(states, "float32"), "parameter", {"step": 7.0}, other
        )
    offset, raw = 1, b"x"  # an odd offset: nothing may rely on alignment
    for (name, state), (array, dtype, kind) in extra.items():
        truth[name, state] = array
        blocks = whole(array.shape, 0, dp)
        tensors[name, state] = LogicalTensor(
            name, state, array.shape, dtype, blocks, np.full(len(blocks), offset, np.int64)
        )
        parameters[name] = ParameterInfo(name, array.shape, {state: dtype}, kind)
        raw += array.astype(numpy_dtype(dtype)).tobytes()
        offset = len(raw)
    (folder / "model.bin").write_bytes(raw)
    files.append(_source(folder / "model.bin", mtime_ns))
    groups = (ParamGroup(tuple(shapes), {"lr": 1e-3, "betas": (0.9, 0.95), "weight_decay": 0.0}),)
    state_of = training_state or TrainingState(groups, global_steps=7, client_state={"epoch": 2})
    catalog = Catalog("raw", "numpy", Layout(dp=dp, zero=stage), tuple(files), parameters, tensors, state_of)
    catalog.check()
    return Raw(catalog, truth)


def _source(path: Path, mtime_ns: int | None) -> SourceFile:
    if mtime_ns is not None:
        os.utime(path, ns=(mtime_ns, mtime_ns))
    stat = os.stat(path)
    return SourceFile(str(path.resolve()), stat.st_size, stat.st_mtime_ns)


def virtual_checkpoint(folder: Path, raw: Raw) -> Path:
    """A virtual universal checkpoint of it: something that `ucp.open` takes."""
    folder.mkdir(parents=True)
    plan = virtual.plan(raw.catalog)
    with Files() as files:
        digests = write_files(Reader(plan.source, files), folder, plan.files)
    (folder / manifest.NAME).write_bytes(plan.manifest(digests, "test", str(folder)))
    return folder


def write_files(
    reader: Reader,
    folder: str | os.PathLike[str],
    files: Sequence[TargetFile],
    *,
    threads: int | None = None,
    max_memory: int | None = None,
    progress: Progress | None = None,
) -> dict[str, ChunkDigests]:
    """Write the files into an existing folder, in one go and by one process; return their chunks' digests by file name.

    Arguments and errors as of `write_share`. Flushing the small files and the folders is left to the caller, who
    commits them all at once. Files may be left half written by an error; the caller owns the folder.
    """
    create_files(folder, files)
    pieces = write_share(
        reader, folder, files, shares(files, 0, 1), threads=threads, max_memory=max_memory, progress=progress
    )
    return seal_files(folder, files, pieces)


def write_consolidated(folder: Path, catalog: Catalog, max_shard: int = limits.SHARD_FILE_BYTES) -> Path:
    """A consolidated universal checkpoint."""
    folder.mkdir(parents=True)
    plan = consolidated.plan(catalog, max_shard)
    with Files() as files:
        digests = write_files(Reader(plan.source, files), folder, plan.files)
    (folder / manifest.NAME).write_bytes(plan.manifest(digests, "test"))
    return folder


def write_form(form: str, folder: Path, made: Raw) -> Path:
    """A universal checkpoint in the form of that name."""
    if form == "virtual":
        return virtual_checkpoint(folder, made)
    return write_consolidated(folder, made.catalog)


def flip(path: Path, at: int, mask: int) -> None:
    """Change bits of one byte of a file."""
    with path.open("r+b") as stream:
        stream.seek(at)
        (byte,) = stream.read(1)
        stream.seek(at)
        stream.write(bytes([byte ^ mask]))


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below a folder with its bytes, to show that nothing changed."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
