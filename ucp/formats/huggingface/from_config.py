"""What a model folder leaves to its config: parameters that are tied, and names that lack their first part."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from ucp import limits
from ucp.catalog import Catalog, LogicalTensor
from ucp.geometry import box, numel
from ucp.printable import logger
from ucp.spec.bound import Bound
from ucp.spec.foreign_names import is_about
from ucp.storage.dtypes import itemsize
from ucp.storage.files import Files
from ucp.transfer.gather import Want, gather
from ucp.transfer.reader import Reader

log = logger(__name__)

FRAMEWORK = "huggingface"
"""The section under ``names:`` of a spec that says what a family's files call its parameters."""


def with_prefix(catalog: Catalog, bound: Bound) -> Catalog:
    """The catalog with the names that the whole model gives to what only its base model was saved as: ``h.0.ln_1.bias``
    of a bare GPT-2 is ``transformer.h.0.ln_1.bias``. Names that the spec knows stay."""

    def known(name: str) -> bool:
        return bound.find(name) is not None or is_about(bound, FRAMEWORK, name)

    unknown = [name for name in catalog.parameters if not known(name)]
    prefixes = dict.fromkeys(str(line.pattern).partition(".")[0] for line in bound.lines)
    counts = Counter(p for p in prefixes for name in unknown if known(f"{p}.{name}"))
    if not counts:
        return catalog
    (prefix, _), *_ = counts.most_common(1)
    new = {name: f"{prefix}.{name}" if name in unknown else name for name in catalog.parameters}
    return replace(
        catalog,
        parameters={new[name]: replace(info, name=new[name]) for name, info in catalog.parameters.items()},
        tensors={(new[name], state): replace(t, name=new[name]) for (name, state), t in catalog.tensors.items()},
    )


def tie(catalog: Catalog, bound: Bound, files: Files) -> Catalog:
    """The catalog with the parameters that the spec ties as one, under the name that owns them.

    If a folder stores copies of a tied parameter, they are compared. Different ones stay apart, with a warning, as
    transformers itself would leave them.
    """
    for name in list(catalog.parameters):
        owner = bound.owner(name)
        if owner is None or name not in catalog.parameters:
            continue
        if owner not in catalog.parameters:
            catalog = _called(catalog, name, owner)
        elif _equal(catalog, name, owner, files):
            catalog = _without(catalog, name)
        else:
            log.warning("'%s' and '%s' are tied by the config, but differ; they are kept apart", name, owner)
    parameters = dict(catalog.parameters)
    for name, info in catalog.parameters.items():
        aliases = [alias for alias in _tied_to(bound, name) if alias not in catalog.parameters]
        parameters[name] = replace(info, aliases=tuple(dict.fromkeys([*info.aliases, *aliases])))
    return replace(catalog, parameters=parameters)


def _tied_to(bound: Bound, owner: str) -> Iterator[str]:
    """The names that the spec ties to this one."""
    for line in bound.ties:
        captures = line.to.match(owner)
        if captures is not None and set(line.pattern.captures) <= captures.keys() and "*" not in str(line.pattern):
            yield line.pattern.fill(captures)


def _called(catalog: Catalog, old: str, new: str) -> Catalog:
    parameters = {
        (new if name == old else name): replace(info, name=new) if name == old else info
        for name, info in catalog.parameters.items()
    }
    tensors = {
        ((new if name == old else name), state): replace(tensor, name=new) if name == old else tensor
        for (name, state), tensor in catalog.tensors.items()
    }
    return replace(catalog, parameters=parameters, tensors=tensors)


def _without(catalog: Catalog, name: str) -> Catalog:
    return replace(
        catalog,
        parameters={n: info for n, info in catalog.parameters.items() if n != name},
        tensors={key: tensor for key, tensor in catalog.tensors.items() if key[0] != name},
    )


def _equal(catalog: Catalog, one: str, other: str, files: Files) -> bool:
    """Whether two weights are the same bits."""
    a, b = catalog.tensors[one, "param"], catalog.tensors[other, "param"]
    if (a.shape, a.dtype) != (b.shape, b.dtype):
        return False
    if _place(a) == _place(b) or not numel(a.shape):
        return True
    rows = max(limits.COMPARED_BYTES // max(a.nbytes // max(a.shape[0], 1), 1), 1) if a.shape else 1
    reader = Reader(catalog, files)
    for first in range(0, a.shape[0] if a.shape else 1, rows):
        sizes = (min(rows, a.shape[0] - first), *a.shape[1:]) if a.shape else ()
        offsets = (first, *(0 for _ in a.shape[1:])) if a.shape else ()
        buffers = [np.empty(numel(sizes) * itemsize(a.dtype), np.uint8) for _ in range(2)]
        wants = [Want(t, box(offsets, sizes).in_buffer(k), t.dtype) for k, t in enumerate((a, b))]
        gather(reader, wants, buffers)
        if not np.array_equal(buffers[0], buffers[1]):
            return False
    return True


def _place(tensor: LogicalTensor) -> tuple[bytes, ...]:
    b = tensor.blocks
    return tuple(column.tobytes() for column in (b.offsets, b.sizes, b.starts, b.strides, b.buffers, tensor.bases))
