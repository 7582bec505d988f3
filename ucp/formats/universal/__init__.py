"""The project's own format: a manifest ``ucp.json`` and the tensors that it describes.

Three physical forms share one schema (`schema`): *consolidated* (every tensor whole, in safetensors files: see
`consolidated`), *virtual* (byte ranges of another checkpoint: see `virtual`) and *fragmented* (many fragments per
tensor, as ranks save them). Reading (`reading`) never asks which form it is. Nothing here needs pickle.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ucp.catalog import Catalog
from ucp.formats.universal import manifest
from ucp.storage import locations
from ucp.storage.files import Files

NAME = "universal"


def detect(path: Path) -> bool:
    """Whether this folder has a manifest."""
    return locations.is_file(path / manifest.NAME)


def read_catalog(path: Path, files: Files, **options: Any) -> Catalog:
    """The folder's catalog; see `reading.read`."""
    from ucp.formats.universal import reader

    return reader.read(path, files, **options)
