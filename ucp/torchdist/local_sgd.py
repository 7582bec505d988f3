"""Runs of local SGD (DiLoCo and its like): workers that train apart, and an outer optimizer that steps for all of them.

    mesh = init_device_mesh("cpu", (4, 2), mesh_dim_names=("worker", "shard"))
    run = LocalRun(model, inner, mesh, outer=[outer], copies=copies)
    save_local_sgd("runs/step-500", run, step=500)
    step, report = load_local_sgd("runs/step-500", run, workers="averaged")

The global copy and the outer optimizer's state are kept under the parameters' own names, so that other programs resume
from them as from any run. What each worker has of its own (weights, buffers, states of the inner optimizer) is kept
under ``workers.``, along a first axis that counts workers.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from ucp.catalog import Catalog
from ucp.changes.workers import WORKERS
from ucp.checkpoint import open as open_checkpoint
from ucp.errors import BadArgument, Mismatch, Unsupported
from ucp.formats.shared.roles import MODEL
from ucp.job import ranks
from ucp.loading.report import LoadReport
from ucp.saving.save import SaveReport
from ucp.spec.changes import AVERAGED, COPIED, KEPT, RESET
from ucp.torchdist.dtensors import local_tensor
from ucp.torchdist.load import load
from ucp.torchdist.optimizers import OPTIMIZER, Made, set_states, state_dict_of, to_save
from ucp.torchdist.save import save

_KEY = WORKERS.removesuffix(".")
_CHOICES = (KEPT, AVERAGED, COPIED, RESET)


@dataclass(frozen=True, eq=False)
class LocalRun:
    """What a run of local SGD consists of on this rank.

    Parameters
    ----------
    model, optimizer
        This worker's model, plain or of FSDP2, and its inner optimizer.
    mesh
        All ranks. Its first dimension counts workers; the others are those of the model's DTensors, in their order.
    outer
        The outer optimizers (one, or one for each fragment of the model); none for plain averaging of weights.
    copies
        The global copy: parameter's name -> this rank's part of it. None where the algorithm keeps none.
    """

    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    mesh: DeviceMesh
    outer: Sequence[torch.optim.Optimizer] = ()
    copies: Mapping[str, torch.Tensor] | None = None


def save_local_sgd(path: str | os.PathLike[str], run: LocalRun, *, step: int = 0) -> SaveReport:
    """Save a run of local SGD as the checkpoint ``path``. Collective over all ranks of all workers.

    Parameters
    ----------
    path
        The checkpoint's folder.
    run
        What this rank has of it.
    step
        Steps done so far.

    Returns
    -------
    SaveReport

    Raises
    ------
    BadArgument
        A copy is missing, or of another shape than its parameter.
    Unsupported, DestinationError, SaveFailed
        As for `ucp.save`.
    """
    state, inner, _ = _state(run)
    fresh = {OPTIMIZER: {"state": state[_KEY]["state"], "param_groups": inner["param_groups"]}}
    to_save(fresh, run.optimizer)
    if run.outer:
        to_save(state, run.outer)
    return save({**state, "step": step}, path)


def load_local_sgd(
    path: str | os.PathLike[str], run: LocalRun, *, workers: str | None = None
) -> tuple[int, LoadReport]:
    """Fill a run of local SGD from a checkpoint of `save_local_sgd`. Collective over all ranks of all workers.

    Parameters
    ----------
    path, run
        As for `save_local_sgd`. Within a worker, the model may be cut over other ranks than it was.
    workers
        What another number of workers begins with: 'kept' (the first ones keep what they had, for fewer workers),
        'averaged' (all have the mean), 'copied' (in turn, what the first ones had) or 'reset' (the global copy, and
        inner states of zero). The same number always keeps what each had. There is no default.

    Returns
    -------
    tuple
        Steps done so far, and the report, whose ``changes`` say what was chosen.

    Raises
    ------
    Mismatch
        There is another number of workers and no choice, or something does not fit. Nothing was changed.
    NotACheckpoint, DamagedCheckpoint, PartlyLoaded, ProofFailed
        As for `ucp.load`.
    """
    if workers is not None and workers not in _CHOICES:
        raise BadArgument(f"workers='{workers}' is not known; choose one of {', '.join(_CHOICES)}")
    count, had = run.mesh.size(0), ranks.from_first(lambda: _workers_in(path))
    if had != count and workers is None:
        raise Mismatch(
            f"{os.fspath(path)}: nothing was loaded: {had} workers saved and {count} resume; say what they begin with: "
            f"workers={', '.join(map(repr, _CHOICES))}"
        )
    state, inner, made = _state(run)
    state["step"] = 0
    changes = None if had == count else {"workers": {str(workers): count}}
    report = load(state, path, changes=changes)
    _take(run, state, inner, made[0])
    if run.outer:
        unwrapped = {name: _inside(states) for name, states in state[OPTIMIZER]["state"].items()}
        set_states(run.model, run.outer, {**state[OPTIMIZER], "state": unwrapped}, made[1])
    return int(state["step"]), report


def of_diloco(diloco: Any, model: torch.nn.Module, optimizer: torch.optim.Optimizer, mesh: DeviceMesh) -> LocalRun:
    """A run of torchft's DiLoCo (0.2), with its outer optimizers and its global copy.

    Save and load right after a sync: how many inner steps were done since is torchft's own. Raises Unsupported for an
    object that has no such fragments, or fragments with parameters that the model does not have.
    """
    names = {id(param): name for name, param in model.named_parameters()}
    outer: dict[int, torch.optim.Optimizer] = {}
    copies: dict[str, torch.Tensor] = {}
    try:
        for fragment in diloco._fragments:
            outer[id(fragment._outer_optimizer)] = fragment._outer_optimizer
            for name, param in fragment._model_fragment.named_parameters():
                copies[names[id(param)]] = fragment.original_parameters[name]
    except (AttributeError, KeyError) as error:
        raise Unsupported(
            f"this {type(diloco).__name__} has not the fragments of torchft 0.2's DiLoCo over this model ({error}); "
            "give outer= and copies= yourself"
        ) from None
    return LocalRun(model, optimizer, mesh, list(outer.values()), copies)


def _workers_in(path: str | os.PathLike[str]) -> int:
    with open_checkpoint(path) as checkpoint:
        catalog: Catalog = checkpoint.catalog
    rows = {info.shape[:1] for name, info in catalog.parameters.items() if name.startswith(WORKERS)}
    if len(rows) != 1 or rows == {()}:
        raise Mismatch(f"{os.fspath(path)}: nothing was loaded: it is no checkpoint of save_local_sgd")
    return int(next(iter(rows))[0])


def _state(run: LocalRun) -> tuple[dict[str, Any], dict[str, Any], tuple[Made, Made]]:
    """The run as a state dict over views of its own memory, the inner optimizer's own state dict, and what was made for
    optimizers that have not stepped."""
    model, mesh = run.model, run.mesh
    own, made = state_dict_of(model, run.optimizer, blank=True)
    inner = _copied(own[OPTIMIZER])
    state: dict[str, Any] = {
        _KEY: {
            "model": {name: _stacked(tensor, mesh) for name, tensor in own[MODEL].items()},
            "state": {
                name: {key: _stacked(value, mesh) for key, value in states.items()}
                for name, states in inner["state"].items()
            },
            "options": [_plain(group) for group in inner["param_groups"]],
        }
    }
    of_outer: Made = {}
    if run.copies is not None:
        params = dict(model.named_parameters())
        _check_copies(params, run.copies)
        state[MODEL] = {name: _global(copy, params[name], mesh) for name, copy in run.copies.items()}
    if run.outer:
        own, of_outer = state_dict_of(model, run.outer, blank=True)
        theirs = _copied(own[OPTIMIZER])
        for states in theirs["state"].values():
            for key, value in states.items():
                if isinstance(value, torch.Tensor) and value.dim():
                    states[key] = _global(local_tensor(value), value, mesh)
        state[OPTIMIZER] = theirs
    return state, inner, (made, of_outer)


def _copied(optimizer: Mapping[str, Any]) -> dict[str, Any]:
    """An optimizer's state dict whose mappings are not the optimizer's own. The tensors are."""
    return {
        "state": {name: dict(states) for name, states in optimizer["state"].items()},
        "param_groups": [dict(group) for group in optimizer["param_groups"]],
    }


def _plain(group: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key != "params"}


def _check_copies(params: Mapping[str, torch.Tensor], copies: Mapping[str, torch.Tensor]) -> None:
    for name in sorted(params.keys() ^ copies.keys()):
        raise BadArgument(f"copies: '{name}' is {'no parameter of the model' if name in copies else 'missing'}")
    for name, copy in copies.items():
        here = tuple(local_tensor(params[name]).shape)
        if tuple(local_tensor(copy).shape) != here:
            raise BadArgument(
                f"copies: '{name}' has shape {list(local_tensor(copy).shape)}, and this rank's part of the parameter "
                f"has {list(here)}"
            )


def _placements(tensor: torch.Tensor, mesh: DeviceMesh) -> list[Any]:
    """Those of a tensor along the mesh's dimensions but the first."""
    if isinstance(tensor, DTensor):
        if len(tensor.placements) != mesh.ndim - 1:
            raise Unsupported(
                f"the model's DTensors lie on a mesh of {len(tensor.placements)} dimensions, and the mesh of all ranks "
                f"has {mesh.ndim}; give one with a dimension for workers before those"
            )
        return list(tensor.placements)
    return [Replicate()] * (mesh.ndim - 1)


