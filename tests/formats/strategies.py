"""Programs of Trainer, Accelerate and Lightning under their parallel strategies, on the CPU: jobs for ranks of a pool.

Accelerate and Lightning ask for GPUs before they shard; here a processor passes for one. Everything after that is
theirs. Each job trains two steps and saves; then the same program resumes by the framework's own loading, and takes
three steps. All samples are the same, so that any number of ranks sees the same losses.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from tests.engines import truth
from tests.formats import lightning_parts

SAVED, FURTHER, ROW = 2, 3, 8
PRELOAD = (
    "transformers.trainer", "transformers.models.llama.modeling_llama", "accelerate",
    "pytorch_lightning.strategies.deepspeed", "pytorch_lightning.strategies.fsdp",
)  # fmt: skip
BLOCK = "LlamaDecoderLayer"
ZERO: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": 2,
    "gradient_clipping": 0.0,
    "zero_optimization": {"stage": 2, "reduce_bucket_size": 100_000, "allgather_bucket_size": 100_000},
    "zero_allow_untested_optimizer": True,
}

Truth = Mapping[str, Mapping[str, Tensor]]


@dataclass(frozen=True, eq=False)
class Wrote:
    """What model and optimizer held when a checkpoint was written, and the losses of the next steps.

    further: of the framework's own resume. onward: of the run that wrote it, which went on; empty where it ended.
    """

    truth: Truth
    further: tuple[float, ...]
    onward: tuple[float, ...] = ()


def llama() -> Any:
    """A tiny Llama with tied embeddings, whose weights are always the same."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 30, "hidden_size": 12, "intermediate_size": 20, "num_hidden_layers": 2}
    return LlamaForCausalLM(
        LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=True)
    )


def shapes() -> dict[str, torch.Size]:
    return {name: parameter.shape for name, parameter in llama().named_parameters()}


def processors_pass_for_gpus() -> None:
    """Accelerate shards on CPUs by no other means."""
    from accelerate.state import DistributedType, PartialState

    def backend(*_: Any, **__: Any) -> tuple[str, DistributedType]:
        return "gloo", DistributedType.MULTI_GPU

    def device(self: Any) -> None:
        self.device = torch.device("cpu")

    PartialState._prepare_backend = backend  # type: ignore[method-assign,assignment]
    PartialState.set_device = device  # type: ignore[method-assign]
    _full_states_are_copied()


def _full_states_are_copied() -> None:
    """FSDP1 does not copy a full state that it is to bring to the CPU, where that is on the CPU, and dies of it."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    begin = FullyShardedDataParallel.set_state_dict_type

    def copied(module: Any, kind: Any, config: Any = None, optimizer: Any = None) -> Any:
        for each in (config, optimizer):
            if each is not None:
                each.offload_to_cpu = False
        return begin(module, kind, config, optimizer)

    FullyShardedDataParallel.set_state_dict_type = staticmethod(copied)  # type: ignore[method-assign,assignment]


def truth_of(model: nn.Module, optimizer: Any, prefix: str = "") -> Truth:
    """Every parameter's weight and states, whole: ranks' shards one after the other, as FSDP cuts them. Collective."""
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

    if hasattr(model, "zero_optimization"):
        live = truth.gather(model)
        return {n.removeprefix(prefix): dict(states) for n, states in live.params.items()} if live else {}
    states = getattr(optimizer, "optimizer", optimizer).state
    mine: dict[str, dict[str, Tensor]] = {}
    for full, parameter in model.named_parameters():
        name = full.replace("_fsdp_wrapped_module.", "").removeprefix("_forward_module.").removeprefix("module.")
        held = {"param": parameter, **states.get(parameter, {})}
        mine[name.removeprefix(prefix)] = {kind: _local(tensor) for kind, tensor in held.items()}
    ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(ranks, mine)
    cut = any(isinstance(module, (FSDPModule, FullyShardedDataParallel)) for module in model.modules())
    return {name: _joined([rank[name] for rank in ranks], shape, cut) for name, shape in shapes().items()}


def _local(tensor: Tensor) -> Tensor:
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach().clone()


def _joined(ranks: list[dict[str, Tensor]], shape: torch.Size, cut: bool) -> dict[str, Tensor]:
    """A parameter's states from the ranks' shards. Under FSDP1, a rank without elements of it has no states."""
    kinds = {kind: tensor.ndim for rank in ranks for kind, tensor in rank.items()}
    found = {kind: [rank[kind] for rank in ranks if kind in rank] for kind in kinds}
    return {kind: torch.cat(shards).view(shape) if cut and kinds[kind] else shards[0] for kind, shards in found.items()}


def trainer(folder: str, kind: str) -> Wrote:
    """Hugging Face's Trainer writes ``checkpoint-2``. kind: ``ddp``, ``deepspeed<stage>``, or FSDP's
    ``<version>-<form>``."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    options: dict[str, Any] = {"use_cpu": True, "ddp_backend": "gloo"}
    if kind != "ddp":
        processors_pass_for_gpus()
        options = {"deepspeed": copy.deepcopy(ZERO)}
        options["deepspeed"]["zero_optimization"]["stage"] = int(kind[-1]) if kind.startswith("deepspeed") else 0
    if kind.startswith("fsdp"):
        version, _, form = kind.removeprefix("fsdp").partition("-")
        options = {
            "fsdp": True,
            "fsdp_config": {
                "version": int(version),
                "transformer_layer_cls_to_wrap": [BLOCK],
                "state_dict_type": f"{form.upper()}_STATE_DICT",
                "sync_module_states": False,  # by broadcasts between GPUs
            },
        }
    data: Any = [{"input_ids": torch.arange(ROW), "labels": torch.arange(ROW)} for _ in range(40)]
    held: dict[str, Any] = {}

    class Watch(TrainerCallback):
        def on_save(self, args: Any, state: Any, control: Any, model: Any, optimizer: Any, **_: Any) -> None:
            if state.global_step == SAVED and not held:
                wrapped = run.model_wrapped if kind != "ddp" else model
                held.update(truth_of(wrapped, optimizer))

    def made(saves: bool) -> Any:
        arguments = TrainingArguments(
            folder,
            max_steps=SAVED + FURTHER,
            save_strategy="steps" if saves else "no",
            save_steps=SAVED,
            save_only_model=False,
            logging_steps=1,
            learning_rate=1e-2,
            weight_decay=0.1,
            max_grad_norm=0.0,
            per_device_train_batch_size=2,
            optim="adamw_torch",
            report_to=[],
            disable_tqdm=True,
            **options,
        )
        return Trainer(llama(), arguments, train_dataset=data, callbacks=[Watch()])

    run = made(saves=True)
    run.train()
    again = made(saves=False)
    again.train(resume_from_checkpoint=str(Path(folder) / f"checkpoint-{SAVED}"))
    return Wrote(held, *(_losses(one.state.log_history) for one in (again, run)))


