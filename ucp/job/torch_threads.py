"""How many threads torch's operations in host memory use."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ucp import limits


@contextmanager
def all_processors() -> Iterator[None]:
    """Let torch use this rank's part of the processors for a while, if it uses fewer.

    A launcher gives each rank one thread (``OMP_NUM_THREADS=1``), since training has other work for the processors.
    Where they only wait for the ranks to round or copy what was loaded, that is as many times slower.
    """
    before = torch.get_num_threads()
    more = limits.processors() // limits.ranks_here()
    if more <= before:
        yield
        return
    torch.set_num_threads(more)
    try:
        yield
    finally:
        torch.set_num_threads(before)
