"""Checkpoints of ``torch_checkpointing``, PyTorch's library beside DCP (0.1), which torchtitan can use.

A checkpoint is a mapping of items, such as ``model`` and ``optimizer``. Each rank writes one ``torch.save`` file of
each item, ``model_0.pt``, whose DTensors have that rank's part. Where the items can be loaded on other ranks, a
``metadata.pkl`` says how many ranks there were and what else each file could be called.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from ucp.formats.base import Format
from ucp.formats.shared.options import PARAM_NAMES, PARAM_SHAPES, SKIP_UNKNOWN_OBJECTS, TRUST_CLIENT_STATE

if TYPE_CHECKING:
    from pathlib import Path

    from ucp.catalog import Catalog
    from ucp.formats.nouns import FolderNames, ReadRequest
    from ucp.storage.files import Files

NAME = "torch-checkpointing"
METADATA = "metadata.pkl"
FILE = re.compile(r"(\w(?:.*\w)?)_(\d+)\.pt")


class TorchCheckpointing(Format):
    name = NAME
    sign = f"one of torch_checkpointing 'model_0.pt' or '{METADATA}'"
    read_options = (TRUST_CLIENT_STATE, SKIP_UNKNOWN_OBJECTS, PARAM_NAMES, PARAM_SHAPES)

    def detect(self, folder: FolderNames) -> bool:
        """Whether each rank has a file of an item: of the model, or of any where metadata say that it is one."""
        return "model_0.pt" in folder.names or (METADATA in folder.names and folder.any_name(FILE))

    def read(self, path: Path, files: Files, request: ReadRequest) -> Catalog:
        from ucp.formats.torch_checkpointing import reader

        return reader.read(path, files, request)

    def file_owners(self, names: Sequence[str]) -> Mapping[str, str]:
        return {name: f"rank {int(found[2])}" for name in names if (found := FILE.fullmatch(name))}

    def knows(self, name: str) -> bool:
        return name == METADATA or FILE.fullmatch(name) is not None


FORMAT = TorchCheckpointing()
