"""One model-parallel rank's share of a DeepSpeed checkpoint: its own tensors under its own names.

Without tensor or pipeline parallelism that is the whole checkpoint.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ucp.catalog import LogicalTensor, ParameterInfo, ParamGroup, TrainingState
from ucp.errors import DamagedCheckpoint, Unsupported
from ucp.formats.deepspeed.experts import Experts
from ucp.formats.deepspeed.read import same_run, same_save, stage0, stage3, stage12, stems, swap_files, swapped
from ucp.formats.deepspeed.read.experts import ExpertFiles, OptimFile
from ucp.formats.deepspeed.read.folder import OPTIMIZER_KEYS, Folder, check_ranks, load
from ucp.formats.deepspeed.read.model_files import ModelFile, tied_by_storage
from ucp.formats.deepspeed.read.optimizer_files import same_on_all_ranks
from ucp.formats.deepspeed.writers import default_clipping
from ucp.formats.nouns import ModuleOrder
from ucp.formats.shared.builder import Builder
from ucp.formats.shared.malformed import malformed
from ucp.formats.shared.samples import counted_once
from ucp.storage.torch_pt.values import Standin, TensorRef


@dataclass(frozen=True)
class LocalModel:
    """What was read.

    model: the first data-parallel rank's model file.
    ep: the number of ranks that experts are spread over.
    experts: which tensors are of experts.
    parameters, tensors: with local names and shapes. Only experts have the whole model's names and shapes.
    copies: of experts that several ranks have.
    of_expert_rank: AutoEP's stacks are those of one expert-parallel rank.
    """

    model: ModelFile
    dp: int
    ep: int
    experts: Experts
    zero: int
    parameters: Mapping[str, ParameterInfo]
    tensors: Mapping[tuple[str, str], LogicalTensor]
    training_state: TrainingState
    copies: Sequence[LogicalTensor] = ()
    of_expert_rank: bool = False


def open_models(folder: Folder, trust: bool, skip: bool = False) -> dict[int, ModelFile]:
    """The part's model files by data-parallel rank. skip: leave unknown objects out.

    Raises DamagedCheckpoint if the first rank's is missing.
    """
    if 0 not in folder.model:
        raise DamagedCheckpoint(f"{folder.path}: rank 0's model file '{folder.model_pattern.format(0)}' is missing")
    found = {r: ModelFile(p, load(p, trust, skip)) for r, p in folder.model.items()}
    for model in found.values():
        stems.note_surplus(model.path, sorted(model.client_state.keys() - found[0].client_state.keys(), key=str))
    return found


def read_part(
    folder: Folder,
    models: Mapping[int, ModelFile],
    builder: Builder,
    param_names: Sequence[Sequence[str]] | None,
    experts: ExpertFiles,
) -> LocalModel:
    """Read one model-parallel rank's files. Arguments and errors as for `ucp.formats.deepspeed.read`."""
    with malformed(models[0].path):
        return _read_part(folder, models, builder, param_names, experts)


