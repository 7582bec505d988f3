"""Checkpoint formats, one module or package each, and how the one at hand is found.

A format offers ``NAME``, ``detect(folder) -> bool`` (by looking at names only) and ``read_catalog(folder, files)``.
All of them are asked, so each imports what only reading needs when it reads.
"""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from ucp.catalog import Catalog
from ucp.errors import NotACheckpoint
from ucp.formats import dcp, deepspeed, huggingface, universal
from ucp.storage import locations
from ucp.storage.files import Files


class Format(Protocol):
    """What a format's module offers to readers."""

    @property
    def NAME(self) -> str:
        """What `Catalog.format` says."""
        ...

    def detect(self, path: Path, /) -> bool:
        """Whether the folder is a checkpoint of this format."""
        ...

    def read_catalog(self, path: Path, files: Files, /) -> Catalog:
        """The folder's catalog."""
        ...


# In the order of trial: a manifest of ours is the surer sign.
READERS: tuple[Format, ...] = (universal, deepspeed, dcp, huggingface)


def find(path: Path) -> Format | None:
    """The format of the checkpoint in this folder, or None where no format knows it."""
    return next((reader for reader in READERS if reader.detect(path)), None)


def explain_unknown(path: Path) -> NotACheckpoint:
    """The error for a path that no format knows, saying what was looked for and what is there."""
    known = (
        "a universal checkpoint has 'ucp.json', a DeepSpeed one '*_model_states.pt', one of "
        "torch.distributed '.metadata', a Hugging Face model folder "
        "'model.safetensors' or an index of several"
    )
    if not locations.exists(path):
        return NotACheckpoint(f"{path}: there is no such file or folder")
    if not locations.is_folder(path):
        return NotACheckpoint(f"{path}: is a file; a checkpoint is a folder ({known})")
    try:
        names = locations.names(path)
    except OSError as error:
        return NotACheckpoint(f"{path}: the folder cannot be listed: {error.strerror or error}")
    found = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "") if names else "nothing"
    return NotACheckpoint(f"{path}: no checkpoint was recognised here ({known}); the folder holds {found}")
