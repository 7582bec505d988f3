"""What `ucp merge` says that it does, in words: each operation its own, and nothing of how it is written in Python."""

from __future__ import annotations

import pytest

from ucp.merging.operations import Combination, Copied, Differences, Drawn, Largest, Lerp, Linear, Redrawn, Slerp
from ucp.merging.words import told

BOTH = ((0, 1.0), (1, 0.5))
SAID: list[tuple[Combination, str]] = [
    (Copied(1), "source 2 as it is"),
    (Linear(BOTH), "(1 × source 1 + 0.5 × source 2)"),
    (Linear(BOTH, normalised=True), "(1 × source 1 + 0.5 × source 2) / the sum of the weights"),
    (Lerp(0, 1, 0.25), "source 1 + 0.25 × (source 2 - source 1)"),
    (Slerp(0, 1, 0.25), "from source 1 to source 2 along the arc (slerp), 0.25 of the way"),
    (Redrawn(0, 7), "drawn anew with the mean and deviation of source 1, seed 7"),
    (Differences(0, ((1, 1.0),)), "source 1 + 1 × (source 2 - source 1)"),
    (
        Differences(2, BOTH, 0.3, Largest(0.2), elected=True),
        "source 3 + 0.3 × (1 × (source 1 - source 3) + 0.5 × (source 2 - source 3)), of each difference the largest "
        "0.2 of its elements, only those with the sign of their sum, as a mean (TIES)",
    ),
    (
        Differences(2, BOTH, selector=Drawn(0.2, 5), normalised=True, masks=(3, 4)),
        "source 3 + (1 × (source 1 - source 3) × mask in source 4 + 0.5 × (source 2 - source 3) × mask in source 5) / "
        "the sum of the weights, of each difference 0.2 of its elements, drawn with seed 5, divided by that",
    ),
]


@pytest.mark.parametrize(("operation", "words"), SAID, ids=[repr(operation)[:40] for operation, _ in SAID])
def test_words(operation: Combination, words: str) -> None:
    assert told(operation) == words


def test_operations_that_differ_read_differently() -> None:
    near = [Linear(((0, 0.1),)), Linear(((0, 0.1 + 2**-55),)), Linear(((0, 1.0), (1, 0.0))), Linear(((0, 1.0),))]
    assert len({told(one) for one in near}) == len(set(near))
