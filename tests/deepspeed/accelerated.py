"""An Accelerate program on DeepSpeed, unmodified but for one import and one key of its config.

Arguments as those of `trainer`: it saves its state in FOLDER/step_N after every second step, and ``--resume`` goes on
from the last one.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DeepSpeedPlugin, DummyOptim
from torch.utils.data import DataLoader

import ucp.deepspeed.auto  # noqa: F401 (what is tested)
from tests.deepspeed.programs import BATCH, Options, data, die, furthest, on_processors, options, say, zero
from tests.deepspeed.trainer import model_of


def main(chosen: Options) -> None:
    on_processors()
    torch.manual_seed(0)
    model = model_of(chosen.lora)
    config = {
        "train_micro_batch_size_per_gpu": BATCH // chosen.ranks,
        "bf16": {"enabled": chosen.bf16},
        "zero_optimization": zero(chosen.stage),
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": chosen.torch_adam}},
        "ucp": {"enabled": True},
    }
    accelerator = Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=config))
    loader = DataLoader(data(), batch_size=BATCH // chosen.ranks)  # type: ignore[arg-type]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    engine, optimizer, loader = accelerator.prepare(model, DummyOptim(trained), loader)
    step = 0
    if chosen.resume:
        newest = furthest(Path(chosen.folder), "step_")
        accelerator.load_state(os.fspath(newest), load_module_strict=not chosen.lora)
        step = int(newest.name.removeprefix("step_"))
    while step < chosen.steps:
        for batch in accelerator.skip_first_batches(loader, step % len(loader)):
            loss = engine(input_ids=batch, labels=batch, use_cache=False).loss
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            mean = accelerator.gather(loss.detach()).mean().item()
            if accelerator.is_main_process:
                say(step, mean)
            if step == chosen.die:
                die()
            if step % 2 == 0:
                accelerator.save_state(f"{chosen.folder}/step_{step}", exclude_frozen_parameters=chosen.lora)
            if step == chosen.steps:
                break
    accelerator.end_training()


if __name__ == "__main__":
    main(options())
