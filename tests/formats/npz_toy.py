"""A toy format, as another package would bring it: one ``.npz`` with every tensor whole, called ``name:state``.

It stands alone: `tests/formats/test_toy_format.py` copies this file into a package of its own and registers it.
"""

from __future__ import annotations

import io
import json
import struct
import zipfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from ucp.catalog import Catalog, LogicalTensor, ParameterInfo, ParamGroup, SourceFile, TrainingState
from ucp.errors import DamagedCheckpoint, Unsupported
from ucp.formats.base import TEXT, Format, Option, WriteTarget
from ucp.formats.nouns import FolderNames, ReadRequest, WriteRequest
from ucp.geometry import numel, whole
from ucp.parallel.mesh import Layout
from ucp.storage import locations
from ucp.storage.crc32 import Crc32Entry
from ucp.storage.dtypes import is_numpy_native
from ucp.storage.files import Files
from ucp.transfer.gather import Want
from ucp.transfer.targets import TargetFile, WritePlan

FILE, FACTS = "tensors.npz", "facts.json"


class NpzTarget(WriteTarget):
    """Writes the archive record by record, each with its CRC-32 behind it, as it is known only then."""

    name = "npz"
    options = (Option("note", TEXT, "a text to keep beside the tensors", "TEXT"),)

    def plan(self, catalog: Catalog, request: WriteRequest) -> WritePlan:
        at, literals, directory = 0, [], b""
        wants, crcs = [], []
        for (name, state), tensor in catalog.tensors.items():
            if not is_numpy_native(tensor.dtype):
                raise Unsupported(f"'{name}' is {tensor.dtype}, which numpy has not")
            dtype = np.dtype(tensor.dtype)
            head = io.BytesIO()
            np.lib.format.write_array_header_1_0(
                head, {"descr": dtype.str, "fortran_order": False, "shape": tensor.shape}
            )
            record = f"{name}:{state}.npy".encode()
            size = len(head.getvalue()) + tensor.nbytes
            common = struct.pack("<5H3L2H", 20, 8, 0, 0, 33, 0, size, size, len(record), 0)
            local = b"PK\3\4" + common + record
            literals.append((at, local + head.getvalue()))
            start = at + len(local)
            if numel(tensor.shape):
                wants.append(Want(tensor, whole(tensor.shape), tensor.dtype, start + len(head.getvalue())))
            literals.append((start + size, b"PK\7\b" + struct.pack("<3L", 0, size, size)))
            crcs.append((start, size, len(directory)))
            directory += b"PK\1\2" + struct.pack("<H", 20) + common + struct.pack("<3H2L", 0, 0, 0, 0, at) + record
            at = start + size + 16
        end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, len(crcs), len(crcs), len(directory), at, 0)
        literals.append((at, directory + end))
        entries = tuple(Crc32Entry(start, size, (start + size + 4, at + k + 16)) for start, size, k in crcs)
        archive = TargetFile(FILE, at + len(directory) + len(end), tuple(literals), tuple(wants), entries)
        state, infos = catalog.training_state, catalog.parameters.values()
        facts = {
            "steps": state.global_steps,
            "groups": [asdict(group) for group in state.param_groups],
            "parameters": {info.name: [info.kind, info.scalars, info.aliases] for info in infos},
            **request.options,
        }
        raw = json.dumps(facts).encode()
        return WritePlan(catalog, (archive, TargetFile(FACTS, len(raw), ((0, raw),), ())))


class Npz(Format):
    name = "npz"
    sign = f"a toy one '{FILE}'"
    targets = (NpzTarget(),)

    def detect(self, folder: FolderNames) -> bool:
        return folder.has_file(FILE)

    def read(self, path: Path, files: Files, request: ReadRequest) -> Catalog:
        archive = path / FILE
        try:
            facts = json.loads(locations.read(path / FACTS))
            tensors = {(t.name, t.state): t for t in self._tensors(archive)}
        except (OSError, ValueError, zipfile.BadZipFile) as error:
            raise DamagedCheckpoint(f"{archive}: cannot be read: {error}") from error
        parameters = {}
        for name, (kind, scalars, aliases) in facts["parameters"].items():
            states = {state: t.dtype for (owner, state), t in tensors.items() if owner == name}
            parameters[name] = ParameterInfo(name, tensors[name, "param"].shape, states, kind, scalars, tuple(aliases))
        groups = tuple(ParamGroup(tuple(group["names"]), group["options"]) for group in facts["groups"])
        stat = locations.stat(archive)
        source = SourceFile(str(archive), stat.size, stat.mtime_ns)
        state = TrainingState(groups, global_steps=facts["steps"])
        catalog = Catalog(self.name, "numpy", Layout(), (source,), parameters, tensors, state)
        catalog.check()
        return catalog

    def _tensors(self, archive: Path) -> Any:
        with locations.opened(archive) as stream, zipfile.ZipFile(stream) as found:
            for info in found.infolist():
                stream.seek(info.header_offset + 26)
                stream.seek(sum(struct.unpack("<HH", stream.read(4))), io.SEEK_CUR)
                np.lib.format.read_magic(stream)
                shape, _, dtype = np.lib.format.read_array_header_1_0(stream)
                name, _, state = info.filename.removesuffix(".npy").rpartition(":")
                blocks = whole(shape)
                bases = np.full(len(blocks), stream.tell(), np.int64)
                yield LogicalTensor(name, state, shape, dtype.name, blocks, bases)


FORMAT = Npz()
