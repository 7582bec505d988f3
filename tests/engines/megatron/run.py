"""One rank of a Megatron run: the model, its optimizer, values by hash, two steps, saves and loads."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core import parallel_state as ps
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, apply_factories
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec, get_gpt_layer_local_spec
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

from tests.engines.megatron import cases, transformer_engine
from tests.engines.megatron.cases import Case

STEPS = 2


@dataclass
class Run:
    case: Case
    model: Any  # the bare GPTModel
    wrapped: Any
    optimizer: Any
    scales: bool = False  # whether its modules save what Transformer Engine's have for FP8

    @property
    def content(self) -> dict[str, Any]:
        """What Megatron calls the content of a checkpoint."""
        found: dict[str, Any] = {"singleton_local_shards": False, "chained_optim_avoid_prefix": True}
        if self.case.sharding is not None:
            found["distrib_optim_sharding_type"] = self.case.sharding
        if self.case.per_layer:
            found["non_homogeneous_layers"] = True
        return found

    def state(self, loading: bool = False, **content: Any) -> dict[str, Any]:
        """The sharded state dict of a whole run, as Megatron's training program makes it."""
        metadata = {**self.content, **content}
        model = self.model.sharded_state_dict(metadata=metadata)
        for key, name in self.module_states().items() if self.scales and not loading else ():
            model[key].data = transformer_engine.state(name)
        return {
            "model": model,
            "optimizer": self.optimizer.sharded_state_dict(model, is_loading=loading, metadata=metadata),
            "iteration": STEPS,
            "checkpoint_version": 3.0,
            "opt_param_scheduler": {"max_lr": 1e-3, "lr_warmup_steps": 2, "num_steps": 16, "lr_decay_style": "linear"},
        }

    def module_states(self) -> dict[str, str]:
        """Keys of this rank's state dict for what its modules keep by themselves -> the whole model's names."""
        out = {}
        for name, module in self.model.named_modules():
            if type(module).get_extra_state is torch.nn.Module.get_extra_state:
                continue
            if name.startswith("decoder.layers."):
                _, _, own, rest = name.split(".", 3)
                whole = f"decoder.layers.{self.model.decoder.layers[int(own)].layer_number - 1}.{rest}"
                out[f"{name}._extra_state"] = f"{whole}._extra_state"
        return out

    def check_scales(self, loaded: dict[str, Any], there: bool) -> None:
        """Every module was given its own state, as it was saved; none where there are none."""
        for key, name in self.module_states().items():
            assert transformer_engine.holds(loaded[key], name) if there else loaded[key] is None, key

    def save(self, folder: str, **content: Any) -> None:
        path = os.path.join(folder, f"iter_{STEPS:07d}")
        if dist.get_rank() == 0:
            os.makedirs(path, exist_ok=True)
        dist.barrier()
        dist_checkpointing.save(self.state(**content), path, content_metadata={**self.content, **content})
        if dist.get_rank() == 0:
            with open(os.path.join(folder, "latest_checkpointed_iteration.txt"), "w") as file:
                file.write(str(STEPS))
        dist.barrier()

    def save_with_common_object(self, folder: str, like: str) -> None:
        """As newer releases: what all ranks have in common is an object of the folder's, and there is no common.pt.

        like: a folder that this run has saved.
        """
        name = f"iter_{STEPS:07d}"
        common = torch.load(os.path.join(like, name, "common.pt"), weights_only=False)
        replica = (0, 0, dist.get_rank())
        state = {**self.state(), "common_state": ShardedObject("common_state", common, (1,), (0,), replica)}
        path = os.path.join(folder, name)
        if dist.get_rank() == 0:
            os.makedirs(path)
        dist.barrier()
        dist_checkpointing.save(state, path, content_metadata=self.content)
        if dist.get_rank() == 0:
            os.remove(os.path.join(path, "common.pt"))

    def save_rank_folders(self, folder: str) -> None:
        """As Megatron's training program saves without dist_checkpointing (megatron/training/checkpointing.py)."""
        tp, pp, ep = (
            ps.get_tensor_model_parallel_rank(),
            ps.get_pipeline_model_parallel_rank(),
            ps.get_expert_model_parallel_rank(),
        )
        name = (
            f"mp_rank_{tp:02d}"
            + (f"_{pp:03d}" if self.case.pp > 1 else "")
            + (f"_{ep:03d}" if self.case.ep > 1 else "")
        )
        path = os.path.join(folder, f"iter_{STEPS:07d}", name)
        first = ps.get_expert_data_parallel_rank() == 0
        if first:
            os.makedirs(path, exist_ok=True)
        dist.barrier()
        if self.case.sharding is not None:
            self.optimizer.save_parameter_state(os.path.join(path, "distrib_optim.pt"))
        if first:
            args = {
                "tensor_model_parallel_size": self.case.tp,
                "pipeline_model_parallel_size": self.case.pp,
                "expert_model_parallel_size": self.case.ep,
                "world_size": self.case.world,
                "num_experts": cases.EXPERTS if self.case.kind == "moe" else None,
                "untie_embeddings_and_output_weights": True,
            }
            model = self.model.state_dict_for_save_checkpoint()
            if self.scales:
                model |= {key: transformer_engine.state(name) for key, name in self.module_states().items()}
            state = {
                "args": argparse.Namespace(**args),
                "checkpoint_version": 3.0,
                "iteration": STEPS,
                "model": model,
                "optimizer": self.optimizer.state_dict(),
                "opt_param_scheduler": {"max_lr": 1e-3, "lr_warmup_steps": 2, "num_steps": 16},
            }
            torch.save(state, os.path.join(path, "model_optim_rng.pt"))
        if dist.get_rank() == 0:
            with open(os.path.join(folder, "latest_checkpointed_iteration.txt"), "w") as file:
                file.write(str(STEPS))
        dist.barrier()

    def load(self, folder: str, **content: Any) -> dict[str, Any]:
        """As Megatron's training program loads: everything strictly, into the model and the optimizer."""
        found = dist_checkpointing.load(self.state(loading=True, **content), folder, strict="raise_all")
        self.fill_from(found)
        return found

    def fill_from(self, found: dict[str, Any]) -> None:
        """Give the model and the optimizer a loaded state dict, as Megatron's training program does."""
        self.model.load_state_dict(found["model"], strict=True)
        self.optimizer.load_state_dict(found["optimizer"])
        # Without Transformer Engine, Megatron gives all parameters one and the same tensor as their step, and torch's
        # Adam counts it up once for each of them.
        for one in getattr(self.optimizer, "chained_optimizers", [self.optimizer]):
            for state in one.optimizer.state.values():
                if isinstance(state.get("step"), torch.Tensor):
                    state["step"] = state["step"].clone()

    def local(self) -> Iterator[tuple[ShardedTensor, torch.nn.Parameter]]:
        """Each part of the model that the rank holds, with the parameter that its data are a view of."""
        found = self.model.sharded_state_dict(metadata={**self.content, "non_homogeneous_layers": True})
        apply_factories(found)
        starts = {p.data_ptr(): p for p in self.model.parameters()}
        ordered = sorted(starts)
        for part in parts(found):
            at = part.data.data_ptr()
            owner = starts[max(start for start in ordered if start <= at)]
            yield part, owner

    def fill(self) -> None:
        """Give the weights their values."""
        with torch.no_grad():
            for part, _ in self.local():
                part.data.copy_(hashed("weight", part))
        self.optimizer.reload_model_params()

    def train_step(self, ids: torch.Tensor, labels: torch.Tensor) -> float:
        """A step on a batch; its loss."""
        self.wrapped.zero_grad_buffer()
        self.optimizer.zero_grad()
        length = ids.shape[1]
        mask = torch.triu(torch.ones(length, length, dtype=torch.bool), 1)[None, None]
        loss = (
            self.wrapped(ids, torch.arange(length)[None].expand(len(ids), length), mask, labels=labels).float().mean()
        )
        loss.backward()
        self.wrapped.finish_grad_sync()
        ok, *_ = self.optimizer.step()
        assert ok
        return loss.item()

    def step(self, number: int) -> None:
        """A step of the optimizer with gradients by hash."""
        self.wrapped.zero_grad_buffer()
        self.optimizer.zero_grad()
        with torch.no_grad():
            for part, owner in self.local():
                grad = owner.main_grad
                at = (part.data.data_ptr() - owner.data_ptr()) // part.data.element_size()
                view = grad.as_strided(part.data.shape, part.data.stride(), grad.storage_offset() + at)
                # Experts' gradients are averaged over fewer ranks than the others, by the same number.
                view.copy_(hashed(f"grad {number}", part) * (self.case.ep if ".experts." in part.key else 1))
        self.wrapped.finish_grad_sync()
        ok, *_ = self.optimizer.step()
        assert ok


