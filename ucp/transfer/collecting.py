"""The logical digests of what is written, added up window by window while it is in memory.

The parts are kept with the records of what was written (`ucp.transfer.pieces`). So they add up over processes, and over
attempts that continue each other.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np

from ucp.catalog import Catalog, LogicalTensor
from ucp.errors import DamagedCheckpoint
from ucp.geometry import numel
from ucp.logical.digest import Digest
from ucp.logical.record import Entry, PassingTensors, Recorded
from ucp.logical.runs import Sample
from ucp.storage.dtypes import itemsize
from ucp.transfer.gather import Want
from ucp.transfer.targets import TargetFile

_PART = struct.Struct("<IQQQQ")  # the want's number among those of its file that count, both lanes of both digests

Key = tuple[str, str, Digest | None]
"""Name, state, and the source's digest: expert-parallel ranks give one name of their own to different experts."""


def _key(tensor: LogicalTensor) -> Key:
    return tensor.name, tensor.state, None if tensor.digest is None else tensor.digest.whole


@dataclass(frozen=True, eq=False)
class _File:
    wants: tuple[Want, ...]
    passing: PassingTensors


class Collecting:
    """Digests of the wants that ``counts`` picks and whose elements are not converted. sample: as in `Recorded`."""

    def __init__(self, files: Sequence[TargetFile], sample: Sample, counts: Callable[[Want], bool]) -> None:
        self._sample = sample
        self._files = [_file(file, sample, counts) for file in files]
        self._found: dict[Key, Recorded] = {}
        self._elements: dict[Key, int] = {}
        for want in chain.from_iterable(file.wants for file in self._files):
            key = _key(want.tensor)
            self._found.setdefault(key, Recorded(Digest(), Digest(), sample))
            self._elements[key] = self._elements.get(key, 0) + int(want.blocks.counts.sum())

    def of(self, file: int, start: int, data: memoryview) -> bytes:
        """What a file's bytes from ``start`` on add to the digests, as records keep it."""
        if not self._files[file].wants:
            return b""
        return b"".join(
            _PART.pack(k, part.whole.first, part.whole.second, part.sampled.first, part.sampled.second)
            for k, part in self._files[file].passing.of(start, data)
        )

    def add(self, file: int, parts: bytes) -> None:
        """Add what `of` has returned for one window."""
        for k, *lanes in _PART.iter_unpack(parts):
            tensor = self._files[file].wants[k].tensor
            part = Recorded(Digest(*lanes[:2]), Digest(*lanes[2:]), self._sample)
            self._found[_key(tensor)] += part

    def finish(self, source: Catalog) -> dict[tuple[str, str], Recorded]:
        """The digests of the tensors that were written whole, and only once. Every window must have been added.

        source: what was read.

        Raises DamagedCheckpoint if a tensor that was written differs from the digest that the source has recorded.
        """
        tensors = {_key(want.tensor): want.tensor for want in chain.from_iterable(file.wants for file in self._files)}
        nothing = Recorded(Digest(), Digest(), self._sample)
        out = {key: nothing for key, tensor in source.tensors.items() if not numel(tensor.shape)}
        wrong = []
        for key, tensor in tensors.items():
            times, rest = divmod(self._elements[key], max(numel(tensor.shape), 1))
            if rest or not times:
                continue  # some of it was written more often than the rest: the parts cannot be told apart
            found = self._found[key]
            if tensor.digest is not None and found.whole != _multiple(tensor.digest.whole, times):
                wrong.append(f"'{tensor.name}' ({tensor.state})")
            if times == 1:
                out[tensor.name, tensor.state] = found
        if wrong:
            raise DamagedCheckpoint(
                f"{len(wrong)} tensors that were written have other elements than the source's manifest says by their "
                f"logical digests: {', '.join(wrong[:4])}{', …' if wrong[4:] else ''}; nothing was left as whole, so "
                "check the source with ucp digest --compute"
            )
        return out


def _file(file: TargetFile, sample: Sample, counts: Callable[[Want], bool]) -> _File:
    wants = tuple(want for want in file.wants if want.dtype == want.tensor.dtype and counts(want))
    entries = [
        Entry(w.tensor.shape, itemsize(w.dtype), w.blocks, np.full(len(w.blocks), w.base, np.int64)) for w in wants
    ]
    return _File(wants, PassingTensors(entries, sample))


def _multiple(digest: Digest, times: int) -> Digest:
    mask = (1 << 64) - 1
    return Digest(digest.first * times & mask, digest.second * times & mask)
