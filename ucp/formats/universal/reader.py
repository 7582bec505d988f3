"""Reading a universal checkpoint, whichever form it has."""

from __future__ import annotations

from pathlib import Path

from ucp.catalog import Catalog
from ucp.formats.universal import manifest, schema
from ucp.storage import locations
from ucp.storage.files import Files


def read(path: Path, files: Files) -> Catalog:
    """The catalog of a universal checkpoint's folder, everything in its manifest checked.

    Raises DigestMismatch or DamagedCheckpoint where the manifest or its files' sizes and times are not as recorded,
    Unsupported for a manifest of another major version.
    """
    where = str(locations.locate(path) / manifest.NAME)
    return schema.decode(where, manifest.load(where))
