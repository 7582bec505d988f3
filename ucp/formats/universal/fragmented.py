"""The fragmented form: many fragments per tensor, each rank's in a file of its own. Ranks write without communicating.

A rank that has written its files leaves a *receipt*: a manifest of what it wrote, digests included, beside the save's
number and its own. The receipts of all ranks are the checkpoint's manifest: `merge` joins them, and checks that they
hold every element exactly once before anything is published.
"""

from __future__ import annotations

import functools
import operator
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ucp.catalog import Catalog, LogicalTensor, ParameterInfo, TrainingState
from ucp.errors import DamagedCheckpoint, SaveFailed
from ucp.formats.shared.apart import COMPUTED_ANEW
from ucp.formats.shared.training_state import Tensors, encode
from ucp.formats.universal import manifest, schema
from ucp.geometry import Blocks, concat, empty
from ucp.logical.record import Recorded
from ucp.storage import locations, plain
from ucp.storage.digests import ChunkDigests


@dataclass(frozen=True)
class Identity:
    """Whose receipt it is. save: the save's own number, so that nothing of another save is taken for it."""

    save: str
    rank: int
    world: int


def file_name(rank: int, world: int) -> str:
    """The file that a rank's fragments lie in."""
    return f"rank-{rank:05d}-of-{world:05d}.safetensors"


def receipt(
    identity: Identity,
    catalog: Catalog,
    digests: Mapping[str, ChunkDigests],
    training_state: dict[str, Any],
    own: dict[str, Any],
    writer: str,
) -> bytes:
    """A receipt's bytes.

    catalog: all parameters of the model, and of their tensors the fragments that this rank wrote; its files' paths are
    relative to the folder. training_state: as `encode` made it; the first rank's counts. own: what this rank alone
    knows, such as its generators, as `plain.encode` made it.
    """
    body = schema.encode(
        catalog,
        form="fragmented",
        writer=writer,
        paths=[file.path for file in catalog.files],
        mtimes=[None] * len(catalog.files),
        digests={k: digests[file.path] for k, file in enumerate(catalog.files) if file.path in digests},
        training_state=training_state,
        source=("training", writer),
    )
    return manifest.frame({**body, "receipt": {**vars(identity), "own": own}})


def empty_state() -> dict[str, Any]:
    """The training state in the receipts of all ranks but the first."""
    return encode(TrainingState(), Tensors())


def merge(folder: str, receipts: Sequence[str], save: str, prefix: str = "") -> bytes:
    """The manifest of what all ranks wrote.

    folder: where the files lie.
    receipts: paths or URLs of the receipts, by rank. They may lie anywhere.
    prefix: of the files' names in the manifest, if the manifest will lie above them.

    Raises SaveFailed if ranks contradict each other or do not hold every element exactly once, DamagedCheckpoint if a
    file is not what its receipt says.
    """
    shares: list[tuple[Catalog, dict[str, Any]]] = []
    for rank, path in enumerate(receipts):
        body = manifest.load(path)
        marks = body.get("receipt")
        wanted = {"save": save, "rank": rank, "world": len(receipts)}
        if not isinstance(marks, dict) or {k: marks.get(k) for k in wanted} != wanted:
            raise SaveFailed(f"{path}: is not the receipt of rank {rank} of {len(receipts)} in this save; save again")
        where = f"{folder}/receipt of rank {rank}"
        shares.append((schema.decode(where, body, complete=False), body))
    body = shares[0][1]
    catalog = _join([share for share, _ in shares])
    try:
        catalog.check()
    except DamagedCheckpoint as error:
        raise SaveFailed(f"nothing was saved, since what the ranks wrote does not fit together: {error}") from error
    joined = schema.encode(
        catalog,
        form="fragmented",
        writer=body["writer"],
        paths=[prefix + _relative(file.path, folder) for file in catalog.files],
        mtimes=[None] * len(catalog.files),
        digests=dict(catalog.chunk_digests),
        training_state=_training_state([b for _, b in shares]),
        source=(body["source"]["format"], body["source"]["writer"]),
    )
    return manifest.frame(joined)


def _relative(path: str, folder: str) -> str:
    if locations.is_remote(folder):
        return path.removeprefix(folder + "/")
    return os.path.relpath(path, os.path.realpath(folder))


