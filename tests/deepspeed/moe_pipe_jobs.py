"""Jobs that run on the ranks: a Mixtral in a pipeline's stages, with DeepSpeed's own layers of experts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tests.engines import autoep, models, truth
from tests.engines.autoep import AutoCase
from tests.engines.configs import Case, make_config
from tests.engines.resume import continue_training
from tests.engines.runs import FURTHER, STEPS
from tests.engines.zygote import resolve

OURS = "ucp.deepspeed:initialize"
STOCK = "deepspeed:initialize"
LAYERS = 2


class Expert(nn.Module):
    """Mixtral's, each of its own."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.w1 = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.w2 = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.w3 = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        out: Tensor = self.w2(nn.functional.silu(self.w1(hidden)) * self.w3(hidden))
        return out


class Block(nn.Module):
    """One of Mixtral's layers. Its experts are a layer of DeepSpeed's, or what AutoEP makes of Mixtral's."""

    def __init__(self, model: Any, index: int, ep: int, auto: bool) -> None:
        super().__init__()
        layer = model.model.layers[index]
        self.self_attn = layer.self_attn
        if auto:
            self.mlp = layer.mlp
        else:
            self.moe = listed(model.config, ep)
        self.input_layernorm = layer.input_layernorm
        self.post_attention_layernorm = layer.post_attention_layernorm
        self.rotary_emb = model.model.rotary_emb

    def forward(self, hidden: Tensor) -> Tensor:
        length = hidden.shape[1]
        later = torch.full((length, length), torch.finfo(hidden.dtype).min, dtype=hidden.dtype).triu(1)
        angles = self.rotary_emb(hidden, torch.arange(length)[None])
        found, _ = self.self_attn(self.input_layernorm(hidden), position_embeddings=angles, attention_mask=later)
        hidden = hidden + found
        inner = self.post_attention_layernorm(hidden)
        out: Tensor = hidden + (self.moe(inner)[0] if hasattr(self, "moe") else self.mlp(inner))
        return out


def listed(config: Any, ep: int) -> nn.Module:
    """DeepSpeed's own layer, which routes as Mixtral's does."""
    from deepspeed.moe.layer import MoE

    found: nn.Module = MoE(
        config.hidden_size,
        Expert(config),
        num_experts=config.num_local_experts,
        ep_size=ep,
        k=2,
        top2_2nd_expert_sampling=False,
        drop_tokens=False,
        min_capacity=0,
        use_rts=False,
    )
    return found


def loss(logits: Tensor, labels: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits.float().flatten(0, 1), labels.flatten())


AUTO = {"moe_layer_pattern": r"\d+\.mlp"}


def pipeline(case: AutoCase, stages: int, auto: bool, initialize: str, section: Any) -> Any:
    """The case's dp counts the ranks of each stage. auto: its experts are AutoEP's."""
    from deepspeed.pipe import PipelineModule

    autoep.accept_defaults()
    whole: Any = autoep.mixtral(case.case.seed)
    whole.set_experts_implementation("eager")
    torch.manual_seed(case.case.seed)
    layers = [whole.model.embed_tokens, *(Block(whole, i, case.ep, auto) for i in range(LAYERS)), whole.model.norm]
    layers.append(whole.lm_head)
    model = PipelineModule(layers, num_stages=stages, loss_fn=loss, partition_method="type:block")
    model.config = whole.config
    config = make_config(case.case) | dict(section or {})
    if auto:
        config["expert_parallel"] = autoep.section(case) | AUTO
    parameters = [p for p in model.parameters() if p.requires_grad]
    return resolve(initialize)(model=model, model_parameters=parameters, config=config)[0]


