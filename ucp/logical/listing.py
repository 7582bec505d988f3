"""The digests of all tensors of a state, live or in a checkpoint, and one digest of them all."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import xxhash

from ucp.geometry import Shape
from ucp.logical.digest import Digest

SCHEMA = "ucp.digest/1"


@dataclass(frozen=True)
class TensorDigest:
    """One tensor's digest.

    recorded: whether it was taken from the checkpoint's manifest, not computed from the tensor's elements.
    """

    name: str
    state: str
    dtype: str
    shape: Shape
    digest: Digest
    recorded: bool = False


@dataclass(frozen=True)
class Digests:
    """All tensors' digests. of: the checkpoint's path, or 'live'."""

    of: str
    tensors: tuple[TensorDigest, ...]

    @property
    def all(self) -> str:
        """One digest of all: names, states, element types, shapes and elements. 32 hexadecimal digits."""
        return combined(self.tensors)

    def differences(self, other: Digests) -> Iterator[str]:
        """``name:state`` of every tensor that is missing in one of the two, or differs between them."""
        ours, theirs = ({(t.name, t.state): (t.dtype, t.shape, t.digest) for t in s.tensors} for s in (self, other))
        for name, state in dict.fromkeys((*ours, *theirs)):
            if ours.get((name, state)) != theirs.get((name, state)):
                yield f"{name}:{state}"

    def as_json(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "path": self.of,
            "digest": self.all,
            "tensors": [
                {
                    "name": t.name,
                    "state": t.state,
                    "dtype": t.dtype,
                    "shape": list(t.shape),
                    "digest": str(t.digest),
                    "recorded": t.recorded,
                }
                for t in self.tensors
            ],
        }

    def __str__(self) -> str:
        return self.all


def combined(tensors: Sequence[TensorDigest]) -> str:
    """The digest of all of these, in whatever order they are given."""
    found = xxhash.xxh3_128()
    for t in sorted(tensors, key=lambda t: (t.name, t.state)):
        text = "\0".join((t.name, t.state, t.dtype, ",".join(map(str, t.shape)), str(t.digest)))
        found.update(text.encode("utf-8", "surrogatepass") + b"\n")
    return found.hexdigest()
