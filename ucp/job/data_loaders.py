"""A data loader's saved state on another number of ranks: only a position that is known to be global may move.

A state that is equal on every rank may still be a count per rank, which means other samples on another number of
ranks. So the meaning of a state is not guessed from its being equal. It is known only for these:

- `ucp.job.data_order.GlobalOrder`, by itself or as the sampler of torchdata's ``StatefulDataLoader``. Its state is the
  number of samples that all ranks have seen, and any number of ranks can continue from there.
- ``StatefulDataLoader`` over a map-style data set with torch's ``DistributedSampler`` or torchdata's own. Rank r of n
  takes every n-th sample of one order, so ranks that have taken k samples each have seen its first k * n. On m ranks
  that is k * n / m each, if this is a whole number of steps. Otherwise they continue at the next whole step, and a log
  line says what is left out.

- Hugging Face's iterable data sets, by themselves or in a ``StatefulDataLoader``, where all ranks share one stream
  (`ucp.job.iterable_sets`).

Everything else is refused on another number of ranks: other iterable data sets, states of workers and of data sets,
other samplers, other loaders.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

from torch.utils.data import IterableDataset
from torch.utils.data.distributed import DistributedSampler

from ucp.errors import Mismatch
from ucp.job import iterable_sets
from ucp.job.data_order import GlobalOrder
from ucp.job.iterable_sets import StreamOf
from ucp.storage import plain
from ucp.units import counted

P = TypeVar("P")

STATE = "dataloader"
PLACE = "dataloader_place"
STREAM = "dataloader_stream"
"""What a rank keeps of its data loader: the state, where it stood when that was taken, and which part of an iterable
data set it reads."""

WAYS_ON = (
    "draw the samples by ucp.job.data_order.GlobalOrder, which goes on with any number of ranks, or pass "
    "dataloader=None and set the position by the report's step or samples"
)


@dataclass(frozen=True)
class SamplesOf:
    """Which samples a loader gives. replicas, rank, drop_last: the sampler's; tensor-parallel ranks share them. batch:
    samples of one step on one rank. length: the data set's. seed, shuffle: those of the order."""

    replicas: int
    rank: int
    batch: int
    length: int
    seed: int
    shuffle: bool
    drop_last: bool


@dataclass(frozen=True)
class Restored:
    """state: the state for this rank's loader. note: what to log about it, if anything."""

    state: Any
    note: str = ""


def kept_of(loader: Any) -> dict[str, Any]:
    """What a rank saves of its data loader; nothing if it has none."""
    if loader is None:
        return {}
    place, stream = _place(loader), iterable_sets.stream_of(loader)
    return {
        STATE: loader.state_dict(),
        **({} if place is None else {PLACE: asdict(place)}),
        **({} if stream is None else {STREAM: asdict(stream)}),
    }


def restored(saved: Sequence[Mapping[str, Any]], loader: Any, rank: int, world: int) -> Restored:
    """The state for this rank's loader. saved: what every rank of the run that saved has kept (`kept_of`).

    Raises Mismatch, which begins with what the checkpoint has, if no state fits these ranks.
    """
    kept = [own for own in saved if STATE in own]
    live, old = _place(loader), [_place_kept(own, PLACE, SamplesOf) for own in kept]
    stream, streams = iterable_sets.stream_of(loader), [_place_kept(own, STREAM, StreamOf) for own in kept]
    changed = live is not None and any(place is not None and place.replicas != live.replicas for place in old)
    changed = changed or (stream is not None and any(one is not None and one != stream for one in streams))
    if len(kept) == world and not changed:
        return Restored(kept[rank][STATE])
    if not kept:
        raise Mismatch(f"it has no data loader's state; {WAYS_ON}")
    if isinstance(loader, GlobalOrder) and _is_global(kept):
        loader.check_state(kept[0][STATE])
        return Restored(kept[0][STATE])
    if live is not None:
        same = next((own for own, place in zip(kept, old, strict=True) if place is not None and place == live), None)
        return Restored(same[STATE]) if same is not None else _moved(kept, old, live, loader)
    if _is_stateful_loader(loader) and isinstance(loader.sampler, GlobalOrder):
        return _global_position(kept, loader)
    if stream is not None:
        states = [plain.encode(own[STATE]) for own in kept]
        fault = iterable_sets.fault(streams, stream, states)
        if fault is None:
            return Restored(kept[0][STATE], "the data loader goes on where all ranks were in one iterable data set")
        raise Mismatch(f"{_counted(kept, world)}, and {fault}; {WAYS_ON}")
    raise Mismatch(f"{_counted(kept, world)}, and {_unknown(loader)} of {world}; {WAYS_ON}")


