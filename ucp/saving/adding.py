"""The logical digests of what a rank saves, added up during the writing, from the copies that are written.

The copies came from the device or the tensors' memory just before. A load compares these digests with what it has put
in place, which may be on the device again. This finds whatever happens to a tensor in between: in the files, on the
way, in a layout's arithmetic, in the load. What a copy from the device itself does to a tensor is found by digesting
the live state before the save (`ucp.digest`).
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from ucp.catalog import Catalog
from ucp.job.stopwatch import Stopwatch
from ucp.logical.digest import Digest
from ucp.logical.record import Entry, PassingTensors, Recorded
from ucp.logical.runs import Sample
from ucp.saving.crew import Crew
from ucp.storage.digests import digest_chunks
from ucp.storage.dtypes import itemsize
from ucp.storage.kept.files import Lease


class Adding:
    """The digests of a share. catalog: its tensors, all in its first file."""

    def __init__(self, catalog: Catalog, sample: Sample) -> None:
        self._catalog = catalog
        held = [tensor for tensor in catalog.tensors.values() if len(tensor.blocks)]
        self._keys = [(tensor.name, tensor.state) for tensor in held]
        self._passing = PassingTensors([Entry(t.shape, itemsize(t.dtype), t.blocks, t.bases) for t in held], sample)
        self._nothing = Recorded(Digest(), Digest(), sample)
        self._found = [self._nothing] * len(held)

    def along(
        self, windows: Iterator[tuple[int, memoryview]], watch: Stopwatch
    ) -> Generator[tuple[int, memoryview], None, None]:
        """The same windows, each digested by a thread while the caller writes it. The caller closes it.

        watch: gets the seconds that the caller waits for the thread as 'digest'.
        """
        with ThreadPoolExecutor(1, "ucp-digest") as pool:
            for at, window in windows:
                work = pool.submit(self._passing.of, at, window)
                yield at, window
                with watch.of("digest"):
                    self._add(work.result())

    def all_of(self, windows: Iterable[tuple[int, memoryview]]) -> bytes:
        """Digest windows that stay where they are. Returns the digests of their chunks, in the order of the windows."""
        tables = []
        for at, window in windows:
            tables.append(digest_chunks(window))
            self._add(self._passing.of(at, window))
        return b"".join(tables)

    def by(self, crew: Crew, lease: Lease, windows: Iterable[tuple[int, memoryview]]) -> bytes:
        """As `all_of`, by other processes, each window as soon as it comes. Raises what `Crew.digest` raises."""
        table, parts = crew.digest(self._passing, lease, windows)
        self._add(parts)
        return table

    def _add(self, parts: Iterable[tuple[int, Recorded]]) -> None:
        for k, part in parts:
            before = self._found[k]
            self._found[k] = part if before is self._nothing else before + part

    def catalog(self) -> Catalog:
        """The share's catalog, with the digests of what has passed."""
        found = dict(zip(self._keys, self._found, strict=True))
        tensors = {
            key: replace(tensor, digest=found.get(key, self._nothing)) for key, tensor in self._catalog.tensors.items()
        }
        return replace(self._catalog, tensors=tensors)
