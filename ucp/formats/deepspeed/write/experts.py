"""Experts in native checkpoints to be written: what each expert-parallel rank's files hold, and the experts' own files.

The layout is described in `ucp.formats.deepspeed.read.experts`. An expert-parallel rank has a catalog of its own, with
its experts under their numbers on the rank, or with its part of AutoEP's stacks; the rest of the writer then knows
nothing of the others.

Beside tensor parallelism ("folding") experts are spread over all ranks in their global order, and not cut. Each file
then says so (``checkpoint/autoep_universal.py: make_folding_metadata``), and DeepSpeed loads no other.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from ucp.catalog import Catalog, LogicalTensor, ParameterInfo, ParamGroup
from ucp.errors import BadArgument, Unsupported
from ucp.formats.deepspeed.experts import Experts, counts, data_ranks, expert_of, ordered
from ucp.formats.shared.torch_files import FileBuilder
from ucp.geometry import numel, restrict
from ucp.parallel.mesh import Layout
from ucp.storage.torch_pt.pickler import Placeholder
from ucp.transfer.targets import TargetFile

# What files say of experts beside tensor parallelism, and the experts' own kind.
FOLDING, ROUTED = "folding", "routed_expert"
# moe/utils.py: split_params_into_different_moe_groups_for_optimizer. A larger group of experts is split, in elements.
GROUP_LIMIT = 178956971
# runtime/engine.py: _get_non_moe_state_dict.
_STACK = re.compile(r"^(?P<layer>(?:.*\.)?experts)\.w[123]$")


@dataclass(frozen=True)
class Spread:
    """How the experts are spread over ranks.

    totals: the number of experts of each layer, in the model's order.
    auto: whether the layers are AutoEP's.
    data_first: whether neighbouring ranks have the same experts.
    """

    totals: Mapping[str, int]
    layout: Layout
    auto: bool
    data_first: bool

    def layer_of(self, name: str) -> str:
        """The layer to whose experts a tensor belongs; '' for other tensors."""
        if self.auto:
            found = _STACK.match(name)
            return found["layer"] if found else ""
        expert = expert_of(name)
        return expert.layer if expert else ""

    def held(self, layer: str) -> int:
        return self.totals[layer] // self.layout.ep

    def data_ranks(self, rank: int) -> range:
        """The ranks that have the experts of an expert-parallel one, by their numbers among all."""
        return data_ranks(rank, self.layout.dp * self.layout.tp, self.layout.ep, self.data_first)

    def folding(self, rank: int, of_slice: int, what: str, group: str, place: tuple[int, int]) -> dict[str, Any]:
        """What a file says of experts beside tensor parallelism; {} if there is none. rank: the expert-parallel one.
        of_slice: the tensor-parallel one. what: the kind of file. group, place: over whom ZeRO cuts what is in it, and
        the partition, of how many."""
        if self.layout.tp == 1:
            return {}
        said = {
            "version": 1,
            "tp_size": self.layout.tp,
            "tp_rank": of_slice,
            "ep_size": self.layout.ep,
            "ep_rank": rank,
            "etp_size": 1,
            "etp_rank": 0,
            "zero_partition_group": group,
            "zero_partition_rank": place[0],
            "zero_partition_count": place[1],
            "dispatch_strategy": "route_full_partition_dispatch",
            "shared_expert_placement": "tp_sharded",
            "family": what,
        }
        return {FOLDING: said}

    def families(self, cut: Sequence[Any], rank: int) -> dict[str, Any]:
        """What an optimizer file of stages 1 and 2 says of its parameters (``_autoep_zero_optimizer_param_families``);
        ``cut``: flat buffers, rank: that of the file, among all."""
        return {
            name: {
                "family": _family(name),
                "zero_partition_group": "edp" if _family(name) == ROUTED else "dense_dp",
                "zero_partition_rank": list(flat.ranks).index(rank),
                "zero_partition_count": len(flat.ranks),
            }
            for flat in cut
            for name in flat.names
        }

    def entries(self, rank: int, data_rank: int) -> dict[str, Any]:
        """What a model file says of the experts. rank: the expert-parallel rank of this one."""
        out: dict[str, Any] = {"num_experts": list(self.totals.values()), "ds_autoep_layers": None}
        if not self.auto:
            return out
        layers = [self._layer(i, layer, rank, data_rank) for i, layer in enumerate(self.totals)]
        patterns = [r".*\.experts\.w[123]$"]
        info = {"universal_checkpoint_version": 0.4, "expert_parameter_patterns": patterns, "ds_autoep_layers": layers}
        place = data_rank // self.layout.tp, self.layout.dp
        folding = self.folding(rank, data_rank % self.layout.tp, "dense", "dense_dp", place)
        return {**out, "ds_autoep_layers": layers, "universal_checkpoint_info": info, **folding}

    def _layer(self, index: int, layer: str, rank: int, data_rank: int) -> dict[str, Any]:
        ep, held, partitioned = self.layout.ep, self.held(layer), self.layout.zero == 3
        placement = [{"rank": r, "experts": list(range(r * held, (r + 1) * held))} for r in range(ep)]
        return {
            "moe_layer_id": index,
            "module_path": layer.removesuffix("experts").removesuffix("."),
            "num_experts": self.totals[layer],
            "num_local_experts": held,
            "ep_size": ep,
            "expert_placement": {
                "version": 1,
                "num_experts": self.totals[layer],
                "ep_size": ep,
                "ranks": placement,
            },
            "expert_key_prefix": layer,
            "checkpoint_format": "zero3_partitioned" if partitioned else "per_expert_files",
            "checkpoint_format_version": 1 if partitioned else None,
            "ep_group_name": f"ep_size_{ep}",
            "ep_rank": rank,
            "expert_data_parallel_rank": self.data_ranks(rank).index(data_rank),
            "expert_data_parallel_world_size": len(self.data_ranks(rank)),
            "global_expert_start": rank * held,
            "global_expert_end": (rank + 1) * held,
        }


def spread(catalog: Catalog, layout: Layout, raw: Mapping[str, Any]) -> Spread | None:
    """How a layout spreads the model's experts; None for a model without. raw: the target's config.

    Raises BadArgument where they cannot be spread over so many ranks, Unsupported for layouts that DeepSpeed has not.
    """
    auto = is_auto(raw)
    totals = _stacked(catalog) if auto else counts(catalog.parameters)
    if not totals:
        if any((group.options or {}).get("moe") for group in catalog.training_state.param_groups):
            raise Unsupported(
                "AutoEP has stacked the experts of the source, and the target's config doesn't ask for AutoEP "
                "('expert_parallel'), without which DeepSpeed has no place for them"
            )
        if layout.ep > 1:
            raise Unsupported(f"layout '{layout}': the source has no experts of DeepSpeed's own layers to be spread")
        return None
    if not auto and layout.zero == 3:
        raise Unsupported(
            f"layout '{layout}': DeepSpeed's own experts do not train at ZeRO stage 3; use zero=0, 1 or 2"
        )
    if auto and layout.tp > 1 and (layout.pp > 1 or layout.ep == 1):
        raise Unsupported(
            f"layout '{layout}': DeepSpeed's AutoEP takes tensor parallelism with ep > 1 and without pipeline "
            "parallelism only"
        )
    for layer, total in totals.items():
        if total % layout.ep:
            raise BadArgument(
                f"layout '{layout}': the {total} experts of '{layer}' cannot be spread over {layout.ep} ranks"
            )
    found = Spread(totals, layout, auto, bool(raw.get("use_data_before_expert_parallelism")))
    frozen = [n for n, info in catalog.parameters.items() if info.kind == "frozen" and found.layer_of(n)]
    if auto and layout.zero == 3 and frozen:
        raise Unsupported(f"layout '{layout}': DeepSpeed keeps no frozen stack of experts ('{frozen[0]}') at stage 3")
    return found


def check_order(catalog: Catalog, how: Spread) -> None:
    """Raise Unsupported where the target has its parameters in another order than the source, and files don't tell."""
    if how.auto != is_auto(catalog.training_state.config):
        raise Unsupported(
            f"the source was trained {'without' if how.auto else 'with'} AutoEP, and the target's config is "
            f"{'with' if how.auto else 'without'}: DeepSpeed's own files know parameters by their order, which AutoEP "
            "changes as it finds them; use --to universal, which the ucp plugin loads into either"
        )