def _counted(kept: Sequence[Mapping[str, Any]], world: int) -> str:
    return f"it has the data loader's states of {counted(len(kept), 'rank')}, and {counted(world, 'loads', 'load')}"


def _unknown(loader: Any) -> str:
    name = type(loader).__name__
    if _is_stateful_loader(loader):
        if isinstance(loader.dataset, IterableDataset):
            return f"an iterable data set's position ({type(loader.dataset).__name__}) is no position"
        return f"what {name} draws by {type(loader.sampler).__name__} on one number of ranks is not known to be that"
    return f"the state of {name} is not known to be one"


def _is_stateful_loader(loader: Any) -> bool:
    """Whether it is torchdata's. If so, torchdata has been imported already."""
    module = sys.modules.get("torchdata.stateful_dataloader")
    return module is not None and isinstance(loader, module.StatefulDataLoader)


def _place(loader: Any) -> SamplesOf | None:
    """Which samples the loader gives. None if the ranks are not known to share one order."""
    if not _is_stateful_loader(loader) or loader.batch_size is None:
        return None
    sampler, dataset = loader.sampler, loader.dataset
    of_torchdata = sys.modules.get("torchdata.stateful_dataloader.sampler")
    known = (DistributedSampler, getattr(of_torchdata, "StatefulDistributedSampler", DistributedSampler))
    # Subclasses may divide the samples in another way.
    if type(sampler) not in known or isinstance(dataset, IterableDataset):
        return None
    return SamplesOf(
        int(sampler.num_replicas),
        int(sampler.rank),
        int(loader.batch_size),
        len(sampler.dataset),
        int(sampler.seed),
        bool(sampler.shuffle),
        bool(sampler.drop_last),
    )


def _place_kept(own: Mapping[str, Any], key: str, kind: type[P]) -> P | None:
    found = own.get(key)
    try:
        return None if found is None else kind(**found)
    except TypeError as error:
        raise Mismatch(f"its '{key}' is not understood: {error}; {WAYS_ON}") from None


@dataclass(frozen=True)
class _Position:
    """The position in a StatefulDataLoader's state. samples: how many this rank was given. finished: its epoch is at
    the end."""

    samples: int
    finished: bool


def _position(state: Any, place: SamplesOf | None, counted: bool = True) -> _Position:
    """The position in a state. counted: the state itself has to say how many samples were drawn, and not only the
    sampler.

    Raises Mismatch for a state that holds more than a position, or none.
    """
    if not isinstance(state, Mapping):
        raise Mismatch(f"its data loader's state is a {type(state).__name__}; {WAYS_ON}")
    snapshot = state.get("_snapshot")
    main = _main_of(state)
    since = 0 if snapshot is None else state.get("_steps_since_snapshot", 0)
    workers = [main] if snapshot is None else list((snapshot.get("_worker_snapshots") or {}).values())
    if any(worker.get(key) is not None for worker in workers for key in ("dataset_state", "fetcher_state")):
        raise Mismatch(f"its data loader's state holds a data set's or a worker's own state; {WAYS_ON}")
    order = main.get("_sampler_iter_state")
    if not isinstance(order, Mapping) or "samples_yielded" not in order:
        raise Mismatch(f"its data loader's state does not say how many samples were drawn; {WAYS_ON}")
    samples = int(order["samples_yielded"])
    if since and place is None and counted:
        raise Mismatch(f"its data loader's state counts steps, and not how many samples a step had; {WAYS_ON}")
    if place is not None:
        samples += since * place.batch
    return _Position(samples, bool(state.get("_iterator_finished")))


