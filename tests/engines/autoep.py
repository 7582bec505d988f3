"""Mixtral under DeepSpeed's AutoEP, which stacks each rank's experts, and the truth about what all ranks hold.

A stacked tensor is whole along its first axis: the ranks' parts in the order of the expert-parallel ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from tests.engines import packing, truth
from tests.engines.configs import Case, make_config
from tests.engines.models import LLAMA_VOCABULARY
from tests.engines.resume import continue_training
from tests.engines.runs import CLIENT_STATE, FURTHER, STEPS, Run
from tests.engines.truth import Truth
from tests.engines.zygote import resolve

EXPERTS = 4
PRELOAD = ("transformers.models.mixtral.modeling_mixtral", "ucp.deepspeed")


@dataclass(frozen=True)
class AutoCase:
    """A case of model "llama" (its batches, its loss) whose model is of this family with its experts over ``ep`` ranks;
    0: without AutoEP."""

    case: Case
    ep: int = 1
    frozen: bool = False  # one of each layer's stacks is not trained
    family: str = "mixtral"
    tp: int = (
        1  # slices of the attention; the experts are spread over all ranks, and the case's dp counts those of data
    )

    def but(self, **changes: Any) -> AutoCase:
        return replace(self, case=self.case.but(**changes))

    @property
    def label(self) -> str:
        family = "" if self.family == "mixtral" else f"-{self.family}"
        tp = f"-tp{self.tp}" if self.tp > 1 else ""
        return f"{self.case.label}-autoep{self.ep}{tp}" + "-frozen" * self.frozen + family

    @property
    def world_size(self) -> int:
        return self.case.dp * self.tp


def mixtral(seed: int) -> nn.Module:
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(seed)
    config = MixtralConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=EXPERTS,
        num_experts_per_tok=2,
        vocab_size=LLAMA_VOCABULARY,
        max_position_embeddings=32,
        attn_implementation="eager",
    )
    return MixtralForCausalLM(config)


_SIZES = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": LLAMA_VOCABULARY,
    "max_position_embeddings": 32,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 8,
    "attn_implementation": "eager",
}
_HEADS = {"num_key_value_heads": 4, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 4, "qk_rope_head_dim": 4}
_DEEPSEEK = {"n_routed_experts": EXPERTS, "n_shared_experts": 1, "first_k_dense_replace": 1, "v_head_dim": 4, **_HEADS}
# Families with shared experts, or with a layer without experts: their class, and sizes of their own.
FAMILIES: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "qwen2_moe": ("Qwen2Moe", {"num_experts": EXPERTS, "shared_expert_intermediate_size": 12}),
    "qwen3_moe": ("Qwen3Moe", {"num_experts": EXPERTS, "head_dim": 4}),
    "deepseek_v2": ("DeepseekV2", {**_DEEPSEEK, "topk_method": "greedy", "n_group": 1, "topk_group": 1}),
    "deepseek_v3": ("DeepseekV3", {**_DEEPSEEK, "n_group": 2, "topk_group": 1}),
}


def of_family(family: str, seed: int) -> nn.Module:
    if family == "mixtral":
        return mixtral(seed)
    import transformers

    kind, sizes = FAMILIES[family]
    torch.manual_seed(seed)
    config = getattr(transformers, f"{kind}Config")(**{**_SIZES, **sizes})
    model: nn.Module = getattr(transformers, f"{kind}ForCausalLM")(config)
    return model


def accept_defaults() -> None:
    """AutoEP asks transformers' registry of recorded outputs with a default, which this release does not take."""
    from transformers.utils import output_capturing

    registry: Any = type(output_capturing._CAN_RECORD_REGISTRY)
    registry.get = lambda self, model, default=None: dict.get(self, str(model.__class__)) or default or {}


def section(case: AutoCase) -> dict[str, Any]:
    """The config's section that switches AutoEP on."""
    if not case.ep:
        return {"enabled": False}
    preset = "qwen3_moe" if case.family == "qwen2_moe" else case.family
    return {"enabled": True, "autoep_size": case.ep, "preset_model": preset, "use_grouped_mm": False}


# transformers' own plan for Mixtral has styles that AutoTP does not know, so the attention alone is cut.
SLICES = {
    "use_default_specs": False,
    "layer_specs": [
        {"patterns": [r".*self_attn.[qkv]_proj.weight$"], "partition_type": "column"},
        {"patterns": [r".*self_attn.o_proj.weight$"], "partition_type": "row"},
    ],
}


def build_engine(case: AutoCase, initialize: str = "deepspeed:initialize", extra: Any = None) -> Any:
    accept_defaults()
    model: Any = of_family(case.family, case.case.seed)
    model.set_experts_implementation("eager")  # torch's grouped product takes no such small ones
    if case.frozen:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(not name.endswith("experts.down_proj"))
    config = make_config(case.case) | {"expert_parallel": section(case)} | dict(extra or {})
    if case.tp > 1:
        config["tensor_parallel"] = {"autotp_size": case.tp, "partition_config": SLICES}
    parameters = [p for p in model.parameters() if p.requires_grad]
    engine, *_ = resolve(initialize)(model=model, config=config, model_parameters=parameters)
    return engine


def gather(engine: Any) -> Truth | None:
    """The truth, on rank 0; None on the others. Collective."""
    placed = dict(stacks(engine.module))
    names = truth.names_of(engine.module)
    slots = list(_slots(engine, names))
    pieces = []
    for slot in slots:
        shift = placed[slot.name][0] * placed[slot.name][1].numel() if slot.name in placed else 0
        pieces += [replace(piece, start=piece.start + shift) for piece in truth.pieces_of(slot)]
    scalars = {
        slot.name: {k: truth.plain(v) for k, v in slot.states.items() if not (torch.is_tensor(v) and v.dim() > 0)}
        for slot in slots
    }
    module = truth.module_weights(engine)
    parts = {name: (placed[name][0], module.pop(name)) for name in placed}
    everyone = packing.gather_object((pieces, scalars, module, parts))
    if everyone is None:
        return None
    tp = max(engine.autotp_size(), 1)
    weights, params = {}, {}
    for name in placed:
        by_rank = {rank: part for _, _, _, held in everyone for rank, part in [held[name]]}
        weights[name] = torch.cat([by_rank[rank] for rank in sorted(by_rank)])
    spread = [p for found in everyone for p in found[0] if p.name in placed]
    params = truth.assembled(_once(spread), {n: t.shape for n, t in weights.items()})
    lanes = [everyone[lane::tp] for lane in range(tp)]
    shards = [
        truth.assembled(
            _once([p for found in lane for p in found[0] if p.name not in placed]),
            {n: t.shape for n, t in lane[0][2].items()},
        )
        for lane in lanes
    ]
    for name in everyone[0][2]:
        weights[name] = _whole(name, [lane[0][2][name] for lane in lanes])
        states = {state: _whole(name, [s[name][state] for s in shards]) for state in shards[0].get(name, {})}
        params |= {name: states} if states else {}
    frozen = {n for n, p in engine.module.named_parameters() if not p.requires_grad}
    truth.check_rounding(params, weights)
    groups = truth.groups_of(engine)
    return Truth(
        params=params,
        scalars=truth.agreed([found[1] for found in everyone]),
        frozen={name: weights[name] for name in sorted(frozen)},
        buffers=truth.buffers_of(engine.module),
        module=weights,
        aliases={},
        groups=tuple({**group, "names": sorted(group["names"])} for group in groups),
        counters={
            "global_steps": int(engine.global_steps),
            "global_samples": int(engine.global_samples) // tp,  # DeepSpeed counts each once for every slice
            "skipped_steps": int(engine.skipped_steps),
        },
        loss_scaler=truth.loss_scaler_of(engine),
        lr_scheduler=None,
    )


def _whole(name: str, shards: list[torch.Tensor]) -> torch.Tensor:
    """The slices of tensor parallelism as one; what is not cut must be the same on all."""
    if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight", "o_proj.weight")):
        return torch.cat(shards, dim=1 if "o_proj" in name else 0) if len(shards) > 1 else shards[0]
    if not all(truth.same(shards[0], shard) for shard in shards):
        raise ValueError(f"{name}: tensor-parallel ranks hold other values of it")
    return shards[0]


def stacks(module: nn.Module) -> Iterator[tuple[str, tuple[int, torch.Size]]]:
    """The stacked tensors: name -> this rank among those that share the experts, and its part's shape."""
    import torch.distributed as dist
    from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer

    for prefix, layer in module.named_modules():
        if isinstance(layer, AutoEPMoELayer):
            for name, parameter in layer.experts.named_parameters():
                shape = torch.Size(getattr(parameter, "ds_shape", parameter.shape))
                yield f"{prefix}.experts.{name}", (dist.get_rank(group=layer.ep_group), shape)


def _slots(engine: Any, names: Mapping[nn.Parameter, str]) -> Iterator[truth.Slot]:
    import torch.distributed as dist

    from tests.engines import moe

    optimizer = engine.optimizer
    if type(optimizer).__name__ != "DeepSpeedZeroOptimizer_Stage3":
        yield from moe.slots(engine, names)
        return
    for params, flat in zip(optimizer.fp16_groups, optimizer.fp32_partitioned_groups_flat, strict=True):
        states = optimizer.optimizer.state.get(flat, {})
        offset = 0
        for param in params:
            share = param.partition_numel()
            start = dist.get_rank(group=param.ds_process_group) * share
            yield truth.Slot(names[param], start, flat, offset, max(min(share, param.ds_numel - start), 0), states)
            offset += share


def _once(pieces: list[truth.Piece]) -> list[truth.Piece]:
    """Without pieces of no elements, of which there may be several at one place."""
    return [piece for piece in pieces if piece.values.numel()]


def train(case: AutoCase, folder: str, initialize: str = "deepspeed:initialize", extra: Any = None) -> Run:
    """Train, save, train on. For ranks."""
    engine = build_engine(case, initialize, extra)
    losses = continue_training(engine, case.case, 0, STEPS, case.tp)
    tag = f"global_step{STEPS}"
    at_save = gather(engine)
    engine.save_checkpoint(folder, tag, client_state=dict(CLIENT_STATE))
    if extra:
        engine.ucp.wait()
    after = continue_training(engine, case.case, STEPS, FURTHER + 1, case.tp)
    return Run(case.case, folder, tag, STEPS, tuple(losses), tuple(after), at_save, gather(engine))


def resume(
    case: AutoCase,
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
    continue_training(engine, case.case, 50, trained, case.tp)
    path, _ = engine.load_checkpoint(folder, tag)
    if path is None:
        raise FileNotFoundError(f"nothing was loaded from {folder}")
    loaded = gather(engine)
    after = continue_training(engine, case.case, STEPS, FURTHER + 1, case.tp)
    return Run(case.case, folder, tag or "", STEPS, (), tuple(after), loaded, gather(engine) if last else None)
