"""What only pipelines have in a native checkpoint: which stage holds what, and the layer files.

Sources: ``runtime/pipe/module.py`` (``_build``, ``_partition_layers``, ``ckpt_layer_path``, ``save_state_dict``,
``load_state_dir``). Neither a layout nor names tell how a PipelineModule splits its layers, so the target's config says
it, under DeepSpeed's own key ``pipeline``: ``{"partition": [0, 4, 8], "tied": {"embed": [0, 7]}}``, what the engine has
as ``engine.module.parts``, and the layers of each tied module.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from ucp.catalog import Catalog, ParameterInfo
from ucp.errors import BadArgument, Unsupported
from ucp.formats.deepspeed.experts import expert_of
from ucp.formats.shared.schedulers import of_groups
from ucp.formats.shared.torch_files import FileBuilder
from ucp.parallel.mesh import Layout
from ucp.storage.torch_pt.pickler import Placeholder
from ucp.transfer.targets import TargetFile

_TIED = "tied_modules"
_EXAMPLE = '"pipeline": {"partition": [0, 4, 8], "tied": {"embed": [0, 7]}}'


@dataclass(frozen=True)
class Stages:
    """A split. bounds: the first layer of each stage, and at the end the number of layers. tied: each tie's layers."""

    bounds: tuple[int, ...]
    tied: Mapping[str, tuple[int, ...]]

    @property
    def layers(self) -> range:
        return range(self.bounds[-1])

    def key(self, name: str, stage: int) -> tuple[int, int] | None:
        """Where a stage's module has this name, in ``parameters()``' order: tied modules come first, each at its first
        layer in the stage, then layers by number. None where the stage does not hold it."""
        held = range(self.bounds[stage], self.bounds[stage + 1])
        first, _, rest = name.partition(".")
        if first == _TIED:
            layers = [layer for layer in self.tied[rest.partition(".")[0]] if layer in held]
            return (0, min(layers)) if layers else None
        return (1, int(first)) if int(first) in held else None


def is_name(name: str) -> bool:
    """Whether a pipeline's parameter may have this name."""
    first = name.partition(".")[0]
    return first == _TIED or first.isdigit()


def stages(raw: Mapping[str, Any], layout: Layout) -> Stages | None:
    """The split that the config gives; None if it gives none and there is only one stage.

    Raises BadArgument if the config does not give the split, or gives an impossible one.
    """
    section = raw.get("pipeline")
    section = section if isinstance(section, Mapping) else {}
    bounds, tied = section.get("partition"), section.get("tied", {})
    if layout.pp == 1 and not (isinstance(bounds, list) and len(bounds) == 2):
        return None  # a pipeline of one stage loads the plain form as well
    if not isinstance(bounds, list):
        raise BadArgument(
            f"layout '{layout}': the DeepSpeed config does not say which layers each stage has; give what the engine "
            f"has as engine.module.parts, and the layers of its tied modules, such as {_EXAMPLE}"
        )
    rising = all(type(b) is int for b in bounds) and all(a <= b for a, b in pairwise(bounds))
    if not rising or len(bounds) != layout.pp + 1 or bounds[0] != 0:
        raise BadArgument(
            f"the DeepSpeed config's pipeline partition is {bounds}, where pp={layout.pp} needs {layout.pp + 1} rising "
            f"numbers from 0 to the number of layers, such as {_EXAMPLE}"
        )
    if layout.zero > 1:
        raise BadArgument(f"layout '{layout}': DeepSpeed's pipelines work with ZeRO stages 0 and 1 only")
    return Stages(tuple(bounds), _tied(tied, bounds[-1]))


def _tied(section: Any, count: int) -> dict[str, tuple[int, ...]]:
    if not isinstance(section, Mapping) or not all(
        isinstance(layers, list) and layers and all(type(n) is int and 0 <= n < count for n in layers)
        for layers in section.values()
    ):
        raise BadArgument(
            f"the DeepSpeed config's tied layers are {section!r}; give a list of layers below {count} for each tie, "
            f"such as {_EXAMPLE}"
        )
    return {str(tie): tuple(layers) for tie, layers in section.items()}


