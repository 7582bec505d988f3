"""What a manifest says, and the catalog that it describes: one schema for all physical forms.

The body is kept in columns, so that a checkpoint of millions of fragments stays arrays of numbers:

- ``files``: ``path``, ``size`` (bytes), ``mtime_ns`` (null for the checkpoint's own files, which must lie in its
  folder; a file of another checkpoint is only pointed at, and must not have changed since), ``digests`` (base64 of 8
  bytes xxh3_64 for each chunk of 1 MiB, or null)
- ``parameters``: ``name``, ``shape``, ``kind``, ``scalars`` (an index into the list ``scalars``, since most parameters
  share one step count); ``aliases`` maps an owner to its other names
- ``tensors``: ``parameter`` (index), ``state`` and ``dtype`` (indices into ``states`` and ``dtypes``), ``blocks`` (how
  many of the following blocks are this tensor's)
- ``blocks``: ``file`` (index), ``byte`` (offset of the first element in the file), ``box`` (for each block its offsets,
  then its sizes, in elements), ``strides`` ({``block``: indices, ``values``: strides in elements}; a block that is not
  named lies densely in row-major order)
- ``logical_digests`` (may be missing): see `ucp.formats.universal.logical`
- ``approximate`` (may be missing): parameters that a repair has filled in -> how; readers refuse the checkpoint unless
  they are told that this is meant
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from itertools import chain
from operator import attrgetter
from typing import Any

from ucp.catalog import Catalog, LogicalTensor, ParameterInfo, SourceFile
from ucp.columns import made_of
from ucp.errors import DamagedCheckpoint, UcpError, Unsupported
from ucp.formats.universal import approximate, blocks, logical, training
from ucp.formats.universal.fields import LIMIT, Fields
from ucp.formats.universal.manifest import VERSION
from ucp.geometry import Shape, numel
from ucp.parallel.mesh import Layout
from ucp.printable import short
from ucp.storage import locations, plain
from ucp.storage.digests import ChunkDigests
from ucp.storage.dtypes import names as dtype_names

FORMS = ("consolidated", "virtual", "fragmented")
KINDS = ("parameter", "frozen", "buffer", "padding")
_LAYOUT = ("dp", "tp", "pp", "ep", "zero")


def encode(
    catalog: Catalog,
    *,
    form: str,
    writer: str,
    paths: Sequence[str],
    mtimes: Sequence[int | None],
    digests: Mapping[int, ChunkDigests],
    training_state: dict[str, Any],
    source: tuple[str, str],
    source_folder: str | None = None,
) -> dict[str, Any]:
    """The manifest's body.

    paths: the files' names as the manifest shall have them. mtimes: None for the checkpoint's own files. source: format
    and writer of the checkpoint that this one was made from. source_folder: where the files lie that it points at.
    """
    infos = list(catalog.parameters.values())
    scalar_of, shared = _encode_scalars(infos)
    return {
        "ucp": VERSION,
        "writer": writer,
        "kind": "training",
        "form": form,
        "source": {
            "format": source[0],
            "writer": source[1],
            **({} if source_folder is None else {"folder": source_folder}),
        },
        "layout": {name: getattr(catalog.layout, name) for name in _LAYOUT},
        "files": {
            "path": list(paths),
            "size": [file.size for file in catalog.files],
            "mtime_ns": list(mtimes),
            "digests": [digests[k].text if k in digests else None for k in range(len(catalog.files))],
        },
        "parameters": {
            "name": [info.name for info in infos],
            "shape": [list(info.shape) for info in infos],
            "kind": [info.kind for info in infos],
            "scalars": scalar_of,
        },
        "aliases": {info.name: list(info.aliases) for info in infos if info.aliases},
        "scalars": shared,
        **_encode_tensors(catalog),
        **approximate.encode(catalog),
        "training_state": training_state,
    }


def _encode_tensors(catalog: Catalog) -> dict[str, Any]:
    """The manifest's sections about tensors."""
    states = sorted({state for _, state in catalog.tensors})
    dtypes = sorted({t.dtype for t in catalog.tensors.values()})
    position = {name: k for k, name in enumerate(catalog.parameters)}
    tensors = list(catalog.tensors.values())
    return {
        "states": states,
        "dtypes": dtypes,
        "tensors": {
            "parameter": [position[t.name] for t in tensors],
            "state": [states.index(t.state) for t in tensors],
            "dtype": [dtypes.index(t.dtype) for t in tensors],
            "blocks": [len(t.blocks) for t in tensors],
        },
        "blocks": blocks.encode(tensors),
        **logical.encode(tensors),
    }


