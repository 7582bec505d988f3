"""The model files of a native checkpoint: weights as each stage keeps them, counters, scheduler and client state.

Source of the layout: ``runtime/engine.py: _common_checkpoint_state, _save_checkpoint``.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from ucp.catalog import Catalog, ParameterInfo
from ucp.errors import Unsupported
from ucp.formats.deepspeed.write.config import VERSION, EngineConfig
from ucp.formats.deepspeed.write.experts import Spread
from ucp.formats.deepspeed.write.groups import PARAM, Flat
from ucp.formats.shared.apart import states_apart
from ucp.formats.shared.samples import autotp_size
from ucp.formats.shared.torch_files import FileBuilder, PlaceholderPiece
from ucp.formats.shared.training_state import values_beside
from ucp.geometry import numel
from ucp.parallel import zero
from ucp.parallel.mesh import Layout
from ucp.printable import short
from ucp.storage.torch_pt.pickler import Placeholder
from ucp.storage.torch_pt.values import Size
from ucp.transfer.targets import TargetFile


@dataclass(frozen=True)
class ModelRank:
    """What one model-parallel rank's files hold.

    number: its number in their names.
    catalog: its own tensors, under its own names.
    in_layers: whether its weights are in layer files.
    spread: how the experts are spread over ranks.
    rank: the expert-parallel rank whose experts these are.
    cuts: what the files say of how tensor parallelism cuts the model, a ``universal_checkpoint_info``.
    """

    number: int
    catalog: Catalog
    in_layers: bool = False
    spread: Spread | None = None
    rank: int = 0
    cuts: Mapping[str, Any] | None = None

    def entries(self, data_rank: int) -> dict[str, Any]:
        """What the model file of a data-parallel rank says beside what all have."""
        cuts = {} if self.cuts is None else {"universal_checkpoint_info": self.cuts}
        if self.spread is None:
            return cuts
        found = self.spread.entries(self.rank, data_rank)
        if self.cuts is not None:
            found["universal_checkpoint_info"] = {**self.cuts, **found.get("universal_checkpoint_info", {})}
        return found

    def place(self, rank: int) -> int:
        """A rank's number in the names of its files. With experts, ranks have their numbers among all."""
        return rank if self.spread is None else rank // self.spread.layout.tp

    def is_expert(self, name: str) -> bool:
        """Whether a tensor is an expert's, which model files leave out."""
        return self.spread is not None and bool(self.spread.layer_of(name))


def model_files(share: ModelRank, config: EngineConfig, layout: Layout, cut: Sequence[Flat]) -> list[TargetFile]:
    """One file; at stage 3, where each rank holds its pieces of the frozen parameters, one for every rank."""
    if layout.zero < 3:
        return [model_file(share, config, layout, 0, cut)]
    # Alike as they may be, each has its own name in its archive, by which swapped files are found.
    return [model_file(share, config, layout, rank, cut) for rank in range(layout.dp)]


def model_name(share: ModelRank, layout: Layout, rank: int) -> str:
    prefix = f"zero_pp_rank_{share.place(rank)}_" if layout.zero == 3 else ""
    return f"{prefix}mp_rank_{share.number:02d}_model_states.pt"


def model_file(share: ModelRank, config: EngineConfig, layout: Layout, rank: int, cut: Sequence[Flat]) -> TargetFile:
    catalog = share.catalog
    file = FileBuilder(model_name(share, layout, rank), catalog)
    frozen = [info for info in catalog.parameters.values() if info.kind == "frozen"]
    module = None
    if not share.in_layers:
        make_module = partitioned_module if layout.zero == 3 else whole_module
        module = make_module(file, config, share.is_expert)
    shapes = fragments = None
    if module is not None and layout.zero >= 2:
        shapes = OrderedDict((info.name, Size(info.shape)) for info in frozen)
        # Of a frozen expert DeepSpeed would copy the first rank's into all ranks' own: those come from their files.
        if not any(share.is_expert(info.name) for info in frozen):
            fragments = OrderedDict(
                (info.name, _frozen(file, module, info, layout, share.place(rank))) for info in frozen
            )
    trained = [OrderedDict((n, Size(catalog.parameters[n].shape)) for n in flat.names) for flat in cut]
    return file.finish(
        model_state(
            catalog,
            config,
            layout,
            module=module,
            optimizer=None,
            param_shapes=trained,
            frozen_param_shapes=shapes,
            shared_params=_shared(catalog) if rank == 0 else {},
            frozen_param_fragments=fragments,
            extra=share.entries(rank),
        )
    )


