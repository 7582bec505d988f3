"""Where a group's parity lies.

A node's payload is its files of a generation, one after the other. If m of n nodes may be lost, each cuts its payload
into k = n − m blocks. There are n stripes. m nodes hold the parity of a stripe, and each of the other k gives it one of
its blocks. So every node keeps m blocks of parity. With m = 1 these are S / (n − 1) bytes, and with n = 2 a mirror.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

ALIGNMENT = 64  # bytes, of blocks


@dataclass(frozen=True)
class Stripes:
    """The stripes of a group. nodes: in order. largest: how many bytes the largest of their payloads has."""

    nodes: tuple[str, ...]
    redundancy: int
    largest: int

    @property
    def data(self) -> int:
        """How many blocks of data a stripe has. A payload is cut into as many blocks."""
        return len(self.nodes) - self.redundancy

    @property
    def block(self) -> int:
        """How many bytes a block has."""
        return -(-self.largest // (self.data * ALIGNMENT)) * ALIGNMENT

    def holders(self, stripe: int) -> list[str]:
        """Who holds the stripe's parities, by row."""
        return [self.nodes[(stripe + row) % len(self.nodes)] for row in range(self.redundancy)]

    def givers(self, stripe: int) -> list[str]:
        """Whose blocks the stripe is made of, by column."""
        holders = self.holders(stripe)
        return [node for node in self.nodes if node not in holders]

    def held(self, node: str) -> list[int]:
        """The stripes whose parity the node holds. Of the r-th of them it holds row r."""
        at = self.nodes.index(node)
        return [(at - row) % len(self.nodes) for row in range(self.redundancy)]

    def start(self, node: str, stripe: int) -> int:
        """Where the block that the node gives this stripe begins in the node's payload."""
        before = sum(node in self.givers(other) for other in range(stripe))
        return before * self.block

    def given(self, node: str) -> list[int]:
        """The stripes to which the node gives a block, in the order of its blocks."""
        return [stripe for stripe in range(len(self.nodes)) if node in self.givers(stripe)]


def overlaps(bad: Sequence[tuple[int, int]], start: int, stop: int) -> bool:
    """Whether any of these ranges has bytes in ``[start, stop)``."""
    return any(low < stop and start < high for low, high in bad)
