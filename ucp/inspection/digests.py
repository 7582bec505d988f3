"""A checkpoint's logical digests: those that it has recorded, and others computed from its files."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ucp.catalog import LogicalTensor
from ucp.checkpoint import Checkpoint
from ucp.inspection import stream
from ucp.logical.digest import Digest
from ucp.logical.listing import Digests, TensorDigest
from ucp.transfer.digesting import digest_files
from ucp.transfer.windows import budget

Progress = Callable[[int, int], None]


def digests_of(checkpoint: Checkpoint, *, compute: bool = False, progress: Progress | None = None) -> Digests:
    """The digest of every tensor. compute: compute it from the files, whatever is recorded.

    Raises what reading raises.
    """
    tensors = list(checkpoint.catalog.tensors.values())
    found = digests(checkpoint, tensors, compute=compute, progress=progress)
    return Digests(str(checkpoint.path), tuple(found))


def digests(
    checkpoint: Checkpoint,
    tensors: Sequence[LogicalTensor],
    *,
    compute: bool = False,
    progress: Progress | None = None,
) -> list[TensorDigest]:
    """As `digests_of`, for some of the tensors, in their order."""
    missing = [t for t in tensors if compute or t.digest is None]
    total, done = stream.total(missing), 0

    def advance(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        if progress is not None:
            progress(done, total)

    computed: dict[tuple[str, str], Digest] = {}
    if missing:
        found = digest_files(checkpoint.reader, missing, threads=budget(None, None)[0], advance=advance)
        computed = {(t.name, t.state): digest for t, digest in zip(missing, found, strict=True)}
    out = []
    for t in tensors:
        digest = computed.get((t.name, t.state))
        if digest is not None:
            out.append(TensorDigest(t.name, t.state, t.dtype, t.shape, digest))
        elif t.digest is not None:
            out.append(TensorDigest(t.name, t.state, t.dtype, t.shape, t.digest.whole, recorded=True))
    return out


def contradictions(checkpoint: Checkpoint, found: Digests) -> list[str]:
    """``name:state`` of the tensors whose recorded digest differs from the computed one in ``found``."""
    recorded = {key: tensor.digest for key, tensor in checkpoint.catalog.tensors.items()}
    return [
        f"{t.name}:{t.state}"
        for t in found.tensors
        if not t.recorded and (known := recorded[t.name, t.state]) is not None and known.whole != t.digest
    ]
