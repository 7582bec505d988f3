"""A catalog while declared changes are made to it, one after the other."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import xxhash

from ucp.catalog import ByteSource, Catalog, LogicalTensor, ParameterInfo, SourceFile, Zeros
from ucp.errors import Mismatch
from ucp.geometry import Shape, numel, whole
from ucp.storage.dtypes import itemsize
from ucp.storage.files import Files
from ucp.transfer.gather import Reader

PARAM = "param"


@dataclass
class Build:
    """catalog: as it is so far. files: reads the checkpoint's files for tensors that are computed. grown: names of
    parameters of whose weights the catalog has only a part, or nothing; the live model has the rest. lines: what was
    changed, for people."""

    catalog: Catalog
    files: Files = field(default_factory=Files)
    grown: set[str] = field(default_factory=set)
    lines: list[str] = field(default_factory=list)

    def reader(self) -> Reader:
        """Reads the catalog as it is so far."""
        return Reader(self.catalog, self.files)

    def computed(self, name: str, state: str, shape: Shape, dtype: str, source: ByteSource, told: str) -> LogicalTensor:
        """A tensor whose bytes come from ``source``, row-major. told: what tells it from others."""
        index = self.file(source, f"{name}:{state}:{told}", numel(shape) * itemsize(dtype))
        blocks = whole(shape, 0, index)
        return LogicalTensor(name, state, shape, dtype, blocks, np.zeros(len(blocks), np.int64))

    def zeros(self, name: str, state: str, shape: Shape, dtype: str) -> LogicalTensor:
        """A tensor of zeros."""
        blocks = whole(shape, 0, self.zeros_file(shape, dtype))
        return LogicalTensor(name, state, shape, dtype, blocks, np.zeros(len(blocks), np.int64))

    def zeros_file(self, shape: Shape, dtype: str) -> int:
        """The number of a "file" that has at least so many zeros."""
        nbytes = numel(shape) * itemsize(dtype)
        known = next((k for k, source in self.catalog.computed.items() if isinstance(source, Zeros)), None)
        if known is None:
            return self.file(Zeros(), "zeros", nbytes)
        files = list(self.catalog.files)
        if files[known].size < nbytes:
            files[known] = replace(files[known], size=nbytes)
            self.catalog = replace(self.catalog, files=tuple(files))
        return known

    def file(self, source: ByteSource, told: str, nbytes: int) -> int:
        """The number of a new "file" of the catalog."""
        index = len(self.catalog.files)
        digest = xxhash.xxh3_128_hexdigest(told.encode("utf-8", "surrogatepass"))
        self.catalog = replace(
            self.catalog,
            files=(*self.catalog.files, SourceFile(f"changed:{digest}", nbytes, 0)),
            computed={**self.catalog.computed, index: source},
        )
        return index

    def put(self, made: Sequence[tuple[ParameterInfo, Sequence[LogicalTensor]]]) -> None:
        """Give parameters these tensors in place of those that they have."""
        names = {info.name for info, _ in made}
        kept = {key: tensor for key, tensor in self.catalog.tensors.items() if key[0] not in names}
        kept.update({(info.name, tensor.state): tensor for info, tensors in made for tensor in tensors})
        infos = {
            info.name: replace(info, states={tensor.state: tensor.dtype for tensor in tensors})
            for info, tensors in made
        }
        self.catalog = replace(
            self.catalog,
            parameters={**self.catalog.parameters, **infos},
            tensors=kept,
            copies=tuple(copy for copy in self.catalog.copies if copy.name not in names),
        )

    def tensors_of(self, info: ParameterInfo) -> list[LogicalTensor]:
        return [self.catalog.tensors[info.name, s] for s in info.states if (info.name, s) in self.catalog.tensors]

    def drop(self, names: Collection[str]) -> None:
        """Leave parameters out."""
        gone = set(names)
        catalog = self.catalog
        self.catalog = replace(
            catalog,
            parameters={name: info for name, info in catalog.parameters.items() if name not in gone},
            tensors={key: tensor for key, tensor in catalog.tensors.items() if key[0] not in gone},
            copies=tuple(copy for copy in catalog.copies if copy.name not in gone),
        )
        self.ungroup(gone)

    def ungroup(self, names: Collection[str]) -> None:
        """Take parameters out of their param groups."""
        state = self.catalog.training_state
        groups = tuple(
            replace(group, names=tuple(name for name in group.names if name not in names))
            for group in state.param_groups
        )
        self.catalog = replace(self.catalog, training_state=replace(state, param_groups=groups))

    def rename(self, new: Mapping[str, str]) -> None:
        """Give parameters other names; the others keep theirs. Raises Mismatch if two would have one name."""
        catalog = self.catalog

        def of(name: str) -> str:
            return new.get(name, name)

        seen: dict[str, str] = {}
        for info in catalog.parameters.values():
            for name in (info.name, *info.aliases):
                if seen.setdefault(of(name), name) != name:
                    raise Mismatch(f"'{name}' and '{seen[of(name)]}' would both be called '{of(name)}'")
        state = catalog.training_state
        self.catalog = replace(
            catalog,
            parameters={
                of(name): replace(info, name=of(name), aliases=tuple(map(of, info.aliases)))
                for name, info in catalog.parameters.items()
            },
            tensors={(of(n), s): replace(tensor, name=of(n)) for (n, s), tensor in catalog.tensors.items()},
            copies=tuple(replace(copy, name=of(copy.name)) for copy in catalog.copies),
            training_state=replace(
                state,
                param_groups=tuple(replace(g, names=tuple(map(of, g.names))) for g in state.param_groups),
            ),
        )


def few(names: Sequence[str]) -> str:
    """Names for a line of a report."""
    first = f"'{names[0]}'"
    return first if len(names) == 1 else f"{first} and {len(names) - 1} more"
