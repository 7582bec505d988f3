"""DeepSpeed's native checkpoints, read straight from their files.

No DeepSpeed and no torch is needed: the files' pickles are read with an allow-list, and every tensor in them is a byte
range. Every model-parallel rank's files are read as a part of its own (`part`), and the parts are put together by what
a spec, or the checkpoint itself, says of the model's cuts (`assemble`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ucp.catalog import Catalog
from ucp.storage.files import Files

NAME = "deepspeed"


def detect(path: Path) -> bool:
    """Whether this folder is a DeepSpeed checkpoint (one tag's folder)."""
    from ucp.formats.deepspeed.read import folder

    return folder.looks_like(path)


def read_catalog(path: Path, files: Files, **options: Any) -> Catalog:
    """The catalog of one tag's folder; see `reading.read`."""
    from ucp.formats.deepspeed.read import checkpoint

    return checkpoint.read(path, files, **options)