def _encode_scalars(infos: Sequence[ParameterInfo]) -> tuple[list[int], list[Any]]:
    """For each parameter an index into the distinct values, and these."""
    distinct: dict[str, int] = {}
    shared: list[Any] = []
    scalar_of = []
    for info in infos:
        value = plain.encode(dict(info.scalars), where=f"'{info.name}'")
        key = repr(value)
        if key not in distinct:
            distinct[key] = len(shared)
            shared.append(value)
        scalar_of.append(distinct[key])
    return scalar_of, shared


def decode(
    path: str,
    body: dict[str, Any],
    *,
    complete: bool = True,
    trust_paths: bool = False,
    absent: Collection[str] = (),
) -> Catalog:
    """The catalog that a manifest describes; ``path`` is the manifest's own. complete: it must hold every element, as
    all manifests do but those of one rank's share. trust_paths: a virtual one's files may lie anywhere. absent: files,
    as the manifest names them, that are not looked at.

    Every name, index and range is checked before it is used. Raises DamagedCheckpoint where the manifest contradicts
    itself or its files, and where a file of a form that keeps its files beside the manifest lies outside its folder.
    """
    fields = Fields(path, body)
    form = fields.choice("form", FORMS)
    fields.choice("kind", ("training",))
    files = _decode_files(fields, os.path.dirname(path), form, trust_paths, absent)
    digests = _decode_digests(fields, files)
    parameters, kept = _decode_parameters(fields)
    tensors = _decode_tensors(fields, parameters, kept, len(files))
    named = {info.name: info for info in parameters}
    source = fields.mapping("source")
    made_from = "" if source.get("format") == "training" else f", from a checkpoint of {source.get('writer')}"
    catalog = Catalog(
        format="universal",
        writer=fields.text("writer") + made_from,
        layout=_decode_layout(fields),
        files=files,
        parameters=named,
        tensors=tensors,
        training_state=training.decode(path, body.get("training_state"), training.tensors_beside(path, files)),
        chunk_digests=digests,
        approximate=approximate.decode(path, body, named),
    )
    try:
        if complete:
            catalog.check()
    except DamagedCheckpoint as error:
        raise DamagedCheckpoint(f"{path}: {error}") from error
    return catalog


def _decode_files(
    fields: Fields, folder: str, form: str, trust_paths: bool, absent: Collection[str]
) -> tuple[SourceFile, ...]:
    paths = fields.column("files", "path", str)
    sizes = fields.integers("files", "size", len(paths)).tolist()
    mtimes = fields.column("files", "mtime_ns", (int, type(None)))
    if len(set(paths)) != len(paths) or len(mtimes) != len(paths):
        raise fields.damaged("'files' names a file twice, or its columns differ in length")
    if form != "virtual" and any(mtime is not None for mtime in mtimes):
        raise fields.damaged(f"a {form} checkpoint cannot point at another checkpoint's files")
    inside = folder if locations.is_remote(folder) else os.path.realpath(folder)
    out = []
    for name, size, mtime in zip(paths, sizes, mtimes, strict=True):
        if mtime is not None and not locations.can_be_path(name):
            raise fields.damaged(f"the file {short(name)} has a name that no file can have")
        full = _inside(fields, inside, name) if mtime is None else _outside(inside, name)
        if mtime is not None and not trust_paths:
            _check_pointer(fields, inside, full)
        if name in absent:
            out.append(SourceFile(full, size, 0))
            continue
        try:
            stat = locations.stat(full)
        except (OSError, ValueError) as error:  # ValueError: the name cannot be a file's
            reason = getattr(error, "strerror", None) or error
            raise DamagedCheckpoint(
                f"{full}: cannot be read ({reason}), but the manifest '{fields.path}' needs it"
            ) from error
        if stat.size != size:
            what = "is truncated or was changed" if stat.size < size else "was changed"
            raise DamagedCheckpoint(f"{full}: the file {what}: the manifest says {size} bytes, found {stat.size}")
        if mtime is not None and stat.mtime_ns != mtime:
            raise DamagedCheckpoint(
                f"{full}: the file was changed after the virtual checkpoint '{folder}' was made (its modification time "
                "differs); make the virtual checkpoint again"
            )
        out.append(SourceFile(full, size, stat.mtime_ns))
    return tuple(out)


