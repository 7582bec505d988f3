"""A checkpoint of any format into a state dict of torch.distributed: into the tensors where they are, by name.

As with engines, all of it or nothing: compare and plan, read this rank's byte ranges into host memory, and only then
copy, each step agreed on by all ranks. What nobody has seen yet is read into straight away. Optimizer states and
hyperparameters are found by the parameters' names, so that neither the order of param groups nor the framework that
saved them matters.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ucp.catalog import Catalog
from ucp.errors import Mismatch
from ucp.formats.shared.roles import PARAM, VALUES, Roles, StateEntry, assign
from ucp.geometry import numel
from ucp.job import ranks
from ucp.job.stopwatch import Stopwatch, stages_text
from ucp.loading.exchange import nbytes_of
from ucp.loading.host_memory import Memory
from ucp.loading.load import reading_threads
from ucp.loading.match import OWN_OPTIONS
from ucp.loading.name_match import match
from ucp.printable import logger
from ucp.progress import watching
from ucp.storage.dtypes import from_torch
from ucp.storage.files import Files
from ucp.torchdist.dtensors import blocks_of, local_tensor
from ucp.torchdist.state_dicts import flatten, put
from ucp.transfer.gather import EXACT, Reader, Want, gather

log = logger(__name__)

SHOWN = 8
ALIGNMENT = 64  # bytes, of the tensors in the memory that they are read into


@dataclass(frozen=True)
class StateDictReport:
    """What a load did. nbytes: of the tensors brought to this rank; bytes_read: of the files. left: entries that stayed
    as they were, by the caller's leave or because the checkpoint records no hyperparameters for them. unused: what the
    checkpoint has besides. seconds: by stage, on this rank: open (the first rank), plan, read, apply, and wait, for
    the others. overlapping: seconds within those: 'digest', checking what was read, of all reading threads together.
    """

    path: str
    tensors: int
    nbytes: int
    bytes_read: int
    left: tuple[str, ...]
    unused: tuple[str, ...]
    seconds: Mapping[str, float]
    overlapping: Mapping[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"restored {self.tensors} tensors from {self.path} in {stages_text(self.seconds)}"


@dataclass
class Plan:
    """wants: entry -> what to gather into its shard. fills: entries that are tensors of one value. own: tensors that
    this rank had for itself. values: what to set."""

    wants: dict[str, Want] = field(default_factory=dict)
    fills: dict[str, Any] = field(default_factory=dict)
    own: dict[str, torch.Tensor] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)
    left: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)


def load_into(
    state_dict: dict[str, Any],
    path: str,
    catalog: Catalog,
    allow_missing: Sequence[str] = (),
    allow_unused: Sequence[str] | None = None,
    verify: bool = True,
    watch: Stopwatch | None = None,
    unseen: Collection[str] = (),
    blank: bool = False,
) -> StateDictReport:
    """Fill the state dict (without Stateful objects: `state_dicts.unwrap`) in place. Collective.

    catalog: its training state's tensors are real ones. allow_missing: patterns of flat names that may stay as they
    are. allow_unused: patterns of what of the checkpoint's tensors may stay unread (names, and ``name:state`` for
    optimizer states); None for anything. watch: of a load that began earlier, with opening. unseen: flat names of
    tensors that are thrown away if the load fails. blank: their elements are anything, so none may stay as it is.

    Raises Mismatch, and what reading raises, on every rank and with nothing changed.
    """
    watch = watch or Stopwatch()
    entries, what = ranks.all_or_none(
        lambda: watch.timed(
            "plan", lambda: _planned(state_dict, path, catalog, allow_missing, allow_unused, unseen if blank else ())
        )
    )
    found = ranks.all_or_none(lambda: watch.timed("read", lambda: read(entries, catalog, what, verify, unseen)))

    def apply() -> None:
        fill(entries, what, found.buffers)
        for key, value in what.values.items():
            put(state_dict, entries[key].path, value)

    watch.timed("apply", apply)
    return StateDictReport(
        path,
        len(what.wants),
        found.nbytes,
        found.bytes_read,
        tuple(what.left),
        tuple(what.unused),
        watch.with_wait(),
        {"digest": found.digest_seconds},
    )


def _planned(
    state_dict: Mapping[str, Any],
    path: str,
    catalog: Catalog,
    allow_missing: Sequence[str],
    allow_unused: Sequence[str] | None,
    blank: Collection[str],
) -> tuple[dict[str, StateEntry], Plan]:
    entries = flatten(state_dict)
    what = plan(entries, assign(entries, complete=False), catalog)
    missing = [key for key in what.missing if not _allowed(key, allow_missing)]
    unused = [] if allow_unused is None else [key for key in what.unused if not _allowed(key, allow_unused)]
    what.left.extend(key for key in what.missing if key not in missing)
    missing += [key for key in what.left if key in blank]
    parts = []
    if what.wrong:
        parts.append(f"{len(what.wrong)} do not fit: {_shown(what.wrong)}")
    if missing:
        listed = [f"'{key}'{_why_missing(key, catalog)}" for key in missing]
        parts.append(f"{len(missing)} are not in the checkpoint: {_shown(listed)} (allow_missing=[...] leaves them)")
    if unused:
        parts.append(
            f"{len(unused)} of the checkpoint would stay unused: {_shown(unused)} (allow_unused=[...] allows it)"
        )
    if parts:
        raise Mismatch(
            f"{path}: nothing was loaded, since what is asked for is not what the checkpoint has; {'; '.join(parts)}"
        )
    return entries, what


def _allowed(key: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(key, pattern) or fnmatchcase(key.partition(":")[0], pattern) for pattern in patterns)


def _why_missing(key: str, catalog: Catalog) -> str:
    saved = catalog.training_state.extra.get("ranks", ())
    if any(key in own.get(VALUES, {}) for own in saved):
        return f" (each of {len(saved)} ranks has its own, and {ranks.world_size()} load)"
    return ""


def _shown(items: Sequence[str]) -> str:
    return ", ".join(items[:SHOWN]) + (f", and {len(items) - SHOWN} more" if len(items) > SHOWN else "")


def plan(entries: Mapping[str, StateEntry], roles: Roles, catalog: Catalog) -> Plan:
    """Everything that a load will do on this rank; talks to nobody."""
    what = Plan()
    asked = [name for name, _ in (*roles.tensors.values(), *roles.scalars.values())]
    names = _names(catalog, [*asked, *(name for group in roles.groups.values() for name in group)])
    own, shared = _own(catalog), catalog.training_state.extra.get(VALUES, {})
    used: set[tuple[str, str]] = set()
    for key, (name, state) in {**roles.tensors, **roles.scalars}.items():
        source = names.get(name)
        entry = entries[key]
        if source is not None and (source, state) in catalog.tensors and entry.shape is not None:
            used.add((source, state))
            _want(what, key, entry, catalog, (source, state))
        elif source is not None and state in catalog.parameters[source].scalars:
            _scalar(what, key, entry, catalog.parameters[source].scalars[state])
        elif isinstance(own.get(key), torch.Tensor) and entry.shape is not None:
            _take_own(what, key, entry, own[key])
        elif (key, PARAM) in catalog.tensors and entry.shape is not None:
            used.add((key, PARAM))
            _want(what, key, entry, catalog, (key, PARAM))
        elif key in shared and entry.shape is None:
            what.values[key] = shared[key]
        else:
            what.missing.append(key)
    _options(what, entries, roles, catalog, names)
    for key in roles.values:
        if key in own or key in shared:
            what.values[key] = own[key] if key in own else shared[key]
        else:
            what.missing.append(key)
    for name, state in catalog.tensors:
        if (name, state) not in used:
            what.unused.append(name if state == PARAM else f"{name}:{state}")
    what.unused.extend(key for key in shared if key not in what.values)
    return what


def _names(catalog: Catalog, asked: list[str]) -> dict[str, str]:
    """The checkpoint's name for each of these; two that are tied there have the same."""
    owners = {alias: info.name for info in catalog.parameters.values() for alias in (info.name, *info.aliases)}
    exact = {name: owners[name] for name in asked if name in owners}
    return {**match(catalog, [name for name in dict.fromkeys(asked) if name not in exact]), **exact}


