"""The project's own format: a manifest ``ucp.json`` and the tensors that it describes.

Three physical forms share one schema (`schema`): *consolidated* (every tensor whole, in safetensors files: see
`consolidated`), *virtual* (byte ranges of another checkpoint: see `virtual`) and *fragmented* (many fragments per
tensor, as ranks save them). Reading (`reader`) never asks which form it is. Nothing here needs pickle.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from ucp.errors import BadArgument
from ucp.formats.base import FLAG, Format, Option, WriteTarget
from ucp.formats.shared.options import TRUST_PATHS

if TYPE_CHECKING:
    from pathlib import Path

    from ucp.catalog import Catalog
    from ucp.formats.nouns import FolderNames, ReadRequest, Remains, Salvage, WriteRequest
    from ucp.logical.record import Recorded
    from ucp.storage.digests import ChunkDigests
    from ucp.storage.files import Files
    from ucp.transfer.targets import WritePlan

NAME = "universal"
MANIFEST = "ucp.json"
"""The manifest's file name."""

_RANK = re.compile(r"rank-(\d+)-of-\d+\.safetensors")
_OWN = re.compile(r"(rank-\d+-of-\d+|training-state(-\d+)?|(model|optimizer\..+)-\d+-of-\d+)\.safetensors")


class UniversalTarget(WriteTarget):
    """Every tensor once and whole, or with ``virtual`` only a manifest."""

    name = NAME
    also = ("ucp",)
    options = (
        Option(
            "virtual",
            FLAG,
            "write a manifest that points into SOURCE; copy no tensors",
            default=False,
            elsewhere="the virtual form exists in the universal format only, not in '{to}'",
        ),
        Option(
            "digests",
            FLAG,
            "with --virtual: read SOURCE and record its digests",
            default=False,
            elsewhere="digests can be asked for in the virtual form only, not in '{to}'",
        ),
    )

    def plan(self, catalog: Catalog, request: WriteRequest) -> WritePlan:
        from ucp.formats.universal import consolidated, manifest, virtual
        from ucp.transfer.targets import WritePlan

        writer = manifest.writer_name()
        with_digests = request.options.get("digests", False)
        if request.options.get("virtual", False):
            return virtual.write_plan(virtual.plan(catalog), writer, request.destination, with_digests, request.workers)
        if with_digests:
            raise BadArgument(
                "digests can be asked for in the virtual form only; the consolidated form always has them"
            )
        whole = consolidated.plan(catalog)

        def finish(digests: dict[str, ChunkDigests], logical: Mapping[tuple[str, str], Recorded]) -> dict[str, bytes]:
            return {MANIFEST: whole.manifest(digests, writer, logical)}

        return WritePlan(whole.source, whole.files, finish, records=True)


class Universal(Format):
    name = NAME
    sign = f"a universal checkpoint has '{MANIFEST}'"
    parts = ("huggingface",)  # the consolidated form's weights
    read_options = (TRUST_PATHS,)
    targets = (UniversalTarget(),)

    def detect(self, folder: FolderNames) -> bool:
        return folder.has_file(MANIFEST)

    def read(self, path: Path, files: Files, request: ReadRequest) -> Catalog:
        from ucp.formats.universal import reader

        return reader.read(path, files, trust_paths=request.options.get("trust_paths", False))

    def file_owners(self, names: Sequence[str]) -> Mapping[str, str]:
        return {name: f"rank {int(found[1])}" for name in names if (found := _RANK.fullmatch(name))}

    def knows(self, name: str) -> bool:
        return _OWN.fullmatch(name) is not None

    def remains(self, path: Path, files: Files, request: ReadRequest) -> Remains | None:
        from ucp.formats.universal.remains import remains

        return remains(path, trust_paths=request.options.get("trust_paths", False))

    def salvage(self, path: Path) -> Salvage | None:
        from ucp.formats.universal.salvage import salvage

        return salvage(path)


FORMAT = Universal()
