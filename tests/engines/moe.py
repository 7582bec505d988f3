"""Engines with experts, trained and saved by stock DeepSpeed, and the truth about what all their ranks hold.

Names carry an expert's global number. Which rank holds which expert is asked of DeepSpeed's own process groups.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tests.engines import moe_models, packing, releases, truth
from tests.engines.configs import Case, make_config, parameter_groups
from tests.engines.kept import Kept
from tests.engines.pool import RankPool
from tests.engines.resume import continue_training
from tests.engines.runs import CLIENT_STATE, FURTHER, STEPS, Run
from tests.engines.sources import preload_for
from tests.engines.truth import Piece, Truth
from tests.engines.zygote import resolve

INITIALIZE = "ucp.deepspeed:initialize"
SECTION = {"ucp": {"enabled": True, "save": {"format": "universal"}}}
PREFIX = "deepspeed_moe.experts.deepspeed_experts."


@dataclass(frozen=True)
class MoeCase:
    """A case whose model has experts. ep: ranks that share the first layer's experts; later_ep: the second layer's,
    the same by default; frozen: one parameter of every expert is not trained; data_first: neighbouring ranks hold the
    same experts (``use_data_before_expert_parallelism``)."""

    case: Case
    ep: int = 1
    later_ep: int | None = None
    frozen: bool = False
    data_first: bool = False
    experts: int = moe_models.EXPERTS  # of each layer

    def but(self, **changes: Any) -> MoeCase:
        """The same with changes of the case inside."""
        return replace(self, case=self.case.but(**changes))

    @property
    def label(self) -> str:
        parts = [self.case.label, f"ep{self.ep}"]
        parts += [f"ep{self.later_ep}"] if self.later_ep else []
        return "-".join([*parts, *(f for f in ("frozen", "data_first") if getattr(self, f))])


def build_engine(
    case: MoeCase, initialize: str = "deepspeed:initialize", extra: Mapping[str, Any] | None = None
) -> Any:
    """A fresh engine; arguments as for ``tests.engines.build.build_engine``."""
    import torch.distributed as dist
    from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer

    model = moe_models.build(
        seed=case.case.seed,
        ep=case.ep,
        later_ep=case.later_ep or case.ep,
        dp_rank=dist.get_rank(),
        dp=dist.get_world_size(),
        data_first=case.data_first,
        frozen=case.frozen,
        experts=case.experts,
    )
    groups: Any = parameter_groups(case.case, model)
    if case.case.groups == 1:
        groups = groups[0]["params"]  # DeepSpeed makes a group of the experts by itself
    else:
        named = [{**group, "name": f"group{i}"} for i, group in enumerate(groups)]
        groups = [g for g in split_params_into_different_moe_groups_for_optimizer(named) if g["params"]]
    config = make_config(case.case) | {"use_data_before_expert_parallelism": case.data_first} | dict(extra or {})
    engine, *_ = resolve(initialize)(model=model, config=config, model_parameters=groups)
    return engine


def global_names(module: nn.Module) -> dict[str, str]:
    """This rank's local names of experts' parameters and buffers -> those with the expert's global number."""
    import torch.distributed as dist
    from deepspeed.moe.layer import MoE

    out: dict[str, str] = {}
    for layer_name, layer in module.named_modules():
        if not isinstance(layer, MoE):
            continue
        first = dist.get_rank(group=layer.deepspeed_moe.ep_group) * layer.num_local_experts
        for local, expert in enumerate(layer.deepspeed_moe.experts.deepspeed_experts):
            for name in expert.state_dict():
                out[f"{layer_name}.{PREFIX}{local}.{name}"] = f"{layer_name}.{PREFIX}{first + local}.{name}"
    return out


