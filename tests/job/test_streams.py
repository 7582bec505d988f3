"""Random numbers that belong to samples."""

from __future__ import annotations

import pytest
import torch

from ucp.errors import BadArgument
from ucp.job.streams import SampleDropout, per_sample, samples


def masks(world: int, micro: int, batch: int = 12) -> dict[int, torch.Tensor]:
    """Each sample's masks of two places and two calls, on ranks that take the batch in micro-batches."""
    places = [SampleDropout(0.4, "a"), SampleDropout(0.4, "b")]
    out = {}
    for start in range(0, batch, world * micro):
        for rank in range(world):
            numbers = range(start + rank * micro, start + (rank + 1) * micro)
            with samples(3, 8, numbers):
                made = [place.mask((micro, 40)) for place in (*places, places[0])]
            out.update({n: torch.stack([m[k] for m in made]) for k, n in enumerate(numbers)})
    return out


def test_masks_are_equal_on_any_number_of_ranks() -> None:
    wanted = masks(4, 3)
    for world, micro in ((3, 2), (2, 6), (1, 4)):
        found = masks(world, micro)
        assert all(torch.equal(found[n], wanted[n]) for n in range(12))
    assert len({tuple(mask.flatten().tolist()) for held in wanted.values() for mask in held}) == 36


def test_steps_samples_seeds_and_uses_have_streams_of_their_own() -> None:
    keys = [(0, 0, 0, "a"), (1, 0, 0, "a"), (0, 1, 0, "a"), (0, 0, 1, "a"), (0, 0, 0, "b")]
    drawn = {torch.rand(4, generator=per_sample(*key)).tolist()[0] for key in keys}
    assert len(drawn) == len(keys)


def test_dropout_keeps_the_mean_and_wants_to_know_its_samples() -> None:
    place = SampleDropout(0.25, "x")
    with samples(0, 0, range(4)):
        out = place(torch.ones(4, 5000))
    assert out.unique().tolist() == pytest.approx([0, 4 / 3])
    assert out.mean().item() == pytest.approx(1, abs=0.02)
    with pytest.raises(BadArgument, match="needs to know their numbers"):
        place(torch.ones(4, 5))
    assert torch.equal(place.eval()(torch.ones(2)), torch.ones(2))