def _stacked(value: Any, mesh: DeviceMesh) -> DTensor:
    """A worker's tensor as its row of all workers' tensors, over the same memory. A plain number becomes a tensor."""
    tensor = value if isinstance(value, torch.Tensor) else torch.tensor(value)
    placements: list[Any] = [Shard(0)]
    for placement in _placements(tensor, mesh):
        if type(placement) is not Shard and not isinstance(placement, Replicate):
            raise Unsupported(f"a tensor is placed as {placement!r}, which has no place beside an axis of workers")
        placements.append(Shard(placement.dim + 1) if isinstance(placement, Shard) else placement)
    return _dtensor(local_tensor(tensor).unsqueeze(0), mesh, placements, (mesh.size(0), *tensor.shape))


def _global(copy: torch.Tensor, param: torch.Tensor, mesh: DeviceMesh) -> DTensor:
    """A tensor of the parameter's shape that all workers have alike."""
    return _dtensor(local_tensor(copy), mesh, [Replicate(), *_placements(param, mesh)], tuple(param.shape))


def _dtensor(local: torch.Tensor, mesh: DeviceMesh, placements: Sequence[Any], shape: tuple[int, ...]) -> DTensor:
    strides = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(local, mesh, placements, run_check=False, shape=torch.Size(shape), stride=strides)


