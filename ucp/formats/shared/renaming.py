"""A catalog under other names: a framework's parameters as a spec's own, or the reverse, by the spec's ``names:``.

Only the description changes. What is fused, taken apart, stacked or transposed is still the same bytes of the same
files, with its boxes rearranged. Optimizer states, values such as step counts, and param groups follow their weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ucp.catalog import Catalog, LogicalTensor, ParameterInfo, ParamGroup
from ucp.errors import Mismatch, UcpError, Unsupported
from ucp.geometry import Blocks, Ints, Shape, concat
from ucp.spec.bound import Bound
from ucp.spec.foreign_names import Moves, moves
from ucp.spec.places import padding_name

Transform = Callable[[Blocks], tuple[Blocks, Ints]]


@dataclass(frozen=True)
class _Recipe:
    """A new parameter. sources: the old ones that give something to it, with the shape that each must have and how its
    boxes become boxes of the new one; there is no transform if only the name changes."""

    name: str
    shape: Shape
    sources: tuple[tuple[str, Shape, Transform | None], ...]


def rename(catalog: Catalog, bound: Bound, framework: str, *, to_framework: bool, keep: bool = False) -> Catalog:
    """The catalog with a framework's names in place of the spec's own (``to_framework``), or the reverse.

    keep: parameters that no line under ``names:`` is about keep their names; otherwise they are refused.

    Raises Mismatch where shapes, states or param groups don't fit together, or two parameters get one name; Unsupported
    for tied or padded parameters that would be re-arranged; and what `ucp.spec.foreign_names.moves` raises.
    """
    held = [info for info in catalog.parameters.values() if info.kind != "padding"]
    every = [name for info in held for name in (info.name, *info.aliases)]
    found = moves(bound, framework, every, to_framework=to_framework)
    plain = _Plain(found, bound.spec.file, framework, keep)
    recipes = _recipes(catalog, found, plain)
    parameters: dict[str, ParameterInfo] = {}
    tensors: dict[tuple[str, str], LogicalTensor] = {}
    becomes: dict[str, list[_Recipe]] = {}
    for recipe in recipes.values():
        info, made = _made(catalog, recipe)
        parameters[info.name] = info
        tensors.update({(info.name, tensor.state): tensor for tensor in made})
        for old, _, _ in recipe.sources:
            becomes.setdefault(old, []).append(recipe)
    for name, info in parameters.items():
        if info.aliases:
            parameters[name] = replace(info, aliases=tuple(map(plain.new, info.aliases)))
    state = replace(
        catalog.training_state, param_groups=tuple(_groups(catalog.training_state.param_groups, becomes, plain))
    )
    return replace(
        catalog,
        parameters=parameters,
        tensors=tensors,
        training_state=state,
        copies=tuple(
            _arranged(recipe, [copy]) for copy in catalog.copies for recipe in becomes[copy.name] if len(copy.blocks)
        ),
    )


def best_names(catalog: Catalog, bound: Bound, known: Callable[[str], bool]) -> Catalog:
    """The catalog by the lines under the spec's ``names:``, for the framework and direction that give the most known
    names. The catalog itself, if it has no fewer of them already.

    Raises what `rename` raises, for parameters that don't fit the spec.
    """
    held = [name for info in catalog.parameters.values() for name in (info.name, *info.aliases)]
    best, most = None, sum(map(known, set(held)))
    for framework in bound.spec.names:
        for to_framework in (True, False):
            count = sum(map(known, set(_moved(held, bound, framework, to_framework))))
            if count > most:
                best, most = (framework, to_framework), count
    return catalog if best is None else rename(catalog, bound, best[0], to_framework=best[1], keep=True)


def _moved(held: Sequence[str], bound: Bound, framework: str, to_framework: bool) -> list[str]:
    """What the names become; [] where they can't be those of this side."""
    try:
        found = moves(bound, framework, held, to_framework=to_framework)
    except UcpError:
        return []
    kept = [found.plain.get(name, name) for name in held if name not in found.split]
    return [*kept, *found.joined, *(part.source for made in found.split.values() for part in made.parts)]


@dataclass(frozen=True)
class _Plain:
    """New names for parameters that stay as they are."""

    moves: Moves
    spec: str
    framework: str
    keep: bool

    def new(self, name: str) -> str:
        found = self.moves.plain.get(name)
        if found is None and not self.keep:
            raise Mismatch(f"{self.spec}: no line under names: {self.framework}: is about '{name}'; write one")
        return found or name


