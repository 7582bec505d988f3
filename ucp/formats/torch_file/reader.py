"""Reading one torch.save file: which of its entries is the model, which are the optimizers, and what else is kept.

An entry is found by what it is: a module's state dict has names and tensors, and an optimizer's has states and param
groups. If there are several, the key decides. Everything else is client state under its own key, so nothing is lost.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ucp.catalog import Catalog
from ucp.errors import BadArgument, NotACheckpoint
from ucp.formats.accelerate.parts import OPTIMIZER, Parts, add_module, add_optimizer, load
from ucp.formats.nouns import ReadRequest
from ucp.formats.shared.builder import Builder
from ucp.formats.shared.numbered import is_optimizer
from ucp.formats.shared.state_dicts import Entries
from ucp.formats.torch_file import NAME
from ucp.storage import locations
from ucp.storage.files import Files
from ucp.storage.torch_pt.shared_out import is_part
from ucp.storage.torch_pt.values import TensorRef

# Programs' usual keys, the surest first.
_MODELS = ("model", "state_dict", "model_state_dict", "module", "model_state", "net", "network", "weights", "params")
_OPTIMIZERS = ("optimizer", "optimizer_state_dict", "optimizer_states", "optim", "optimizer_state", "optim_state_dict")
_SCHEDULERS = ("lr_scheduler", "scheduler", "lr_schedulers", "lr_scheduler_state_dict", "scheduler_state_dict")
_STEPS = ("global_step", "global_steps", "step", "iteration", "iter", "steps")
_LIGHTNING = "pytorch-lightning_version"


@dataclass(frozen=True)
class FileRoles:
    """What the entries are. model: the model's key; None if the file is the model itself. optimizers: (key, value)."""

    model: str | None
    module: Mapping[str, Any]
    optimizers: tuple[tuple[str, Any], ...] = ()


def read(path: Path, files: Files, request: ReadRequest) -> Catalog:
    """The file's catalog.

    Raises NotACheckpoint for a file without a model, BadArgument where it leaves open which entry that is, and what
    reading it does.
    """
    path = locations.locate(path)
    graph = load(path, request, alone=True)
    roles = find_roles(path, graph, request.options)
    parts = Parts(path.parent, request, Entries(Builder(files)))
    add_module(parts, unwrapped(roles.module, graph), path.name)
    for index, (key, optimizer) in enumerate(roles.optimizers):
        root = OPTIMIZER if not index else f"{OPTIMIZER}_{index}"
        add_optimizer(parts, optimizer, path.name, root, kept_as=key)
    catalog = parts.catalog(NAME, _writer(graph))
    return catalog if roles.model is None else with_the_rest(catalog, graph, roles)


def find_roles(path: Path, graph: Any, options: Mapping[str, Any]) -> FileRoles:
    """What the entries of a file are. Raises NotACheckpoint and BadArgument."""
    if not isinstance(graph, Mapping):
        raise NotACheckpoint(f"{path}: holds a {type(graph).__name__}, and no mapping with a model in it")
    model_key, optimizer_key = options.get("model_key"), options.get("optimizer_key")
    if model_key is None and _is_module(graph):
        return FileRoles(None, graph)
    key, module = _at(path, graph, model_key, "--model-key", _is_module) if model_key else _only_module(path, graph)
    if optimizer_key:
        where, found = _at(path, graph, optimizer_key, "--optimizer-key", lambda value: bool(_optimizers("", value)))
        return FileRoles(key, module, tuple(_optimizers(where, found)))
    return FileRoles(key, module, tuple(_only_optimizers(path, graph)))


def _is_module(value: Any) -> bool:
    """Whether it is what a module's ``state_dict()`` returns: names and tensors, and modules' extra states."""
    if not isinstance(value, Mapping) or not value or not all(isinstance(name, str) for name in value):
        return False
    others = [name for name, item in value.items() if not isinstance(item, TensorRef) and not is_part(item)]
    return len(others) < len(value) and all(name.endswith("_extra_state") for name in others)


