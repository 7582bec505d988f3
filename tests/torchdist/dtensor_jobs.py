"""Jobs for ranks: FSDP2 runs that save and load by this project's functions and by stock DCP, in one go."""

from __future__ import annotations

import copy
import glob
import logging
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

import ucp
import ucp.dcp
from tests.engines.fsdp import FURTHER, STEPS, Live, Mesh, State
from tests.engines.truth import same
from ucp import limits
from ucp.job import local_sums
from ucp.loading.exchange import Sharing, exchange
from ucp.torchdist.save import background_saver

warnings.filterwarnings("ignore")


@dataclass(frozen=True, eq=False)
class Run:
    """What a job saw. states: by what was done; losses: of the steps before; further: of the steps after."""

    states: dict[str, State]
    losses: tuple[float, ...]
    further: tuple[float, ...]
    extra: Any = None


class AppState(dcp.stateful.Stateful):
    """DCP's own idiom: model and optimizer behind one Stateful object."""

    def __init__(self, live: Live, flat: bool = False) -> None:
        self.live = live
        self.options = StateDictOptions(flatten_optimizer_state_dict=flat)

    def state_dict(self) -> dict[str, Any]:
        model, optim = get_state_dict(self.live.model, self.live.optimizer, options=self.options)
        return {"model": model, "optim": optim}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        set_state_dict(
            self.live.model,
            self.live.optimizer,
            model_state_dict=state_dict["model"],
            optim_state_dict=state_dict["optim"],
            options=self.options,
        )


def nested(live: Live) -> dict[str, Any]:
    return {**AppState(live).state_dict(), "epoch": 7, "rng": torch.get_rng_state()}


def shared(live: Live) -> dict[str, Any]:
    """Without what each rank has for itself."""
    return {k: v for k, v in nested(live).items() if k != "rng"}


def shared_model(live: Live) -> dict[str, Any]:
    """Model and optimizer alone."""
    return AppState(live).state_dict()


def drifted(live: Live) -> dict[str, Any]:
    """The same with a tied head whose copy says something else."""
    found = shared_model(live)
    return {**found, "model": {**found["model"], "head.weight": found["model"]["head.weight"] + 1}}


def titan(live: Live) -> dict[str, Any]:
    """As torchtitan has it: bare names of the model, a flattened optimizer."""
    found = AppState(live, flat=True).state_dict()
    return {**found["model"], "optimizer": found["optim"], "train_state": {"step": torch.tensor(STEPS)}}


def flat_only(live: Live) -> dict[str, Any]:
    """As torchtitan has model and optimizer."""
    return {k: v for k, v in titan(live).items() if k != "train_state"}


def app(live: Live) -> dict[str, Any]:
    return {"app": AppState(live)}


def save_ucp(state: dict[str, Any], path: str) -> None:
    ucp.save(state, path)


def save_async(state: dict[str, Any], path: str) -> None:
    pending = ucp.async_save(state, path)
    for value in _tensors(state):
        value.zero_()  # what is saved is what was there
    pending.result()
    assert background_saver().loudness == (logging.WARNING if dist.get_rank() == 0 else logging.DEBUG)


def save_dcp(state: dict[str, Any], path: str) -> None:
    dcp.save(state, checkpoint_id=path)


def save_writer(state: dict[str, Any], path: str) -> None:
    dcp.save(state, storage_writer=ucp.dcp.StorageWriter(path))


def save_async_writer(state: dict[str, Any], path: str) -> None:
    # It asks for a backend that sends from the host's memory.
    group = dist.new_group(backend="gloo") if dist.get_backend() == "nccl" else None
    dcp.async_save(state, storage_writer=ucp.dcp.StorageWriter(path), process_group=group).result()


def load_ucp(state: dict[str, Any], path: str) -> None:
    ucp.load(state, path)


def load_dcp(state: dict[str, Any], path: str) -> None:
    dcp.load(state, checkpoint_id=path)


def load_reader(state: dict[str, Any], path: str) -> None:
    dcp.load(state, storage_reader=ucp.dcp.StorageReader(path))


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        local = value.to_local() if hasattr(value, "to_local") else value
        return [local]
    items = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return [tensor for item in items for tensor in _tensors(item)]


def draw() -> torch.Tensor:
    """Numbers of this rank's generators; of its device's, too, where it has one."""
    drawn = torch.rand(3)
    return torch.cat([drawn, torch.rand(3, device="cuda").cpu()]) if dist.get_backend() == "nccl" else drawn


Make = Callable[[Live], dict[str, Any]]
Step = Callable[[dict[str, Any], str], None]


