"""One file that a program wrote with ``torch.save``: a module's state dict, or a mapping with that and more.

Lightning's ``.ckpt`` is one, and so are FSDP's FULL_STATE_DICT and what most training loops write themselves.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from ucp.formats.base import TEXT, Format, Option
from ucp.formats.shared.options import PARAM_NAMES, PARAM_SHAPES, SKIP_UNKNOWN_OBJECTS, TRUST_CLIENT_STATE

if TYPE_CHECKING:
    from pathlib import Path

    from ucp.catalog import Catalog
    from ucp.formats.nouns import FolderNames, ReadRequest
    from ucp.storage.files import Files

NAME = "torch-file"
_NAMES = re.compile(r".+\.(pt|pth|bin|ckpt|tar)")
MODEL_KEY = Option("model_key", TEXT, "where a file's model is, such as ema.model, if that is open", "KEY")
OPTIMIZER_KEY = Option("optimizer_key", TEXT, "where a file's optimizer is, if that is open", "KEY")


class SavedFile(Format):
    name = NAME
    sign = "one file of torch.save's, '*.pt', '*.pth', '*.bin' or '*.ckpt'"
    read_options = (TRUST_CLIENT_STATE, SKIP_UNKNOWN_OBJECTS, MODEL_KEY, OPTIMIZER_KEY, PARAM_NAMES, PARAM_SHAPES)

    def detect(self, folder: FolderNames) -> bool:
        return folder.is_file and _NAMES.fullmatch(folder.path.name) is not None

    def read(self, path: Path, files: Files, request: ReadRequest) -> Catalog:
        from ucp.formats.torch_file import reader

        return reader.read(path, files, request)


FORMAT = SavedFile()
