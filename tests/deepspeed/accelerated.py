"""An Accelerate program on DeepSpeed, unmodified but for one import and one key of its config.

``python -m tests.deepspeed.accelerated FOLDER STAGE EPOCHS``: trains, from the state in FOLDER if it is there, saves
its state there and prints the losses as JSON.
"""

from __future__ import annotations

import json
import os
import sys

import torch
from accelerate import Accelerator
from accelerate.utils import DeepSpeedPlugin, DummyOptim
from torch import nn
from torch.utils.data import DataLoader

import ucp.deepspeed.auto  # noqa: F401 (what is tested)


def main(folder: str, stage: int, epochs: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.GELU(), nn.Linear(16, 3))
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "zero_optimization": {"stage": stage},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
        "ucp": {"enabled": True},
    }
    accelerator = Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=config))
    data = torch.randn(8, 6, generator=torch.Generator().manual_seed(1))
    loader = DataLoader(data, batch_size=4)
    engine, optimizer, loader = accelerator.prepare(model, DummyOptim(model.parameters()), loader)
    if os.path.isdir(folder):
        accelerator.load_state(folder)
    losses = []
    for _ in range(epochs):
        for batch in loader:
            loss = engine(batch).square().mean()
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    accelerator.save_state(folder)
    sys.stdout.write(f"\nlosses {json.dumps(losses)}\n")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
