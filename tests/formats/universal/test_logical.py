"""Logical digests in the manifest: kept, carried over, missing in older ones, and refused where they are damaged."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from ucp.catalog import LogicalTensor
from ucp.errors import DamagedCheckpoint
from ucp.formats.universal import logical
from ucp.geometry import whole
from ucp.logical.digest import Digest
from ucp.logical.record import Recorded
from ucp.logical.runs import Sample

SAMPLE = Sample(2**64 - 1, 32)


def tensor(name: str, digest: Recorded | None) -> LogicalTensor:
    return LogicalTensor(name, "param", (2,), "float32", whole((2,)), np.zeros(1, np.int64), digest)


def recorded(number: int, sample: Sample = SAMPLE) -> Recorded:
    return Recorded(Digest(number, 2), Digest(3, 2**64 - 1), sample)


def test_they_come_back() -> None:
    tensors = [tensor("a", recorded(1)), tensor("b", None), tensor("c", recorded(4))]
    found = logical.decode("ucp.json", logical.encode(tensors), 3)
    assert found == [recorded(1), None, recorded(4)]


def test_the_sample_of_older_checkpoints_is_told_from_that_of_newer_ones() -> None:
    """Both have the same digests of a whole tensor, and a reader that knows the older alone takes none from a newer."""
    for first, scheme in ((True, "rows-256x2"), (False, "rows-256x2-spread")):
        digest = recorded(1, Sample(7, 64, first))
        body = logical.encode([tensor("a", digest)])
        assert body[logical.NAME]["scheme"] == scheme
        assert logical.decode("ucp.json", body, 1) == [digest]
    assert logical.decode("ucp.json", {logical.NAME: {"scheme": ["rows-256x2"]}}, 1) == [None]


def test_without_any_there_is_no_entry_and_older_manifests_have_none() -> None:
    assert logical.encode([tensor("a", None)]) == {}
    assert logical.decode("ucp.json", {}, 2) == [None, None]


def test_another_sample_or_scheme_is_as_good_as_none() -> None:
    body = logical.encode([tensor("a", recorded(1)), tensor("b", recorded(1, Sample(1, 2)))])
    assert logical.decode("ucp.json", body, 2) == [recorded(1), None]
    body[logical.NAME]["scheme"] = "another"
    assert logical.decode("ucp.json", body, 2) == [None, None]


@pytest.mark.parametrize(
    "change",
    [
        {"seed": -1},
        {"seed": 2**64},
        {"seed": "7"},
        {"every": 0},
        {"every": True},
        {"whole": None},
        {"whole": []},
        {"whole": ["0" * 31]},
        {"sampled": [7]},
        {"sampled": ["0" * 32, None]},
    ],
)
def test_what_is_none_is_refused(change: dict[str, Any]) -> None:
    body = logical.encode([tensor("a", recorded(1))])
    body[logical.NAME].update(change)
    with pytest.raises(DamagedCheckpoint, match=r"^ucp\.json: 'logical_digests.*damaged$"):
        logical.decode("ucp.json", body, 1)
    with pytest.raises(DamagedCheckpoint, match="not an object"):
        logical.decode("ucp.json", {logical.NAME: 3}, 1)
