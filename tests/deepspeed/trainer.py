"""A Hugging Face Trainer program on DeepSpeed, unmodified but for one import and one key of its config.

``python -m tests.deepspeed.trainer FOLDER STAGE STEPS`` trains STEPS steps, saving every second one, and prints each
step's loss as JSON; under torchrun, on as many GPUs as there are ranks, which share a batch of 8. ``--resume``: from
the newest checkpoint in FOLDER. ``--die N``: every rank is killed in step N. ``--lora``: trains adapters of a frozen
model. ``--bf16``. ``--memory DIR``: with snapshots after every step, whose keeper leaves word in DIR.
"""

from __future__ import annotations

import os
from typing import Any

from torch import nn
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
from tests.deepspeed.programs import BATCH, Options, data, die, on_processors, options, say, zero
from tests.engines import releases
from ucp.storage.kept import places


class Watch(TrainerCallback):
    """Prints losses, and ends training early: as a job whose time is over, or as one that is killed."""

    def __init__(self, chosen: Options) -> None:
        self._chosen = chosen

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        if state.global_step == self._chosen.die:
            die()
        control.should_training_stop = state.global_step >= self._chosen.steps

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        if "loss" in state.log_history[-1] and state.is_world_process_zero:
            say(state.global_step, state.log_history[-1]["loss"])


class DividesOnce(Trainer):
    """transformers 4.46 hands DeepSpeed a loss that it has divided by the steps that are accumulated, and DeepSpeed
    divides again: on another number of ranks, which is another number of steps, gradients would be of another size."""

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        return super().get_batch_samples(*args, **kwargs)[0], None


def model_of(lora: bool) -> nn.Module:
    """A tiny Llama; lora: frozen, with adapters."""
    sizes = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1))
    if not lora:
        return model
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))


def main(chosen: Options) -> None:
    on_processors()
    set_seed(0)
    model = model_of(chosen.lora)
    config: dict[str, Any] = {
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "bf16": {"enabled": "auto"},
        "zero_optimization": zero(chosen.stage),
        "optimizer": {"type": "AdamW", "params": {"lr": "auto", "torch_adam": chosen.torch_adam}},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": "auto", "warmup_num_steps": "auto"}},
        "ucp": {"enabled": True},
    }
    if chosen.memory is not None:
        os.environ[places.FOLDER] = chosen.memory
        memory = {"enabled": True, "run": chosen.folder, "redundancy": 0}
        config["ucp"] = {"enabled": True, "memory": memory}
    arguments = TrainingArguments(
        chosen.folder,
        per_device_train_batch_size=4,  # older ones go on with what the checkpoint says
        gradient_accumulation_steps=BATCH // 4 // chosen.ranks,
        max_steps=8,
        save_steps=2,
        save_total_limit=1,
        logging_steps=1,
        learning_rate=1e-2 if chosen.lora else 1e-3,
        warmup_steps=4,
        bf16=chosen.bf16,
        deepspeed=config,
        report_to=[],
        disable_tqdm=True,
    )
    rows = [{"input_ids": row, "labels": row} for row in data()]
    kind = Trainer if releases.is_pinned("transformers") else DividesOnce
    trainer = kind(model=model, args=arguments, train_dataset=rows, callbacks=[Watch(chosen)])
    trainer.train(resume_from_checkpoint=chosen.resume)


if __name__ == "__main__":
    releases.mend()
    main(options())
