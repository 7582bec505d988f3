"""Lightning's folders of FSDP: torch.distributed's shards, with loops, callbacks and schedulers in ``meta.pt``.

Its single files are `ucp.formats.torch_file`'s; its folders of DeepSpeed have DeepSpeed's tag ``checkpoint`` in them,
and are found by their ``latest``; the scheduler is among DeepSpeed's client state there. Names: lightning
``strategies/fsdp.py`` and ``model_parallel.py``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ucp.formats.base import Format
from ucp.formats.shared.options import PARAM_SHAPES, SKIP_UNKNOWN_OBJECTS, TRUST_CLIENT_STATE

if TYPE_CHECKING:
    from pathlib import Path

    from ucp.catalog import Catalog
    from ucp.formats.nouns import FolderNames, ReadRequest
    from ucp.storage.files import Files

NAME = "lightning"
META = "meta.pt"
VERSION = "pytorch-lightning_version"


class Lightning(Format):
    name = NAME
    sign = f"Lightning's '{META}' beside '.metadata'"
    parts = ("dcp",)
    completes = ("deepspeed", "universal")
    read_options = (TRUST_CLIENT_STATE, SKIP_UNKNOWN_OBJECTS, PARAM_SHAPES)

    def detect(self, folder: FolderNames) -> bool:
        return folder.has_file(META) and folder.has_file(".metadata")

    def read(self, path: Path, files: Files, request: ReadRequest) -> Catalog:
        from ucp.formats.lightning import reader

        return reader.read(path, files, request)

    def complete(self, catalog: Catalog, beside: FolderNames | None, request: ReadRequest) -> Catalog:
        if VERSION not in catalog.training_state.client_state:
            return catalog
        from ucp.formats.lightning import reader

        return reader.complete(catalog)

    def knows(self, name: str) -> bool:
        from ucp.formats.dcp import FORMAT as SHARDS

        return name == META or SHARDS.knows(name)


FORMAT = Lightning()