def _setting_without_step(optimizer: DistributedOptimizer, parameter: Any, tensors: dict[str, Any]) -> None:
    """As Megatron's own, which takes the optimizer to be Transformer Engine's: torch's has a state ``step`` besides,
    which has been loaded by then."""
    kept = optimizer._get_main_param_and_optimizer_states(parameter)
    _SET(optimizer, parameter, {**{k: v for k, v in kept.items() if k == "step"}, **tensors})


_SET = DistributedOptimizer._set_main_param_and_optimizer_states
DistributedOptimizer._set_main_param_and_optimizer_states = _setting_without_step


def parts(value: Any) -> Iterator[ShardedTensor]:
    if isinstance(value, ShardedTensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from parts(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from parts(item)


def hashed(what: str, part: ShardedTensor) -> torch.Tensor:
    lead = part.prepend_axis_num
    sizes = (*[1] * lead, *part.local_shape)
    found = cases.values(what, part.key, part.global_offset, sizes, part.global_shape)
    return torch.from_numpy(found).reshape(part.local_shape)


class PlainAttention(torch.nn.Module):
    """What Transformer Engine does between latent attention's projections: Megatron's own class has no values that are
    narrower than keys."""

    def __init__(self, *, softmax_scale: float, **_: Any) -> None:
        super().__init__()
        self.scale = softmax_scale

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        """(length, batch, heads, width) each; the result has heads and width together."""
        q, k, v = (t.permute(1, 2, 0, 3) for t in (query, key, value))
        made = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.scale)
        return made.permute(2, 0, 1, 3).flatten(2)


def config_of(case: Case) -> TransformerConfig:
    moe, gpt = case.kind == "moe", case.kind == "gpt"
    dtype = torch.bfloat16 if case.bf16 else torch.float32
    return TransformerConfig(
        num_layers=cases.LAYERS,
        hidden_size=cases.HIDDEN,
        num_attention_heads=cases.HEADS,
        num_query_groups=cases.HEADS if gpt else cases.GROUPS,
        ffn_hidden_size=cases.FFN,
        tensor_model_parallel_size=case.tp,
        pipeline_model_parallel_size=case.pp,
        expert_model_parallel_size=case.ep,
        gated_linear_unit=not gpt,
        activation_func=torch.nn.functional.gelu if gpt else torch.nn.functional.silu,
        add_bias_linear=gpt,
        normalization="LayerNorm" if gpt else "RMSNorm",
        bf16=case.bf16,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        use_cpu_initialization=True,
        num_moe_experts=cases.EXPERTS if moe else None,
        moe_ffn_hidden_size=cases.FFN // 2 if moe else None,
        moe_router_topk=2,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        gradient_accumulation_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
    )


def made(case: Case) -> Run:
    """The model and its optimizer, on every rank of the world. The process group is there already."""
    model, config = bare(case)
    return with_optimizer(case, config, model)


def bare(case: Case) -> tuple[GPTModel, TransformerConfig]:
    """The model, and how it is set up."""
    ps.initialize_model_parallel(case.tp, case.pp, expert_model_parallel_size=case.ep, create_gloo_process_groups=True)
    model_parallel_cuda_manual_seed(1)
    config = config_of(case)
    spec = get_gpt_layer_local_spec(
        num_experts=cases.EXPERTS if case.kind == "moe" else None, normalization=config.normalization
    )
    model = GPTModel(
        config,
        spec,
        vocab_size=cases.VOCAB,
        max_sequence_length=cases.SEQUENCE,
        pre_process=ps.is_pipeline_first_stage(),
        post_process=ps.is_pipeline_last_stage(),
        share_embeddings_and_output_weights=False,
        position_embedding_type="learned_absolute" if case.kind == "gpt" else "rope",
    )
    return model, config


def with_optimizer(case: Case, config: TransformerConfig, model: Any) -> Run:
    """The run of a model: Megatron's wrapper for data parallelism, and its optimizer."""
    module = Float16Module(config, model) if case.bf16 else model
    distributed = case.sharding is not None
    wrapped = DistributedDataParallel(
        config, DistributedDataParallelConfig(use_distributed_optimizer=distributed), module
    )
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=1e-3,
            bf16=case.bf16,
            params_dtype=config.params_dtype,
            use_distributed_optimizer=distributed,
            clip_grad=0.0,
            weight_decay=0.0,
        ),
        [wrapped],
    )
    return Run(case, model, wrapped, optimizer)