def _only_module(path: Path, graph: Mapping[Any, Any]) -> tuple[str, Mapping[str, Any]]:
    modules = {key: value for key, value in graph.items() if isinstance(key, str) and _is_module(value)}
    known = [key for key in _MODELS if key in modules] or list(modules)
    if len(known) == 1:
        return known[0], modules[known[0]]
    if not known:
        shown = ", ".join(repr(key) for key in list(graph)[:6])
        what = "an optimizer's state alone" if is_optimizer(graph) else f"the keys {shown} and no model's state dict"
        raise NotACheckpoint(f"{path}: holds {what}; model_key (--model-key) names an entry deeper in it")
    raise BadArgument(
        f"{path}: holds several models ({', '.join(known)}); say which with model_key (--model-key {known[0]})"
    )


def _only_optimizers(path: Path, graph: Mapping[Any, Any]) -> list[tuple[str, Any]]:
    found = {str(key): own for key, value in graph.items() if (own := _optimizers(str(key), value))}
    known = [key for key in _OPTIMIZERS if key in found] or list(found)
    if len(known) > 1:
        raise BadArgument(
            f"{path}: holds several optimizers ({', '.join(known)}); say which belongs to the model with optimizer_key "
            f"(--optimizer-key {known[0]})"
        )
    return found[known[0]] if known else []


def _optimizers(key: str, value: Any) -> list[tuple[str, Any]]:
    """An optimizer's state dict, or a list of some."""
    if is_optimizer(value):
        return [(key, value)]
    if isinstance(value, list) and value and all(is_optimizer(item) for item in value):
        return [(f"{key}.{index}" if len(value) > 1 else key, item) for index, item in enumerate(value)]
    return []


def _at(path: Path, graph: Mapping[Any, Any], key: str, flag: str, fits: Callable[[Any], bool]) -> tuple[str, Any]:
    """What lies at a key, with dots between those of nested mappings."""
    value: Any = graph
    for part in [key] if key in graph else key.split("."):
        if not isinstance(value, Mapping) or part not in value:
            shown = ", ".join(repr(k) for k in list(graph)[:8])
            raise BadArgument(f"{path}: has nothing at {flag} '{key}'; its keys are {shown}")
        value = value[part]
    if not fits(value):
        raise BadArgument(f"{path}: what lies at {flag} '{key}' is no state dict of that kind")
    return key, value


def unwrapped(module: Mapping[str, Any], graph: Mapping[Any, Any]) -> dict[str, Any]:
    """The state dict without what DistributedDataParallel and torch.compile put before or into all names. A Lightning
    module may have a part that is called so."""
    out = {name.replace("_orig_mod.", ""): value for name, value in module.items()}
    if _LIGHTNING not in graph and all(name.startswith("module.") for name in out):
        out = {name.removeprefix("module."): value for name, value in out.items()}
    return out if len(out) == len(module) else dict(module)


def with_the_rest(catalog: Catalog, graph: Mapping[Any, Any], roles: FileRoles) -> Catalog:
    """Scheduler and step as what they are; everything else as client state."""
    used = {str(roles.model).partition(".")[0]} if roles.model not in graph else {roles.model}
    used |= {key if key in graph else key.partition(".")[0] for key, _ in roles.optimizers}
    rest = {key: value for key, value in graph.items() if key not in used}
    key = next((key for key in _SCHEDULERS if isinstance(rest.get(key), (Mapping, list))), None)
    scheduler = rest.get(key)
    if isinstance(scheduler, list):
        scheduler = scheduler[0] if len(scheduler) == 1 else None
    if scheduler is not None:
        rest.pop(key)
    step = next((rest[key] for key in _STEPS if type(rest.get(key)) is int and 0 <= rest[key] < 2**63), None)
    state = catalog.training_state
    kept = {str(key): value for key, value in rest.items()}
    return replace(
        catalog,
        training_state=replace(
            state, lr_scheduler=scheduler, global_steps=step, client_state={**state.client_state, **kept}
        ),
    )


def _writer(graph: Mapping[Any, Any]) -> str:
    version = graph.get(_LIGHTNING)
    return f"lightning {version}" if isinstance(version, str) else "torch.save"