def _read_part(
    folder: Folder,
    models: Mapping[int, ModelFile],
    builder: Builder,
    param_names: Sequence[Sequence[str]] | None,
    experts: ExpertFiles,
) -> LocalModel:
    path, model = folder.path, models[0]
    dp = int(model.need("dp_world_size"))
    cuts = cut_over(model, folder.partitioned_model)
    _refuse_nameless(folder, model)
    _refuse_zenflow(model)
    if folder.partitioned_model:
        check_ranks("model", folder.model, cuts, path, folder.model_pattern, model.path)
        same_save.check_models({m.path: m.raw for m in models.values()})
    module, buffers = model.module, model.buffers
    shared = {**tied_by_storage({n: r for n, r in module.items() if n not in buffers}), **model.shared}
    shared = _toward_owners(shared, set(_trainable_names(model)))
    aliases = _by_owner(shared)
    first_state: Mapping[str, Any] = {}
    stage = 0
    if model.raw.get("param_shapes") is not None:
        optim = _optimizer_states(folder, models, cuts)
        first_state = optim[0][1]
        stage = same_on_all_ranks("the ZeRO stage", {p: _stage(p, sd) for p, sd in optim.values()})
        if (stage == 3) != folder.partitioned_model:
            raise DamagedCheckpoint(
                f"{optim[0][0]}: was written at ZeRO stage {stage}, but '{model.path.name}' was not; two runs are mixed"
            )
        if stage == 3:
            optim = _with_swap_files(folder, model, optim, [n for n in module if n not in buffers and n not in shared])
            with malformed(path, "what the optimizer files hold"):
                groups = stage3.read(builder, optim, model.param_shapes, aliases, experts)
            stage3.read_frozen(builder, models, aliases)
            swapped.check(builder, swapped.weights_beside(path))
        else:
            facts = stage12.OptimizerContext(_offloads_optimizer(model), _is_round_robin(model, first_state), experts)
            with malformed(path, "what the optimizer files hold"):
                groups = stage12.read(builder, optim, model.param_shapes, aliases, facts)
            same_run.check(builder, module)
    elif isinstance(model.raw.get("optimizer"), Mapping):
        candidates = {n: r for n, r in module.items() if n not in buffers and n not in shared}
        groups = _without_zero(builder, model, candidates, aliases, param_names, experts)
        first_state = model.raw["optimizer"]
    else:
        groups = []
    rest = {n: r for n, r in module.items() if n not in shared and (stage < 3 or n in buffers)}
    _enter_rest(builder, rest, buffers, aliases)
    experts.enter_frozen(builder)
    state, of_rank = training_state(model, groups, first_state, dp), experts.optim_ranks > 0
    found = builder.parameters, builder.tensors, state, builder.copies, of_rank
    return LocalModel(model, dp, experts.ep, experts.experts, stage, *found)


def _enter_rest(
    builder: Builder, module: Mapping[str, TensorRef], buffers: Collection[str], aliases: Mapping[str, list[str]]
) -> None:
    """Enter what the optimizer does not know."""
    for name, ref in module.items():
        if name not in builder.parameters:
            kind = "buffer" if name in buffers else "frozen"
            builder.add(name, kind, [builder.whole(name, "param", ref)], None, aliases.get(name, ()))


def _without_zero(
    builder: Builder,
    model: ModelFile,
    module: Mapping[str, TensorRef],
    aliases: Mapping[str, list[str]],
    param_names: Sequence[Sequence[str]] | None,
    experts: ExpertFiles,
) -> list[ParamGroup]:
    """Enter what stage 0's optimizer updates: of these tensors of the module, and AutoEP's stacks."""
    candidates: dict[str, stage0.Weight] = {**module, **experts.stacked}
    if param_names is not None:  # the caller knows all experts, this part has its rank's
        param_names = _of_rank(param_names, candidates, experts)
    with malformed(model.path, "'optimizer'"):
        return stage0.read(builder, model, candidates, aliases, param_names, experts)


def _of_rank(
    param_names: Sequence[Sequence[str]], candidates: Collection[str], experts: ExpertFiles
) -> list[Sequence[str]]:
    """The names of each group without those of other ranks' experts."""
    held = [[n for n in g if n in candidates or not experts.experts.has(n)] for g in param_names]
    return [g.but(own) if isinstance(g, ModuleOrder) else own for g, own in zip(param_names, held, strict=True)]


def _refuse_nameless(folder: Folder, model: ModelFile) -> None:
    """Raise Unsupported for ZeRO's optimizer files beside a model file that does not name what they hold."""
    if folder.optim and model.raw.get("param_shapes") is None:
        raise Unsupported(
            f"{model.path}: has no 'param_shapes', which say what ZeRO's optimizer files beside it hold, as DeepSpeed "
            "0.16 and before save models with experts; load it with that DeepSpeed, and save it with a newer one or "
            "through ucp.deepspeed"
        )


