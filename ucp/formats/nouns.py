"""The nouns that the Format protocol is said in: what a format is asked, and what it answers.

Apart from `ucp.formats.base`, since the command line names the formats' options and needs none of this.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ucp.catalog import Catalog, LogicalTensor, ParameterInfo
from ucp.geometry import Blocks
from ucp.parallel.mesh import Layout
from ucp.spec.select import Choice
from ucp.storage import locations


@dataclass(frozen=True)
class FolderNames:
    """What one look into a folder shows; all formats are asked about it.

    names: of the files and folders in it, sorted.
    listed: False if the folder cannot be listed. Even then a file of a known name can be asked for.
    is_file: the path is a file's, so there are no names in it.
    """

    path: Path
    names: tuple[str, ...]
    listed: bool = True
    is_file: bool = False

    def has_file(self, name: str) -> bool:
        """Whether there is a file of this name. Raises OSError where that cannot be told of a URL."""
        return (name in self.names or not self.listed) and locations.is_file(self.path / name)

    def any_name(self, pattern: re.Pattern[str]) -> bool:
        """Whether a name matches the pattern from its beginning to its end."""
        return any(pattern.fullmatch(name) for name in self.names)


@dataclass(frozen=True)
class ReadRequest:
    """How a checkpoint is to be read.

    choice: the spec, and the model's config, that the caller gives.
    compare: refuse a checkpoint in which copies of the same elements differ.
    options: those of the format's ``read_options`` that were given, by name, checked.
    """

    choice: Choice
    compare: bool = True
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ModelFacts:
    """What a checkpoint says of its model.

    info: how its framework cuts it, as in DeepSpeed's ``universal_checkpoint_info``; None if the checkpoint has none.
    config: the model's config; None if the checkpoint has none.
    captures: which numbers in parameters' names are places along an axis, as for `ucp.spec.infer.draft`.
    """

    info: Any
    config: Mapping[str, Any] | None
    captures: Sequence[tuple[str, str]] = ()


@dataclass(frozen=True)
class Salvage:
    """What can be told of a checkpoint that is too damaged to be opened.

    faults: files, each with what is wrong.
    catalog: what its metadata still says, unchecked; None if it says nothing.
    """

    faults: tuple[tuple[str, str], ...]
    catalog: Catalog | None = None


@dataclass(frozen=True)
class Remains:
    """What is left of a checkpoint that lost files of some of its layers.

    catalog: what is left, whole by itself.
    files: missing or damaged files, each with what is wrong.
    parameters: those that are lost, as far as they are known.
    layers: numbers of lost layers of which nothing else is known.
    stateless: parameters of the catalog whose weights are left but whose optimizer states are lost.
    unknown: why nothing tells what was lost; an empty string if it is known.
    buffers_known: whether ``parameters`` has lost buffers, too.
    """

    catalog: Catalog
    files: tuple[tuple[str, str], ...]
    parameters: Mapping[str, ParameterInfo] = field(default_factory=dict)
    layers: tuple[int, ...] = ()
    stateless: frozenset[str] = frozenset()
    unknown: str = ""
    buffers_known: bool = True


@dataclass(frozen=True)
class WriteRequest:
    """What a target has to know besides the catalog.

    source, source_format: the opened checkpoint's folder, and its format's name.
    destination: a path or URL.
    tag: the checkpoint's name, for targets whose folder holds several.
    layout: the ranks to write for, None if the target takes no layout.
    choice: the spec that the caller gives.
    options: the target's own options that were given, by name, checked.
    workers: threads, None for the default.
    changed: whether the model was changed on the way, as declared.
    """

    source: Path
    source_format: str
    destination: str
    tag: str
    layout: Layout | None
    choice: Choice
    options: Mapping[str, Any] = field(default_factory=dict)
    workers: int | None = None
    changed: bool = False


@dataclass(frozen=True)
class Division:
    """How a framework divides a checkpoint over the ranks of a layout.

    held: every tensor with the boxes of it that ranks hold; ``buffers`` is the rank. A tensor that is cut up between
    the framework's modules comes once for each part, as a tensor of that part.
    stages: the first layer of each pipeline stage, and at the end the number of layers; None without a pipeline.
    """

    held: Iterable[tuple[LogicalTensor, Blocks]]
    stages: tuple[int, ...] | None = None


class ModuleOrder(tuple[str, ...]):
    """A param group's names, in the order in which the caller's module has them, as most optimizers are made.

    If a checkpoint numbers an optimizer's parameters and its own module has them in another order, they were numbered
    in the checkpoint's order: the caller's module may have been changed since. Names that the caller gives in any other
    order are a plain sequence, and are trusted as they are.
    """

    @classmethod
    def of_group(cls, group: Iterable[str], module: Iterable[str]) -> Sequence[str]:
        """The group as a ModuleOrder if it follows the module's order, else as a plain list."""
        names, place = list(group), {name: k for k, name in enumerate(module)}
        places = [place.get(name, -1) for name in names]
        return cls(names) if places == sorted(places) and -1 not in places else names

    def but(self, names: Iterable[str]) -> ModuleOrder:
        """Some of them, in the same order."""
        kept = set(names)
        return ModuleOrder(name for name in self if name in kept)


def by_module(group: Sequence[str], module: Iterable[str]) -> Sequence[str]:
    """The group's names in the order of the checkpoint's module, if they were in the order of the caller's module."""
    if not isinstance(group, ModuleOrder):
        return group
    known = set(group)
    found = [name for name in module if name in known]
    return found if len(found) == len(group) else group