def save(mesh: Mesh, saves: list[tuple[Make, Step, str]], pair: str | None = None) -> Run:
    """Train, save the same state in several ways, train on. pair: also by `save_training`, to this path."""
    live = Live(mesh)
    losses = live.train(0, scheduler=pair is not None)
    state = live.state()
    if pair is not None:
        torch.manual_seed(100 + dist.get_rank())
        ucp.save_training(
            pair,
            model=live.model,
            optimizer=live.optimizer,
            lr_scheduler=live.scheduler,
            dataloader=Loader(dist.get_rank()),
            step=STEPS,
            extra={"note": "kept"},
        )
    for make, step, path in saves:
        step(copy.deepcopy(make(live)) if step is save_async else make(live), path)
    drawn = draw()
    return Run({"saved": state}, tuple(losses), tuple(live.train(STEPS, FURTHER, scheduler=pair is not None)), drawn)


def load(mesh: Mesh, loads: list[tuple[Make, Step, str]], pair: str | None = None, again: str | None = None) -> Run:
    """Load in several ways, each over a state that was trained elsewhere; then train on from the last.

    again: save what was loaded last, by `save_training`.
    """
    live = Live(mesh)
    states: dict[str, State] = {}
    extra = None
    for make, step, path in loads:
        live.train(50, 1)
        for parameter in live.model.parameters():
            parameter.data.add_(1)
        state = make(live)
        step(state, path)
        if "app" not in state:
            _set(live, state)
        states[path] = live.state()
        extra = {k: v for k, v in state.items() if k in ("epoch", "rng", "train_state")} or extra
    if pair is not None:
        live.train(50, 1, scheduler=True)
        loader = Loader(-1)
        report = ucp.load_training(
            pair,
            model=live.model,
            optimizer=live.optimizer,
            lr_scheduler=live.scheduler,
            dataloader=loader,
        )
        states[pair] = live.state()
        extra = (report.step, report.extra, loader.position, draw(), live.scheduler.state_dict())
    if again is not None:
        ucp.save_training(again, model=live.model, optimizer=live.optimizer, step=STEPS)
    return Run(states, (), tuple(live.train(STEPS, FURTHER, scheduler=pair is not None)), extra)


def _set(live: Live, state: dict[str, Any]) -> None:
    flat = "optimizer" in state
    model = (
        state["model"]
        if "model" in state
        else {k: v for k, v in state.items() if k not in ("optimizer", "train_state")}
    )
    AppState(live, flat).load_state_dict({"model": model, "optim": state["optimizer" if flat else "optim"]})


class Loader:
    """A data loader's state: each rank's own position."""

    def __init__(self, position: int) -> None:
        self.position = position

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position, "shuffled": [3, 1, 2]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.position = state["position"]


def cross(mesh: Mesh, source: str, target: str, flat: bool) -> Run:
    """Load another framework's checkpoint by `load_training` and by stock DCP with our reader, and save it again; then
    train on. flat: save as torchtitan would, with our StorageWriter."""
    live = Live(mesh)
    report = ucp.load_training(source, model=live.model, optimizer=live.optimizer)
    states = {"load_training": live.state()}
    for parameter in live.model.parameters():
        parameter.data.add_(1)
    found = (flat_only if flat else shared_model)(live)
    load_reader(found, source)
    _set(live, found)
    states["reader"] = live.state()
    if flat:
        save_writer(flat_only(live), target)
    else:
        ucp.save_training(
            target, model=live.model, optimizer=live.optimizer, step=report.step, samples=report.samples, rng=False
        )
    return Run(states, (), tuple(live.train(STEPS, 3)), (report.step, report.samples, report.extra))


def load_once(mesh: Mesh, path: str, once: bool | str) -> tuple[int, int, bool, State]:
    """Load model and optimizer with ``read_once``: the bytes brought to this rank, those that it read, whether any were
    exchanged, and the state after it."""

    limits.EXCHANGE_BUFFER_BYTES = 1 << 12  # many rounds
    live = Live(mesh)
    state = shared_model(live)
    report = ucp.load(state, path, read_once=once, verify=False)
    _set(live, state)
    return report.nbytes, report.bytes_read, report.read_once, live.state()


