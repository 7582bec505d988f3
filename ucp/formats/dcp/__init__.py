"""Checkpoints of torch.distributed.checkpoint (DCP), torchtitan's among them: ``.metadata`` and ``*.distcp`` files.

A data file is a row of records, each a complete ``torch.save`` archive of one chunk of a tensor, or of one object. So
every chunk's bytes are a byte range of a file, and are read like any other fragment. What the entries are to a training
run, their names tell: see `names`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ucp.catalog import Catalog
from ucp.storage import locations
from ucp.storage.files import Files

NAME = "dcp"
METADATA = ".metadata"


def detect(path: Path) -> bool:
    """Whether the folder has DCP's metadata."""
    return locations.is_file(path / METADATA)


def read_catalog(path: Path, files: Files, **options: Any) -> Catalog:
    """The folder's catalog; see `reading.read`."""
    from ucp.formats.dcp import reader

    return reader.read(path, files, **options)
