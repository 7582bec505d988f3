"""Stage 3's ranks told apart by whole weights beside them, if there are any.

Stage 3's own files hold no weights but the masters' pieces, which have the same size on all ranks. Hugging Face's
Trainer, and ``save_16bit_model``, put the whole weights beside them, rounded. They may be of another step, which is no
reason to refuse. But if a rank's pieces are, bit for bit, what another rank should have, the two files are swapped.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ucp import limits
from ucp.catalog import LogicalTensor
from ucp.errors import DamagedCheckpoint, UcpError
from ucp.formats.shared.builder import Builder
from ucp.geometry import row_major
from ucp.printable import logger
from ucp.storage import locations, safetensors
from ucp.storage.dtypes import itemsize
from ucp.storage.rounding import rounds_to
from ucp.storage.torch_pt import reader
from ucp.storage.torch_pt.values import TensorRef

log = logger(__name__)

_WHOLE = ("model.safetensors", "pytorch_model.bin")


def weights_beside(folder: Path) -> Mapping[str, TensorRef]:
    """The whole weights in a checkpoint's folder or the one above, by name; {} where there are none to be read."""
    for place in (folder, folder.parent):
        for name in _WHOLE:
            if locations.is_file(place / name):
                try:
                    return _tensors(place / name)
                except UcpError as error:
                    log.debug("%s is not compared: %s", place / name, error)
    return {}


def _tensors(path: Path) -> dict[str, TensorRef]:
    found = safetensors.read_header(path).tensors if path.suffix == ".safetensors" else reader.load(path, trust=None)
    items = found.items() if isinstance(found, Mapping) else ()
    return {name: ref for name, ref in items if isinstance(ref, TensorRef) and ref.is_contiguous}


@dataclass(frozen=True)
class _Piece:
    """A file's piece of a parameter, which is contiguous in both. at: its first byte in the file; first: its first
    element in the parameter, row-major; count: elements."""

    at: int
    first: int
    count: int


def check(builder: Builder, weights: Mapping[str, TensorRef]) -> None:
    """Raise DamagedCheckpoint where a file's masters are the weights at another file's place, and not at its own."""
    pieces = {
        name: _pieces(tensor)
        for (name, state), tensor in builder.tensors.items()
        if state == "param" and name in weights and weights[name].shape == tensor.shape
    }
    for file in sorted({file for found in pieces.values() for file in found}):
        names = [name for name, found in pieces.items() if file in found]
        compared = 0
        agreed: dict[int, int] = defaultdict(int)
        for name in names[:: max(1, len(names) // limits.SAME_RUN_FRAGMENTS_COUNT)]:
            dtype = builder.tensors[name, "param"].dtype
            hits = _files_that_fit(builder, builder.sources[file].path, pieces[name], file, dtype, weights[name])
            if len(hits) < 2:  # at several places alike: that tells nothing
                compared += 1
                agreed.update({other: agreed[other] + 1 for other in hits})
        best = max(agreed, key=lambda other: agreed[other], default=file)
        if best != file and agreed[best] == compared >= limits.SAME_RUN_ENOUGH_COUNT:
            other = Path(builder.sources[best].path).name
            raise DamagedCheckpoint(
                f"{builder.sources[file].path}: its masters are the weights that '{other}' should have, by the whole "
                "weights beside the checkpoint; the files of two ranks were swapped"
            )


def _pieces(tensor: LogicalTensor) -> dict[int, _Piece]:
    """Each file's piece of a parameter that stage 3 has cut."""
    b, width = tensor.blocks, itemsize(tensor.dtype)
    firsts = b.offsets @ np.array(row_major(tensor.shape), np.int64) if b.ndim else np.zeros(len(b), np.int64)
    bytes_ = tensor.bases + b.starts * width
    out = {}
    for file in np.unique(b.buffers).tolist():
        mine = b.buffers == file
        out[file] = _Piece(int(bytes_[mine].min()), int(firsts[mine].min()), int(b.counts[mine].sum()))
    return out


def _files_that_fit(
    builder: Builder, path: str, pieces: Mapping[int, _Piece], file: int, dtype: str, weight: TensorRef
) -> list[int]:
    """The files at whose place in the parameter the first elements of this file's piece would be right."""
    count = min(limits.SAME_RUN_ELEMENTS_COUNT, *(piece.count for piece in pieces.values()))
    high = builder.bits(path, pieces[file].at, count, dtype)
    width = itemsize(weight.dtype)
    return [
        other
        for other, piece in pieces.items()
        if rounds_to(
            high,
            dtype,
            builder.bits(weight.file, weight.offset + piece.first * width, count, weight.dtype),
            weight.dtype,
        )
    ]
