"""Folders of other programs' checkpoints, made by themselves: Trainer, Accelerate, Lightning. Run as a program each."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tests.formats import lightning_parts


def trainer(folder: str) -> None:
    """Hugging Face's Trainer: ``checkpoint-2``, a model folder with the training state beside the weights.

    ``truth.pt`` is what model and optimizer held then, by name, and ``losses.json`` those of the steps that the Trainer
    itself takes after resuming from it.
    """
    from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    data: Any = [{"input_ids": torch.arange(8), "labels": torch.arange(8)} for _ in range(16)]
    arguments = TrainingArguments(
        folder,
        max_steps=5,
        save_steps=2,
        logging_steps=1,
        learning_rate=1e-2,
        weight_decay=0.1,
        per_device_train_batch_size=2,
        report_to=[],
        use_cpu=True,
    )

    class Watch(TrainerCallback):
        def on_save(self, args: Any, state: Any, control: Any, model: Any, optimizer: Any, **_: Any) -> None:
            if state.global_step == 2 and not (Path(folder) / "truth.pt").exists():
                held = {n: {"param": p.detach(), **optimizer.state[p]} for n, p in model.named_parameters()}
                torch.save(held, Path(folder) / "truth.pt")

    Trainer(LlamaForCausalLM(config), arguments, train_dataset=data, callbacks=[Watch()]).train()
    again = Trainer(LlamaForCausalLM(config), arguments, train_dataset=data)
    again.train(resume_from_checkpoint=str(Path(folder) / "checkpoint-2"))
    losses = {log["step"]: log["loss"] for log in again.state.log_history if "loss" in log}
    (Path(folder) / "losses.json").write_text(json.dumps([losses[step] for step in (3, 4, 5)]))


def accelerate(folder: str) -> None:
    """Accelerate on one process: ``save_state``."""
    from accelerate import Accelerator
    from accelerate.utils import DataLoaderConfiguration

    class Progress:
        """An object of the program's own, of which plain data are saved."""

        def state_dict(self) -> dict[str, Any]:
            return {"best": 0.5, "seen": torch.arange(3)}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            raise NotImplementedError

    accelerator = Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(use_stateful_dataloader=True))
    model: Any = nn.Linear(8, 8)
    optimizer: Any = torch.optim.AdamW(model.parameters())
    scheduler: Any = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    loader: Any = torch.utils.data.DataLoader(torch.randn(12, 8), batch_size=4, shuffle=True)
    model, optimizer, scheduler, loader = accelerator.prepare(model, optimizer, scheduler, loader)
    accelerator.register_for_checkpointing(Progress())
    accelerator.backward(model(next(iter(loader))).sum())
    optimizer.step()
    scheduler.step()
    accelerator.save_state(folder)


def accelerate_fsdp(folder: str) -> None:
    """Accelerate's FSDP plugin: the model and the optimizer, each a folder of torch.distributed's."""
    import torch.distributed as dist
    from accelerate import Accelerator, FullyShardedDataParallelPlugin
    from accelerate.utils.fsdp_utils import save_fsdp_model, save_fsdp_optimizer
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo", init_method=f"file://{folder}.rendezvous", rank=0, world_size=1)
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, state_dict_type="SHARDED_STATE_DICT")
    accelerator = Accelerator(cpu=True)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(4, 8)).sum().backward()
    optimizer.step()
    save_fsdp_model(plugin, accelerator, model, folder)
    save_fsdp_optimizer(plugin, accelerator, optimizer, model, folder)
    torch.save({"last_epoch": 1}, Path(folder) / "scheduler.bin")
    dist.destroy_process_group()


def lightning(folder: str) -> None:
    """Lightning's ModelParallelStrategy: shards of torch.distributed's with ``meta.pt`` beside them."""
    import pytorch_lightning as pl
    from pytorch_lightning.strategies import ModelParallelStrategy
    from torch.distributed.fsdp import fully_shard

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def configure_model(self) -> None:
            fully_shard(self.linear, mesh=self.device_mesh["data_parallel"])

        def training_step(self, batch: Any, index: int) -> Any:
            return self.linear(batch).sum()

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters())

        def train_dataloader(self) -> Any:
            return torch.utils.data.DataLoader(torch.randn(8, 8), batch_size=4)

    strategy = ModelParallelStrategy(process_group_backend="gloo")
    run = lightning_parts.trainer(devices=1, strategy=strategy, max_steps=2)
    run.fit(Module())
    run.save_checkpoint(folder)
    lightning_file(folder)


def lightning_file(folder: str) -> None:
    """The same program's single file: ``<folder>.ckpt``; ``<folder>.json`` has the losses of the next steps of its own
    resume, and ``<folder>.truth.pt`` what model and optimizer held."""
    import pytorch_lightning as pl

    losses: list[float] = []

    class Module(pl.LightningModule):
        def __init__(self, width: int = 8) -> None:
            super().__init__()
            self.save_hyperparameters()
            self.model = nn.Sequential(nn.Linear(8, width), nn.BatchNorm1d(width), nn.Linear(width, 8))

        def training_step(self, batch: Any, index: int) -> Any:
            loss = self.model(batch).pow(2).mean()
            losses.append(loss.item())
            return loss

        def configure_optimizers(self) -> Any:
            return lightning_parts.optimizers(self.parameters())

        def train_dataloader(self) -> Any:
            return torch.utils.data.DataLoader(torch.arange(32.0).reshape(4, 8) / 32, batch_size=4)

    def fit(epochs: int, module: pl.LightningModule, path: str | None = None) -> pl.Trainer:
        run = lightning_parts.trainer(devices=1, max_epochs=epochs)
        run.fit(module, ckpt_path=path)
        return run

    module = Module()
    run = fit(3, module)
    run.save_checkpoint(f"{folder}.ckpt")
    names = {p: name for name, p in module.named_parameters()}
    held = {n: {"param": p.detach(), **run.optimizers[0].state[p]} for p, n in names.items()}
    torch.save(held, f"{folder}.truth.pt")
    losses.clear()
    fit(6, Module(), f"{folder}.ckpt")
    Path(f"{folder}.json").write_text(json.dumps(losses))


ROOT = Path(__file__).resolve().parents[2]


def made_by(program: str, folder: Path) -> Path:
    """What the program, run by itself, has written into a folder of its name in this one, made once."""
    path = folder / program
    if not path.exists():
        environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": "29597",
            "RANK": "0",
            "LOCAL_RANK": "0",
            "WORLD_SIZE": "1",
        }
        command = [sys.executable, "-m", "tests.formats.foreign_programs", program, str(path)]
        done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, check=False)
        assert path.exists(), done.stderr
        assert not done.returncode, done.stderr
    return path


PROGRAMS = {program.__name__: program for program in (trainer, accelerate, accelerate_fsdp, lightning)}

if __name__ == "__main__":
    PROGRAMS[sys.argv[1]](sys.argv[2])