def _own(catalog: Catalog) -> Mapping[str, Any]:
    """What this rank had for itself when as many ranks saved; of other numbers, what all of them had alike."""
    saved = [own.get(VALUES, {}) for own in catalog.training_state.extra.get("ranks", ())]
    if len(saved) == ranks.world_size():
        return saved[ranks.rank()]
    return {}


def _want(what: Plan, key: str, entry: StateEntry, catalog: Catalog, source: tuple[str, str]) -> None:
    tensor = catalog.tensors[source]
    dtype = from_torch(entry.value.dtype)
    if tensor.shape != entry.shape:
        what.wrong.append(f"'{key}' is {list(tensor.shape)} in the checkpoint and {list(entry.shape or ())} here")
    elif tensor.dtype != dtype and (tensor.dtype, dtype) not in EXACT:
        what.wrong.append(f"'{key}' is {tensor.dtype} in the checkpoint and {dtype} here, which would lose bits")
    else:
        what.wants[key] = Want(tensor, blocks_of(key, entry.value), dtype)


def _scalar(what: Plan, key: str, entry: StateEntry, value: Any) -> None:
    if entry.shape is None:
        what.values[key] = value
    elif numel(entry.shape) != 1 or not _holds(entry.value.dtype, value):
        what.wrong.append(f"'{key}' is the value {value!r} in the checkpoint, which {entry.value.dtype} does not hold")
    else:
        what.fills[key] = value


def _holds(dtype: torch.dtype, value: Any) -> bool:
    """Whether a tensor of this type can have exactly this value."""
    if not isinstance(value, (bool, int, float)):
        return False
    return value != value or torch.tensor(value, dtype=torch.float64).to(dtype).item() == value