def held(engine: Any) -> dict[str, dict[str, Tensor]] | None:
    """Masters and states of all stages on rank 0, from the buffers of stage 1; experts that are listed have their
    numbers among all. Collective."""
    from tests.engines import moe

    renamed = moe.global_names(engine.module)
    names = {p: renamed.get(n, n) for n, p in engine.module.named_parameters()}
    stacks = dict(autoep.stacks(engine.module))
    shapes = {name: parameter.shape for parameter, name in names.items()}
    pieces = []
    for slot in truth.slots_of_stages_1_and_2(engine.optimizer, names):
        place, shape = stacks.get(slot.name, (0, shapes[slot.name]))
        pieces += [replace(piece, start=piece.start + place * shape.numel()) for piece in truth.pieces_of(slot)]
    shapes |= {name: torch.Size([autoep.EXPERTS, *shape[1:]]) for name, (_, shape) in stacks.items()}
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.gather_object((pieces, shapes), everyone if dist.get_rank() == 0 else None)
    if dist.get_rank() != 0:
        return None
    spread = [piece for found, _ in everyone for piece in found if piece.values.numel()]
    return truth.assembled(spread, {name: shape for _, found in everyone for name, shape in found.items()})


def train(engine: Any, case: AutoCase, first: int, steps: int) -> list[float]:
    accumulation = case.case.accumulation
    replica, replicas = engine.grid.get_data_parallel_rank(), engine.grid.get_data_parallel_world_size()
    out = []
    for step in range(first, first + steps):
        micro = (models.batch("llama", step * accumulation + m, replica, replicas) for m in range(accumulation))
        out.append(float(engine.train_batch(micro)))
    return out


def trained(case: AutoCase, stages: int, auto: bool, folder: str) -> Any:
    """Stock DeepSpeed's pipeline: what it holds when it is saved, and further losses."""
    engine = pipeline(case, stages, auto, STOCK, None)
    train(engine, case, 0, STEPS)
    engine.save_checkpoint(folder)
    return held(engine), train(engine, case, STEPS, FURTHER + 1)


def into_stages(case: AutoCase, stages: int, auto: bool, folder: str, changes: Any, save: str = "") -> Any:
    """Load, save, and take further steps."""
    engine = pipeline(case, stages, auto, OURS, section(changes))
    engine.load_checkpoint(folder)
    report, found = engine.ucp.last_load, held(engine)
    if save:
        engine.save_checkpoint(save)
    return found, report.proof.complete, report.changes, train(engine, case, STEPS, FURTHER + 1)


def section(changes: Any) -> dict[str, Any]:
    return {"ucp": {"enabled": True, "load": {"prove": "always", "changes": changes or {}}, "save": {"async": False}}}


def out_of_stages(case: AutoCase, folder: str, changes: Any) -> Any:
    """Into an engine without stages."""
    engine = autoep.build_engine(case, OURS, section(changes))
    engine.load_checkpoint(folder)
    report, found = engine.ucp.last_load, autoep.gather(engine)
    losses = continue_training(engine, case.case, STEPS, FURTHER + 1)
    return None if found is None else found.params, report.proof.complete, report.changes, losses


def stock(case: AutoCase, folder: str, stages: int) -> Any:
    """AutoEP in stages by DeepSpeed alone."""
    engine = pipeline(case, stages, True, STOCK, None)
    if engine.load_checkpoint(folder)[0] is None:
        raise FileNotFoundError(folder)
    return held(engine), train(engine, case, STEPS, FURTHER + 1)


