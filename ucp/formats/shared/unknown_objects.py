"""Torch files whose pickles may hold objects of unknown classes: refused, or left out where that is asked."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from ucp.errors import UnsafePickle
from ucp.printable import logger
from ucp.storage.torch_pt import reader
from ucp.storage.torch_pt.reader import TorchFile
from ucp.storage.torch_pt.skipped import Skipped

log = logger(__name__)

T = TypeVar("T")


@dataclass(frozen=True)
class UnknownObjects:
    """What becomes of objects of unknown classes, which are refused by default.

    trust: make them, which runs their code. None: never, whatever the caller trusts, as for files of tensors.
    skip: leave them out, but for the tensors and plain data in them, and say so.
    """

    trust: bool | None = False
    skip: bool = False

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> UnknownObjects:
        """As a format's reading options say."""
        return cls(bool(options.get("trust_client_state")), bool(options.get("skip_unknown_objects")))


REFUSED = UnknownObjects()


def load_file(path: Path, unknown: UnknownObjects, *, dtensors: bool = False) -> TorchFile:
    """A torch.save file, as `reader.load_file` reads it.

    Raises DamagedCheckpoint, and UnsafePickle, which names the way to skip, for an object of an unknown class.
    """
    return _loaded(
        str(path),
        unknown,
        lambda skipped: reader.load_file(path, trust=unknown.trust, skipped=skipped, dtensors=dtensors),
    )


def load_section(stream: BinaryIO, path: str, start: int, length: int, unknown: UnknownObjects) -> Any:
    """The object graph of an archive inside another file, as `reader.load_section` reads it. Raises as `load_file`."""
    return _loaded(
        path,
        unknown,
        lambda skipped: reader.load_section(stream, path, start, length, trust=unknown.trust, skipped=skipped),
    )


def _loaded(path: str, unknown: UnknownObjects, load: Callable[[Skipped | None], T]) -> T:
    skipped: Skipped = set()
    try:
        found = load(skipped if unknown.skip else None)
    except UnsafePickle as error:
        way_on = "skip_unknown_objects (--skip-unknown-objects) reads the rest without it"
        raise UnsafePickle(f"{error}; {way_on}") from error
    for module, name in sorted(skipped):
        log.warning("%s: objects of %s.%s are left out, but for the tensors and plain data in them", path, module, name)
    return found