def gather(engine: Any) -> Truth | None:
    """The truth about an engine with experts, on rank 0; None on the others. Collective."""
    renamed = global_names(engine.module)
    names = {p: renamed.get(n, n) for n, p in engine.module.named_parameters()}
    held = list(slots(engine, names))
    pieces = [piece for slot in held for piece in truth.pieces_of(slot)]
    scalars: dict[str, dict[str, Any]] = {}
    for slot in held:
        scalars.setdefault(slot.name, {}).update(
            {k: truth.plain(v) for k, v in slot.states.items() if not (torch.is_tensor(v) and v.dim() > 0)}
        )
    module = {renamed.get(n, n): truth.plain(p.data) for n, p in engine.module.named_parameters()}
    buffers = {renamed.get(n, n): t for n, t in truth.buffers_of(engine.module).items()}
    frozen = {renamed.get(n, n) for n, p in engine.module.named_parameters() if not p.requires_grad}
    groups = _groups(engine, names)
    mine = (pieces, scalars, module, buffers, frozen, groups)
    everyone = packing.gather_object(mine)
    if everyone is None:
        return None
    weights = _joined([found[2] for found in everyone])
    not_trained = set().union(*(found[4] for found in everyone))
    params = truth.assembled(
        _first_of_equal([p for found in everyone for p in found[0]]), {n: t.shape for n, t in weights.items()}
    )
    if params.keys() != weights.keys() - not_trained:
        raise ValueError(f"no rank has masters of {sorted(weights.keys() - not_trained - params.keys())}")
    truth.check_rounding(params, weights)
    first_groups = everyone[0][5]
    return Truth(
        params=params,
        scalars=truth.agreed([found[1] for found in everyone]),
        frozen={name: weights[name] for name in sorted(not_trained)},
        buffers=_joined([found[3] for found in everyone]),
        module=weights,
        aliases={},
        groups=tuple(
            {**group, "names": sorted({n for found in everyone for n in found[5][i]["names"]})}
            for i, group in enumerate(first_groups)
        ),
        counters={key: int(getattr(engine, key)) for key in ("global_steps", "global_samples", "skipped_steps")},
        loss_scaler=truth.loss_scaler_of(engine),
        lr_scheduler=None if engine.lr_scheduler is None else truth.plain(engine.lr_scheduler.state_dict()),
    )


def slots(engine: Any, names: Mapping[nn.Parameter, str]) -> Iterator[truth.Slot]:
    """What this rank holds; at stage 0 everything whole, as others hold it too."""
    optimizer = engine.optimizer
    kind = type(optimizer).__name__
    if kind == "DeepSpeedZeroOptimizer":
        yield from truth.slots_of_stages_1_and_2(optimizer, names)
    elif kind == "BF16_Optimizer":
        yield from truth.slots_of_bf16_optimizer(optimizer, names)
    elif kind == "FP16_UnfusedOptimizer":
        for params, masters in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True):
            for param, master in zip(params, masters, strict=True):
                states = optimizer.optimizer.state.get(master, {})
                yield truth.Slot(names[param], 0, master, 0, master.numel(), states, replica=True)
    elif kind == "FP16_Optimizer":
        for params, flat in zip(optimizer.fp16_groups, optimizer.fp32_groups_flat, strict=True):
            offset = 0
            for param in params:
                states = optimizer.optimizer.state.get(flat, {})
                yield truth.Slot(names[param], 0, flat, offset, param.numel(), states, replica=True)
                offset += param.numel()
    else:
        for group in optimizer.param_groups:
            for param in group["params"]:
                states = optimizer.state.get(param, {})
                yield truth.Slot(names[param], 0, param, 0, param.numel(), states, replica=True)


def _groups(engine: Any, names: Mapping[nn.Parameter, str]) -> list[dict[str, Any]]:
    optimizer = engine.optimizer
    listed = getattr(optimizer, "bit16_groups", None) or getattr(optimizer, "bf16_groups", None)
    listed = listed or getattr(optimizer, "fp16_groups", None) or [g["params"] for g in optimizer.param_groups]
    return [
        {"names": [names[p] for p in params], **{k: truth.plain(v) for k, v in group.items() if k != "params"}}
        for params, group in zip(listed, optimizer.param_groups, strict=True)
    ]