def _refuse_zenflow(model: ModelFile) -> None:
    """Raise Unsupported for what ZenFlow trained. Columns that it steps by a second optimizer are newer in the model's
    weights than in the masters, and that optimizer's states are in no file (``runtime/zenflow``)."""
    zero = model.config.get("zero_optimization")
    if isinstance(zero, Mapping) and zero.get("zenflow") is not None:
        raise Unsupported(
            f"{model.path}: was saved under ZenFlow ('zero_optimization.zenflow'), whose second optimizer's states are "
            "in no file, and the columns that it steps are older in the masters than in the model's weights; start "
            "from the weights alone (save_16bit_model)"
        )


def of_all_ranks(folders: Sequence[Folder], models: Mapping[int, Mapping[int, ModelFile]]) -> dict[int, OptimFile]:
    """The optimizer files of a stage's tensor-parallel ranks, by global rank: neighbours are of the same slice of the
    data. models: by the folders' numbers."""
    out: dict[int, OptimFile] = {}
    for slice_, folder in enumerate(folders):
        own = models[folder.mp]
        with malformed(own[0].path):
            cuts = cut_over(own[0], folder.partitioned_model)
            found = _optimizer_states(folder, own, cuts)
        out |= {rank * len(folders) + slice_: file for rank, file in found.items()}
    return dict(sorted(out.items()))


def _optimizer_states(folder: Folder, models: Mapping[int, ModelFile], cuts: int) -> dict[int, OptimFile]:
    """Each rank's optimizer file and the state dict in it, all of one save."""
    check_ranks("optimizer", folder.optim, cuts, folder.path, folder.optim_pattern, models[0].path)
    whole = {r: load(folder.optim[r], trust=None, skip=folder.skip) for r in range(cuts)}
    for r, raw in whole.items():
        stems.note_surplus(folder.optim[r], [key for key in raw if key not in OPTIMIZER_KEYS])
    by_path = {folder.optim[r]: raw for r, raw in whole.items()}
    same_save.check_optimizers(by_path, {m.path: m.raw for m in models.values()})
    return {r: (folder.optim[r], _optimizer_state(folder.optim[r], raw)) for r, raw in whole.items()}


def _with_swap_files(
    folder: Folder, model: ModelFile, optim: Mapping[int, tuple[Path, Mapping[str, Any]]], order: Sequence[str]
) -> dict[int, tuple[Path, Mapping[str, Any]]]:
    """The optimizer files with what ZeRO-Infinity keeps beside them, in folders numbered by global rank."""
    parts, groups, dp = int(model.raw.get("mp_world_size") or 1), model.param_shapes, len(optim)
    return {
        r: (path, swap_files.bring_back(path, r * parts + folder.mp, sd, stage3.MASTERS, groups, order, dp))
        for r, (path, sd) in optim.items()
    }


def _by_owner(shared: Mapping[str, str]) -> dict[str, list[str]]:
    """Owner -> its other names."""
    out: dict[str, list[str]] = defaultdict(list)
    for alias, owner in shared.items():
        out[owner].append(alias)
    return out


def cut_over(model: ModelFile, partitioned: bool) -> int:
    """Over how many ranks the model is cut, each of which has files of its own: all data-parallel ones. Under MiCS it
    is cut over the ranks of a shard group only; the first group saves, and the others hold the same.

    partitioned: whether every rank has a model file (stage 3).
    """
    dp, zero = int(model.need("dp_world_size")), model.config.get("zero_optimization")
    shards = int(zero.get("mics_shard_size", -1) or -1) if isinstance(zero, Mapping) else -1
    if shards <= 0:
        return dp
    if not partitioned or int(model.raw.get("mp_world_size") or 1) > 1:
        raise Unsupported(
            f"{model.path}: was saved under MiCS ('mics_shard_size') below stage 3 or together with tensor or pipeline "
            "parallelism, which DeepSpeed does not cut into shard groups"
        )
    if dp % shards:
        raise DamagedCheckpoint(
            f"{model.path}: says that {dp} data-parallel ranks saved, which make no MiCS groups of {shards} "
            "('mics_shard_size')"
        )
    return shards