def under_fsdp2(case: AutoCase, folder: str, how: Any, save: str) -> Any:
    """Transformers' Mixtral, whole experts on every rank, cut by FSDP2: what it holds after a load, and losses."""
    from torch.distributed.fsdp import fully_shard

    import ucp
    from tests.engines.configs import OPTIMIZERS

    model: Any = autoep.mixtral(case.case.seed)
    model.set_experts_implementation("eager")
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    options = {k: v for k, v in OPTIMIZERS["adamw"][1].items() if k != "torch_adam"}
    named = list(model.named_parameters())
    groups = [[p for n, p in named if (".experts." in n) == experts] for experts in (False, True)]
    optimizer = torch.optim.AdamW([{"params": params} for params in groups], **options)
    report = ucp.load_training(folder, model=model, optimizer=optimizer, rng=False, prove="always", **how).tensors
    found = {
        name: {"param": whole(p), **{s: whole(v) for s, v in optimizer.state[p].items() if v.dim()}}
        for name, p in named
    }
    ucp.save_training(save, model=model, optimizer=optimizer, step=STEPS)
    losses = []
    for step in range(STEPS, STEPS + FURTHER + 1):
        tokens, labels = models.batch("llama", step, dist.get_rank(), dist.get_world_size())
        loss = models.loss("llama", model, tokens, labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        total = loss.detach().double()
        dist.all_reduce(total)
        losses.append(total.item() / dist.get_world_size())
    return found, report.proof is not None and report.proof.complete, losses


def whole(tensor: Any) -> Tensor:
    """All ranks' shards."""
    out: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return out.detach().clone()


def without_zero(engine: Any) -> dict[str, tuple[int | None, dict[str, Tensor]]]:
    """What a rank holds at stage 0 in fp32: whole tensors, and of stacks the part of which number."""
    stacks = {name: place for name, (place, _) in autoep.stacks(engine.module)}
    mine = {}
    for name, parameter in engine.module.named_parameters():
        states = {s: v.detach().clone() for s, v in engine.optimizer.state[parameter].items() if v.dim()}
        mine[name] = (stacks.get(name), {"param": parameter.detach().clone(), **states})
    return mine


def trained_without_zero(case: AutoCase, folder: str, stages: int) -> Any:
    """Stock DeepSpeed's pipeline under AutoEP at stage 0: what every rank holds, and further losses."""
    engine = pipeline(case, stages, True, STOCK, None)
    train(engine, case, 0, STEPS)
    engine.save_checkpoint(folder)
    return without_zero(engine), train(engine, case, STEPS, FURTHER + 1)


def stock_without_zero(case: AutoCase, folder: str, stages: int) -> Any:
    """A checkpoint in stock DeepSpeed's pipeline under AutoEP at stage 0: what every rank holds, and further losses."""
    engine = pipeline(case, stages, True, STOCK, None)
    if engine.load_checkpoint(folder)[0] is None:
        raise FileNotFoundError(folder)
    return without_zero(engine), train(engine, case, STEPS, FURTHER + 1)


def at_stage_0(case: AutoCase, folder: str, save: str, stages: int = 0, changes: Any = None) -> Any:
    """AutoEP without ZeRO: what every rank holds after a load, of which each has whole tensors and its own experts."""
    if stages:
        engine = pipeline(case, stages, True, OURS, section(changes))
    else:
        engine = autoep.build_engine(case, OURS, section(changes))
    engine.load_checkpoint(folder)
    complete = engine.ucp.last_load.proof.complete
    mine = without_zero(engine)
    engine.save_checkpoint(save)
    losses = (
        train(engine, case, STEPS, FURTHER + 1) if stages else continue_training(engine, case.case, STEPS, FURTHER + 1)
    )
    return mine, complete, losses


def folded_in_stages(case: AutoCase) -> None:
    """AutoEP with AutoTP in a pipeline's two stages, by stock DeepSpeed."""
    pipeline(case, 2, True, STOCK, {"tensor_parallel": {"autotp_size": 2, "partition_config": autoep.SLICES}})


def auto_in_some_stages(case: AutoCase) -> None:
    """Stock DeepSpeed's pipeline whose first stage has no experts."""
    pipeline(case, 4, True, STOCK, None)


def listed_in_slices(cut: bool) -> str:
    """DeepSpeed's own layers in two stages of two tensor-parallel ranks: what this project says of the engine. cut:
    they are to cut each expert, too."""
    from deepspeed.pipe import PipelineModule
    from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology

    from tests.deepspeed.moe_parallel_jobs import Mixture
    from ucp.errors import UcpError

    layers = [Mixture(1), Mixture(1)]
    for layer in layers:
        layer.moe.enable_expert_tensor_parallelism = cut
    model = PipelineModule(layers, topology=PipeModelDataParallelTopology(2, 2, 1), loss_fn=loss)
    config = make_config(Case(stage=1)) | {"ucp": {"enabled": True}}
    try:
        resolve(OURS)(model=model, model_parameters=list(model.parameters()), config=config)
    except UcpError as error:
        return str(error)
    return ""
