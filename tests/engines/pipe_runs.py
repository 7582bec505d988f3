"""Pipelines, and plain modules of the same model: cases, engines, training. The rig of `parallel_runs`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tests.engines import models, pipe_models, sequences
from tests.engines.configs import Case, make_config, parameter_groups
from tests.engines.pipe_truth import gather
from tests.engines.runs import CLIENT_STATE
from tests.engines.zygote import resolve

FURTHER = 3  # steps after the save
PRELOAD = ()


@dataclass(frozen=True)
class PipeCase:
    """A pipeline, or with pp=0 the plain module; ``case`` has the ZeRO stage, the data-parallel degree and all else.

    method: DeepSpeed's partition_method. head_module: the head is the tied module itself, not a function of it.
    topology: with tp=1, use the topology that has an axis for tensor parallelism, too (its files are named otherwise).
    blocks: how many there are.
    dual: DualPipeV's, of whose stages each rank has two, one from either end.
    shift: the tied module has a parameter that is not tied; declared: the model says that the first copy counts.
    """

    RIG: ClassVar[str] = __name__

    pp: int = 2
    tp: int = 1
    method: str = "uniform"
    head_module: bool = False
    topology: bool = False
    shift: bool = False
    declared: bool = True
    dual: bool = False
    blocks: int = pipe_models.BLOCKS
    case: Case = field(default_factory=lambda: Case(stage=1, dp=1, accumulation=2))

    def but(self, pp: int | None = None, tp: int | None = None, method: str | None = None, **case: Any) -> PipeCase:
        own = {k: v for k, v in (("pp", pp), ("tp", tp), ("method", method)) if v is not None}
        return replace(self, **own, case=self.case.but(**case))  # type: ignore[arg-type]

    @property
    def world_size(self) -> int:
        return max(self.pp, 1) * self.tp * self.case.dp

    @property
    def label(self) -> str:
        parts = [f"pp{self.pp}" if self.pp else "plain"]
        parts += [f"tp{self.tp}"] if self.tp > 1 else []
        parts += [self.method] if self.method != "uniform" else []
        parts += [n for n in ("head_module", "topology", "shift", "dual") if getattr(self, n)]
        return "-".join([*parts, self.case.but(accumulation=1).label])


def build_model(pipe: PipeCase) -> nn.Module:
    """The module before DeepSpeed makes an engine of it."""
    case = pipe.case
    if not pipe.pp:
        return pipe_models.Plain(case.seed, case.frozen, pipe.blocks)
    from deepspeed.pipe import PipelineModule
    from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology

    kind: dict[str, Any] = {"num_stages": pipe.pp}
    group = None
    if pipe.tp > 1 or pipe.topology:
        topology = PipeModelDataParallelTopology(num_pp=pipe.pp, num_mp=pipe.tp, num_dp=case.dp)
        kind = {"topology": topology}
        for ranks in topology.get_axis_comm_lists("model"):
            made = dist.new_group(ranks)
            group = made if dist.get_rank() in ranks else group
    specs = pipe_models.layers(
        case.seed,
        frozen=case.frozen,
        head_module=pipe.head_module,
        shift=pipe.shift,
        group=group,
        blocks=pipe.blocks,
    )
    if pipe.dual:
        from deepspeed.pipe import DualPipeVModule as PipelineModule
    model = PipelineModule(specs, loss_fn=pipe_models.loss, partition_method=pipe.method, **kind)
    if pipe.shift and pipe.declared:
        patterns = [r"tied_modules\.embed\.shift$"]
        model.universal_checkpoint_info = {"pipeline_replicated_parameter_patterns": patterns}
    return model


def build_engine(pipe: PipeCase, section: dict[str, Any] | None = None) -> Any:
    """A fresh engine; with ``section`` (the config's "ucp") one of this project's."""
    model = build_model(pipe)
    groups = parameter_groups(pipe.case, model)
    config = make_config(pipe.case) | ({} if section is None else {"ucp": {"enabled": True, **section}})
    initialize = resolve("deepspeed:initialize" if section is None else "ucp.deepspeed:initialize")
    engine, *_ = initialize(
        model=model, config=config, model_parameters=groups[0]["params"] if len(groups) == 1 else groups
    )
    return engine


def with_sequences(pipe: PipeCase) -> None:
    """Stock DeepSpeed's pipeline over ranks of which two share a sequence."""
    import deepspeed

    mesh = sequences.mesh(2)
    deepspeed.initialize(model=build_model(pipe), config=make_config(pipe.case), mpu=mesh)


def _batches(case: Case, step: int, rank: int) -> Iterator[tuple[Tensor, Tensor]]:
    for micro in range(case.accumulation):
        yield models.batch("odd", step * case.accumulation + micro, rank, case.dp)


def continue_training(engine: Any, pipe: PipeCase, from_step: int, steps: int) -> list[float]:
    """Run ``steps`` optimizer steps; the losses, averaged over the global batch. Collective."""
    case = pipe.case
    rank = dist.get_rank(engine.seq_data_parallel_group)
    losses = []
    for step in range(from_step, from_step + steps):
        if pipe.pp:
            losses.append(engine.train_batch(_batches(case, step, rank)).item())
            continue
        total = torch.zeros((), dtype=torch.float64)
        for tokens, labels in _batches(case, step, rank):
            loss = engine(tokens, labels)
            engine.backward(loss)
            engine.step()
            total += loss.detach().double()
        dist.all_reduce(total)
        losses.append(total.item() / (case.dp * case.accumulation))
    return losses


def client_state(pipe: PipeCase) -> dict[str, Any]:
    """What is given to the save."""
    return dict(CLIENT_STATE)


def split(pipe: PipeCase) -> list[int]:
    """The first layer of each stage, and the number of layers, as the PipelineModule has it."""
    model: Any = build_model(pipe)
    return [int(layer) for layer in model.parts]


__all__ = ["FURTHER", "PRELOAD", "PipeCase", "build_engine", "client_state", "continue_training", "gather", "split"]