def _join(shares: Sequence[Catalog]) -> Catalog:
    first = shares[0]
    files = [file for share in shares for file in share.files]
    bases = np.cumsum([0, *(len(share.files) for share in shares)])
    known: dict[str, ParameterInfo] = {}
    for rank, share in enumerate(shares):
        _add_parameters(known, share, rank)
    parameters = {
        # A value that the first rank has is that rank's.
        name: info
        if info.scalars.keys() == (scalars := _scalars(name, shares)).keys()
        else replace(info, scalars=scalars)
        for name, info in known.items()
    }
    shift = _Shift()
    tensors: dict[tuple[str, str], LogicalTensor] = {}
    for key, tensor in {key: t for share in reversed(shares) for key, t in share.tensors.items()}.items():
        # A rank that holds nothing of a parameter may not know what states it has.
        held = [share.tensors.get(key) or _nothing_of(tensor) for share in shares]
        odd = next((rank for rank, t in enumerate(held) if t.dtype != tensor.dtype), None)
        if odd is not None:
            raise SaveFailed(
                f"'{key[0]}' ({key[1]}) is {tensor.dtype} on rank 0 and {held[odd].dtype} on rank {odd}; nothing was "
                "saved"
            )
        if len(held) == 1:
            tensors[key] = tensor
            continue
        blocks = concat(
            (shift.by(base, t.blocks) for t, base in zip(held, bases.tolist(), strict=False)), len(tensor.shape)
        )
        bases_of = np.concatenate([t.bases for t in held])
        tensors[key] = replace(tensor, blocks=blocks, bases=bases_of, digest=_digest(held))
    bare = next((name for name in parameters if (name, "param") not in tensors), None)
    if bare is not None:
        raise SaveFailed(f"no rank has the weights of '{bare}'; nothing was saved")
    digests: dict[int, Any] = {}
    for base, share in zip(bases.tolist(), shares, strict=False):
        digests.update({base + k: table for k, table in share.chunk_digests.items()})
    return replace(first, files=tuple(files), parameters=parameters, tensors=tensors, chunk_digests=digests)


class _Shift:
    """Blocks whose files' numbers are changed. Tensors that share their blocks share the result."""

    def __init__(self) -> None:
        self._known: dict[tuple[int, int], tuple[Blocks, Blocks]] = {}  # with the blocks, which are kept while this is

    def by(self, base: int, blocks: Blocks) -> Blocks:
        key = base, id(blocks)
        if key not in self._known:
            self._known[key] = blocks, replace(blocks, buffers=blocks.buffers + base)
        return self._known[key][1]


def _digest(held: Sequence[LogicalTensor]) -> Recorded | None:
    """What the ranks' digests add up to; None if one of the ranks has none."""
    parts = [t.digest for t in held if len(t.blocks) or t.digest is not None]
    known = [part for part in parts if part is not None]
    if not known or len(known) < len(parts) or len({part.sample for part in known}) > 1:
        return None
    return functools.reduce(operator.add, known)


def _nothing_of(tensor: LogicalTensor) -> LogicalTensor:
    return replace(tensor, blocks=empty(len(tensor.shape)), bases=np.zeros(0, np.int64), digest=None)


def _scalars(name: str, shares: Sequence[Catalog]) -> dict[str, Any]:
    """A parameter's values. A rank that holds nothing of the parameter may know none of them."""
    out: dict[str, Any] = {}
    for rank, share in enumerate(shares):
        for key, value in share.parameters[name].scalars.items() if name in share.parameters else ():
            if plain.encode(out.setdefault(key, value)) != plain.encode(value) and key not in COMPUTED_ANEW:
                raise SaveFailed(
                    f"'{name}' has {key} {value!r} on rank {rank} and {out[key]!r} on an earlier one; nothing was saved"
                )
    return out


def _add_parameters(known: dict[str, ParameterInfo], share: Catalog, rank: int) -> None:
    """Enter a rank's parameters: all of the model, or those of its pipeline stage."""

    def described(info: ParameterInfo) -> tuple[Any, ...]:
        return info.shape, info.kind, info.aliases

    for name, theirs in share.parameters.items():
        ours = known.setdefault(name, theirs)
        if described(ours) != described(theirs):
            raise SaveFailed(
                f"'{name}' is {described(theirs)} on rank {rank} and {described(ours)} on an earlier one; nothing was "
                "saved"
            )


def _training_state(bodies: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The first rank's, with what each rank has of its own as ``extra['ranks']``, in order of rank."""
    state = dict(bodies[0]["training_state"])
    if "$" in state["extra"]:
        raise DamagedCheckpoint("the training state's further entries have names that are not plain text")
    own = [body["receipt"]["own"] for body in bodies]
    for entry in own[1:]:
        if entry.get("client_state") == state["client_state"]:
            entry.pop("client_state", None)
    state["extra"] = {**state["extra"], "ranks": own}
    return state
