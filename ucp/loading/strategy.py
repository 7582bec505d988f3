"""In which order a load reads, verifies and changes what is live: the choice, and what it rests on.

A load promises to change nothing unless all of it can be brought. There are four ways to keep that, and each is best
somewhere:

- `HOLD`: read and verify everything into fresh host memory, then put it in place. Everything is read once, but the
  memory has to be found, and a share that is larger than the load's bound does not fit.
- `VERIFY_THEN_READ`: first compare every byte that will be used with its digest, in a few small windows, and keep
  nothing. Then read again, straight to where the bytes live. Best where the page cache has the files, or keeps them
  from the first time.
- `VERIFY_READ_PROVE`: the same, but bytes are not compared with their digests a second time. The proof afterwards
  finds what changed in between. Where everything goes to a device, since there the proof sees every element.
- `VERIFY_WHILE_BRINGING`: read once, straight to where the bytes live, and verify on the way. Only where the share is
  too large to hold, and files are read from a slow place twice otherwise. Damage is then found when part of the state
  has changed already, and the state may not be trained on until another load succeeds.

This is about what is live. Memory that nobody has seen, as of states that the optimizer has not made yet, is filled in
the first phase whatever the way, and verified as it is filled.

All ranks take the same way. It is chosen by what the slowest of them says.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from ucp import limits
from ucp.job import ranks
from ucp.loading.host_memory import Memory
from ucp.storage.digests import CHUNK
from ucp.storage.locations import is_remote
from ucp.storage.page_cache import available_bytes, cached_bytes
from ucp.transfer.checking import Ranges, compare, nbytes
from ucp.transfer.reader import Reader

HOLD = "hold the share"
VERIFY_THEN_READ = "verify, then read"
VERIFY_WHILE_BRINGING = "verify while bringing"
VERIFY_READ_PROVE = "verify, read, then prove"
STRATEGIES = (HOLD, VERIFY_THEN_READ, VERIFY_READ_PROVE, VERIFY_WHILE_BRINGING)


@dataclass(frozen=True)
class ReadFacts:
    """What one rank knows before it reads.

    held: bytes of host memory that holding its share would take. bound: bytes that the load may take. wanted: bytes of
    files that it will read. compared: how many of those (and of what lies around them) can be verified. cached: how
    many of the wanted bytes are in the page cache. available: memory that the system could give, in bytes; None if
    unknown. local: how many ranks share this machine. hold_costs, again_costs: seconds for each byte of fresh memory,
    and for each byte that is read once more; 0 if not measured. proved: whether a proof will see all of it, since it
    goes to a device.
    """

    held: int
    bound: int
    wanted: int
    compared: int
    cached: int
    available: int | None
    local: int
    hold_costs: float = 0.0
    again_costs: float = 0.0
    proved: bool = False

    @property
    def is_warm(self) -> bool:
        return self.cached >= self.wanted * limits.WARM_PART

    @property
    def keeps_pages(self) -> bool:
        """Whether the page cache would still have, in the second reading, what the first one left there."""
        missing = (self.compared - self.cached) * max(self.local, 1)
        return self.available is None or missing <= self.available * limits.CACHE_PART


def facts(reader: Reader, wanted: Ranges, compared: Ranges, held: int, bound: int, local: int) -> ReadFacts:
    """This rank's, without the costs."""
    cached = total = 0
    remote = False
    for file, ranges in wanted.items():
        path = reader.path(file)
        if path is None:
            continue
        here = sum(high - low for low, high in ranges)
        total += here
        if reader.is_far(file):
            remote = True
        else:
            cached += here if is_remote(path) else cached_bytes(path, ranges)  # or in the memory of a keeper
    # What comes over a network is in no page cache, so that it never stays for the second reading.
    available = 0 if remote else available_bytes()
    return ReadFacts(held, bound, total, nbytes(compared), cached, available, local)


def with_costs(own: ReadFacts, reader: Reader, compared: Ranges, threads: int) -> ReadFacts:
    """The same facts, with the costs measured where they matter: if a share of some size may be held, and the files are
    warm. Raises what reading raises."""
    if not (limits.HELD_ANYWAY_BYTES < own.held <= own.bound and own.is_warm and own.compared):
        return own
    some = dict(_first_bytes(compared, limits.TRIAL_BYTES))
    began = time.perf_counter()
    compare(reader, some, threads)
    again = time.perf_counter()
    Memory().take(limits.TRIAL_BYTES).zero_()
    held = time.perf_counter()
    return replace(own, again_costs=(again - began) / nbytes(some), hold_costs=(held - again) / limits.TRIAL_BYTES)


def _first_bytes(ranges: Ranges, count: int) -> Iterator[tuple[int, list[tuple[int, int]]]]:
    """The first ranges, of about so many bytes. The last one may be longer by less than a chunk."""
    for file, held in ranges.items():
        out = []
        for low, high in held:
            if count <= 0:
                break
            stop = min(high, low + -(-count // CHUNK) * CHUNK)
            out.append((low, stop))
            count -= stop - low
        if out:
            yield file, out


def choose(every: Sequence[ReadFacts]) -> str:
    """The way that all ranks take, by the facts of each."""
    fits = all(one.held <= one.bound for one in every)
    twice = VERIFY_READ_PROVE if all(one.proved for one in every) else VERIFY_THEN_READ
    if fits and all(one.held <= limits.HELD_ANYWAY_BYTES for one in every):
        return HOLD
    if all(one.is_warm for one in every):
        quicker = all(0 < one.hold_costs < one.again_costs for one in every)
        return HOLD if fits and quicker else twice
    if fits:
        return HOLD
    if all(one.compared == 0 or one.keeps_pages for one in every):
        return twice
    return VERIFY_WHILE_BRINGING


def agreed(own: ReadFacts, alone: bool) -> str:
    """`choose`, with the facts of all ranks. Collective, unless ``alone``."""
    if alone:
        return choose([own])
    said, _ = ranks.distinct(vars(own))
    return choose([ReadFacts(**one) for one in said])
