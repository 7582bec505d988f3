"""Checkpoints that hold a tied parameter once under each of its names: the copies have to be equal.

torch's state dicts name a tied parameter twice, and DCP writes it twice. One copy is restored; that the other says the
same is checked, since otherwise something would be dropped without a word.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ucp.catalog import LogicalTensor
from ucp.errors import Mismatch
from ucp.geometry import flat_ranges, numel
from ucp.job import ranks
from ucp.job.stopwatch import Stopwatch
from ucp.storage.dtypes import itemsize
from ucp.transfer.gather import Reader, Want, gather

# Bytes of each copy that are compared at a time.
_WINDOW = 8 << 20


def check(reader: Reader, pairs: Sequence[tuple[LogicalTensor, LogicalTensor]], watch: Stopwatch) -> None:
    """Compare the copies of each pair bit for bit; ranks that know of the same pairs share the work. Collective.

    watch: gets the seconds of this rank's share as 'read'.

    Raises Mismatch on every rank, naming both, where they differ.
    """
    said, which = ranks.distinct([(one.name, one.state, other.name) for one, other in pairs])
    if not any(said):
        return
    rank = ranks.rank()
    share, shares = which[:rank].count(which[rank]), which.count(which[rank])

    def differing() -> list[tuple[str, str, str]]:
        with watch.of("read"):
            return [(a.name, a.state, b.name) for a, b in pairs if _differ(reader, a, b, share, shares)]

    mine = ranks.all_or_none(differing)
    found, _ = ranks.distinct(mine)
    differ = sorted({pair for pairs in found for pair in pairs})
    if differ:
        name, state, owner = differ[0]
        raise Mismatch(
            f"nothing was loaded: '{name}' is tied to '{owner}' here, and the checkpoint has different values for them "
            f"({state}{f', and {len(differ) - 1} more' if differ[1:] else ''}); to load '{owner}' alone, use "
            f'"ucp": {{"load": {{"allow_unused": ["{name}"]}}}}'
        )


def _differ(reader: Reader, one: LogicalTensor, other: LogicalTensor, share: int, shares: int) -> bool:
    """Whether the elements of this share are not the same in both."""
    width, count = itemsize(one.dtype), numel(one.shape)
    step, last = _WINDOW // width, count * (share + 1) // shares
    for start in range(count * share // shares, last, step):
        blocks = flat_ranges(one.shape, [start], [min(start + step, last)], [0])
        found = [np.empty(int(blocks.counts.sum()) * width, np.uint8) for _ in (one, other)]
        gather(reader, [Want(t, blocks.in_buffer(k), one.dtype) for k, t in enumerate((one, other))], found, 1)
        if not np.array_equal(found[0], found[1]):
            return True
    return False