def resume_once(path: str, once: bool) -> tuple[int, int, bool]:
    """Save a model that all ranks hold whole, and resume it with a new optimizer; the same of that, and an error where
    anything is not as it was."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(40, 30), torch.nn.Linear(30, 20))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.ones(2, 40)).square().sum().backward()
    optimizer.step()
    ucp.save_training(path, model=model, optimizer=optimizer)
    torch.manual_seed(1)
    other = torch.nn.Sequential(torch.nn.Linear(40, 30), torch.nn.Linear(30, 20))
    fresh = torch.optim.AdamW(other.parameters(), lr=0.5)
    report = ucp.load_training(path, model=other, optimizer=fresh, read_once=once, verify=False).tensors
    if not (same(other.state_dict(), model.state_dict()) and same(fresh.state_dict(), optimizer.state_dict())):
        raise ValueError("what was resumed is not what was saved")
    return report.nbytes, report.bytes_read, report.read_once


def stages(folder: str) -> list[str]:
    """Ranks that hold other layers each, as pipeline stages do, and what they share; then contradictions.

    Returns the messages of the refusals, in order; every rank has to refuse."""
    rank, world = dist.get_rank(), dist.get_world_size()
    ucp.save(stage(rank, world), f"{folder}/stages")
    found = stage(rank, world)
    for tensor in _tensors(found):
        tensor.zero_()
    ucp.load(found, f"{folder}/stages")
    truth = stage(rank, world)
    truth["model"]["drift"] = torch.ones(2)  # of a buffer that nothing keeps equal, the first rank's counts
    if not all(torch.equal(a, b) for a, b in zip(_tensors(found), _tensors(truth), strict=True)):
        raise ValueError("what was loaded is not what was saved")
    messages = []
    for change in (trained_differs, groups_differ, shapes_differ, one_has_an_object):
        state = stage(rank, world)
        change(state, rank)
        messages.append(_refused(lambda state=state: ucp.save(state, f"{folder}/refused")))
    one_more = stage(rank, world)
    if rank == 1:
        one_more["model"]["more"] = torch.full((2,), 5.0)
        one_more["epoch"] = 0
    before = copy.deepcopy(one_more)
    messages.append(_refused(lambda: ucp.load(one_more, f"{folder}/stages")))
    if not all(torch.equal(a, b) for a, b in zip(_tensors(one_more), _tensors(before), strict=True)):
        raise ValueError("a load that was refused has changed something")
    return messages


def stage(rank: int, world: int) -> dict[str, Any]:
    """A stage's layer, a layer that all have, a buffer that differs, and an optimizer of the stage's own."""
    names = [f"layers.{rank}.w", "shared.w"]
    model = {names[0]: torch.arange(6.0).reshape(2, 3) + 10 * rank, names[1]: torch.arange(4.0)}
    states = {n: {"exp_avg": t + 0.5, "step": torch.tensor(3.0)} for n, t in model.items()}
    groups = [{"params": names, "lr": 0.25, "betas": (0.9, 0.99)}]
    buffers = {"mean": torch.full((3,), 7.0), "drift": torch.full((2,), 1.0)}
    if world > 1:
        buffers["drift"] += 0.5 * rank
    return {"model": {**model, **buffers}, "optim": {"state": states, "param_groups": groups}, "epoch": 4}


def trained_differs(state: dict[str, Any], rank: int) -> None:
    state["model"]["shared.w"][1] += rank


def groups_differ(state: dict[str, Any], rank: int) -> None:
    state["optim"]["param_groups"][0]["lr"] += rank


def shapes_differ(state: dict[str, Any], rank: int) -> None:
    state["model"]["mean"] = torch.zeros(3 + rank)


def one_has_an_object(state: dict[str, Any], rank: int) -> None:
    state["epoch"] = Mesh() if rank else 4


def _refused(work: Callable[[], Any]) -> str:
    try:
        work()
    except ucp.UcpError as error:
        return error.whole
    raise ValueError("this was not refused")


def exchanged(folder: str, apart: bool = False) -> tuple[bool, int, list[str]]:
    """Exchange what three ranks have read a third of each, all together and then two of them, with shared memory in
    ``folder``. apart: the last rank does not see the others' files, as on a machine of its own. Whether this rank has
    everything, the most bytes that a collective has moved, and what is left there."""
    place, most = dist.get_rank(), 0
    reduce: Any = dist.all_reduce

    def counted(tensor: torch.Tensor, *given: Any, **named: Any) -> Any:
        nonlocal most
        most = max(most, tensor.nbytes)
        return reduce(tensor, *given, **named)

    def unseen(path: str, *given: Any) -> int:
        raise FileNotFoundError(path)

    whole = torch.arange(100_000, dtype=torch.int32)
    right = True
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(local_sums, "FOLDER", folder)
        patch.setattr(limits, "EXCHANGE_LOCAL_BYTES", 1 << 16)  # many rounds
        patch.setattr(limits, "EXCHANGE_BUFFER_BYTES", 1 << 20)
        patch.setattr(dist, "all_reduce", counted)
        if apart and place == 2:
            patch.setattr(local_sums.os, "open", unseen)
        for group in ((0, 1, 2), (0, 2)):
            entry, flat = (0, "param", "int32"), torch.zeros_like(whole)
            own = [len(whole) * k // len(group) for k in range(len(group) + 1)]
            if place in group:
                low, high = own[group.index(place)], own[group.index(place) + 1]
                flat[low:high] = whole[low:high]
            sharing = Sharing({group: (entry,)} if place in group else {}, (group,))
            exchange(sharing, {entry: flat} if place in group else {})
            right &= place not in group or bool(flat.equal(whole))
    dist.barrier()
    return right, most, glob.glob(f"{folder}/ucp-*")