def _losses(history: list[dict[str, Any]]) -> tuple[float, ...]:
    return tuple(log["loss"] for log in history if "loss" in log and log["step"] > SAVED)


def accelerate(folder: str, form: str) -> Wrote:
    """Accelerate under FSDP1: ``save_state`` into the folder. form: ``sharded`` or ``full``."""
    from accelerate import Accelerator, FullyShardedDataParallelPlugin

    processors_pass_for_gpus()
    os.environ["ACCELERATE_USE_FSDP"] = "true"

    def made() -> tuple[Any, Any, Any, Any]:
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=1,
            state_dict_type=f"{form.upper()}_STATE_DICT",
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=[BLOCK],
            use_orig_params=True,
            sync_module_states=False,
        )
        accelerator = Accelerator(fsdp_plugin=plugin)
        model = accelerator.prepare(llama())
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        return accelerator, model, *accelerator.prepare(optimizer, scheduler)

    def train(parts: tuple[Any, Any, Any, Any], steps: int) -> list[float]:
        accelerator, model, optimizer, scheduler = parts
        rows, losses = torch.arange(ROW).expand(2, ROW), []
        for _ in range(steps):
            loss = model(input_ids=rows, labels=rows).loss
            accelerator.backward(loss)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        return losses

    parts = made()
    train(parts, SAVED)
    parts[0].save_state(folder)
    held = truth_of(parts[1], parts[2])
    onward = train(parts, FURTHER)
    again = made()
    again[0].load_state(folder)
    return Wrote(held, tuple(train(again, FURTHER)), tuple(onward))


def lightning(folder: str, kind: str) -> Wrote:
    """Lightning's Trainer saves into the folder. kind: ``sharded`` or ``full`` of FSDP, or ``deepspeed``."""
    import pytorch_lightning as pl
    from pytorch_lightning.strategies import DeepSpeedStrategy, FSDPStrategy, deepspeed
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    shown: Any = deepspeed
    shown.CUDAAccelerator = pl.accelerators.CPUAccelerator
    shown._validate_device_index_selection = lambda devices: None

    class Sharded(FSDPStrategy):
        root_device = torch.device("cpu")

    class Zero(DeepSpeedStrategy):
        root_device = torch.device("cpu", 0)

    begin: Any = FullyShardedDataParallel.__init__

    def on_processor(self: Any, *args: Any, device_id: Any = None, **options: Any) -> None:
        begin(self, *args, device_id=torch.device("cpu"), **options)

    FullyShardedDataParallel.__init__ = on_processor  # type: ignore[method-assign]
    _full_states_are_copied()
    losses: list[float] = []

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = llama()

        def training_step(self, batch: Any, index: int) -> Any:
            loss = self.model(input_ids=batch, labels=batch).loss
            losses.append(loss.item())
            return loss

        def configure_optimizers(self) -> Any:
            return lightning_parts.optimizers(self.parameters())

        def train_dataloader(self) -> Any:
            rows: Any = torch.arange(ROW).expand(4, ROW).clone()
            return torch.utils.data.DataLoader(rows, batch_size=2)

    def fit(epochs: int, path: str | None = None) -> Any:
        strategy: Any = Zero(config=copy.deepcopy(ZERO))
        if kind != "deepspeed":
            form: Any = kind
            policy = ModuleWrapPolicy({LlamaDecoderLayer})
            strategy = Sharded(auto_wrap_policy=policy, state_dict_type=form, process_group_backend="gloo")
        run = lightning_parts.trainer(devices=2, strategy=strategy, max_epochs=epochs)
        run.fit(Module(), ckpt_path=path)
        return run

    run = fit(SAVED)
    run.save_checkpoint(folder)
    held = truth_of(run.strategy.model, run.optimizers[0], "model.")
    losses.clear()
    fit(SAVED + FURTHER, folder)
    return Wrote(held, tuple(losses))