def _take_own(what: Plan, key: str, entry: StateEntry, value: torch.Tensor) -> None:
    local = local_tensor(entry.value)
    if value.shape != local.shape or value.dtype != local.dtype:
        what.wrong.append(
            f"'{key}' is {value.dtype} {list(value.shape)} in the checkpoint and {local.dtype} {list(local.shape)} here"
        )
    else:
        what.own[key] = value


def _options(
    what: Plan, entries: Mapping[str, StateEntry], roles: Roles, catalog: Catalog, names: Mapping[str, str]
) -> None:
    """Hyperparameters, from the checkpoint's groups that hold the same parameters."""
    groups = catalog.training_state.param_groups
    owner = {name: index for index, group in enumerate(groups) for name in group.names}
    for key, (group, option) in roles.options.items():
        if option in OWN_OPTIONS:
            continue
        origins = sorted({owner[names.get(n, n)] for n in roles.groups[group] if names.get(n, n) in owner})
        found = [options[option] for index in origins if option in (options := groups[index].options or {})]
        if not found or len(found) < len(origins):
            what.left.append(key)
        elif any(not _same(value, found[0]) for value in found[1:]):
            differing = _shown([*map(repr, found)])
            what.wrong.append(f"'{key}' is for parameters of the checkpoint's groups {origins}, which have {differing}")
        else:
            _option(what, key, entries[key], found[0])


def _option(what: Plan, key: str, entry: StateEntry, value: Any) -> None:
    number = value.item() if isinstance(value, torch.Tensor) and value.numel() == 1 else value
    if entry.shape is not None:
        _scalar(what, key, entry, number)
    elif isinstance(entry.value, tuple) and isinstance(value, list):
        what.values[key] = tuple(value)
    else:
        what.values[key] = number


def _same(a: Any, b: Any) -> bool:
    return bool(list(a) == list(b)) if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)) else bool(a == b)


@dataclass
class Read:
    """This rank's shards, in host memory, and what bringing them there took. buffers: those that are to be copied into
    their tensors. nbytes: of all; bytes_read: of the files."""

    buffers: dict[str, torch.Tensor]
    nbytes: int
    bytes_read: int
    digest_seconds: float


def read(
    entries: Mapping[str, StateEntry], catalog: Catalog, what: Plan, verify: bool = True, unseen: Collection[str] = ()
) -> Read:
    """Read this rank's shards: of entries named in ``unseen`` into their tensors, where these are dense host memory.

    Raises what reading raises.
    """
    locals_ = {key: local_tensor(entries[key].value) for key in what.wants}
    straight = {key for key, local in locals_.items() if key in unseen and _is_dense_in_host(local)}
    sizes = {key: local.numel() * local.element_size() for key, local in locals_.items() if key not in straight}
    pages = Memory()
    pages.ready(locals_[key] for key in straight)
    starts = np.cumsum([0, *(-(-size // ALIGNMENT) * ALIGNMENT for size in sizes.values())]).tolist()
    memory = pages.take(starts[-1])
    buffers = {
        key: memory[start : start + size].view(locals_[key].dtype)
        for start, (key, size) in zip(starts, sizes.items(), strict=False)
    }
    raw = [buffers.get(key, local).reshape(-1).view(torch.uint8).numpy() for key, local in locals_.items()]
    wants = [
        Want(want.tensor, want.blocks.in_buffer(index), want.dtype) for index, want in enumerate(what.wants.values())
    ]
    total = sum(map(nbytes_of, wants))
    with Files() as files, watching("loading", lambda: files.bytes_read, total, ranks.rank() == 0):
        reader = Reader(catalog, files, verify)
        nbytes = gather(reader, wants, raw, reading_threads())
        _check_tied(locals_, raw)
        return Read(buffers, nbytes, files.bytes_read, reader.digest_seconds)


def _is_dense_in_host(tensor: torch.Tensor) -> bool:
    return tensor.device.type == "cpu" and tensor.is_contiguous()


def _check_tied(locals_: Mapping[str, torch.Tensor], raw: Sequence[NDArray[np.uint8]]) -> None:
    """Raise Mismatch where entries that are one memory (a tied parameter's two names) would get different values."""
    first: dict[tuple[int, int], tuple[str, NDArray[np.uint8]]] = {}
    for (key, local), values in zip(locals_.items(), raw, strict=True):
        other, others = first.setdefault((local.data_ptr(), len(values)), (key, values))
        if other != key and not np.array_equal(values, others):
            raise Mismatch(
                f"nothing was loaded: '{key}' and '{other}' are one tensor here, and the checkpoint has different "
                "values for them; leave one of them out of the state dict"
            )


@torch.no_grad()
def fill(entries: Mapping[str, StateEntry], what: Plan, buffers: dict[str, torch.Tensor]) -> None:
    """Copy what was read into the tensors of the state dict; ``buffers`` is empty afterwards."""
    for key in list(buffers):
        local = local_tensor(entries[key].value)
        local.copy_(buffers.pop(key).view(local.shape))
    for key, value in what.fills.items():
        local_tensor(entries[key].value).fill_(value)
    for key, tensor in what.own.items():
        local_tensor(entries[key].value).copy_(tensor)