def is_auto(raw: Mapping[str, Any]) -> bool:
    """Whether a config asks for AutoEP."""
    parallel = raw.get("expert_parallel")
    return isinstance(parallel, Mapping) and bool(parallel.get("enabled"))


def _family(name: str) -> str:
    """As ``runtime/engine.py: _autoep_param_family`` has it."""
    kinds = {".experts.": ROUTED, ".router.": "router_gate_replicated", ".shared_experts": "shared_expert"}
    return next((family for part, family in kinds.items() if part in name), "dense")


def _stacked(catalog: Catalog) -> dict[str, int]:
    out: dict[str, int] = {}
    for name, info in catalog.parameters.items():
        found = _STACK.match(name)
        if found and info.shape:
            out[found["layer"]] = info.shape[0]
    return out


def with_ep(raw: Mapping[str, Any], layout: Layout, given: bool) -> dict[str, Any]:
    """The target's config with AutoEP's number of ranks; raises BadArgument where the one given has another."""
    parallel = raw.get("expert_parallel")
    if not isinstance(parallel, Mapping) or not parallel.get("enabled"):
        return dict(raw)
    if given and parallel.get("autoep_size", 1) != layout.ep:
        raise BadArgument(
            f"the config given spreads experts over {parallel.get('autoep_size', 1)} ranks ('autoep_size'), the layout "
            f"over {layout.ep}; change one of them"
        )
    return {**raw, "expert_parallel": {**parallel, "autoep_size": layout.ep}}


