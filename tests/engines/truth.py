"""What a live engine holds, read from its own flat buffers by their true offsets.

Nothing here uses this project's library, a checkpoint file, or DeepSpeed's ``safe_get_full_*`` (which follow slice
mappings that ``round_robin_gradients`` makes wrong, and know neither stage 0, frozen parameters nor several groups).
Where each rank's elements lie is read from the attributes that DeepSpeed's optimizer step itself works with; the pieces
of all ranks must cover every parameter exactly once, and the masters, rounded, must equal the module's weights.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from tests.engines.packing import gather_object

PARAM = "param"


@dataclass(frozen=True, eq=False)
class Truth:
    """The whole state of an engine, unsharded and unpadded; names are the module's own."""

    params: Mapping[str, Mapping[str, Tensor]]  # trained parameter -> state -> tensor of the parameter's shape
    scalars: Mapping[str, Mapping[str, Any]]  # trained parameter -> state -> what has no place per element (step)
    frozen: Mapping[str, Tensor]
    buffers: Mapping[str, Tensor]  # persistent ones
    module: Mapping[str, Tensor]  # every parameter as the module computes with it
    aliases: Mapping[str, str]  # other names of tied parameters -> the name used here
    groups: tuple[Mapping[str, Any], ...]  # "names" and the hyperparameters of each param group
    counters: Mapping[str, int]
    loss_scaler: Mapping[str, Any] | None
    lr_scheduler: Mapping[str, Any] | None


@dataclass(frozen=True, eq=False)
class Piece:
    """Some elements of one state of one parameter, as one rank holds them."""

    name: str
    state: str
    start: int  # in elements of the flattened parameter
    values: Tensor  # 1-d
    replica: bool = False  # other ranks may hold the same elements, and then the same values


@dataclass(frozen=True, eq=False)
class Slot:
    """Where a rank's elements of a parameter lie: ``length`` elements from ``offset`` of ``flat``."""

    name: str
    start: int
    flat: Tensor
    offset: int
    length: int
    states: Mapping[str, Any]  # the inner optimizer's state of ``flat``
    only: str | None = None  # the one state that is meant; by default the master and all that lie like it
    replica: bool = False


def names_of(module: nn.Module) -> dict[nn.Parameter, str]:
    """Every parameter's name; a tied one's is its first."""
    return {parameter: name for name, parameter in module.named_parameters()}


def aliases_of(module: nn.Module) -> dict[str, str]:
    """The further names of tied parameters, each with the parameter's first name."""
    first = names_of(module)
    return {
        name: first[parameter]
        for name, parameter in module.named_parameters(remove_duplicate=False)
        if first[parameter] != name
    }


def gather(engine: Any, group: Any = None) -> Truth | None:
    """The truth about ``engine``: on rank 0; None on the others. Collective; raises ValueError if it contradicts.

    group: of the data-parallel ranks, where there is model parallelism: its first rank knows the truth of its part.
    """
    import torch.distributed as dist

    module = engine.module
    weights = module_weights(engine)
    shapes = {name: tensor.shape for name, tensor in weights.items()}
    slots = list(_slots(engine, group))
    pieces = [piece for slot in slots for piece in pieces_of(slot)]
    scalars: dict[str, dict[str, Any]] = {}
    for slot in slots:
        found = {
            state: plain(value)
            for state, value in slot.states.items()
            if not (isinstance(value, Tensor) and value.dim() > 0)
        }
        scalars.setdefault(slot.name, {}).update(found)
    mine = (pieces, scalars, fingerprint_of(weights))
    everyone = gather_object(mine, dist.get_global_rank(group, 0) if group else 0, group)
    if everyone is None:
        return None
    if len({weights_print for _, _, weights_print in everyone}) != 1:
        raise ValueError("the module's weights differ from rank to rank")
    params = assembled([piece for rank_pieces, _, _ in everyone for piece in rank_pieces], shapes)
    trained = {n for n, p in module.named_parameters() if p.requires_grad and weights[n].numel()}
    if params.keys() != trained:
        raise ValueError(f"no rank has masters of {sorted(trained - params.keys())}")
    check_rounding(params, weights)
    return Truth(
        params=params,
        scalars=agreed([rank_scalars for _, rank_scalars, _ in everyone]),
        frozen={name: weights[name] for name, p in module.named_parameters() if not p.requires_grad},
        buffers=buffers_of(module),
        module=weights,
        aliases=aliases_of(module),
        groups=groups_of(engine),
        counters={key: int(getattr(engine, key)) for key in ("global_steps", "global_samples", "skipped_steps")},
        loss_scaler=loss_scaler_of(engine),
        lr_scheduler=None if engine.lr_scheduler is None else plain(engine.lr_scheduler.state_dict()),
    )


def plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().cpu().clone()
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(plain(item) for item in value)
    return value


def module_weights(engine: Any) -> dict[str, Tensor]:
    parameters = dict(engine.module.named_parameters())
    if engine.zero_optimization_stage() == 3:
        from deepspeed.runtime.zero import GatheredParameters

        with GatheredParameters(list(parameters.values())):
            return {name: plain(parameter.data) for name, parameter in parameters.items()}
    return {name: plain(parameter.data) for name, parameter in parameters.items()}


def buffers_of(module: nn.Module) -> dict[str, Tensor]:
    persistent = set(module.state_dict(keep_vars=True))
    return {name: plain(buffer) for name, buffer in module.named_buffers() if name in persistent}


def _slots(engine: Any, group: Any) -> Iterator[Slot]:
    optimizer = engine.optimizer
    kind = type(optimizer).__name__
    names = names_of(engine.module)
    if kind == "DeepSpeedZeroOptimizer":
        yield from slots_of_stages_1_and_2(optimizer, names)
    elif kind == "BF16_Optimizer":
        yield from slots_of_bf16_optimizer(optimizer, names)
    elif kind == "DeepSpeedZeroOptimizer_Stage3":
        yield from _slots_of_stage_3(optimizer, names)
    elif kind not in ("FP16_UnfusedOptimizer", "FP16_Optimizer") and not isinstance(optimizer, torch.optim.Optimizer):
        raise NotImplementedError(f"no truth is known of a {kind}")
    elif _is_first_rank(group):  # stage 0: every rank holds everything; one of them is enough
        if kind == "FP16_UnfusedOptimizer":
            for params, masters in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True):
                for param, master in zip(params, masters, strict=True):
                    yield Slot(names[param], 0, master, 0, master.numel(), optimizer.optimizer.state.get(master, {}))
        elif kind == "FP16_Optimizer":
            for params, flat in zip(optimizer.fp16_groups, optimizer.fp32_groups_flat, strict=True):
                states = optimizer.optimizer.state.get(flat, {})
                offset = 0
                for param in params:
                    yield Slot(names[param], 0, flat, offset, param.numel(), states)
                    offset += param.numel()
        else:
            for group in optimizer.param_groups:
                for param in group["params"]:
                    yield Slot(names[param], 0, param, 0, param.numel(), optimizer.state.get(param, {}))


def _is_first_rank(group: Any) -> bool:
    import torch.distributed as dist

    return dist.get_rank(group) == 0


def _slots_of_flat(
    params: list[nn.Parameter], offsets: list[int], partition: Tensor, rank: int, states: Any, names: Any
) -> Iterator[Slot]:
    """Slots of a flat buffer that is cut into equal partitions, of which ``partition`` is the rank's."""
    size = partition.numel()
    for param, offset in zip(params, offsets, strict=True):
        low = max(offset, rank * size)
        high = min(offset + param.numel(), (rank + 1) * size)
        if low < high:
            yield Slot(names[param], low - offset, partition, low - rank * size, high - low, states)


def slots_of_stages_1_and_2(optimizer: Any, names: Any) -> Iterator[Slot]:
    import torch.distributed as dist

    for index, partition in enumerate(optimizer.single_partition_of_fp32_groups):
        states = dict(optimizer.optimizer.state.get(partition, {}))
        if optimizer.param_groups[index].get("use_muon") and not optimizer.cpu_offload and "momentum_buffer" in states:
            # Muon works on matrices: without offload, a rank's buffer holds whole every parameter that its partition
            # touches, so that one cut by a partition boundary is held by both ranks.
            whole = states.pop("momentum_buffer")
            offset = 0
            for param in optimizer.params_in_partition[index]:
                yield Slot(names[param], 0, whole, offset, param.numel(), {}, "momentum_buffer", replica=True)
                offset += param.numel()
            if offset != whole.numel():
                raise ValueError(f"Muon's buffer of group {index} has {whole.numel()} elements instead of {offset}")
        yield from _slots_of_flat(
            optimizer.round_robin_bit16_groups[index],
            _offsets(optimizer, index),
            partition,
            dist.get_rank(group=optimizer.real_dp_process_group[index]),
            states,
            names,
        )


