"""The project's own format: a manifest ``ucp.json`` and the tensors that it describes.

Three physical forms share one schema (`schema`): *consolidated* (every tensor whole, in safetensors files: see
`consolidated`), *virtual* (byte ranges of another checkpoint: see `virtual`) and *fragmented* (many fragments per
tensor, as ranks save them). Reading never asks which form it is. Nothing here needs pickle.
"""

from __future__ import annotations

from pathlib import Path

from ucp.catalog import Catalog
from ucp.formats.universal import manifest, schema
from ucp.storage import locations
from ucp.storage.files import Files

NAME = "universal"


def detect(path: Path) -> bool:
    """Whether this folder has a manifest."""
    return locations.is_file(path / manifest.NAME)


def read(path: Path, files: Files) -> Catalog:
    """The catalog of a universal checkpoint's folder, everything in its manifest checked.

    Raises DigestMismatch or DamagedCheckpoint where the manifest or its files' sizes and times are not as recorded,
    Unsupported for a manifest of another major version.
    """
    where = str(locations.locate(path) / manifest.NAME)
    return schema.decode(where, manifest.load(where))