def _joined(by_rank: list[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """All ranks' tensors; what several hold must be the same."""
    out: dict[str, torch.Tensor] = {}
    for held in by_rank:
        for name, tensor in held.items():
            if not truth.same(out.setdefault(name, tensor), tensor):
                raise ValueError(f"{name} differs from rank to rank")
    return out


def _first_of_equal(pieces: list[Piece]) -> list[Piece]:
    """Without the further copies of what several ranks hold whole."""
    out: dict[tuple[str, str, int], Piece] = {}
    for piece in pieces:
        known = out.setdefault((piece.name, piece.state, piece.start), piece)
        if known is not piece and not (piece.replica and truth.same(known.values, piece.values)):
            raise ValueError(f"{piece.name} {piece.state}: two ranks hold it, and differ")
    return list(out.values())


def train(case: MoeCase, folder: str, initialize: str = "deepspeed:initialize", extra: Any = None) -> Run:
    """Train, save, train on. For ranks."""
    engine = build_engine(case, initialize, extra)
    losses = continue_training(engine, case.case, 0, STEPS)
    tag = f"global_step{STEPS}"
    at_save = gather(engine)
    engine.save_checkpoint(folder, tag, client_state=dict(CLIENT_STATE))
    if extra:
        engine.ucp.wait()
    after = continue_training(engine, case.case, STEPS, FURTHER + 1)
    return Run(case.case, folder, tag, STEPS, tuple(losses), tuple(after), at_save, gather(engine))


class MoeSources:
    """Checkpoints of cases, each made once. Treat the folders as read-only."""

    def __init__(
        self,
        pool: RankPool,
        root: Path,
        job: Callable[..., Run] | None = None,
        modules: Callable[[Any, bool], tuple[str, ...]] | None = None,
    ) -> None:
        """job: trains and saves, by default `train`. modules: what its ranks need beforehand, as `preload` says it."""
        self.pool = pool
        self._runs = Kept(root)
        self._job, self._modules = job or train, modules or preload

    def get(self, case: Any, universal: bool = False) -> Run:
        """The run of a case, with rank 0's knowledge; universal: saved by this project in fragments, else natively."""

        def make(folder: str) -> Run:
            how: tuple[Any, ...] = (INITIALIZE, SECTION) if universal else ()
            world, modules = getattr(case, "world_size", case.case.dp), self._modules(case, universal)
            found: Run = self.pool.run(self._job, case, folder, *how, world_size=world, preload=modules)[0]
            return found

        run: Run = self._runs.get((case, universal), make)
        releases.skip_unreadable(run.folder)
        return run

    def copy(self, case: Any, to: Path) -> Path:
        """A copy of the run's folder of one tag, for tests that damage it."""
        run = self.get(case)
        shutil.copytree(run.folder, to)
        return to / run.tag


def preload(case: MoeCase, ours: bool) -> tuple[str, ...]:
    """What ranks need beforehand. ours: they use this project."""
    return (*preload_for(case.case), *(("ucp.deepspeed",) if ours else ()))


def resume(
    case: MoeCase,
    folder: str,
    tag: str | None,
    initialize: str,
    extra: Any = None,
    trained: int = 0,
    last: bool = True,
) -> Run:
    """Load into an engine that may have trained on other data, then train on. last: gather the truth after that, too.
    For ranks."""
    engine = build_engine(case, initialize, extra)
    continue_training(engine, case.case, 50, trained)
    path, found = engine.load_checkpoint(folder, tag)
    if path is None:
        raise FileNotFoundError(f"nothing was loaded from {folder}")
    for key, value in CLIENT_STATE.items():
        if found.get(key) != value:
            raise ValueError(f"client state {key!r}: {found.get(key)!r} instead of {value!r}")
    loaded = gather(engine)
    after = continue_training(engine, case.case, STEPS, FURTHER + 1)
    return Run(case.case, folder, tag or "", STEPS, (), tuple(after), loaded, gather(engine) if last else None)


def refuse(case: MoeCase, folder: str, tag: str | None) -> tuple[str, str, list[str]]:
    """Load where that is to be refused: the error's class, its text, and what of the engine it changed (rank 0)."""
    from ucp.errors import UcpError

    engine = build_engine(case, INITIALIZE, {"ucp": {"enabled": True}})
    before = gather(engine)
    try:
        engine.load_checkpoint(folder, tag)
    except UcpError as error:
        after = gather(engine)
        changed = [] if before is None or after is None else truth.compare(before, after)
        return type(error).__name__, error.whole.removeprefix("rank 0: "), changed
    return "", "", []