def refuse_stacks(catalog: Catalog) -> None:
    """Raise Unsupported for a source whose experts AutoEP stacked."""
    if is_auto(catalog.training_state.config):
        raise Unsupported("the source was trained with AutoEP, which has no place in this form; use --to universal")


def of_rank(catalog: Catalog, how: Spread, rank: int) -> Catalog:
    """What an expert-parallel rank holds, under the names that it uses.

    Raises Unsupported where DeepSpeed would group these parameters otherwise than the source does.
    """
    names: dict[str, str] = {}
    for name in catalog.parameters:
        expert = expert_of(name)
        if how.auto or expert is None:
            names[name] = name
        elif expert.number // how.held(expert.layer) == rank:
            names[name] = expert._replace(number=expert.number % how.held(expert.layer)).name
    parameters = {own: replace(catalog.parameters[name], name=own) for name, own in names.items()}
    tensors = {
        (names[name], state): replace(tensor, name=names[name])
        for (name, state), tensor in catalog.tensors.items()
        if name in names
    }
    if how.auto:
        for key, tensor in tensors.items():
            if how.layer_of(key[0]):
                tensors[key] = rank_rows(tensor, how.held(how.layer_of(key[0])), rank)
                parameters[key[0]] = replace(parameters[key[0]], shape=tensors[key].shape)
    _check_groups(catalog.training_state.param_groups, how)
    groups = tuple(_group(group, names, how) for group in catalog.training_state.param_groups)
    for index, group in enumerate(groups):
        size = sum(numel(parameters[name].shape) for name in group.names)
        if _is_moe(group, how) and size > GROUP_LIMIT:
            raise Unsupported(
                f"layout '{how.layout}': param group {index} would hold {size} elements of experts on a rank, and "
                f"DeepSpeed splits groups of more than {GROUP_LIMIT}, which is not written; spread them over more ranks"
            )
    state = replace(catalog.training_state, param_groups=groups)
    return replace(catalog, parameters=parameters, tensors=tensors, training_state=state)