def _take(run: LocalRun, state: Mapping[str, Any], inner: dict[str, Any], made: Made) -> None:
    """Give the inner optimizer what was loaded. The tensors are its own already, or those that were made for it."""
    rows = state[_KEY]
    for name, states in inner["state"].items():
        for key, value in states.items():
            if not isinstance(value, torch.Tensor):
                states[key] = type(value)(local_tensor(rows["state"][name][key]).item())
    for group, options in zip(inner["param_groups"], rows["options"], strict=True):
        group.update(options)
    set_states(run.model, run.optimizer, inner, made)


def _inside(states: Mapping[str, Any]) -> dict[str, Any]:
    """An outer optimizer's states of a parameter, with the workers' dimension taken off again."""
    return {key: _own(value) for key, value in states.items()}


def _own(value: Any) -> Any:
    if not isinstance(value, DTensor):
        return value
    if value.device_mesh.ndim == 1:
        return local_tensor(value)
    names = value.device_mesh.mesh_dim_names
    if names is None:
        raise Unsupported("the mesh of all ranks has no names for its dimensions; give it some (mesh_dim_names)")
    return DTensor.from_local(
        local_tensor(value),
        value.device_mesh[names[1:]],
        value.placements[1:],
        run_check=False,
        shape=value.shape,
        stride=value.stride(),
    )