def _inside(fields: Fields, folder: str, name: str) -> str:
    """The full path of a file that must lie in the manifest's folder, whatever links there are."""
    full = ""
    possible = locations.can_be_path(name) and not locations.is_remote(name)
    if possible and not os.path.isabs(name) and ".." not in name.split("/"):
        if locations.is_remote(folder):
            return str(locations.locate(folder) / name)
        full = os.path.realpath(os.path.join(folder, name))
    if not full or os.path.commonpath([folder, full]) != folder:
        raise fields.damaged(f"points at '{name}', outside its own folder; such a manifest is not followed")
    return full


def _check_pointer(fields: Fields, folder: str, full: str) -> None:
    """Raise Unsupported where a virtual checkpoint, which anybody may have written, points out of the folder that it
    names as its source. One of a release that named none may point at what lies beside it."""
    named = fields.mapping("source").get("folder", os.pardir)
    if not isinstance(named, str) or not locations.can_be_path(named):
        raise fields.damaged(f"'source.folder' is {short(named)}")
    source = _outside(folder, named)
    if locations.is_remote(full):
        held = full.startswith(source.rstrip("/") + "/") and ".." not in full.split("/")
    else:
        source = os.path.realpath(source)
        real = os.path.realpath(full)
        held = source != os.sep and os.path.commonpath([source, real]) == source
    if not held:
        raise Unsupported(
            f"points at '{full}', outside '{source}', which it names as its source; trust_paths=True (--trust-paths; "
            'under DeepSpeed in the config "ucp": {"load": {"trust_paths": true}}) follows it, if you trust whoever '
            "wrote it",
            file=fields.path,
        )


def _outside(folder: str, name: str) -> str:
    """The full path of a file of the checkpoint that a virtual one points at."""
    if locations.is_remote(name) or os.path.isabs(name):
        return name
    if locations.is_remote(folder):
        return str(locations.locate(folder) / name)
    return os.path.normpath(os.path.join(folder, name))


def _decode_digests(fields: Fields, files: Sequence[SourceFile]) -> dict[int, ChunkDigests]:
    texts = fields.column("files", "digests", (str, type(None)))
    if len(texts) != len(files):
        raise fields.damaged(f"'files.digests' has {len(texts)} entries for {len(files)} files")
    out = {}
    for index, (file, text) in enumerate(zip(files, texts, strict=True)):
        if text is not None:
            try:
                out[index] = ChunkDigests.from_text(file.size, text)
            except UcpError as error:
                raise fields.damaged(f"digests of '{file.path}': {error}") from error
    return out


def _decode_layout(fields: Fields) -> Layout:
    found = fields.mapping("layout")
    values: dict[str, int] = {}
    for name in _LAYOUT:
        value = found.get(name)
        if type(value) is not int or not (0 if name == "zero" else 1) <= value < 1 << 31:
            raise fields.damaged(f"'layout.{name}' is {value!r}")
        values[name] = value
    return Layout(**values)


