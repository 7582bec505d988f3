"""Which operation each parameter of a merge gets, and from which sources: by one method for all, or by a merge file."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from ucp.errors import BadArgument
from ucp.layers import layer_of
from ucp.merging.language import MergeFile
from ucp.merging.language import load as load_recipe
from ucp.merging.methods import WEIGHTED, MethodOptions, Sources, operations, resolved_weights
from ucp.merging.operations import Combination, Copied


@dataclass(frozen=True)
class AssignedSource:
    """A checkpoint that takes part. name: what messages call it. is_mask: its tensors only say what counts."""

    name: str
    path: str
    is_mask: bool = False


@dataclass(frozen=True)
class Assignment:
    """Which operation each parameter gets.

    sources: all checkpoints that are opened, in this order: the base if there is one, those that are merged, the masks.
    first: the number of the first one that is merged. count: how many are merged. method: its name, or the merge
    file's. weights: those of a linear method, normalised. operation: called with a parameter's name and its layer's
    number as a share of all (None outside layers).
    """

    sources: tuple[AssignedSource, ...]
    first: int
    count: int
    method: str
    weights: tuple[float, ...] | None
    operation: Callable[[str, float | None], Combination]

    def operation_for(self, only: Sequence[str], names: Collection[str]) -> Callable[[str], Combination]:
        """The operation by name alone, for a model with these parameters. A parameter that fits no pattern of ``only``
        is copied from the first source (the base, if there is one)."""
        layers = {name: found[0].index for name in names if (found := layer_of(name)) is not None}
        last = max(layers.values(), default=0)

        def operation(name: str) -> Combination:
            if only and not any(fnmatchcase(name, pattern) for pattern in only):
                return Copied(0)
            return self.operation(name, layers[name] / last if name in layers and last else None)

        return operation


def assigned(
    sources: Sequence[str | os.PathLike[str]],
    method: str,
    options: MethodOptions,
    base: str | os.PathLike[str] | None,
    masks: Sequence[str | os.PathLike[str]],
    recipe: str | os.PathLike[str] | MergeFile | None,
) -> Assignment:
    """The assignment that a merge's arguments ask for.

    Raises
    ------
    BadArgument
        For arguments that contradict each other, and what `operations` raises.
    SpecError
        For a merge file that is refused.
    """
    if recipe is not None:
        if sources or base is not None or masks or options != MethodOptions():
            raise BadArgument("a merge file names its sources and methods itself; give it alone")
        return _by_recipe(recipe if isinstance(recipe, MergeFile) else load_recipe(recipe))
    if not sources:
        raise BadArgument("there is nothing to merge; name at least one checkpoint")
    paths = [*([] if base is None else [base]), *sources]
    first = len(paths) - len(sources)
    given = [AssignedSource(os.fspath(path), os.fspath(path)) for path in paths]
    given += [AssignedSource(os.fspath(path), os.fspath(path), is_mask=True) for path in masks]
    numbers = Sources(
        tuple(range(first, len(paths))), None if base is None else 0, tuple(range(len(paths), len(given)))
    )
    make = operations(method, numbers, options)
    make(None)  # errors in the options are raised before anything is opened
    weights = resolved_weights(method, len(sources), options) if method in WEIGHTED else None
    return Assignment(tuple(given), first, len(sources), method, weights, lambda name, layer: make(layer))


def _by_recipe(recipe: MergeFile) -> Assignment:
    sources = tuple(AssignedSource(name, path) for name, path in recipe.sources.items())
    return Assignment(sources, 0, len(sources), recipe.file, None, lambda name, layer: recipe.operation(name))
