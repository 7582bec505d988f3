"""A live DeepSpeed engine as a source: the same slots that a load fills, and everything that is not a tensor."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch

from ucp.catalog import ParameterInfo, ParamGroup, TrainingState
from ucp.deepspeed.live import generators, releases
from ucp.deepspeed.live.gradients import gradients_of
from ucp.deepspeed.live.state import samples_per_step, samples_seen
from ucp.errors import Unsupported
from ucp.formats.deepspeed.read.optimizer_files import divide_step, options_of
from ucp.formats.shared.apart import is_plain
from ucp.formats.shared.gradients import entry
from ucp.geometry import empty
from ucp.job import ranks
from ucp.loading.target import Group, Slot
from ucp.parallel.mesh import Layout
from ucp.printable import logger
from ucp.saving.late import LateNumbers
from ucp.saving.source import Holding, Source
from ucp.storage.dtypes import itemsize

log = logger(__name__)

# What is saved of the loss scale at stage 0, where its owner (`releases.loss_scale`) also has other attributes.
_STAGE0_SCALER = ("cur_scale", "cur_iter", "last_overflow_iter", "scale_factor", "scale_window")


class EngineFacts(Protocol):
    """What else is needed from a live engine, besides its slots."""

    engine: Any

    @property
    def layout(self) -> Layout: ...

    @property
    def groups(self) -> Sequence[Group]: ...

    @property
    def scheduler_state(self) -> Any: ...

    def live(self, key: int) -> tuple[torch.Tensor, Mapping[str, Any]]: ...


def make_source(
    live: EngineFacts, slots: Sequence[Slot], client_state: Mapping[str, Any], frozen: bool, late: bool = False
) -> Source:
    """What this rank saves. late: a save in the background is to read the numbers that the optimizer has in tensors
    (`Source.late`). Raises Unsupported for optimizer state that has no place in the parameters."""
    rank = ranks.rank()
    aliases = _aliases(live.engine.module)
    groups = live.groups
    counting = {slot.group for slot in slots if "step" in live.live(slot.key)[1]}
    held = {slot.group for slot in slots}  # other stages of a pipeline may have more
    counts = [g in counting if g in held else bool(counting) for g in range(len(groups))]
    divided = [divide_step(options_of(group.options), c) for group, c in zip(groups, counts, strict=True)]
    parameters: dict[str, ParameterInfo] = {}
    holdings: list[Holding] = []
    numbers: dict[tuple[str, str], torch.Tensor] = {}
    for slot in slots:
        if slot.kind == "frozen" and not frozen:
            continue
        scalars = _scalars(live, slot)
        if late:
            own_numbers = {name: value for name, value in scalars.items() if isinstance(value, torch.Tensor)}
            scalars = {name: value for name, value in scalars.items() if name not in own_numbers}
            numbers |= {(m.name, name): value for m in slot.members for name, value in own_numbers.items()}
        scalars = {name: _plain(value) for name, value in scalars.items()}
        if slot.group is not None and slot.states and slot.group < len(divided):
            scalars = {**{k: _plain(v) for k, v in divided[slot.group][1].items()}, **scalars}
        for member in slot.members:
            names = tuple(aliases.get(member.name, ()))
            kind = "padding" if member.padding else slot.kind
            parameters[member.name] = ParameterInfo(member.name, member.shape, {}, kind, scalars, names)
        holdings += _holdings(live, slot, rank)
    own: dict[str, Any] = {"rng": generators.capture(live.engine)}
    later = LateNumbers(numbers) if numbers else None
    if rank == 0:
        kept = tuple(ParamGroup(g.names, options) for g, (options, _) in zip(groups, divided, strict=True))
        return Source(live.layout, parameters, holdings, _training_state(live, kept, client_state), own, later)
    own["client_state"] = dict(client_state)
    return Source(live.layout, parameters, holdings, TrainingState(), own, later)


def nbytes_to_save(slots: Sequence[Slot], groups: Sequence[Group]) -> int:
    """About how many bytes a rank with these slots writes when it saves, with the states that are yet to be made."""
    total = 0
    for slot in slots:
        states = slot.states
        if not states and slot.group is not None:
            states = dict.fromkeys(groups[slot.group].expects or (), slot.dtype)
        width = sum(itemsize(dtype) for dtype in (slot.dtype, *states.values()))
        total += slot.length * width // max(len(slot.holders), 1)
    return total


def _holdings(live: EngineFacts, slot: Slot, rank: int) -> Iterator[Holding]:
    weights, state = live.live(slot.key)
    for name, dtype in {"param": slot.dtype, **slot.states}.items():
        placement = slot.placement(name)
        tensor = weights if name == "param" else state[name]
        for member, blocks, holders in zip(slot.members, placement.blocks, placement.holders, strict=True):
            volatile = slot.kind == "buffer"
            if volatile:
                # Nothing keeps buffers equal between ranks. The first rank's is saved, as DeepSpeed does.
                holders = holders[:1]
                blocks = blocks if rank in holders else empty(len(member.shape))
            yield Holding(member.name, name, member.shape, dtype, tensor, blocks, holders or (rank,), volatile)


def _scalars(live: EngineFacts, slot: Slot) -> dict[str, Any]:
    """The values that an optimizer keeps once for a slot, such as 'step': plain ones, and tensors of one element."""
    out: dict[str, Any] = {}
    for name, value in live.live(slot.key)[1].items():
        if name in slot.states or value is None:
            continue
        if not (isinstance(value, torch.Tensor) and value.numel() == 1) and not is_plain(value):
            found = f"shape {list(value.shape)}" if isinstance(value, torch.Tensor) else type(value).__name__
            raise Unsupported(
                f"optimizer state '{name}' of '{slot.members[0].name}' has {found}, neither the parameters' shape nor "
                "a single value; checkpoints of this optimizer could not be resharded, so nothing is saved"
            )
        out[name] = value
    return out


def _aliases(module: torch.nn.Module) -> dict[str, list[str]]:
    """First name of a tied parameter -> its further names."""
    first: dict[int, str] = {}
    out: dict[str, list[str]] = {}
    for name, param in module.named_parameters(remove_duplicate=False):
        owner = first.setdefault(id(param), name)
        if owner != name:
            out.setdefault(owner, []).append(name)
    return out


def _training_state(
    live: EngineFacts, groups: tuple[ParamGroup, ...], client_state: Mapping[str, Any]
) -> TrainingState:
    engine = live.engine
    clip = getattr(engine.optimizer, "clip_grad", None)
    extra = entry(gradients_of(engine))
    if engine.training_dataloader is not None and engine.curriculum_learning_enabled():
        extra["data_sampler"] = engine.training_dataloader.data_sampler.state_dict()
    if engine.random_ltd_enabled():
        extra["random_ltd"] = engine.random_ltd_scheduler.state_dict()
    return TrainingState(
        param_groups=groups,
        lr_scheduler=live.scheduler_state,
        loss_scaler=_loss_scaler(engine.optimizer),
        clip_grad=float(clip) if isinstance(clip, (int, float)) else None,
        global_steps=engine.global_steps,
        global_samples=samples_seen(engine),
        skipped_steps=engine.skipped_steps,
        dp_world_size=engine.seq_dp_world_size,
        global_batch_size=samples_per_step(engine),
        extra=extra,
        client_state=dict(client_state),
        config=_config(engine),
    )


def _loss_scaler(optimizer: Any) -> dict[str, Any] | None:
    """The loss scaler's attributes by DeepSpeed's names (``runtime/fp16/loss_scaler.py``), with 'dynamic'."""
    kept = releases.loss_scale(optimizer)
    if kept is None:
        return None
    if hasattr(kept, "dynamic"):
        return {k: v for k, v in vars(kept).items() if isinstance(v, (bool, int, float))}
    found = {k: getattr(kept, k, None) for k in _STAGE0_SCALER}
    plain = {k: v for k, v in found.items() if isinstance(v, (bool, int, float))}
    return {"dynamic": bool(kept.dynamic_loss_scale), **plain}


def _config(engine: Any) -> dict[str, Any]:
    """The DeepSpeed configuration, for the record. Values that are not JSON become text."""
    found: dict[str, Any] = json.loads(json.dumps(engine._config._param_dict, default=str))
    return found


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, torch.Tensor) else value