def check_names(catalog: Catalog, stages: Stages) -> None:
    """Raise BadArgument for a tied module whose layers are not given, Unsupported for a name that no pipeline has."""
    for name in catalog.parameters:
        _check_name(name, stages)


def _check_name(name: str, stages: Stages) -> None:
    first, _, rest = name.partition(".")
    tie = rest.partition(".")[0]
    if first == _TIED and tie not in stages.tied:
        raise BadArgument(
            f"'{name}' lies in the tied module '{tie}', and the DeepSpeed config does not say which layers that is; "
            f"give them, such as {_EXAMPLE}"
        )
    if first != _TIED and not (first.isdigit() and int(first) in stages.layers):
        raise Unsupported(
            f"'{name}' is no name of a pipeline of {len(stages.layers)} layers, whose parameters are called "
            "'{layer}.…' or 'tied_modules.{tie}.…'; give a spec (spec=, --spec) whose names: tell what is what"
        )


def share(catalog: Catalog, stages: Stages, stage: int) -> Catalog:
    """A stage's own parameters, in its module's order. A stage without experts has no param group of them.

    Raises Unsupported for another param group without any: DeepSpeed drops such a group, and hangs where stages differ
    in it.
    """
    keys = {name: key for name in catalog.parameters if (key := stages.key(name, stage)) is not None}
    state = catalog.training_state
    groups = []
    held = []
    for index, group in enumerate(state.param_groups):
        names = sorted((name for name in group.names if name in keys), key=keys.__getitem__)
        if not names and all(map(expert_of, group.names)):
            continue
        held.append(index)
        if not names:
            raise Unsupported(
                f"param group {index} has no parameter on pipeline stage {stage}, and DeepSpeed needs all groups on "
                "every stage; choose another partition"
            )
        groups.append(replace(group, names=tuple(names)))
    return replace(
        catalog,
        parameters={n: replace(catalog.parameters[n], aliases=()) for n in sorted(keys, key=keys.__getitem__)},
        tensors={key: tensor for key, tensor in catalog.tensors.items() if key[0] in keys},
        training_state=replace(
            state,
            param_groups=tuple(groups),
            lr_scheduler=of_groups(state.lr_scheduler, len(state.param_groups), held),
        ),
    )


def layer_files(
    catalog: Catalog,
    stages: Stages,
    weight: Callable[[FileBuilder, ParameterInfo], Placeholder],
    suffix: str = "",
    stage: int | None = None,
) -> list[TargetFile]:
    """A file for every layer, empty ones for those without tensors: loading a module without any needs one, too.

    weight: a parameter or buffer as the module holds it. suffix: in the files' names, of a tensor-parallel rank. stage:
    only its layers; None for all.
    """
    layers = stages.layers if stage is None else range(stages.bounds[stage], stages.bounds[stage + 1])
    of_layer: dict[int, list[tuple[str, ParameterInfo]]] = {layer: [] for layer in layers}
    for name, info in catalog.parameters.items():
        first, _, rest = name.partition(".")
        if first == _TIED:
            tie, _, key = rest.partition(".")
            for layer in stages.tied[tie]:
                if layer in layers:
                    of_layer[layer].append((key, info))
        else:
            of_layer[int(first)].append((rest, info))
    return [_layer_file(catalog, layer, held, weight, suffix) for layer, held in of_layer.items()]


def _layer_file(
    catalog: Catalog,
    layer: int,
    held: Sequence[tuple[str, ParameterInfo]],
    weight: Callable[[FileBuilder, ParameterInfo], Placeholder],
    suffix: str,
) -> TargetFile:
    file = FileBuilder(f"layer_{layer:02d}{suffix}-model_states.pt", catalog)
    return file.finish(OrderedDict((key, weight(file, info)) for key, info in held))
