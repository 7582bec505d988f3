"""The virtual form: a manifest that points at byte ranges of somebody else's checkpoint, which stays where it is.

Making it takes only as long as reading the source's metadata. The files that it points at are recognised by size and
modification time, and are refused once these differ. With digests, damage inside the files is found, too.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import takewhile
from typing import Any

import numpy as np
import xxhash

from ucp.catalog import Catalog, SourceFile
from ucp.errors import Unsupported
from ucp.formats.shared.training_state import Tensors, encode, with_sources
from ucp.formats.universal import manifest, schema, training
from ucp.logical.record import Recorded, drawn
from ucp.storage import locations
from ucp.storage.digests import ChunkDigests, digest_file
from ucp.storage.files import Files
from ucp.storage.torch_pt.archive import crcs_of
from ucp.transfer.checksums import RecordChecks
from ucp.transfer.destination import check_unchanged
from ucp.transfer.digesting import digest_files
from ucp.transfer.reader import Reader
from ucp.transfer.targets import TargetFile, WritePlan
from ucp.transfer.windows import budget


@dataclass(frozen=True)
class VirtualPlan:
    """A virtual checkpoint before it is written.

    source: the catalog to read the training state's tensors from. files: at most one, with those tensors. result: the
    catalog of what is pointed at, which has only the files that tensors lie in; the files of ``files`` come last in it.
    """

    source: Catalog
    files: tuple[TargetFile, ...]
    result: Catalog
    training_state: dict[str, Any]

    @property
    def foreign(self) -> tuple[SourceFile, ...]:
        """The files of the other checkpoint, in the order in which digests are numbered."""
        return self.result.files[: len(self.result.files) - len(self.files)]

    def manifest(
        self,
        digests: Mapping[str, ChunkDigests],
        writer: str,
        folder: str,
        foreign_digests: Mapping[int, ChunkDigests] | None = None,
        logical: Mapping[tuple[str, str], Recorded] | None = None,
    ) -> bytes:
        """The manifest's bytes. digests: those of ``files`` by name. folder: the path that the manifest will lie in.

        foreign_digests: those of the files pointed at, by their index in ``foreign``, where they were made;
        logical: the tensors' logical digests, if they were.
        """
        found = logical or {}
        tensors = {
            key: dataclasses.replace(t, digest=found.get(key, t.digest)) for key, t in self.result.tensors.items()
        }
        count = len(self.foreign)
        tables = {**self.result.chunk_digests, **(foreign_digests or {})}
        tables.update({count + k: digests[file.name] for k, file in enumerate(self.files) if file.name in digests})
        body = schema.encode(
            dataclasses.replace(self.result, tensors=tensors),
            form="virtual",
            writer=writer,
            paths=[*(_pointer(file.path, folder) for file in self.foreign), *(file.name for file in self.files)],
            mtimes=[*(file.mtime_ns for file in self.foreign), *(None for _ in self.files)],
            digests=tables,
            training_state=self.training_state,
            source=(self.source.format, self.source.writer),
            source_folder=_source_folder([file.path for file in self.foreign], folder),
        )
        return manifest.frame(body)


def plan(catalog: Catalog) -> VirtualPlan:
    """Describe a catalog where it is.

    Raises Unsupported for training state that is not plain data, and for tensors that lie in no file.
    """
    if catalog.computed:
        name, index = min(
            (t.name, min(found))
            for t in catalog.tensors.values()
            if (found := set(t.blocks.buffers.tolist()) & set(catalog.computed))
        )
        averages = catalog.files[index].path == "(averages)"
        what = "the average of its copies" if averages else "computed as it is read"
        raise Unsupported(
            f"'{name}' is {what}, which lies in no file, so a virtual checkpoint cannot point at it; convert without "
            "--virtual"
        )
    met = Tensors()
    training_state = encode(catalog.training_state, met)
    source = with_sources(catalog, met)
    extra = training.tensors_file(source, met)
    files = () if extra is None else (extra,)
    used = np.unique(np.concatenate([np.zeros(0, np.int64), *(t.blocks.buffers for t in catalog.tensors.values())]))
    place = np.full(len(catalog.files), -1, np.int64)
    place[used] = np.arange(len(used))
    tensors = {
        key: dataclasses.replace(t, blocks=dataclasses.replace(t.blocks, buffers=place[t.blocks.buffers]))
        for key, t in catalog.tensors.items()
    }
    result = dataclasses.replace(
        catalog,
        files=(*(catalog.files[k] for k in used.tolist()), *(SourceFile(f.name, f.size, 0) for f in files)),
        tensors=tensors,
        chunk_digests={int(place[k]): table for k, table in catalog.chunk_digests.items() if place[k] >= 0},
        crc_records={int(place[k]): found for k, found in catalog.crc_records.items() if place[k] >= 0},
    )
    return VirtualPlan(source, files, result, training_state)


def write_plan(made: VirtualPlan, writer: str, destination: str, with_digests: bool, workers: int | None) -> WritePlan:
    """The same as a conversion writes it. with_digests: read the files pointed at for digests of their chunks, and the
    tensors for their logical digests, where they have none. workers: threads for that."""

    def finish(digests: dict[str, ChunkDigests], logical: Mapping[tuple[str, str], Recorded]) -> dict[str, bytes]:
        foreign = _digests_of(made, workers) if with_digests else {}
        of_tensors = _logical_of(made, foreign, workers) if with_digests else {}
        check_unchanged(made.foreign)
        return {manifest.NAME: made.manifest(digests, writer, destination, foreign, of_tensors)}

    return WritePlan(made.source, made.files, finish, is_virtual=True)


def _digests_of(made: VirtualPlan, workers: int | None) -> dict[int, ChunkDigests]:
    """The digests of the files pointed at. Raises DigestMismatch if their bytes differ from their own CRC-32s, since a
    digest would then pass on damage as valid."""
    paths = [file.path for file in made.foreign]
    # Everything gets a digest, what no tensor needs (weights beside their masters) too.
    records = {index: crcs_of(paths[index]) or found for index, found in made.result.crc_records.items()}
    with Files() as source, ThreadPoolExecutor(budget(workers, None)[0]) as pool:
        checks = RecordChecks(records, paths, source)

        def digest(index: int) -> ChunkDigests:
            seen = partial(checks.add, index) if checks.covers(index) else None
            return digest_file(paths[index], source, seen)

        return dict(enumerate(pool.map(digest, range(len(paths)))))


def _logical_of(
    made: VirtualPlan, tables: Mapping[int, ChunkDigests], workers: int | None
) -> dict[tuple[str, str], Recorded]:
    """The logical digests of the tensors that have none, read against the digests of the files' chunks, so that both
    are of the same bytes."""
    catalog = dataclasses.replace(made.result, chunk_digests={**made.result.chunk_digests, **tables})
    tensors = [tensor for tensor in catalog.tensors.values() if tensor.digest is None]
    recorded = {tensor.digest.sample for tensor in catalog.tensors.values() if tensor.digest is not None}
    sample = (
        recorded.pop()
        if recorded
        else drawn(xxhash.xxh3_64_intdigest(repr(catalog.files).encode("utf-8", "surrogatepass")))
    )
    threads = budget(workers, None)[0]
    with Files() as files:
        reader = Reader(catalog, files)
        whole = digest_files(reader, tensors, threads=threads)
        sampled = digest_files(reader, tensors, sample=sample, threads=threads)
    return {(t.name, t.state): Recorded(a, b, sample) for t, a, b in zip(tensors, whole, sampled, strict=True)}


def _source_folder(paths: list[str], folder: str) -> str | None:
    """The folder that all these files lie in, as `_pointer` would name it; None if that is only the root."""
    if not paths:
        return None
    if any(map(locations.is_remote, paths)):
        columns = zip(*(path.split("/")[:-1] for path in paths), strict=False)
        parts = [column[0] for column in takewhile(lambda column: len(set(column)) == 1, columns)]
        return "/".join(parts) if len(parts) > 3 else None
    common = os.path.commonpath([os.path.dirname(os.path.realpath(path)) for path in paths])
    return None if common == os.sep else _pointer(common, folder)


def _pointer(path: str, folder: str) -> str:
    """How the manifest names a file outside. The name is relative if both share a folder below the root, so that they
    may move together. Otherwise it is absolute, and a URL stays as it is."""
    if locations.is_remote(path) or locations.is_remote(folder):
        return path
    path, folder = os.path.realpath(path), os.path.realpath(folder)
    if os.path.commonpath([path, folder]) == os.sep:
        return path
    return os.path.relpath(path, folder)
