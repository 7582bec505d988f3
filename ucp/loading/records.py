"""CRC-32s of records that no rank reads whole: ranks tell one another those of the parts that they have read."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from ucp import limits
from ucp.catalog import Catalog
from ucp.job import ranks
from ucp.transfer.reader import Reader


def are_shared(catalog: Catalog, alone: bool, verify: bool) -> bool:
    """Whether this load's ranks compare records together. The same on all ranks, as the catalog is."""
    return verify and not alone and bool(catalog.crc_records) and ranks.world_size() > 1


def compare_together(agreed: Callable[[Callable[[], None]], object], *readers: Reader) -> None:
    """Compare the records of which this rank has read a part, by what all have read of them. Collective.

    readers: the last one reads on, and takes as compared what the others have compared so. agreed: as
    `ranks.all_or_none`. Raises what reading raises, and DigestMismatch, on all ranks.
    """
    most = max(limits.RECORD_PIECES_COUNT // ranks.world_size(), 1)
    own = [piece for reader in readers for piece in reader.records.parts(most)]
    pieces: dict[int, list[tuple[int, int, int]]] = {}
    for table in ranks.gather(_table(own)):
        for file, start, size, crc in table.tolist():
            pieces.setdefault(file, []).append((start, size, crc))

    def compare() -> None:
        for reader in readers:
            reader.records.compare_together(pieces)

    agreed(compare)
    for reader in readers[:-1]:
        readers[-1].records.trust(reader.records)


def _table(pieces: list[tuple[int, int, int, int]]) -> NDArray[np.int64]:
    return np.array(pieces, np.int64).reshape(-1, 4)