def _moved(
    kept: Sequence[Mapping[str, Any]], old: Sequence[SamplesOf | None], live: SamplesOf, loader: Any
) -> Restored:
    """The state of a loader whose rank takes every n-th sample of one order, from ranks that also did so."""
    positions = {_position(own[STATE], place) for own, place in zip(kept, old, strict=True)}
    if len(positions) > 1:
        counts = sorted({position.samples for position in positions})
        raise Mismatch(f"its ranks had drawn {counts[0]} to {counts[-1]} samples, which is no one position; {WAYS_ON}")
    (position,) = positions
    replicas = {len(kept) if place is None else place.replicas for place in old}
    before = next((place for place in old if place is not None), None)
    for what in ("length", "seed", "shuffle"):
        if before is not None and getattr(before, what) != getattr(live, what):
            was, now = getattr(before, what), getattr(live, what)
            raise Mismatch(f"its samples were drawn in another order: {what} was {was} and is {now}; {WAYS_ON}")
    seen = position.samples * max(replicas)
    said = f"{seen} samples of the epoch were drawn by {max(replicas)} ranks"
    if position.finished or seen >= live.length:
        # A loader without a state begins the next epoch.
        return Restored({}, f"the data loader begins an epoch: {said}, which ended it")
    a_step = live.replicas * live.batch
    steps = -(-seen // a_step)
    out = min(steps * a_step, live.length) - seen
    note = f"the data loader goes on at sample {seen + out} of the epoch's order: {said}"
    if out:
        note += f", and {live.replicas} ranks step by {a_step}, so that {out} samples are left out and seen by none"
    samples = steps * live.batch
    return Restored(_with_position(kept[0][STATE], loader, {"yielded": samples}, samples, steps), note)


def _is_global(kept: Sequence[Mapping[str, Any]]) -> bool:
    """Whether all ranks have the same state."""
    first = plain.encode(kept[0][STATE])
    return all(plain.encode(own[STATE]) == first for own in kept)


def _global_position(kept: Sequence[Mapping[str, Any]], loader: Any) -> Restored:
    """The state of a loader over `GlobalOrder`. It contains the order's own state, which is global."""
    orders = []
    for own in kept:
        _position(own[STATE], None, counted=False)
        main = _main_of(own[STATE])
        order = main["_sampler_iter_state"].get("sampler_state")
        if not isinstance(order, Mapping):
            raise Mismatch(f"its data loader's state does not have GlobalOrder's position; {WAYS_ON}")
        loader.sampler.check_state(order)
        since = int(own[STATE].get("_steps_since_snapshot", 0))
        orders.append({**order, "given": order["given"] + since * order["batch"]})
    if not _is_global([{STATE: order} for order in orders]):
        raise Mismatch(f"its ranks had come to different samples of the order; {WAYS_ON}")
    steps = orders[0]["given"] // orders[0]["batch"]
    return Restored(_with_position(kept[0][STATE], loader, orders[0], orders[0]["given"], steps))


def _main_of(state: Mapping[str, Any]) -> Mapping[str, Any]:
    """What a StatefulDataLoader's state says about the main process."""
    found: Mapping[str, Any] = state if "_snapshot" not in state else state["_snapshot"].get("_main_snapshot", {})
    return found


def _with_position(
    state: Mapping[str, Any], loader: Any, sampler: Mapping[str, Any], samples: int, steps: int
) -> dict[str, Any]:
    """A StatefulDataLoader's state, moved to this many steps and samples of its rank.

    sampler: the sampler's own state, if it has one. Workers of map-style data sets have no state of their own, so their
    number may change.
    """
    main = dict(_main_of(state))
    order = {**main["_sampler_iter_state"], "samples_yielded": samples}
    if "sampler_state" in order:
        order["sampler_state"] = dict(sampler)
    main["_sampler_iter_state"], main["_sampler_iter_yielded"] = order, steps
    workers = loader.num_workers
    if bool(workers) != ("_snapshot" in state):
        raise Mismatch(
            f"its data loader had {'workers' if not workers else 'no workers'} and this one has {workers}; use the "
            "same, or pass dataloader=None"
        )
    if not workers:
        return {**main, "_num_yielded": steps, "_iterator_finished": False}
    main["_num_workers"] = workers
    nothing = {"dataset_state": None, "fetcher_state": None}
    return {
        "_snapshot": {
            "_snapshot_step": steps,
            "_last_yielded_worker_id": (steps - 1) % workers,
            "_main_snapshot": main,
            "_worker_snapshots": {f"worker_{k}": {"worker_id": k, **nothing} for k in range(workers)},
        },
        "_steps_since_snapshot": 0,
        "_iterator_finished": False,
    }