def _recipes(catalog: Catalog, found: Moves, plain: _Plain) -> dict[str, _Recipe]:
    """All new parameters, each in the place of the first of the parameters that make it."""
    out: dict[str, _Recipe] = {}
    larger = {part.source: made for made in found.joined.values() for part in made.parts}
    arranged = {*larger, *found.split}
    padded = {padding_name(name): name for name in catalog.parameters}
    for name, info in catalog.parameters.items():
        tied = next((n for n in (name, *info.aliases) if n in arranged), None) if info.aliases else None
        if tied is not None or padded.get(name) in arranged:
            what = f"tied ({', '.join((name, *info.aliases))})" if tied is not None else "padded"
            raise Unsupported(f"{plain.spec}: '{tied or name}' is {what}, and would be re-arranged; that is not done")
        if name in larger:
            made = larger[name]
            if made.name not in out:
                sources = tuple((p.source, p.shape, p.into) for p in made.parts)
                out[made.name] = _Recipe(made.name, made.shape, sources)
            continue
        if name in found.split:
            made = found.split[name]
            new = [_Recipe(p.source, p.shape, ((name, made.shape, p.back),)) for p in made.parts]
        elif name in padded:
            new = [_Recipe(padding_name(plain.new(padded[name])), info.shape, ((name, info.shape, None),))]
        else:
            new = [_Recipe(plain.new(name), info.shape, ((name, info.shape, None),))]
        for recipe in new:
            if recipe.name in out:
                other = out[recipe.name].sources[0][0]
                raise Mismatch(f"{plain.spec}: '{name}' and '{other}' would both be called '{recipe.name}'")
            out[recipe.name] = recipe
    return out


def _made(catalog: Catalog, recipe: _Recipe) -> tuple[ParameterInfo, list[LogicalTensor]]:
    """A new parameter and its tensors."""
    infos = [catalog.parameters[old] for old, _, _ in recipe.sources]
    first = infos[0]
    for info, (_, shape, _) in zip(infos, recipe.sources, strict=True):
        if info.shape != shape:
            raise Mismatch(
                f"'{info.name}' has shape {list(info.shape)}, and '{recipe.name}' is made of one of {list(shape)}: the "
                "spec's sizes are another model's"
            )
        for what, ours, theirs in (
            ("the states", dict(first.states), dict(info.states)),
            ("the values", dict(first.scalars), dict(info.scalars)),
            ("kind", first.kind, info.kind),
        ):
            if ours != theirs:
                raise Mismatch(
                    f"'{recipe.name}' can't be made of '{first.name}', which has {what} {ours}, and '{info.name}', "
                    f"which has {what} {theirs}"
                )
    tensors = [_arranged(recipe, [catalog.tensors[info.name, state] for info in infos]) for state in first.states]
    return replace(first, name=recipe.name, shape=recipe.shape), tensors


def _arranged(recipe: _Recipe, olds: Sequence[LogicalTensor]) -> LogicalTensor:
    """One state of a new parameter, from the same state of all or some of the old ones."""
    by_name = {old: (shape, transform) for old, shape, transform in recipe.sources}
    parts: list[Blocks] = []
    bases: list[Ints] = []
    for old in olds:
        shape, transform = by_name[old.name]
        if transform is None:
            return replace(old, name=recipe.name)
        if old.shape != shape:
            raise Unsupported(
                f"state '{old.state}' of '{old.name}' has shape {list(old.shape)}, not the parameter's {list(shape)}, "
                f"so it can't be re-arranged into '{recipe.name}'"
            )
        blocks, which = transform(old.blocks)
        parts.append(blocks)
        bases.append(old.bases[which])
    return replace(
        olds[0],
        name=recipe.name,
        shape=recipe.shape,
        blocks=concat(parts, len(recipe.shape)),
        bases=np.concatenate(bases),
        digest=None,
    )


def _groups(groups: Sequence[ParamGroup], becomes: Mapping[str, Sequence[_Recipe]], plain: _Plain) -> list[ParamGroup]:
    """The param groups under the new names. Raises Mismatch where one new parameter would lie in two of them."""
    out: list[ParamGroup] = []
    seen: dict[str, int] = {}
    for index, group in enumerate(groups):
        names: dict[str, None] = {}
        for old in group.names:
            names.update(dict.fromkeys([r.name for r in becomes[old]] if old in becomes else [plain.new(old)]))
        for name in names:
            if seen.setdefault(name, index) != index:
                raise Mismatch(f"'{name}' would be made of parameters of param groups {seen[name]} and {index}")
        out.append(replace(group, names=tuple(names)))
    return out
