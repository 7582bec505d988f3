"""A Lightning program on DeepSpeed, unmodified but for one import and one key of its config.

Arguments as those of `trainer`: it keeps the newest checkpoint, FOLDER/step=N.ckpt, and ``--resume`` goes on from it.
Lightning's strategy asks for GPUs; for the tests on a CPU, one processor passes for one.
"""

from __future__ import annotations

import inspect
import os
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.strategies import DeepSpeedStrategy, deepspeed
from torch import Tensor
from torch.utils.data import DataLoader

import ucp.deepspeed.auto  # noqa: F401 (what is tested)
from tests.deepspeed.programs import BATCH, Options, data, die, furthest, options, say, zero
from tests.deepspeed.trainer import model_of

ON_GPU = torch.cuda.is_available()


class Tiny(pl.LightningModule):
    def __init__(self, chosen: Options) -> None:
        super().__init__()
        self.save_hyperparameters({"lora": chosen.lora, "lr": 1e-2})
        self.chosen = chosen
        self.model = model_of(chosen.lora)

    def training_step(self, batch: Tensor, _: int) -> Tensor:
        loss: Tensor = self.model(input_ids=batch, labels=batch, use_cache=False).loss
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        kind: Any = torch.optim.AdamW
        if not self.chosen.torch_adam:
            from deepspeed.ops.adam import FusedAdam

            kind = FusedAdam
        optimizer = kind(trained, lr=1e-2)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 4))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Watch(pl.Callback):
    """Prints losses, and is killed."""

    def __init__(self, chosen: Options) -> None:
        self._chosen = chosen

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, *_: object) -> None:
        mean = trainer.strategy.reduce(outputs["loss"], reduce_op="mean").item()
        if trainer.is_global_zero:
            say(trainer.global_step, mean)
        if trainer.global_step == self._chosen.die:
            die()


def main(chosen: Options) -> None:
    if not ON_GPU:
        deepspeed.CUDAAccelerator = pl.accelerators.CPUAccelerator  # type: ignore[misc]
        deepspeed._validate_device_index_selection = lambda devices: None
        DeepSpeedStrategy.root_device = torch.device("cpu", 0)  # type: ignore[assignment,method-assign]
    pl.seed_everything(0)
    known = inspect.signature(DeepSpeedStrategy.__init__).parameters  # Lightning 2.4 saves the frozen ones, too
    without_frozen = {name: chosen.lora for name in ("exclude_frozen_parameters",) if name in known}
    config = {
        "train_micro_batch_size_per_gpu": BATCH // chosen.ranks,
        "zero_optimization": zero(chosen.stage),
        "zero_allow_untested_optimizer": True,
        "ucp": {"enabled": True},
    }
    trainer = pl.Trainer(
        accelerator="gpu" if ON_GPU else "cpu",
        devices=chosen.ranks,
        strategy=DeepSpeedStrategy(config=config, **without_frozen),
        precision="bf16-mixed" if chosen.bf16 else "32-true",
        max_epochs=chosen.steps // 2,
        callbacks=[
            Watch(chosen),
            ModelCheckpoint(chosen.folder, filename="{step}", every_n_epochs=1, save_top_k=1),
        ],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module = Tiny(chosen)
    if chosen.lora:
        module.strict_loading = False
    newest = os.fspath(furthest(Path(chosen.folder), "step=")) if chosen.resume else None
    # An epoch is two steps, and ends with a checkpoint: within one, or anywhere where max_steps is set, Lightning by
    # itself resumes with the epoch's first samples again, whoever saved.
    loader = DataLoader(data()[: 2 * BATCH], batch_size=BATCH // chosen.ranks)  # type: ignore[arg-type]
    trainer.fit(module, loader, ckpt_path=newest)


if __name__ == "__main__":
    main(options())
