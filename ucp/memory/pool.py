"""Memory that a keeper lends to a rank, with the interface of the pool through which background saves copy."""

from __future__ import annotations

import errno
import weakref
from typing import Any

import torch

from ucp import limits
from ucp.errors import SaveFailed
from ucp.saving.staging import Pool, pin
from ucp.storage.kept.files import KeptFiles


class LentPool(Pool):
    """Room for the whole of a rank's file, a new one for each snapshot. What is copied stays where it is."""

    def __init__(self, files: KeptFiles, rank: int) -> None:
        super().__init__()
        self._kept, self._rank = files, rank
        self.digesters = limits.digesters()
        self._seen: dict[int, torch.Tensor] = {}
        self._pins: dict[int, weakref.finalize[Any, Any]] = {}

    def reserve(self, nbytes: int, *, pinned: bool) -> None:
        """Get a new lease for this many bytes. Raises SaveFailed if the keeper is gone or has no room."""
        try:
            self.lease, mapped = self._kept.lease(self._rank, nbytes)
        except OSError as error:
            what = "nothing was snapshotted" if error.errno == errno.ENOMEM else "no keeper lends memory"
            raise SaveFailed(f"memory of '{self._kept.run}': {what}: {error.strerror or error}") from error
        place = id(mapped)
        if place not in self._seen:
            self._seen[place] = torch.frombuffer(mapped, dtype=torch.uint8)
        self.bytes = self._seen[place]
        if pinned and place not in self._pins:
            self._pins[place] = pin(self, self.bytes)

    def forget(self) -> None:
        """Release what a keeper had lent that is gone now."""
        self.lease = self.bytes = None
        for end in self._pins.values():
            end()
        self._pins.clear()
        self._seen.clear()