def _decode_parameters(fields: Fields) -> tuple[list[ParameterInfo], list[dict[str, str]]]:
    """The parameters, and of each the mapping that its states are yet to be put into."""
    names = fields.column("parameters", "name", str)
    shapes = fields.column("parameters", "shape", list)
    kinds = fields.column("parameters", "kind", str)
    shared = [plain.decode(value) for value in fields.listing("scalars")]
    which = fields.integers("parameters", "scalars", len(names), below=len(shared))
    aliases = fields.mapping("aliases")
    if not len(names) == len(shapes) == len(kinds):
        raise fields.damaged("the columns of 'parameters' differ in length")
    if not set(aliases) <= set(names):
        raise fields.damaged(f"'aliases' names '{min(set(aliases) - set(names))}', which is no parameter")
    if not all(
        isinstance(group, list) and all(isinstance(alias, str) for alias in group) for group in aliases.values()
    ):
        raise fields.damaged("'aliases' should map names to lists of names")
    used = Counter([*names, *(alias for group in aliases.values() for alias in group)])
    twice = next((name for name, times in used.items() if times > 1), None)
    if twice is not None:
        raise fields.damaged(f"parameter name '{twice}' is used twice")
    unknown = set(kinds).difference(KINDS)
    if unknown:
        name, kind = next(pair for pair in zip(names, kinds, strict=True) if pair[1] in unknown)
        raise fields.damaged(f"'{name}' is of kind '{kind}'; known are {', '.join(KINDS)}")
    odd = next((scalar for scalar in set(which.tolist()) if not isinstance(shared[scalar], dict)), None)
    if odd is not None:
        raise fields.damaged(f"'scalars[{odd}]' is not an object")
    states: list[dict[str, str]] = [{} for _ in names]
    scalars = [shared[scalar] for scalar in which.tolist()]
    others = [tuple(aliases[name]) if name in aliases else () for name in names]
    whole = _decode_shapes(fields, names, shapes)
    out = made_of(ParameterInfo, len(names), names, whole, states, kinds, scalars, others)
    return out, states


def _decode_shapes(fields: Fields, names: Sequence[str], shapes: Sequence[list[Any]]) -> list[Shape]:
    """The shapes; equal ones are one object."""
    whole = set(map(type, chain.from_iterable(shapes))) <= {int}
    found: list[Shape] = list(map(tuple, shapes))
    known = {shape: shape for shape in found} if whole else {}
    for shape in known if whole else found:
        if any(type(n) is not int or not 0 <= n < LIMIT for n in shape) or numel(shape) >= LIMIT:
            name = next(name for name, one in zip(names, found, strict=True) if one is shape)  # [True] equals [1]
            raise fields.damaged(f"'{name}' has the impossible shape {list(shape)}")
    return list(map(known.__getitem__, found))


def _decode_tensors(
    fields: Fields, parameters: Sequence[ParameterInfo], kept: Sequence[dict[str, str]], files: int
) -> dict[tuple[str, str], LogicalTensor]:
    """kept: gets each parameter's states and their element types."""
    states = [str(state) for state in fields.listing("states")]
    dtypes = [str(dtype) for dtype in fields.listing("dtypes")]
    unknown = sorted(set(dtypes) - set(dtype_names()))
    if unknown:
        raise fields.damaged(f"names the unknown element type '{unknown[0]}'")
    parameter = fields.integers("tensors", "parameter", below=len(parameters))
    count = len(parameter)
    state = fields.integers("tensors", "state", count, below=len(states))
    dtype = fields.integers("tensors", "dtype", count, below=len(dtypes))
    owners = list(map(parameters.__getitem__, parameter.tolist()))
    shapes = list(map(attrgetter("shape"), owners))
    placed = blocks.decode(fields, shapes, fields.integers("tensors", "blocks", count), files)
    digests = logical.decode(fields.path, fields.body, count)
    names = list(map(attrgetter("name"), owners))
    of = list(map(states.__getitem__, state.tolist()))
    kinds = list(map(dtypes.__getitem__, dtype.tolist()))
    tensors = made_of(LogicalTensor, count, names, of, shapes, kinds, *placed, digests)
    out = dict(zip(zip(names, of, strict=True), tensors, strict=True))
    for p, key, kind in zip(parameter.tolist(), of, kinds, strict=True):
        kept[p][key] = kind
    if len(out) < count:
        times = Counter(zip(parameter.tolist(), state.tolist(), strict=True))
        p, s = next(pair for pair, count in times.items() if count > 1)
        raise fields.damaged(f"'{parameters[p].name}' ({states[s]}) is described twice")
    return out
