"""A Hugging Face Trainer program on DeepSpeed, unmodified but for one import and one key of its config.

``python -m tests.deepspeed.trainer FOLDER STAGE STOP [resume]``: trains to step STOP of 6, prints the losses as JSON.
"""

from __future__ import annotations

import json
import sys

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)

import ucp.deepspeed.auto  # noqa: F401 (what is tested)


class Stop(TrainerCallback):
    """Ends training early, as a job does whose time is over."""

    def __init__(self, step: int) -> None:
        self._step = step

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        control.should_training_stop = state.global_step >= self._step


def main(folder: str, stage: int, stop: int, resume: bool) -> None:
    set_seed(0)
    sizes = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1))
    tokens = torch.randint(97, (64, 16), generator=torch.Generator().manual_seed(1))
    config = {
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "zero_optimization": {"stage": stage},
        "optimizer": {"type": "AdamW", "params": {"lr": "auto", "torch_adam": True}},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": "auto", "warmup_num_steps": "auto"}},
        "ucp": {"enabled": True},
    }
    arguments = TrainingArguments(
        folder,
        per_device_train_batch_size=4,
        max_steps=6,
        save_steps=2,
        save_total_limit=1,
        logging_steps=1,
        learning_rate=1e-3,
        warmup_steps=4,
        deepspeed=config,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
    )
    rows = [{"input_ids": row, "labels": row} for row in tokens]
    trainer = Trainer(model=model, args=arguments, train_dataset=rows, callbacks=[Stop(stop)])
    trainer.train(resume_from_checkpoint=resume)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    sys.stdout.write(f"\nlosses {json.dumps(losses)}\n")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:] == ["resume"])
