"""A tensor-parallel rank's own tensors, cut from the whole model's by a spec: what its native files are written from.

Only the description is cut: a slice's boxes lie where the whole tensor's lie, in the source's files.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np

from ucp.catalog import Catalog, LogicalTensor
from ucp.errors import Mismatch, Unsupported
from ucp.formats.deepspeed.write.config import EngineConfig
from ucp.formats.shared.apart import states_apart
from ucp.formats.shared.renaming import best_names
from ucp.geometry import Blocks, concat, numel, restrict
from ucp.parallel.mesh import Layout
from ucp.spec.bound import Bound
from ucp.spec.evaluate import Cutting, shape_of, shard
from ucp.spec.grammar import Expression, Padded, names
from ucp.spec.placement import expression_of, factor_expression
from ucp.spec.places import padding_name
from ucp.spec.select import Choice


def without_padding(catalog: Catalog) -> Catalog:
    """The catalog without what tensor-parallel shards hold beyond parameters' ends."""
    kept = {name: info for name, info in catalog.parameters.items() if info.kind != "padding"}
    if len(kept) == len(catalog.parameters):
        return catalog
    state = catalog.training_state
    groups = (replace(group, names=tuple(n for n in group.names if n in kept)) for group in state.param_groups)
    return replace(
        catalog,
        parameters=kept,
        tensors={key: tensor for key, tensor in catalog.tensors.items() if key[0] in kept},
        training_state=replace(state, param_groups=tuple(groups)),
    )


def spec_of(choice: Choice, layout: Layout, config: EngineConfig) -> Bound | None:
    """The spec that was given, or None. Raises Unsupported if a spec is needed to say how the target is cut."""
    if choice.spec is None and layout.tp == 1:
        return None
    found = choice.bound(None, "autotp" if config.autotp else "megatron")
    if found is None:
        raise Unsupported(
            f"layout '{layout}': nothing says how {layout.tp} tensor-parallel ranks cut the model (a source says it of "
            "its own ranks only); give a spec (spec=, --spec; 'ucp-spec show' lists those at hand)"
        )
    return found


def sliced(
    catalog: Catalog,
    bound: Bound,
    layout: Layout,
    rank: int,
    autotp: bool,
    left_out: Callable[[str], object] = lambda name: False,
) -> Catalog:
    """One tensor-parallel rank's own tensors under the spec's names, padded as wide as the source's are.

    autotp: DeepSpeed cuts the model, and unevenly where it has to. left_out: whether a name is of what no rank cuts, as
    experts.

    Raises SpecError for a parameter without a line and for a cut that can't be; Mismatch where shapes contradict the
    spec.
    """
    rule = "balanced" if autotp else "exact"
    catalog = best_names(catalog, bound, lambda name: bound.find(name) is not None)
    whole = without_padding(catalog)
    parameters, tensors = dict(whole.parameters), dict(whole.tensors)
    factors = states_apart(parameters, parameters)
    for name, info in whole.parameters.items():
        expression = None if left_out(name) else _expression(bound, whole, name, factors.get(name))
        if expression is None:
            continue
        if shape_of(expression, bound.sizes) != info.shape:
            raise Mismatch(
                f"{expression.source.position}: '{expression}' makes '{name}' {list(shape_of(expression, bound.sizes))}"
                f", and the checkpoint has {list(info.shape)}"
            )
        cutting = Cutting({"tp": layout.tp}, rule, padded=padded_widths(catalog, expression, name))
        mine = shard(expression, bound.sizes, cutting, {"tp": rank}, keep_padding=True)
        parameters[name] = replace(info, shape=mine.shape)
        if info.kind == "parameter" and not numel(mine.shape):
            states = {"param": info.states["param"]}
            parameters[name] = replace(info, shape=mine.shape, kind="frozen", states=states, scalars={})
        for state in info.states:
            tensor = _with_padding(catalog, name, state)
            blocks, index = restrict(tensor.blocks, mine.blocks, mine.shape)
            tensors[name, state] = replace(
                tensor, shape=mine.shape, blocks=blocks, bases=tensor.bases[index], digest=None
            )
    kept = {key: tensor for key, tensor in tensors.items() if key[1] in parameters[key[0]].states}
    training_state = whole.training_state
    groups = (
        replace(group, names=tuple(n for n in group.names if parameters[n].kind == "parameter"))
        for group in training_state.param_groups
    )
    training_state = replace(training_state, param_groups=tuple(groups))
    return replace(whole, parameters=parameters, tensors=kept, training_state=training_state)


def _expression(bound: Bound, catalog: Catalog, name: str, of: tuple[str, str] | None) -> Expression | None:
    """What the spec says of a tensor. of: the parameter whose state it is, with some of its axes, and the state."""
    info = catalog.parameters[name]
    if of is None:
        return expression_of(bound, name, info.shape, info.kind == "buffer")
    owner = catalog.parameters[of[0]]
    base = expression_of(bound, owner.name, owner.shape, True)
    return None if base is None else factor_expression(bound, *of, base, [(owner.shape, info.shape)])


def padded_widths(catalog: Catalog, expression: Expression, name: str) -> Mapping[str, int]:
    """The widths of the parameter's padded axes in the source, by the axes' names."""
    padding = catalog.parameters.get(padding_name(name))
    axis = next((a for a in names(expression) if isinstance(a, Padded)), None)
    if padding is None or axis is None:
        return {}
    info = catalog.parameters[name]
    return {axis.name: _joined(info.shape, padding.shape)[_axis(info.shape, padding.shape)]}


def _with_padding(catalog: Catalog, name: str, state: str) -> LogicalTensor:
    """A tensor as wide as all its shards together."""
    tensor, padding = catalog.tensors[name, state], catalog.tensors.get((padding_name(name), state))
    if padding is None:
        return tensor
    k, b = _axis(tensor.shape, padding.shape), padding.blocks
    offsets = b.offsets.copy()
    offsets[:, k] += tensor.shape[k]
    beyond = Blocks(offsets, b.sizes, b.starts, b.strides, b.buffers)
    return replace(
        tensor,
        shape=_joined(tensor.shape, padding.shape),
        blocks=concat([tensor.blocks, beyond], len(tensor.shape)),
        bases=np.concatenate([tensor.bases, padding.bases]),
    )


def _axis(shape: tuple[int, ...], padding: tuple[int, ...]) -> int:
    """The one axis along which a parameter is padded; the last, where padding is as wide as the parameter."""
    return next((k for k in range(len(shape)) if shape[k] != padding[k]), 0)


def _joined(shape: tuple[int, ...], padding: tuple[int, ...]) -> tuple[int, ...]:
    k = _axis(shape, padding)
    return (*shape[:k], shape[k] + padding[k], *shape[k + 1 :])
