"""Checkpoints of torch.distributed.checkpoint (DCP), torchtitan's among them: ``.metadata`` and ``*.distcp`` files.

A data file is a row of records. Each is a complete ``torch.save`` archive of one chunk of a tensor, or of one object.
So every chunk's bytes are a byte range of a file, and are read like any other fragment. The names of the entries tell
what they are to a training run: see `ucp.formats.shared.roles`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from ucp.formats.base import Format, WriteTarget
from ucp.formats.shared.options import PARAM_NAMES, PARAM_SHAPES, SKIP_UNKNOWN_OBJECTS, TRUST_CLIENT_STATE

if TYPE_CHECKING:
    from pathlib import Path

    from ucp.catalog import Catalog
    from ucp.formats.nouns import FolderNames, ReadRequest, WriteRequest
    from ucp.storage.files import Files
    from ucp.transfer.targets import WritePlan

NAME = "dcp"
METADATA = ".metadata"

# torch distributed/checkpoint/filesystem.py: ``__{rank}_{n}.distcp``.
_DATA = re.compile(r"__(\d+)_\d+\.distcp")


class DcpTarget(WriteTarget):
    """A checkpoint that torch's own DCP loads, under the names that its programs use."""

    name = NAME
    also = ("distcp", "torch", "fsdp")

    def plan(self, catalog: Catalog, request: WriteRequest) -> WritePlan:
        from ucp.formats.dcp import writer
        from ucp.formats.shared.training_state import with_sources_of_state
        from ucp.transfer.targets import WritePlan

        source = with_sources_of_state(catalog)
        return WritePlan(source, tuple(writer.plan(source)))


class Dcp(Format):
    name = NAME
    sign = f"one of torch.distributed '{METADATA}'"
    read_options = (TRUST_CLIENT_STATE, SKIP_UNKNOWN_OBJECTS, PARAM_NAMES, PARAM_SHAPES)
    targets = (DcpTarget(),)

    def detect(self, folder: FolderNames) -> bool:
        return folder.has_file(METADATA)

    def read(self, path: Path, files: Files, request: ReadRequest) -> Catalog:
        from ucp.formats.dcp import reader
        from ucp.formats.shared.unknown_objects import UnknownObjects

        names, shapes = request.options.get("param_names"), request.options.get("param_shapes")
        return reader.read(path, files, UnknownObjects.of(request.options), names, shapes)

    def file_owners(self, names: Sequence[str]) -> Mapping[str, str]:
        return {name: f"rank {int(found[1])}" for name in names if (found := _DATA.fullmatch(name))}

    def knows(self, name: str) -> bool:
        return name == METADATA or _DATA.fullmatch(name) is not None


FORMAT = Dcp()
