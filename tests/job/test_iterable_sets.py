"""Hugging Face's iterable data sets on another number of ranks: one stream goes on, and shards of ranks are refused."""

from __future__ import annotations

from typing import Any

import pytest
from torchdata.stateful_dataloader import StatefulDataLoader

from ucp.errors import Mismatch
from ucp.job.data_loaders import kept_of, restored

datasets = pytest.importorskip("datasets")
split = pytest.importorskip("datasets.distributed").split_dataset_by_node
COUNT = 60


def stream(rank: int, world: int, shards: int = 7, shuffled: bool = False) -> Any:
    """What one of ``world`` ranks reads; the whole data set if world is 0."""
    whole = datasets.Dataset.from_dict({"x": list(range(COUNT))}).to_iterable_dataset(num_shards=shards)
    if shuffled:
        whole = whole.shuffle(seed=1, buffer_size=4)
    return split(whole, rank, world) if world else whole


def loader(data: Any, workers: int = 0) -> StatefulDataLoader[Any]:
    return StatefulDataLoader(data, batch_size=2, num_workers=workers)


def taken(loader: Any, steps: int) -> list[int]:
    iterator = iter(loader)
    return [x for _ in range(steps) for x in next(iterator)["x"].tolist()]


@pytest.mark.parametrize(("old", "world"), [(n, m) for n in (2, 3, 4) for m in (2, 3, 5, 6)] + [(1, 1), (0, 1), (0, 0)])
def test_one_stream_goes_on_with_any_number(old: int, world: int) -> None:
    """Each sample once, before and after: of ranks that take every n-th, or of one that reads all."""
    loaders = [loader(stream(rank, old)) for rank in range(max(old, 1))]
    seen = [taken(one, 3) for one in loaders]
    saved = [kept_of(one) for one in loaders]
    rest = []
    for rank in range(max(world, 1)):
        live = loader(stream(rank, world))
        live.load_state_dict(restored(saved, live, rank, max(world, 1)).state)
        rest += [x for batch in live for x in batch["x"].tolist()]
    first = [x for one in seen for x in one]
    assert sorted(first) == list(range(6 * max(old, 1)))
    assert sorted(rest) == list(range(len(first), COUNT))


def test_a_data_set_by_itself() -> None:
    old = [stream(rank, 2) for rank in range(2)]
    for one in old:
        iterator = iter(one)
        assert [next(iterator)["x"] for _ in range(4)]
    saved = [kept_of(one) for one in old]
    rest = []
    for rank in range(3):
        live = stream(rank, 3)
        live.load_state_dict(restored(saved, live, rank, 3).state)
        rest += [one["x"] for one in live]
    assert sorted(rest) == list(range(8, COUNT))


def test_what_is_no_position_is_refused_by_name() -> None:
    def states(old: int, steps: int = 2, **kind: Any) -> list[dict[str, Any]]:
        loaders = [loader(stream(rank, old, **kind)) for rank in range(old)]
        for one in loaders:
            taken(one, steps)
        return [kept_of(one) for one in loaders]

    with pytest.raises(Mismatch, match="6 shards, which 2 ranks divide evenly, each reads its own"):
        restored(states(2, shards=6), loader(stream(0, 4, shards=6)), 0, 4)
    with pytest.raises(Mismatch, match="6 shards, which 3 ranks divide evenly"):
        restored(states(4, shards=6), loader(stream(0, 3, shards=6)), 0, 3)
    with pytest.raises(Mismatch, match="had 7 shards, and this one has 5"):
        restored(states(2), loader(stream(0, 3, shards=5)), 0, 3)
    with pytest.raises(Mismatch, match="shuffle buffer are no part of its state"):
        restored(states(2, shuffled=True), loader(stream(0, 3, shuffled=True)), 0, 3)
    with pytest.raises(Mismatch, match="2 workers of a loader divide"):
        restored(states(2), loader(stream(0, 3), workers=2), 0, 3)
    for old, new in ((2, 1), (1, 2), (3, 0)):  # divided and not
        with pytest.raises(Mismatch, match="its state means another place there"):
            restored(states(old), loader(stream(0, new)), 0, max(new, 1))
    unlike = [states(2)[0], states(2, steps=3)[1]]
    with pytest.raises(Mismatch, match="different places of the iterable data set"):
        restored(unlike, loader(stream(0, 3)), 0, 3)
    unnamed = [{"dataloader": one["dataloader"]} for one in states(2)]
    with pytest.raises(Mismatch, match="does not say how its ranks divided"):
        restored(unnamed, loader(stream(0, 3)), 0, 3)


def test_the_same_ranks_go_on_each_with_its_own_state() -> None:
    saved = [{"dataloader": {"place": rank}} for rank in range(2)]
    assert restored(saved, loader(stream(1, 2, shards=6)), 1, 2).state == {"place": 1}