def rank_rows(tensor: LogicalTensor, held: int, rank: int) -> LogicalTensor:
    """A rank's part of a stack of experts, of which each holds ``held``."""
    shape = (held, *tensor.shape[1:])
    stack = [range(r * held, (r + 1) * held) for r in range(tensor.shape[0] // held)]
    outer = Experts(stacks={tensor.name: stack}).place(tensor.name, shape, rank).blocks
    blocks, index = restrict(tensor.blocks, outer, shape)
    return replace(tensor, shape=shape, blocks=blocks, bases=tensor.bases[index], digest=None)


def _is_moe(group: ParamGroup, how: Spread) -> bool:
    return any(how.layer_of(name) for name in group.names)


def _group(group: ParamGroup, names: Mapping[str, str], how: Spread) -> ParamGroup:
    own = tuple(ordered([names[name] for name in group.names if name in names]))
    if not _is_moe(group, how) or group.options is None:
        return ParamGroup(own, group.options)
    return ParamGroup(own, {**group.options, "moe": True, "name": f"ep_size_{how.layout.ep}"})


def _check_groups(groups: Sequence[ParamGroup], how: Spread) -> None:
    """Each group of experts comes from one group of the program, so no two have the same hyperparameters."""
    seen: list[Mapping[str, Any]] = []
    for index, group in enumerate(groups):
        if not _is_moe(group, how):
            continue
        if not all(how.layer_of(name) for name in group.names):
            raise Unsupported(f"param group {index} holds both experts and others, which DeepSpeed keeps apart")
        options = {k: v for k, v in dict(group.options or {}).items() if k != "name"}
        if options in seen:
            raise Unsupported(
                f"param group {index} of experts has the hyperparameters of another one: DeepSpeed had split a large "
                "group, or layers are spread over different numbers of ranks; such groups are not written"
            )
        seen.append(options)


def of_stage(share: Catalog, how: Spread, stage: int) -> Spread | None:
    """How a pipeline's stage spreads its own experts; None if it has none. share: what the stage holds.

    Raises Unsupported for a stage without experts where DeepSpeed trains no such: under AutoEP, which finds none there,
    and with ZeRO, under which its ranks wait for the others' at the gradients' norm.
    """
    held = {how.layer_of(name) for name in share.parameters}
    totals = {layer: total for layer, total in how.totals.items() if layer in held}
    if not totals and (how.auto or how.layout.zero):
        raise Unsupported(
            f"layout '{how.layout}': stage {stage} would have no experts, and others some, which DeepSpeed trains with "
            "its own layers of experts and at ZeRO stage 0 only; choose another partition"
        )
    return replace(how, totals=totals) if totals else None


def in_stage(share: Catalog, how: Spread, source: Catalog) -> Catalog:
    """What a pipeline's stage holds, as AutoEP has it: its routers under their second names, too, and in the source's
    place among the parameters.

    A program that gives DeepSpeed a list of parameters finds AutoEP's new ones at its end, one that gives a generator
    finds them where the old ones were (``runtime/engine.py: _remap_param_groups_after_module_replacement``).

    Raises Unsupported where the source does not tell which of the two it is.
    """
    if not how.auto:
        return share
    prefixes = tuple(f"{layer.removesuffix('experts')}router." for layer in how.totals)
    parameters = dict(share.parameters)
    for name, info in parameters.items():
        if name.startswith(prefixes):
            parameters[name] = replace(info, aliases=source.parameters[name].aliases)
    groups = list(share.training_state.param_groups)
    for index, group in enumerate(groups):
        routers = [name for name in group.names if name.startswith(prefixes)]
        if routers and _at_end(source.training_state.param_groups[index].names):
            groups[index] = replace(group, names=(*(n for n in group.names if n not in routers), *routers))
    state = replace(share.training_state, param_groups=tuple(groups))
    return replace(share, parameters=parameters, training_state=state)


def _at_end(names: Sequence[str]) -> bool:
    """Whether routers come after all other parameters of their stage, in a pipeline's param group."""
    layers = [int(name.partition(".")[0]) for name in names if name.partition(".")[0].isdigit()]
    if layers != sorted(layers):
        return True
    for name, after in pairwise(names):
        if ".router." in name and ".router." not in after and name.partition(".")[0] == after.partition(".")[0]:
            return False
    raise Unsupported(
        "the source's order of parameters does not tell where AutoEP's routers come in a stage's; save with "
        '"ucp": {"save": {"format": "universal"}}, which knows parameters by name'
    )


def files(
    catalog: Catalog, how: Spread, weight: Callable[[FileBuilder, ParameterInfo], Placeholder], number_of: int = 0
) -> list[TargetFile]:
    """Every expert's file; ``weight`` enters a parameter as the module has it. AutoEP has none at stage 3. number_of:
    the model-parallel rank in their names, without tensor parallelism."""
    held: dict[tuple[int, int], dict[str, ParameterInfo]] = {}
    layers = list(how.totals)
    rows: dict[str, LogicalTensor] = {}
    for name, info in catalog.parameters.items():
        layer = how.layer_of(name)
        expert = expert_of(name)
        if layer and how.auto and how.layout.zero < 3:
            for number in range(how.totals[layer]):
                row = rank_rows(catalog.tensors[name, "param"], 1, number)
                own = f"{name}.{number}"
                # One row is a matrix in its file.
                blocks = replace(
                    row.blocks,
                    offsets=row.blocks.offsets[:, 1:],
                    sizes=row.blocks.sizes[:, 1:],
                    strides=row.blocks.strides[:, 1:],
                )
                rows[own] = replace(row, name=own, shape=row.shape[1:], blocks=blocks)
                held.setdefault((layers.index(layer), number), {})[own] = replace(info, name=own, shape=row.shape[1:])
        elif layer and expert:
            held.setdefault((layers.index(layer), expert.number), {})[name] = info
    tensors = {**catalog.tensors, **{(name, "param"): row for name, row in rows.items()}}
    out = []
    with_rows = replace(catalog, tensors=tensors)
    for (layer_id, number), infos in sorted(held.items()):
        rank = number // how.held(layers[layer_id])
        sharing = how.data_ranks(rank)
        for of_slice in sorted({r % how.layout.tp for r in sharing}):
            name = f"layer_{layer_id}_expert_{number}_mp_rank_{number_of + of_slice:02d}_model_states.pt"
            file = FileBuilder(name, with_rows)
            weights = {name: weight(file, info) for name, info in infos.items()}
            out.append(file.finish({**weights, **how.folding(rank, of_slice, ROUTED, "edp", (0, len(sharing)))}))
    return out


def partition_groups(how: Spread, cut: Sequence[Any], data_rank: int) -> list[dict[str, Any]]:
    """What a stage-3 optimizer file says of the ranks over which its subgroups are cut; ``cut``: flat buffers."""
    out = []
    for index, flat in enumerate(cut):
        moe = any(how.layer_of(name) for name in flat.names)
        out.append(
            {
                "sub_group": index,
                "partition_count": len(flat.ranks),
                "partition_rank": list(flat.ranks).index(data_rank),
                "partition_ranks": list(flat.ranks),
                "families": ["autoep_expert" if moe else "replicated"],
                "group_names": [f"ep_size_{how.layout.ep}" if moe else "replicated"],
            }
        )
    return out