def trained_model(case: Case, config: dict[str, Any], position_embedding_type: str, share_embeddings: bool) -> Run:
    """A run of a model that transformers has, too. config: of TransformerConfig."""
    ps.initialize_model_parallel(case.tp, case.pp, create_gloo_process_groups=True)
    model_parallel_cuda_manual_seed(1)
    dtype = torch.bfloat16 if case.bf16 else torch.float32
    cut = {"tensor_model_parallel_size": case.tp, "bf16": case.bf16, "params_dtype": dtype, "pipeline_dtype": dtype}
    model = inference_model({**config, **cut}, position_embedding_type, share_embeddings)
    return with_optimizer(case, model.config, model.train())


def groups_of_one_rank() -> None:
    if not ps.model_parallel_is_initialized():
        ps.initialize_model_parallel(create_gloo_process_groups=True)
        model_parallel_cuda_manual_seed(1)


def inference_model(config: dict[str, Any], position_embedding_type: str, share_embeddings: bool) -> GPTModel:
    """A model for its logits. config: of TransformerConfig; by itself one on one rank in full precision."""
    groups_of_one_rank()
    latent = "kv_lora_rank" in config
    found = (MLATransformerConfig if latent else TransformerConfig)(
        **config,
        use_cpu_initialization=True,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        gradient_accumulation_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
    )
    if isinstance(found.moe_layer_freq, list):
        spec = get_gpt_decoder_block_spec(found, use_transformer_engine=False, normalization=found.normalization)
        for layer in spec.layer_specs if latent else ():
            layer.submodules.self_attention.submodules.core_attention = PlainAttention
    else:
        spec = get_gpt_layer_local_spec(
            num_experts=found.num_moe_experts, normalization=found.normalization, qk_layernorm=found.qk_layernorm
        )
    return GPTModel(
        found,
        spec,
        vocab_size=64,
        max_sequence_length=32,
        share_embeddings_and_output_weights=share_embeddings,
        position_embedding_type=position_embedding_type,
    ).eval()
