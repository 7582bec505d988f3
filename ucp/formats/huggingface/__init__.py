"""Hugging Face model folders: weights, with the config that says what they are of.

Read as a checkpoint that has weights and nothing else. Where the catalogue of specs knows the config's model_type, the
names are the module's own as transformers 5 has them, whatever the files call them, and tied parameters are one.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from ucp.catalog import Catalog
from ucp.storage import locations
from ucp.storage.files import Files

NAME = "huggingface"

# What tells a training checkpoint, or a folder of them, that has weights for other programs beside it: DeepSpeed's as
# Hugging Face's Trainer leaves them, and a universal one that has lost its manifest.
_TRAINING = re.compile(r"latest|latest_universal|ucp\.json|global_step.*|optimizer\..*\.safetensors(\.index\.json)?")


def detect(path: Path) -> bool:
    """Whether this folder has weight files, and is no training checkpoint or folder of them besides."""
    from ucp.formats.huggingface import folder

    if not any(kind.in_folder(path) for kind in folder.KINDS):
        return False
    return not any(_TRAINING.fullmatch(name) for name in locations.names(path))


def read_catalog(path: Path, files: Files, **options: Any) -> Catalog:
    """The catalog of a folder; see `reading.read`."""
    from ucp.formats.huggingface import reader

    return reader.read(path, files, **options)
