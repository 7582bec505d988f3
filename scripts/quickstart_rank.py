"""One rank of the quickstart's training: started by torch.distributed.run, once for every layout.

`train` is plain DeepSpeed, which knows nothing of ucp: it trains, saves with DeepSpeed's own save_checkpoint, and goes
on; its later losses are the yardstick. `resume` is a training program that uses ucp: note how little it takes.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from quickstart_truth import (
    State,
    describe_progress,
    gather_state,
    swap_q_and_k,
    weights_that_are_not_the_rounded_masters,
    zero_optimizer_states,
)
from transformers import LlamaConfig, LlamaForCausalLM

BATCH = 12  # sequences in the global batch: divides by 1, 2, 3 and 4 ranks
LENGTH = 48  # tokens of a sequence
VOCABULARY = 512
LEARNING_RATE = 3e-3


def main() -> None:
    args = parse_arguments()
    device = start_process_group(args.device)
    torch.manual_seed(0 if args.role == "train" else 12345)  # a resumed model starts from other random weights
    model = build_model()
    config = deepspeed_config(args)
    report: dict[str, Any] = {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "tensors": len(list(model.parameters())),
    }
    if args.role == "train":
        engine, *_ = deepspeed.initialize(model=model, model_parameters=param_groups(model), config=config)
        report["losses"] = train(engine, range(args.save_at), device)
        save_truth(engine, args.truth)
        engine.save_checkpoint(str(args.checkpoint))
        report["losses"] += train(engine, range(args.save_at, args.steps), device)
    else:
        import ucp.deepspeed

        config["ucp"] = {"enabled": True}
        engine, *_ = ucp.deepspeed.initialize(model=model, model_parameters=param_groups(model), config=config)
        engine.load_checkpoint(str(args.checkpoint))
        report["load"] = str(engine.ucp.last_load)
        report["state"] = compare_with_truth(engine, args.truth)
        resumed = range(args.save_at, args.steps)
        report["losses"] = train(engine, resumed, device)
        if args.controls:
            engine.load_checkpoint(str(args.checkpoint))
            zero_optimizer_states(engine)
            report["losses with optimizer states zeroed"] = train(engine, resumed, device)
            engine.load_checkpoint(str(args.checkpoint))
            swap_q_and_k(engine)
            report["losses with q and k swapped"] = train(engine, resumed, device)
    if dist.get_rank() == 0:
        args.report.write_text(json.dumps(report, indent=1))
    dist.barrier()
    dist.destroy_process_group()


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("role", choices=["train", "resume"])
    parser.add_argument("--zero", type=int, required=True, help="ZeRO stage")
    parser.add_argument("--dtype", choices=["bf16", "fp32"], required=True)
    parser.add_argument("--device", choices=["cpu", "cuda"], required=True)
    parser.add_argument("--save-at", type=int, required=True, help="the step after which the checkpoint is written")
    parser.add_argument("--steps", type=int, required=True, help="the last step")
    parser.add_argument("--checkpoint", type=Path, required=True, help="folder to save to or to load from")
    parser.add_argument("--truth", type=Path, required=True, help="the state at the moment of saving")
    parser.add_argument("--report", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--controls", action="store_true", help="also run two resumes that are wrong on purpose")
    return parser.parse_args()


def start_process_group(device: str) -> torch.device:
    if device == "cuda":
        torch.use_deterministic_algorithms(True, warn_only=True)  # on the CPU they are deterministic anyway
        torch.utils.deterministic.fill_uninitialized_memory = False
        index = int(os.environ["LOCAL_RANK"])
        torch.cuda.set_device(index)
        deepspeed.init_distributed("nccl")
        return torch.device("cuda", index)
    # DeepSpeed would look for a compiler and build a kernel for inference, which takes a minute and is not used here.
    deepspeed.ops.__compatible_ops__ = {}
    deepspeed.init_distributed("gloo")
    return torch.device("cpu")


def build_model() -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=4,
            vocab_size=VOCABULARY,
            max_position_embeddings=LENGTH,
            attn_implementation="eager",
            initializer_range=0.05,  # larger than usual, so that attention matters from the first step on
            use_cache=False,
        )
    )


def param_groups(model: torch.nn.Module) -> list[dict[str, Any]]:
    """Two groups, as in real training: no weight decay on the norms."""
    matrices = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    norms = [parameter for parameter in model.parameters() if parameter.dim() == 1]
    return [{"params": matrices, "weight_decay": 0.1}, {"params": norms, "weight_decay": 0.0}]


def deepspeed_config(args: argparse.Namespace) -> dict[str, Any]:
    return {
        "train_batch_size": BATCH,
        "train_micro_batch_size_per_gpu": BATCH // dist.get_world_size(),
        "optimizer": {
            "type": "AdamW",
            "params": {"lr": LEARNING_RATE, "betas": [0.9, 0.95], "torch_adam": True},  # torch_adam: nothing to compile
        },
        "scheduler": {
            "type": "WarmupDecayLR",
            "params": {"warmup_num_steps": 4, "warmup_max_lr": LEARNING_RATE, "total_num_steps": 64},
        },
        "gradient_clipping": 1.0,
        "bf16": {"enabled": args.dtype == "bf16"},
        "zero_optimization": {"stage": args.zero, "reduce_bucket_size": 1_000_000},
    }


def batch(step: int) -> torch.Tensor:
    """The global batch of a step, the same for every layout: token t+1 mostly follows from token t by a fixed rule."""
    generator = torch.Generator().manual_seed(1000 + step)
    rule = torch.randperm(VOCABULARY // 8, generator=torch.Generator().manual_seed(7))
    tokens = torch.randint(0, len(rule), (BATCH, LENGTH), generator=generator)
    noise = torch.rand(BATCH, LENGTH, generator=generator) < 0.1
    for position in range(1, LENGTH):
        follows = rule[tokens[:, position - 1]]
        tokens[:, position] = torch.where(noise[:, position], tokens[:, position], follows)
    return tokens


def train(engine: Any, steps: range, device: torch.device) -> list[float]:
    """One optimizer step for each step number. Returns the loss of the global batch before each."""
    rank, world = dist.get_rank(), dist.get_world_size()
    losses = []
    for step in steps:
        tokens = batch(step).chunk(world)[rank].to(device)
        loss = engine(input_ids=tokens, labels=tokens).loss
        engine.backward(loss)
        engine.step()
        mean = loss.detach().double() / world
        dist.all_reduce(mean)
        losses.append(mean.item())
    return losses


def save_truth(engine: Any, path: Path) -> None:
    state, progress = gather_state(engine), describe_progress(engine)
    if dist.get_rank() == 0:
        torch.save({"state": state, "progress": progress}, path)


def compare_with_truth(engine: Any, path: Path) -> dict[str, Any]:
    """Counts the tensors that are bit for bit what the source engine held when it saved, and names all that differs."""
    saved = torch.load(path, weights_only=True)
    truth: State = saved["state"]
    state, progress = gather_state(engine), describe_progress(engine)
    wanted = {(name, key) for name in truth for key in truth[name]}
    found = {(name, key) for name in state for key in state[name]}
    differing = [f"{name} ({key}): missing or too many" for name, key in sorted(wanted ^ found)]
    for name, key in sorted(wanted & found):
        if not torch.equal(state[name][key], truth[name][key]):
            differing.append(f"{name} ({key})")
    differing += [f"{name} (weight)" for name in weights_that_are_not_the_rounded_masters(engine, state)]
    for key, value in saved["progress"].items():
        if progress[key] != value:
            differing.append(f"{key}: {progress[key]}, saved as {value}")
    return {"tensors": len(wanted), "differing": differing}


if __name__ == "__main__":
    main()
