"""The digests of a live training state, at any time: of every tensor that a save would write, on all ranks together."""

from __future__ import annotations

from ucp.errors import Mismatch
from ucp.geometry import numel
from ucp.job import ranks
from ucp.job.live_digest import LiveElements, digest_lanes
from ucp.job.live_sums import RankParts, add_up
from ucp.logical.digest import Digest
from ucp.logical.listing import Digests, TensorDigest
from ucp.saving.source import Source


def digest_source(source: Source, *, threads: int = 1) -> Digests:
    """The digests of all tensors of a source, the same on every rank and in every layout. Collective. Each rank reads
    its own memory once, where it lies. Nothing is gathered.

    Raises Mismatch on every rank if ranks hold different values of the same elements, or not all of a tensor.
    """
    held = [h for h in source.holdings if len(h.blocks)]
    lives = [LiveElements(h.tensor, h.shape, h.blocks) for h in held]
    found = ranks.all_or_none(lambda: digest_lanes(lives, threads=threads))
    sums = add_up(RankParts.of([(h.name, h.state) for h in held], found, [live.blocks for live in lives]))
    described, _ = ranks.distinct(sorted({(h.name, h.state): (h.dtype, h.shape) for h in source.holdings}.items()))
    tensors = []
    for (name, state), (dtype, shape) in dict(pair for pairs in described for pair in pairs).items():
        total = sums.get((name, state))
        held_elements = 0 if total is None else total.elements
        if total is not None and total.differ:
            raise Mismatch(f"'{name}' ({state}) has no digest: ranks hold different values of the same elements")
        if held_elements != numel(shape):
            raise Mismatch(
                f"'{name}' ({state}) has no digest: the ranks hold {held_elements} elements of {numel(shape)} together"
            )
        digest = Digest() if total is None else total.digest
        tensors.append(TensorDigest(name, state, dtype, shape, digest))
    return Digests("live", tuple(sorted(tensors, key=lambda t: (t.name, t.state))))
