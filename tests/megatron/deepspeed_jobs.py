"""The DeepSpeed side of runs that go on under Megatron-Core and come back."""

from __future__ import annotations

from typing import Any

import torch

from tests.engines.megatron import families


def train(family: str, bf16: bool, first: int, steps: int, load: str = "", saved: str = "") -> list[float]:
    """The losses of some steps, from number ``first`` on, of a run from a checkpoint or from the family's own values.
    saved: where it saves after the first two."""
    import ucp.deepspeed

    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 2,
        "bf16": {"enabled": bf16},
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": 1},
        "optimizer": {"type": "Adam", "params": {"lr": 1e-3, "weight_decay": 0.0, "torch_adam": True}},
        "ucp": {"enabled": True, "spec": family},
    }
    engine, *_ = ucp.deepspeed.initialize(model=families.transformers_model(family), config=config)
    if load:
        path, _ = engine.load_checkpoint(load)
        assert path is not None
    losses = []
    for number in range(steps):
        if number == 2 and saved:
            engine.save_checkpoint(saved)
            engine.ucp.wait()
        ids, labels = families.batch(first + number)
        logits = engine(input_ids=ids).logits
        loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), labels.flatten())
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses
