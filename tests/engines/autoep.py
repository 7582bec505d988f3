"""Mixtral under DeepSpeed's AutoEP, which stacks each rank's experts, and the truth about what all ranks hold.

A stacked tensor is whole along its first axis: the ranks' parts in the order of the expert-parallel ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from tests.engines import truth
from tests.engines.configs import Case, make_config
from tests.engines.models import LLAMA_VOCABULARY
from tests.engines.resume import continue_training
from tests.engines.runs import CLIENT_STATE, FURTHER, STEPS, Run
from tests.engines.truth import Truth
from tests.engines.zygote import resolve

EXPERTS = 4


@dataclass(frozen=True)
class AutoCase:
    """A case of model "llama" (its batches, its loss) whose model is of this family with its experts over ``ep`` ranks;
    0: without AutoEP."""

    case: Case
    ep: int = 1
    frozen: bool = False  # one of each layer's stacks is not trained
    family: str = "mixtral"

    def but(self, **changes: Any) -> AutoCase:
        return replace(self, case=self.case.but(**changes))

    @property
    def label(self) -> str:
        family = "" if self.family == "mixtral" else f"-{self.family}"
        return f"{self.case.label}-autoep{self.ep}" + "-frozen" * self.frozen + family


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


def build_engine(case: AutoCase, initialize: str = "deepspeed:initialize", extra: Any = None) -> Any:
    accept_defaults()
    model: Any = of_family(case.family, case.case.seed)
    model.set_experts_implementation("eager")  # torch's grouped product takes no such small ones
    if case.frozen:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(not name.endswith("experts.down_proj"))
    config = make_config(case.case) | {"expert_parallel": section(case)} | dict(extra or {})
    parameters = [p for p in model.parameters() if p.requires_grad]
    engine, *_ = resolve(initialize)(model=model, config=config, model_parameters=parameters)
    return engine


def gather(engine: Any) -> Truth | None:
    """The truth, on rank 0; None on the others. Collective."""
    import torch.distributed as dist

    stacks = dict(_stacks(engine.module))
    names = truth.names_of(engine.module)
    slots = list(_slots(engine, names))
    pieces = []
    for slot in slots:
        shift = stacks[slot.name][0] * stacks[slot.name][1].numel() if slot.name in stacks else 0
        pieces += [replace(piece, start=piece.start + shift) for piece in truth.pieces_of(slot)]
    scalars = {
        slot.name: {k: truth.plain(v) for k, v in slot.states.items() if not (torch.is_tensor(v) and v.dim() > 0)}
        for slot in slots
    }
    module = truth.module_weights(engine)
    parts = {name: (stacks[name][0], module.pop(name)) for name in stacks}
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.gather_object((pieces, scalars, module, parts), everyone if dist.get_rank() == 0 else None)
    if dist.get_rank() != 0:
        return None
    weights = dict(everyone[0][2])
    for name in stacks:
        by_rank = {rank: part for _, _, _, held in everyone for rank, part in [held[name]]}
        weights[name] = torch.cat([by_rank[rank] for rank in sorted(by_rank)])
    frozen = {n for n, p in engine.module.named_parameters() if not p.requires_grad}
    params = truth.assembled(
        _once([p for found in everyone for p in found[0]]), {n: t.shape for n, t in weights.items()}
    )
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
        counters={key: int(getattr(engine, key)) for key in ("global_steps", "global_samples", "skipped_steps")},
        loss_scaler=truth.loss_scaler_of(engine),
        lr_scheduler=None,
    )


def _stacks(module: nn.Module) -> Iterator[tuple[str, tuple[int, torch.Size]]]:
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

    optimizer = engine.optimizer
    if type(optimizer).__name__ != "DeepSpeedZeroOptimizer_Stage3":
        yield from truth.slots_of_stages_1_and_2(optimizer, names)
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
    losses = continue_training(engine, case.case, 0, STEPS)
    tag = f"global_step{STEPS}"
    at_save = gather(engine)
    engine.save_checkpoint(folder, tag, client_state=dict(CLIENT_STATE))
    if extra:
        engine.ucp.wait()
    after = continue_training(engine, case.case, STEPS, FURTHER + 1)
    return Run(case.case, folder, tag, STEPS, tuple(losses), tuple(after), at_save, gather(engine))


def resume(case: AutoCase, folder: str, tag: str | None, initialize: str, extra: Any = None, trained: int = 0) -> Run:
    """Load into an engine that may have trained on other data, then train on. For ranks."""
    engine = build_engine(case, initialize, extra)
    continue_training(engine, case.case, 50, trained)
    path, _ = engine.load_checkpoint(folder, tag)
    if path is None:
        raise FileNotFoundError(f"nothing was loaded from {folder}")
    loaded = gather(engine)
    after = continue_training(engine, case.case, STEPS, FURTHER + 1)
    return Run(case.case, folder, tag or "", STEPS, (), tuple(after), loaded, gather(engine))
