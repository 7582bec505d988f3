"""Reading a universal checkpoint, whichever form it has."""

from __future__ import annotations

from pathlib import Path

from ucp.catalog import Catalog
from ucp.formats.universal import manifest, schema
from ucp.storage import locations
from ucp.storage.files import Files


def read(path: Path, files: Files, trust_paths: bool = False) -> Catalog:
    """The catalog of a universal checkpoint's folder, everything in its manifest checked.

    trust_paths: follow a virtual one to files outside the folder that it names as its source.

    Raises DigestMismatch or DamagedCheckpoint where the manifest or its files' sizes and times are not as recorded,
    Unsupported for a manifest of another major version.
    """
    where = str(locations.locate(path) / manifest.NAME)
    return schema.decode(where, manifest.load(where), trust_paths=trust_paths)
