"""Checkpoints of Megatron-Core: ``torch_dist`` folders, with the optimizer's states under their parameters.

A ``torch_dist`` folder is one of torch's DCP (``.metadata``, ``*.distcp``) with ``metadata.json``, which is written
last, and what all ranks have in common in ``common.pt`` (megatron/core/dist_checkpointing/serialization.py). Its keys
are the modules' names, the layers of a block stacked along a first axis or one by one; here every parameter has the
name that one rank's whole model would have for it: `ucp.formats.megatron.keys`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from ucp.formats.base import Format
from ucp.formats.shared.options import TRUST_CLIENT_STATE

if TYPE_CHECKING:
    from pathlib import Path

    from ucp.catalog import Catalog
    from ucp.formats.nouns import FolderNames, ReadRequest
    from ucp.storage.files import Files

NAME = "megatron"
CONFIG, COMMON, INTEGRITY = "metadata.json", "common.pt", "integrity.json"
_PARTS = (".metadata", CONFIG, COMMON)

_DATA = re.compile(r"__(\d+)_\d+\.distcp")
_ITERATION = re.compile(r"iter_(\d{7,17})")


class Megatron(Format):
    name = NAME
    sign = f"one of Megatron-Core '{CONFIG}' beside '.metadata'"
    specificity = 1
    read_options = (TRUST_CLIENT_STATE,)

    def detect(self, folder: FolderNames) -> bool:
        """Two of the three files that tell it: what is missing then is said when it is read."""
        return sum(folder.has_file(name) for name in _PARTS) > 1

    def read(self, path: Path, files: Files, request: ReadRequest) -> Catalog:
        from ucp.formats.megatron.read import torch_dist

        return torch_dist.read(path, files, request.choice, **request.options)

    def step(self, path: Path) -> int | None:
        found = _ITERATION.fullmatch(path.name)
        return None if found is None else int(found[1])

    def tag(self, path: Path) -> str | None:
        return path.name if _ITERATION.fullmatch(path.name) or path.name == "release" else None

    def file_owners(self, names: Sequence[str]) -> Mapping[str, str]:
        return {name: f"rank {int(found[1])}" for name in names if (found := _DATA.fullmatch(name))}

    def knows(self, name: str) -> bool:
        return name in (*_PARTS, INTEGRITY) or _DATA.fullmatch(name) is not None


FORMAT = Megatron()
