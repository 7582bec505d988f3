"""Experts in native checkpoints to be written: what each expert-parallel rank's files hold, and the experts' own files.

The layout is described in `ucp.formats.deepspeed.experts`. An expert-parallel rank has a catalog of its own, with its
experts under their numbers on the rank; the rest of the writer then knows nothing of the others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ucp.catalog import Catalog, ParameterInfo, ParamGroup
from ucp.errors import BadArgument, Unsupported
from ucp.formats.deepspeed.write_files import FileBuilder
from ucp.geometry import numel
from ucp.parallel.mesh import Layout
from ucp.spec.experts import counts, expert_of
from ucp.storage.torchwriter import Placeholder
from ucp.transfer.targets import TargetFile

# moe/utils.py: split_params_into_different_moe_groups_for_optimizer. A larger group of experts is split, in elements.
GROUP_LIMIT = 178956971


def has_experts(catalog: Catalog, layout: Layout) -> bool:
    """Whether the model has experts of DeepSpeed's own layers.

    Raises BadArgument where they cannot be spread over so many ranks, Unsupported for layouts that DeepSpeed has not.
    """
    refuse_stacks(catalog)
    totals = counts(catalog.parameters)
    if not totals:
        if layout.ep > 1:
            raise Unsupported(f"layout '{layout}': the source has no experts of DeepSpeed's own layers to be spread")
        return False
    if layout.zero == 3:
        raise Unsupported(
            f"layout '{layout}': DeepSpeed's own experts do not train at ZeRO stage 3; use zero=0, 1 or 2"
        )
    if layout.tp * layout.pp > 1:
        raise Unsupported(f"layout '{layout}': experts under tensor or pipeline parallelism cannot be written")
    for layer, total in totals.items():
        if total % layout.ep:
            raise BadArgument(
                f"layout '{layout}': the {total} experts of '{layer}' cannot be spread over {layout.ep} ranks"
            )
    return True


def refuse_stacks(catalog: Catalog) -> None:
    """Raise Unsupported for a source whose experts AutoEP stacked."""
    parallel = catalog.training_state.config.get("expert_parallel")
    if isinstance(parallel, Mapping) and parallel.get("enabled"):
        raise Unsupported(
            "the source was trained with AutoEP, whose checkpoints cannot be written in DeepSpeed's forms"
        )


def of_rank(catalog: Catalog, layout: Layout, rank: int) -> Catalog:
    """What an expert-parallel rank holds, under the names that it uses.

    Raises Unsupported where DeepSpeed would group these parameters otherwise than the source does.
    """
    totals = counts(catalog.parameters)
    names: dict[str, str] = {}
    for name in catalog.parameters:
        expert = expert_of(name)
        if expert is None:
            names[name] = name
            continue
        held = totals[expert.layer] // layout.ep
        if expert.number // held == rank:
            names[name] = expert._replace(number=expert.number % held).name
    parameters = {own: replace(catalog.parameters[name], name=own) for name, own in names.items()}
    tensors = {
        (names[name], state): replace(tensor, name=names[name])
        for (name, state), tensor in catalog.tensors.items()
        if name in names
    }
    _check_groups(catalog.training_state.param_groups)
    groups = tuple(_group(group, names, layout) for group in catalog.training_state.param_groups)
    for index, group in enumerate(groups):
        size = sum(numel(parameters[name].shape) for name in group.names)
        if _is_moe(group) and size > GROUP_LIMIT:
            raise Unsupported(
                f"layout '{layout}': param group {index} would hold {size} elements of experts on a rank, and "
                f"DeepSpeed splits groups of more than {GROUP_LIMIT}, which is not written; spread them over more ranks"
            )
    state = replace(catalog.training_state, param_groups=groups)
    return replace(catalog, parameters=parameters, tensors=tensors, training_state=state)


def _is_moe(group: ParamGroup) -> bool:
    return any(expert_of(name) is not None for name in group.names)


def _group(group: ParamGroup, names: Mapping[str, str], layout: Layout) -> ParamGroup:
    own = tuple(names[name] for name in group.names if name in names)
    if not _is_moe(group) or group.options is None:
        return ParamGroup(own, group.options)
    return ParamGroup(own, {**group.options, "moe": True, "name": f"ep_size_{layout.ep}"})


def _check_groups(groups: Sequence[ParamGroup]) -> None:
    """Groups of experts come from one group of the program each, which has but one hyperparameters."""
    seen: list[Mapping[str, Any]] = []
    for index, group in enumerate(groups):
        if not _is_moe(group):
            continue
        if any(expert_of(name) is None for name in group.names):
            raise Unsupported(f"param group {index} holds both experts and others, which DeepSpeed keeps apart")
        options = {k: v for k, v in dict(group.options or {}).items() if k != "name"}
        if options in seen:
            raise Unsupported(
                f"param group {index} of experts has the hyperparameters of another one: DeepSpeed had split a large "
                "group, or layers are spread over different numbers of ranks; such groups are not written"
            )
        seen.append(options)


def files(catalog: Catalog, weight: Callable[[FileBuilder, ParameterInfo], Placeholder]) -> list[TargetFile]:
    """Every expert's file; ``weight`` enters a parameter as the module has it."""
    held: dict[tuple[int, int], list[ParameterInfo]] = {}
    layers = list(counts(catalog.parameters))
    for name, info in catalog.parameters.items():
        expert = expert_of(name)
        if expert is not None:
            held.setdefault((layers.index(expert.layer), expert.number), []).append(info)
    out = []
    for (layer, number), infos in sorted(held.items()):
        file = FileBuilder(f"layer_{layer}_expert_{number}_mp_rank_00_model_states.pt", catalog)
        out.append(file.finish({info.name: weight(file, info) for info in infos}))
    return out
