"""The manifest's ``logical_digests``: of every tensor's elements and their places, whatever the layout.

    {"scheme": "rows-256x2-spread", "seed": 7, "every": 64, "whole": [...], "sampled": [...]}

``whole`` and ``sampled`` are columns of the tensors: 32 hexadecimal digits (the two lanes of `ucp.logical.digest`, 64
bits each), null for a tensor that has none. ``sampled`` is of the blocks that ``seed`` and ``every`` pick
(`ucp.logical.runs.Sample`). Older checkpoints have the scheme ``rows-256x2``: the same digests, another sample, which
has each tensor's first block. Digests of a scheme that a reader doesn't know are as good as none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import repeat
from typing import Any

from ucp.catalog import LogicalTensor
from ucp.columns import made_of
from ucp.errors import DamagedCheckpoint
from ucp.logical.digest import SCHEME, Digest
from ucp.logical.record import Recorded
from ucp.logical.runs import Sample

NAME = "logical_digests"

_SCHEMES = {SCHEME: True, f"{SCHEME}-spread": False}
"""By their names: whether the sample has each tensor's first block."""


_NONE = str(Digest())


def encode(tensors: Sequence[LogicalTensor]) -> dict[str, Any]:
    """The manifest's entry if any of the tensors has a digest; otherwise it is empty."""
    sample = next((t.digest.sample for t in tensors if t.digest is not None), None)
    if sample is None:
        return {}
    known = [t.digest if t.digest is not None and t.digest.sample == sample else None for t in tensors]
    return {
        NAME: {
            "scheme": next(name for name, first in _SCHEMES.items() if first == sample.first),
            "seed": sample.seed,
            "every": sample.every,
            "whole": [None if digest is None else str(digest.whole) for digest in known],
            "sampled": [None if digest is None else str(digest.sampled) for digest in known],
        }
    }


def decode(path: str, body: Mapping[str, Any], count: int) -> list[Recorded | None]:
    """Each tensor's digest. Raises DamagedCheckpoint for an entry that is not one."""
    found = body.get(NAME)
    if found is None:
        return [None] * count
    if not isinstance(found, dict):
        raise DamagedCheckpoint(f"{path}: '{NAME}' is not an object; the manifest is damaged")
    scheme = found.get("scheme")
    if not isinstance(scheme, str) or scheme not in _SCHEMES:
        return [None] * count
    seed, every = found.get("seed"), found.get("every")
    if type(seed) is not int or not 0 <= seed < 1 << 64 or type(every) is not int or not 1 <= every < 1 << 31:
        raise DamagedCheckpoint(f"{path}: '{NAME}' has the sample {seed!r}, {every!r}; the manifest is damaged")
    sample = Sample(seed, every, _SCHEMES[scheme])
    whole = _column(path, found, "whole", count)
    # A tensor of one block is a sample of itself.
    sampled = whole if found["whole"] == found.get("sampled") else _column(path, found, "sampled", count)
    both: list[Recorded | None] = list(made_of(Recorded, count, whole, sampled, repeat(sample)))
    if None in found["whole"] or None in found["sampled"]:
        return [
            None if first is None or second is None else one
            for one, first, second in zip(both, found["whole"], found["sampled"], strict=True)
        ]
    return both


def _column(path: str, found: dict[str, Any], name: str, count: int) -> list[Digest]:
    """One column; a tensor without a digest has that of nothing in it."""
    values = found.get(name)
    if not isinstance(values, list) or len(values) != count:
        raise DamagedCheckpoint(f"{path}: '{NAME}.{name}' has not {count} entries; the manifest is damaged")
    try:
        return Digest.parse_all([_NONE if value is None else str(value) for value in values])
    except ValueError as error:
        raise DamagedCheckpoint(f"{path}: '{NAME}.{name}': {error}; the manifest is damaged") from error
