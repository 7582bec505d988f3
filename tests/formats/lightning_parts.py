"""What the programs under Lightning that write checkpoints for tests have in common."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch


def trainer(**options: Any) -> Any:
    """Lightning's Trainer on the processor, which only trains. options: further ones."""
    import pytorch_lightning as pl

    return pl.Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        **options,
    )


def optimizers(parameters: Iterable[torch.nn.Parameter]) -> Any:
    """An optimizer with a learning rate that falls every epoch, as `configure_optimizers` returns them."""
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)]
