"""Checkpoints that hold a tied parameter once under each of its names: the copies have to be equal.

torch's state dicts name a tied parameter twice, and DCP writes it twice. One copy is restored. The other one is
compared with it, since otherwise something could be lost silently.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ucp import limits
from ucp.catalog import LogicalTensor
from ucp.errors import Mismatch
from ucp.geometry import flat_ranges, numel
from ucp.job import ranks
from ucp.job.stopwatch import Stopwatch
from ucp.loading.refusals import Words
from ucp.storage.dtypes import itemsize
from ucp.transfer.gather import Want, gather
from ucp.transfer.reader import Reader


def check(
    reader: Reader,
    pairs: Sequence[tuple[LogicalTensor, LogicalTensor]],
    words: Words,
    watch: Stopwatch,
    alone: bool = False,
) -> None:
    """Compare the copies of each pair bit for bit. Ranks with the same pairs share the work. Collective, unless
    ``alone``.

    words: the target's. watch: gets the seconds of this rank's share as 'read'.

    Raises Mismatch on every rank, naming both, if they differ.
    """
    said, which = ([[*map(_names, pairs)]], [0]) if alone else ranks.distinct([*map(_names, pairs)])
    if not any(said):
        return
    rank = 0 if alone else ranks.rank()
    share, shares = which[:rank].count(which[rank]), which.count(which[rank])

    def differing() -> list[tuple[str, str, str]]:
        with watch.of("read"):
            return [_names(pair) for pair in pairs if _differ(reader, *pair, share, shares)]

    found = [differing()] if alone else ranks.distinct(ranks.all_or_none(differing))[0]
    differ = sorted({pair for pairs in found for pair in pairs})
    if differ:
        name, state, owner = differ[0]
        more = f", and {len(differ) - 1} more" if differ[1:] else ""
        raise Mismatch(words.tied_differ(name, owner, f"{state}{more}"))


def _names(pair: tuple[LogicalTensor, LogicalTensor]) -> tuple[str, str, str]:
    return pair[0].name, pair[0].state, pair[1].name


def _differ(reader: Reader, one: LogicalTensor, other: LogicalTensor, share: int, shares: int) -> bool:
    """Whether the elements of this share differ between both."""
    width, count = itemsize(one.dtype), numel(one.shape)
    step, last = limits.TIED_WINDOW_BYTES // width, count * (share + 1) // shares
    for start in range(count * share // shares, last, step):
        blocks = flat_ranges(one.shape, [start], [min(start + step, last)], [0])
        found = [np.empty(int(blocks.counts.sum()) * width, np.uint8) for _ in (one, other)]
        gather(reader, [Want(t, blocks.in_buffer(k), one.dtype) for k, t in enumerate((one, other))], found, 1)
        if not np.array_equal(found[0], found[1]):
            return True
    return False
