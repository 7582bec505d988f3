"""Comparing with digests before a load: how threads share it."""

from __future__ import annotations

import threading
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from ucp import limits
from ucp.storage.digests import CHUNK
from ucp.transfer import checking


class SlowStart:
    """Stands in for a reader. The first step ends once all others are done."""

    def __init__(self, count: int) -> None:
        self.done: list[int] = []
        self._others = threading.Semaphore(0)
        self._count = count

    def is_far(self, file: int) -> bool:
        return False

    def reading_ahead(self, shares: Any) -> AbstractContextManager[None]:
        return nullcontext()

    def compare(self, file: int, at: int, buffer: Any) -> None:
        if at == 0:
            assert all(self._others.acquire(timeout=20) for _ in range(self._count - 1))
        else:
            self._others.release()
        self.done.append(at)


def test_a_slow_thread_does_not_keep_its_share() -> None:
    size = limits.chunks_at_once(limits.CHUNKS_COMPARED_COUNT) * CHUNK
    count = 4 * max(limits.BYTES_PER_READER // size, 1)
    reader: Any = SlowStart(count)
    checking.compare(reader, {0: [(0, count * size)]}, 3)
    assert sorted(reader.done) == [k * size for k in range(count)]
    assert reader.done[-1] == 0
