"""Engines under tensor parallelism: cases, engines, training. The rig of `parallel_runs`."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import nn

from tests.engines import models, releases, sequences, tp_models
from tests.engines.configs import Case, make_config, parameter_groups
from tests.engines.runs import CLIENT_STATE, FURTHER
from tests.engines.tp_truth import gather
from tests.engines.zygote import resolve


@dataclass(frozen=True)
class TpCase:
    """A tensor-parallel engine; ``case`` has the ZeRO stage, the data-parallel degree and all else.

    kind: 'autotp' (a Llama that DeepSpeed cuts) or 'megatron' (a GPT that cuts itself, with an mpu); the plain module
    with tp=1. kv_heads: of the Llama. info: the GPT says how it is cut. sp: ranks of sequence parallelism, dividing dp.
    """

    RIG: ClassVar[str] = __name__

    kind: str = "autotp"
    tp: int = 2
    kv_heads: int = 2
    info: bool = True
    sp: int = 1
    case: Case = field(default_factory=lambda: Case(stage=1, dp=2))

    def but(self, tp: int | None = None, info: bool | None = None, sp: int | None = None, **case: Any) -> TpCase:
        own = {k: v for k, v in (("tp", tp), ("info", info), ("sp", sp)) if v is not None}
        return replace(self, **own, case=self.case.but(**case))  # type: ignore[arg-type]

    @property
    def world_size(self) -> int:
        return self.tp * self.sp * self.case.dp

    @property
    def label(self) -> str:
        parts = [self.kind] + ([f"kv{self.kv_heads}"] if self.kind == "autotp" and self.kv_heads != 2 else [])
        parts += ["tp" + str(self.tp)] + ([f"sp{self.sp}"] if self.sp > 1 else [])
        parts += ["silent"] if self.kind == "megatron" and not self.info else []
        return "-".join([*parts, self.case.label])


def make_mesh(tp: TpCase, stock: bool = False) -> Any:
    """The engine's ``mpu``, None where it needs none. stock: as for `sequences.mesh`."""
    if tp.sp > 1:
        return sequences.mesh(tp.sp, stock) if tp.tp == 1 else sequences.SlicedSequences(tp.tp, tp.sp)
    return tp_models.Mesh(tp.tp) if tp.kind == "megatron" and tp.tp > 1 else None


def build_model(tp: TpCase, mesh: Any) -> nn.Module:
    """The module before DeepSpeed sees it."""
    if tp.kind == "megatron":
        group = mesh.tp_group if tp.tp > 1 else None
        sequence = mesh.get_sequence_parallel_group() if tp.sp > 1 else None
        return tp_models.Gpt(tp.case.seed, group, tp.info, sequence)
    model = tp_models.llama(tp.case.seed, tp.kv_heads, tp.case.tied)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not (tp.case.frozen and "k_proj" in name))
    return model


def config_of(tp: TpCase) -> dict[str, Any]:
    """The DeepSpeed config of ``tp``, as a new dictionary."""
    config = make_config(tp.case)
    if tp.kind == "autotp" and tp.tp > 1:
        config["tensor_parallel"] = {"autotp_size": tp.tp}
    return config


def build_engine(tp: TpCase, section: dict[str, Any] | None = None) -> Any:
    """A fresh engine; with ``section`` (the config's "ucp") one of this project's."""
    mesh = make_mesh(tp, stock=section is None)
    config = config_of(tp)
    if section is not None:
        config["ucp"] = {"enabled": True, **section}
    with sequences.building(mesh, config):
        model = build_model(tp, mesh)
    if tp.kind == "autotp" and tp.tp > 1:
        model = releases.cut(model, tp.tp, tp.case.dtype)
    groups = parameter_groups(tp.case, model)
    initialize = resolve("deepspeed:initialize" if section is None else "ucp.deepspeed:initialize")
    engine, *_ = initialize(
        model=model,
        config=config,
        mpu=mesh,
        model_parameters=groups[0]["params"] if len(groups) == 1 else groups,
    )
    if tp.kind == "autotp" and tp.tp > 1 and not hasattr(engine, "autotp_size"):
        raise LookupError("this DeepSpeed has no AutoTP for training")
    return engine


def loss_of(engine: Any, tp: TpCase, tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The mean loss over this rank's share of the batch."""
    if tp.kind == "megatron":
        return engine(tokens, labels)
    whole = torch.cat([tokens, labels[:, -1:]], dim=1)
    return engine(input_ids=whole, labels=whole, use_cache=False).loss  # the head may be cut, so the model's own loss


def continue_training(engine: Any, tp: TpCase, from_step: int, steps: int) -> list[float]:
    """Run ``steps`` optimizer steps; the losses, averaged over the global batch. Collective."""
    case = tp.case
    rank, part = divmod(dist.get_rank(engine.seq_data_parallel_group), tp.sp)
    losses = []
    for step in range(from_step, from_step + steps):
        total = torch.zeros((), dtype=torch.float64)
        for micro in range(case.accumulation):
            tokens, labels = models.batch("odd", step * case.accumulation + micro, rank, case.dp)
            if tp.kind == "megatron":  # an even length, of which each rank of sequence parallelism has its part
                tokens, labels = (t[:, :4].chunk(tp.sp, dim=1)[part].contiguous() for t in (tokens, labels))
            loss = loss_of(engine, tp, tokens, labels)
            engine.backward(loss)
            engine.step()
            total += loss.detach().double()
        dist.all_reduce(total)
        losses.append(total.item() * tp.sp / (dist.get_world_size() * case.accumulation))
    return losses


def spec_of(tp: TpCase) -> dict[str, Any]:
    """What tells how AutoTP cuts this Llama where its files do not: the catalogue's spec, and the model's config."""
    config = tp_models.llama(tp.case.seed, tp.kv_heads, tp.case.tied).config.to_dict()  # type: ignore[operator,union-attr]
    return {"spec": "llama", "model_config": config}


def client_state(tp: TpCase) -> dict[str, Any]:
    """What is given to the save."""
    return dict(CLIENT_STATE) | ({"args": dict(tp_models.ARGS)} if tp.kind == "megatron" else {})


PRELOAD = ("transformers.models.llama.modeling_llama",)

__all__ = ["FURTHER", "PRELOAD", "TpCase", "build_engine", "client_state", "continue_training", "gather"]
