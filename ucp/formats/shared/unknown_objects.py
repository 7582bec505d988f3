"""Torch files whose pickles may hold objects of unknown classes: refused, or left out where that is asked."""

from __future__ import annotations

from pathlib import Path

from ucp.errors import UnsafePickle
from ucp.printable import logger
from ucp.storage.torch_pt import reader
from ucp.storage.torch_pt.reader import TorchFile

log = logger(__name__)


def load_file(path: Path, *, trust: bool, skip: bool, dtensors: bool = False) -> TorchFile:
    """A torch.save file, as `reader.load_file` reads it.

    skip: leave objects of unknown classes out, but for the tensors and plain data in them, and say so.

    Raises DamagedCheckpoint, and UnsafePickle, which names the way to skip, for such an object.
    """
    skipped: set[tuple[str, str]] = set()
    try:
        found = reader.load_file(path, trust=trust, skipped=skipped if skip else None, dtensors=dtensors)
    except UnsafePickle as error:
        way_on = "skip_unknown_objects (--skip-unknown-objects) reads the rest without it"
        raise UnsafePickle(f"{error}; {way_on}") from error
    for module, name in sorted(skipped):
        log.warning("%s: objects of %s.%s are left out, but for the tensors and plain data in them", path, module, name)
    return found
