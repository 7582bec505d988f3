"""DeepSpeed's own universal folder as a source: ``zero/<parameter>/{fp32,exp_avg,...}.pt`` beside a model file.

Its converter writes it (``checkpoint/ds_to_universal.py``), and so does ``--to deepspeed-universal`` here. Every state
of a parameter is a file of its own and whole: tensor-parallel parts are put together, by patterns or by the affine map
that the model file records.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ucp.formats.base import Format
from ucp.formats.shared.options import SKIP_UNKNOWN_OBJECTS, TRUST_CLIENT_STATE

if TYPE_CHECKING:
    from pathlib import Path

    from ucp.catalog import Catalog
    from ucp.formats.nouns import FolderNames, ReadRequest
    from ucp.storage.files import Files

NAME = "deepspeed-universal"
FOLDER = "zero"
COMMON = "optimizer_state.pt"


class DeepSpeedUniversal(Format):
    name = NAME
    sign = f"DeepSpeed's universal one '{FOLDER}/{COMMON}'"
    parts = ("deepspeed",)
    read_options = (TRUST_CLIENT_STATE, SKIP_UNKNOWN_OBJECTS)

    def detect(self, folder: FolderNames) -> bool:
        from ucp.storage import locations

        return FOLDER in folder.names and locations.is_file(folder.path / FOLDER / COMMON)

    def read(self, path: Path, files: Files, request: ReadRequest) -> Catalog:
        from ucp.formats.deepspeed_universal import reader
        from ucp.formats.shared.unknown_objects import UnknownObjects

        return reader.read(path, files, UnknownObjects.of(request.options))

    def tag(self, path: Path) -> str | None:
        return path.name

    def knows(self, name: str) -> bool:
        from ucp.formats.deepspeed.read.names import is_ours

        return name == FOLDER or is_ours(name)


FORMAT = DeepSpeedUniversal()