def _offsets(optimizer: Any, index: int) -> list[int]:
    """Where a group's parameters begin, by where the weights that the model computes with lie."""
    flat = optimizer.bit16_groups_flat[index]
    width = flat.element_size()
    return [(p.data_ptr() - flat.data_ptr()) // width for p in optimizer.round_robin_bit16_groups[index]]


def slots_of_bf16_optimizer(optimizer: Any, names: Any) -> Iterator[Slot]:
    import torch.distributed as dist

    for index, partition in enumerate(optimizer.fp32_groups_flat_partition):
        params = optimizer.bf16_groups[index]
        offsets = [0]
        for param in params[:-1]:
            offsets.append(offsets[-1] + param.numel())
        rank = dist.get_rank(group=optimizer.real_dp_process_group[index])
        states = optimizer.optimizer.state.get(partition, {})
        yield from _slots_of_flat(params, offsets, partition, rank, states, names)


def _slots_of_stage_3(optimizer: Any, names: Any) -> Iterator[Slot]:
    import torch.distributed as dist

    rank = dist.get_rank(group=optimizer.dp_process_group)
    for params, flat in zip(optimizer.fp16_groups, optimizer.fp32_partitioned_groups_flat, strict=True):
        states = optimizer.optimizer.state.get(flat, {})
        offset = 0
        for param in params:
            share = param.partition_numel()
            start = rank * share
            length = min(share, param.ds_numel - start)
            # A rank whose share is all padding still has a slot: its scalars must agree with the others'.
            yield Slot(names[param], start, flat, offset, max(length, 0), states)
            offset += share
        if offset != flat.numel():
            raise ValueError(f"the shares of a stage-3 subgroup are {offset} elements, its buffer {flat.numel()}")


def pieces_of(slot: Slot) -> Iterator[Piece]:
    if slot.length == 0:
        return
    flats = {slot.only or PARAM: slot.flat}
    for state, value in slot.states.items():
        if isinstance(value, Tensor) and value.dim() > 0:
            if value.numel() != slot.flat.numel():
                raise ValueError(f"{slot.name} {state}: {value.numel()} elements beside {slot.flat.numel()} masters")
            flats[state] = value
    for state, flat in flats.items():
        values = flat.detach().reshape(-1)[slot.offset : slot.offset + slot.length]
        yield Piece(slot.name, state, slot.start, values.cpu().clone(), slot.replica)


def assembled(pieces: list[Piece], shapes: Mapping[str, torch.Size]) -> dict[str, dict[str, Tensor]]:
    """Join the pieces of every (parameter, state), which must cover it exactly once."""
    grouped: dict[tuple[str, str], list[Piece]] = {}
    for piece in pieces:
        grouped.setdefault((piece.name, piece.state), []).append(piece)
    params: dict[str, dict[str, Tensor]] = {}
    for (name, state), parts in grouped.items():
        parts.sort(key=lambda piece: piece.start)
        chosen: list[Piece] = []
        end = 0
        for part in parts:
            if part.replica and chosen and part.start == chosen[-1].start:
                if not same(part.values, chosen[-1].values):
                    raise ValueError(f"{name} {state}: two ranks hold it whole, and differ")
                continue
            if part.start != end:
                raise ValueError(f"{name} {state}: a piece starts at {part.start}, the one before ends at {end}")
            chosen.append(part)
            end += part.values.numel()
        if end != shapes[name].numel():
            raise ValueError(f"{name} {state}: the pieces end at {end}, the parameter at {shapes[name].numel()}")
        params.setdefault(name, {})[state] = torch.cat([part.values for part in chosen]).reshape(shapes[name])
    return params


def agreed(by_rank: list[dict[str, dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """The scalars of every parameter, which must be equal on all ranks that hold a part of it."""
    merged: dict[str, dict[str, Any]] = {}
    for rank, scalars in enumerate(by_rank):
        for name, values in scalars.items():
            known = merged.setdefault(name, values)
            if not same(known, values):
                raise ValueError(f"{name}: rank {rank} has {values}, an earlier rank {known}")
    return merged


def check_rounding(params: Mapping[str, Mapping[str, Tensor]], weights: Mapping[str, Tensor]) -> None:
    for name, states in params.items():
        rounded = states[PARAM].to(weights[name].dtype)
        if not same(rounded, weights[name]):
            wrong = int((rounded != weights[name]).sum())
            raise ValueError(f"{name}: {wrong} of {rounded.numel()} rounded masters differ from the module's weights")


def groups_of(engine: Any) -> tuple[dict[str, Any], ...]:
    optimizer = engine.optimizer
    names = names_of(engine.module)
    kind = type(optimizer).__name__
    if kind == "DeepSpeedZeroOptimizer_Stage3":
        members: dict[int, list[str]] = {}
        for subgroup, params in enumerate(optimizer.fp16_groups):
            members.setdefault(optimizer.sub_group_to_group_id[subgroup], []).extend(names[p] for p in params)
        by_group = [members.get(index, []) for index in range(len(optimizer.param_groups))]
    elif kind == "DeepSpeedZeroOptimizer":
        by_group = [[names[p] for p in params] for params in optimizer.bit16_groups]
    elif kind == "BF16_Optimizer":
        by_group = [[names[p] for p in params] for params in optimizer.bf16_groups]
    elif kind in ("FP16_UnfusedOptimizer", "FP16_Optimizer"):
        by_group = [[names[p] for p in params] for params in optimizer.fp16_groups]
    else:
        by_group = [[names[p] for p in group["params"]] for group in optimizer.param_groups]
    return tuple(
        {"names": members_of, **{key: plain(value) for key, value in group.items() if key != "params"}}
        for members_of, group in zip(by_group, optimizer.param_groups, strict=True)
    )


def loss_scaler_of(engine: Any) -> dict[str, Any] | None:
    scaler = getattr(engine.optimizer, "loss_scale_config", None)
    if scaler is None:
        scaler = getattr(engine.optimizer, "loss_scaler", None)
    if scaler is None and hasattr(engine.optimizer, "dynamic_loss_scale") and hasattr(engine.optimizer, "cur_iter"):
        names = ("dynamic_loss_scale", "cur_scale", "cur_iter", "last_overflow_iter")  # stage 0 before DeepSpeed 0.18
        return {name: getattr(engine.optimizer, name) for name in names if hasattr(engine.optimizer, name)}
    if scaler is None:
        return None
    return {"class": type(scaler).__name__, **{key: plain(value) for key, value in vars(scaler).items()}}


def same(a: Any, b: Any) -> bool:
    """Equality to the bit, types included; NaNs of the same bits are equal."""
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return (
            isinstance(a, Tensor)
            and isinstance(b, Tensor)
            and a.dtype == b.dtype
            and a.shape == b.shape
            and _bytes(a) == _bytes(b)
        )
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return type(a) is type(b) and (a == b or (a != a and b != b))


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def known(truth: Truth | None) -> Truth:
    """The truth of a run that rank 0 has told."""
    assert truth is not None
    return truth


def compare(a: Truth, b: Truth, ignore: tuple[str, ...] = ()) -> list[str]:
    """What differs between two truths, bit by bit, one line each; ``ignore`` names fields to leave out."""
    lines: list[str] = []
    for field in fields(Truth):
        if field.name not in ignore:
            _differences(field.name, getattr(a, field.name), getattr(b, field.name), lines)
    return lines


def _differences(where: str, a: Any, b: Any, lines: list[str]) -> None:
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        for key in a.keys() | b.keys():
            if key not in a or key not in b:
                lines.append(f"{where}[{key}]: only in the {'first' if key in a else 'second'}")
            else:
                _differences(f"{where}[{key}]", a[key], b[key], lines)
    elif isinstance(a, list | tuple) and isinstance(b, list | tuple) and len(a) == len(b):
        for index, (x, y) in enumerate(zip(a, b, strict=True)):
            _differences(f"{where}[{index}]", x, y, lines)
    elif not same(a, b):
        lines.append(f"{where}: {_describe(a, b)}")


def _describe(a: Any, b: Any) -> str:
    if not (isinstance(a, Tensor) and isinstance(b, Tensor)) or (a.dim() == 0 and b.dim() == 0):
        return f"{a!r} != {b!r}"
    if a.dtype != b.dtype or a.shape != b.shape:
        return f"{a.dtype} {tuple(a.shape)} != {b.dtype} {tuple(b.shape)}"
    difference = (a.double() - b.double()).abs()
    return f"{int((a != b).sum())} of {a.numel()} elements differ, by at most {difference.max().item():.3g}"


def fingerprint_of(tensors: Mapping[str, Tensor]) -> str:
    """A digest of names, dtypes, shapes and bits."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(_bytes(tensor))
    return digest.hexdigest()


def fingerprint(truth: Truth) -> str:
    """A digest of all tensors of a truth."""
    tensors = {f"{name}\0{state}": tensor for name, states in truth.params.items() for state, tensor in states.items()}
    for kind in ("frozen", "buffers", "module"):
        tensors.update({f"{kind}\0{name}": tensor for name, tensor in getattr(truth, kind).items()})
    return fingerprint_of(tensors)
