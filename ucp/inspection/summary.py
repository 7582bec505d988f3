"""What is in a checkpoint: format, layout, step, sizes, and every parameter with its states and fragments."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import numpy as np

from ucp import formats
from ucp.catalog import Catalog, LogicalTensor, ParameterInfo
from ucp.checkpoint import Checkpoint
from ucp.errors import BadArgument
from ucp.geometry import numel
from ucp.inspection import display
from ucp.inspection.owners import FileOwners, file_owners
from ucp.layers import Layer, layer_of, shown
from ucp.storage.dtypes import itemsize
from ucp.units import counted

SCHEMA = "ucp.inspect/1"


@dataclass(frozen=True)
class StateSummary:
    """One state of a parameter. bytes: of its elements. fragments: how many boxes it lies in. copies: further boxes."""

    dtype: str
    bytes: int
    fragments: int
    copies: int


@dataclass(frozen=True)
class ParameterSummary:
    """A parameter. elements: of its weight. bytes: of all its states. cut: how its fragments divide it, in words."""

    name: str
    shape: tuple[int, ...]
    kind: str
    elements: int
    bytes: int
    cut: str
    states: Mapping[str, StateSummary]
    scalars: Mapping[str, Any]
    aliases: tuple[str, ...]


@dataclass(frozen=True)
class FileSummary:
    """A file with fragments. holder: the rank that wrote it, or its own name. held: bytes of fragments in it."""

    path: str
    bytes: int
    held: int
    holder: str
    digests: bool


@dataclass(frozen=True)
class HolderSummary:
    """What one rank (or file) holds: files and bytes of fragments."""

    name: str
    files: int
    bytes: int


@dataclass(frozen=True)
class Summary:
    """What is in a checkpoint.

    elements: of all parameters' weights, buffers included. bytes: of all logical tensors; file_bytes: of the files.
    states: state -> tensors, bytes, dtypes. training: what the training state has, in short.
    facts: what else the format tells, titles -> texts. approximate: parameters that a repair has filled in -> how.
    """

    path: str
    format: str
    writer: str
    layout: Mapping[str, int]
    step: int | None
    elements: int
    bytes: int
    file_bytes: int
    fragments: int
    states: Mapping[str, Mapping[str, Any]]
    kinds: Mapping[str, int]
    parameters: tuple[ParameterSummary, ...]
    files: tuple[FileSummary, ...]
    holders: tuple[HolderSummary, ...]
    training: Mapping[str, Any]
    facts: Mapping[str, str] = field(default_factory=dict)
    approximate: Mapping[str, str] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        return {"schema": SCHEMA, **asdict(self)}


def summarise(checkpoint: Checkpoint) -> Summary:
    """Everything that `inspect` shows. Reads no tensor.

    Parameters
    ----------
    checkpoint
        An open checkpoint.

    Returns
    -------
    Summary
        Sizes are in bytes, and shapes those of the whole tensors.
    """
    catalog = checkpoint.catalog
    who = file_owners(catalog)
    held = held_bytes(catalog)
    copies: dict[tuple[str, str], int] = {}
    for copy in catalog.copies:
        copies[copy.name, copy.state] = copies.get((copy.name, copy.state), 0) + len(copy.blocks)
    parameters = tuple(_parameter(catalog, info, who, copies) for info in catalog.parameters.values())
    states: dict[str, dict[str, Any]] = {}
    for tensor in catalog.tensors.values():
        entry = states.setdefault(tensor.state, {"tensors": 0, "bytes": 0, "dtypes": {}})
        entry["tensors"] += 1
        entry["bytes"] += tensor.nbytes
        entry["dtypes"][tensor.dtype] = entry["dtypes"].get(tensor.dtype, 0) + 1
    kinds: dict[str, int] = {}
    for info in parameters:
        kinds[info.kind] = kinds.get(info.kind, 0) + 1
    files = tuple(
        FileSummary(file.path, file.size, int(held[k]), who[k], k in catalog.chunk_digests)
        for k, file in enumerate(catalog.files)
    )
    return Summary(
        path=str(checkpoint.path),
        format=catalog.format,
        writer=catalog.writer,
        layout={name: getattr(catalog.layout, name) for name in ("dp", "tp", "pp", "ep", "zero")},
        step=catalog.training_state.global_steps,
        elements=sum(info.elements for info in parameters),
        bytes=sum(tensor.nbytes for tensor in catalog.tensors.values()),
        file_bytes=sum(file.size for file in catalog.on_disk),
        fragments=sum(len(tensor.blocks) for tensor in catalog.tensors.values()),
        states=states,
        kinds=kinds,
        parameters=parameters,
        files=files,
        holders=tuple(
            HolderSummary(name, int((who.of_file == k).sum()), int(held[who.of_file == k].sum()))
            for k, name in enumerate(who.names)
        ),
        training=_training(catalog),
        facts={} if (known := formats.named(catalog.format)) is None else known.facts(catalog),
        approximate=catalog.approximate,
    )


def approximate_text(approximate: Mapping[str, str]) -> str:
    """What a repair has filled in: ``layers 4-5 (checkfree)``, and how many parameters that is."""
    ways: dict[str, set[Layer]] = {}
    outside = 0
    for name, how in approximate.items():
        found = layer_of(name)
        outside += found is None
        if found is not None:
            ways.setdefault(how.partition(":")[0], set()).add(found[0])
    texts = [f"layers {shown(layers)} ({way})" for way, layers in ways.items()]
    texts += [f"{counted(outside, 'parameter')} outside layers"] if outside else []
    return f"{', '.join(texts)}: {counted(len(approximate), 'parameter')}"


def held_bytes(catalog: Catalog) -> np.ndarray:
    """(files,) bytes of fragments, copies included, in every file."""
    out = np.zeros(len(catalog.files), np.float64)
    for tensor in (*catalog.tensors.values(), *catalog.copies):
        counts = tensor.blocks.counts * itemsize(tensor.dtype)
        out += np.bincount(tensor.blocks.buffers, counts, len(out)) if len(counts) else 0
    return out.astype(np.int64)


def _parameter(
    catalog: Catalog, info: ParameterInfo, who: FileOwners, copies: Mapping[tuple[str, str], int]
) -> ParameterSummary:
    tensors = {state: catalog.tensors[info.name, state] for state in info.states}
    shown = tensors.get("param") or next(iter(tensors.values()), None)
    cut = ""
    if shown is not None:
        holders = [who.names[k] for k in np.unique(who.of_file[shown.blocks.buffers])]
        cut = display.cut_text(info.shape, shown.blocks, holders)
    again = {state: copies.get((info.name, state), 0) for state in info.states}
    if again.get("param"):
        cut += f", {again['param']} more copies"
    return ParameterSummary(
        name=info.name,
        shape=tuple(info.shape),
        kind=info.kind,
        elements=numel(info.shape),
        bytes=sum(t.nbytes for t in tensors.values()),
        cut=cut,
        states={s: StateSummary(t.dtype, t.nbytes, len(t.blocks), again[s]) for s, t in tensors.items()},
        scalars={key: _plain(value) for key, value in info.scalars.items()},
        aliases=tuple(info.aliases),
    )


def _training(catalog: Catalog) -> dict[str, Any]:
    state = catalog.training_state
    return {
        "global_steps": state.global_steps,
        "global_samples": state.global_samples,
        "skipped_steps": state.skipped_steps,
        "global_batch_size": state.global_batch_size,
        "dp_world_size": state.dp_world_size,
        "clip_grad": state.clip_grad,
        "param_groups": [
            {
                "parameters": len(group.names),
                "options": None if group.options is None else {k: _plain(v) for k, v in group.options.items()},
            }
            for group in state.param_groups
        ],
        "lr_scheduler": state.lr_scheduler is not None,
        "loss_scaler": None if state.loss_scaler is None else {k: _plain(v) for k, v in state.loss_scaler.items()},
        "client_state": sorted(map(str, state.client_state)),
        "extra": sorted(map(str, state.extra)),
    }


def _plain(value: Any) -> Any:
    """A value in the form that JSON has for it, or else as text."""
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if value == value and abs(value) != float("inf") else str(value)
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return str(value)


# --- parts of a summary ----------------------------------------------------------------------------------------------


def matching(names: Sequence[str], pattern: str) -> list[str]:
    """The names that a glob matches. Raises BadArgument if there are none."""
    found = [name for name in names if fnmatchcase(name, pattern)]
    if not found:
        shown = ", ".join(f"'{n}'" for n in names[:3])
        raise BadArgument(f"--param {pattern}: matches none of {len(names)} parameters ({shown}, …)")
    return found


def families(parameters: Sequence[ParameterSummary]) -> list[tuple[str, ParameterSummary, int]]:
    """Parameters that differ only in the numbers in their names, as one: (name, the first, how many).

    The name has a span for each number that varies: ``layers.{0-31}.up.weight``.
    """
    groups: dict[tuple[Any, ...], list[ParameterSummary]] = {}
    for p in parameters:
        types = tuple((state, s.dtype) for state, s in p.states.items())
        # How ZeRO cuts them does not matter here, so it is not in the key.
        key = (re.sub(r"\d+", "#", p.name), p.shape, p.kind, types, tuple(map(str, p.scalars.values())))
        groups.setdefault(key, []).append(p)
    return [(_spans([p.name for p in members]), members[0], len(members)) for members in groups.values()]


def _spans(names: Sequence[str]) -> str:
    columns = zip(*(re.split(r"(\d+)", name) for name in names), strict=True)
    out = ""
    for index, parts in enumerate(columns):
        if index % 2 == 0 or len(set(parts)) == 1:
            out += parts[0]
        else:
            numbers = sorted(map(int, parts))
            out += f"{{{numbers[0]}-{numbers[-1]}}}"
    return out


@dataclass(frozen=True)
class Fragment:
    """Where a box of a tensor lies. offsets, sizes: the box, in elements. byte: where it begins in the file."""

    holder: str
    file: str
    byte: int
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    copy: bool


def fragments(catalog: Catalog, name: str, state: str) -> list[Fragment]:
    """All fragments of one tensor, copies last."""
    out: list[Fragment] = []
    who = file_owners(catalog)
    again = [copy for copy in catalog.copies if (copy.name, copy.state) == (name, state)]
    for k, tensor in enumerate((catalog.tensors[name, state], *again)):
        out += _fragments(catalog, who, tensor, copy=k > 0)
    return out


def _fragments(catalog: Catalog, who: FileOwners, tensor: LogicalTensor, copy: bool) -> Iterator[Fragment]:
    b = tensor.blocks
    places = tensor.bases + b.starts * itemsize(tensor.dtype)
    for k in range(len(b)):
        file = int(b.buffers[k])
        yield Fragment(
            who[file],
            catalog.files[file].path,
            int(places[k]),
            tuple(b.offsets[k].tolist()),
            tuple(b.sizes[k].tolist()),
            copy,
        )


@dataclass(frozen=True)
class Module:
    """A module of the model with the sums of what lies below it. children: by the next part of the name."""

    name: str
    parameters: int
    elements: int
    bytes: int
    children: tuple[Module, ...]

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def tree(parameters: Sequence[ParameterSummary]) -> Module:
    """The parameters as a tree of modules, by their names. A leaf is a parameter."""
    root: dict[str, Any] = {}
    for info in parameters:
        node = root
        *path, last = info.name.split(".")
        for part in path:
            node = node.setdefault(part, {})
        node[f"{last}\0"] = info  # a module and a parameter may have the same name
    return _module("", root)


def _module(name: str, node: Mapping[str, Any]) -> Module:
    children = tuple(
        _module(key, value) if isinstance(value, dict) else Module(key.rstrip("\0"), 1, value.elements, value.bytes, ())
        for key, value in node.items()
    )
    return Module(
        name,
        sum(c.parameters for c in children),
        sum(c.elements for c in children),
        sum(c.bytes for c in children),
        children,
    )