def model_state(
    catalog: Catalog,
    config: EngineConfig,
    layout: Layout,
    *,
    module: Mapping[str, Placeholder] | None,
    optimizer: Any,
    param_shapes: Any,
    frozen_param_shapes: Any,
    shared_params: Any,
    frozen_param_fragments: Any,
    extra: Mapping[str, Any] = MappingProxyType({}),
) -> dict[str, Any]:
    """A model file's content, in the order in which the engine writes it (``_common_checkpoint_state``). Values that
    a state dict had beside the model are client state.

    Raises Unsupported for client state under a key of the engine's own.
    """
    state = catalog.training_state
    apart = states_apart(catalog.parameters, catalog.parameters)
    own = {
        "module": module,
        "buffer_names": [n for n, info in catalog.parameters.items() if info.kind == "buffer" and n not in apart],
        "optimizer": optimizer,
        "param_shapes": param_shapes,
        "frozen_param_shapes": frozen_param_shapes,
        "shared_params": shared_params,
        "frozen_param_fragments": frozen_param_fragments,
        "lr_scheduler": state.lr_scheduler,
        "data_sampler": state.extra.get("data_sampler"),
        "random_ltd": state.extra.get("random_ltd"),
        "skipped_steps": state.skipped_steps or 0,
        "global_steps": state.global_steps or 0,
        "global_samples": (state.global_samples or 0) * autotp_size(config.raw),
        "dp_world_size": layout.dp,
        "mp_world_size": layout.tp * layout.pp,
        "checkpoint_parallel_dimensions": {"pp_degree": layout.pp, "tp_degree": layout.tp},
        "ds_config": dict(config.raw),
        "ds_version": VERSION,
        **extra,
    }
    plain = (bool, int, float, str, type(None))
    client = {
        key: value
        for key, value in state.client_state.items()
        if not (key in own and isinstance(value, plain) and isinstance(own[key], plain) and value == own[key])
    }
    taken = next((key for key in client if key in own), None)
    if taken is not None:
        raise Unsupported(
            f"the client state has the key {short(taken)}, under which DeepSpeed's model file has something of its "
            "own; rename it in the source"
        )
    beside = {key: value for key, value in values_beside(state).items() if key not in own}
    return {**own, **beside, **client}


def whole_module(
    file: FileBuilder, config: EngineConfig, left_out: Callable[[str], bool] = lambda name: False
) -> OrderedDict[str, Placeholder]:
    """The module's state dict with whole weights: trained ones rounded to the engine's type, all others as they are.

    Names of tied parameters share one tensor. left_out: whether a name has no place there, as experts have none.
    """
    module: OrderedDict[str, Placeholder] = OrderedDict()
    apart = states_apart(file.catalog.parameters, file.catalog.parameters)
    for info in file.catalog.parameters.values():
        if left_out(info.name) or info.name in apart:
            continue
        module.update(dict.fromkeys((info.name, *info.aliases), weight(file, config, info)))
    return module


def weight(file: FileBuilder, config: EngineConfig, info: ParameterInfo) -> Placeholder:
    tensor = file.catalog.tensors[info.name, PARAM]
    return file.whole(tensor, config.dtype, round=True) if info.kind == "parameter" else file.whole(tensor)


def partitioned_module(
    file: FileBuilder, config: EngineConfig, left_out: Callable[[str], bool] = lambda name: False
) -> OrderedDict[str, Placeholder]:
    """The same at stage 3: buffers are whole, parameters empty, since their partitions lie elsewhere."""
    module: OrderedDict[str, Placeholder] = OrderedDict()
    nothing = file.tensor((0,), config.dtype)
    for info in file.catalog.parameters.values():
        if left_out(info.name):
            continue
        weight = file.whole(file.catalog.tensors[info.name, PARAM]) if info.kind == "buffer" else nothing
        module.update(dict.fromkeys((info.name, *info.aliases), weight))
    return module


def _frozen(
    file: FileBuilder, module: Mapping[str, Placeholder], info: ParameterInfo, layout: Layout, rank: int
) -> Placeholder:
    """A frozen parameter as this rank's file has it: whole, or at stage 3 the rank's ceil-sized piece."""
    if layout.zero < 3:
        return module[info.name]
    tensor = file.catalog.tensors[info.name, PARAM]
    blocks = zero.ceil_partition(info.shape, 0, layout.dp)
    mine = blocks.take(blocks.buffers == rank).in_buffer(0)
    return file.tensor((zero.ceil_size(numel(info.shape), layout.dp),), tensor.dtype, [PlaceholderPiece(tensor, mine)])


def _shared(catalog: Catalog) -> dict[str, str]:
    """Tied names: alias -> the name that holds the data."""
    return {alias: info.name for info in catalog.parameters.values() for alias in info.aliases}