def _offloads_optimizer(model: ModelFile) -> bool:
    zero = model.config.get("zero_optimization")
    offload = zero.get("offload_optimizer") if isinstance(zero, Mapping) else None
    return isinstance(offload, Mapping) and offload.get("device") in ("cpu", "nvme")


def _is_round_robin(model: ModelFile, optimizer: Mapping[str, Any]) -> bool:
    """Whether a group's parameters lie in the order of ``round_robin_gradients`` (BF16_Optimizer has none)."""
    zero = model.config.get("zero_optimization")
    return isinstance(zero, Mapping) and bool(zero.get("round_robin_gradients")) and "zero_stage" in optimizer


def _trainable_names(model: ModelFile) -> list[str]:
    found = model.raw.get("param_shapes")
    return [str(n) for g in found for n in g] if isinstance(found, (list, tuple)) else []


def _toward_owners(shared: Mapping[str, str], owners: set[str]) -> dict[str, str]:
    """Alias -> owner, with the owner being the name that the optimizer knows."""
    out = {}
    for alias, owner in shared.items():
        if alias in owners and owner not in owners:
            alias, owner = owner, alias
        if alias != owner:
            out[alias] = owner
    return out


def _optimizer_state(path: Path, raw: Mapping[str, Any]) -> Mapping[str, Any]:
    found = raw.get("optimizer_state_dict")
    if not isinstance(found, Mapping):
        raise DamagedCheckpoint(f"{path}: the key 'optimizer_state_dict' is missing; this is no optimizer file")
    return found


def _stage(path: Path, sd: Mapping[str, Any]) -> int:
    """The ZeRO stage. BF16_Optimizer, which is a stage 1, does not write it."""
    found = sd.get("zero_stage", 1)
    with malformed(path, "'zero_stage'"):
        return int(found.value if isinstance(found, Standin) else found)


def training_state(model: ModelFile, groups: list[ParamGroup], optimizer: Mapping[str, Any], dp: int) -> TrainingState:
    config = model.config
    batch = config.get("train_batch_size")
    steps, samples = model.integer("global_steps"), model.integer("global_samples")
    if not isinstance(batch, int) and steps and samples:
        batch = samples // steps
    clip = optimizer.get("clip_grad", config.get("gradient_clipping"))  # stage 3 has it in the config alone
    if clip is None:
        clip = default_clipping(model.raw.get("ds_version"))
    state = TrainingState(
        param_groups=tuple(groups),
        lr_scheduler=model.raw.get("lr_scheduler"),
        loss_scaler=_loss_scaler(optimizer),
        clip_grad=float(clip) if isinstance(clip, (int, float)) else None,
        global_steps=steps,
        global_samples=samples,
        skipped_steps=model.integer("skipped_steps"),
        dp_world_size=dp,
        global_batch_size=batch if isinstance(batch, int) else None,
        extra={k: model.raw[k] for k in ("data_sampler", "random_ltd") if model.raw.get(k) is not None},
        client_state=model.client_state,
        config=config,
    )
    return counted_once(state)


def _loss_scaler(optimizer: Mapping[str, Any]) -> dict[str, Any] | None:
    """The loss scaler's attributes by DeepSpeed's names (``runtime/fp16/loss_scaler.py``), with 'dynamic'."""
    scaler = optimizer.get("loss_scaler")
    if isinstance(scaler, Standin):
        return {k: v for k, v in scaler.state.items() if isinstance(v, (bool, int, float))}
    if "cur_scale" in optimizer:
        keys = ("cur_scale", "cur_iter", "last_overflow_iter", "scale_factor", "scale_window")
        found = {k: optimizer[k] for k in keys if k in optimizer}
        return {"dynamic": bool(optimizer.get("dynamic_loss_scale")), **found}
    return None
