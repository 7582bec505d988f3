"""Jobs that run on the ranks: transformers' models trained by DeepSpeed, and model folders loaded into engines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tests.engines.configs import Case, make_config
from tests.engines.truth import Truth, gather
from tests.spec.models import MODELS


def inputs(model: str) -> dict[str, torch.Tensor]:
    """The same tokens for everybody."""
    tokens = torch.randint(3, 101, (2, 7), generator=torch.Generator().manual_seed(5))
    return (
        {"input_ids": tokens, "decoder_input_ids": tokens.flip(0)} if model.startswith("t5") else {"input_ids": tokens}
    )


def logits(model: str, module: Any) -> torch.Tensor:
    """What a module computes of them, without dropout."""
    module.eval()
    with torch.no_grad():
        return module(**inputs(model), use_cache=False).logits.cpu()


def build(model: str, seed: int) -> Any:
    torch.manual_seed(seed)
    module: Any = MODELS[model].make("cpu")
    return plain(module).train()


def plain(module: Any) -> Any:
    """The module with experts computed one by one: torch's grouped product takes no such small ones."""
    module.set_experts_implementation("eager")
    return module


def train(model: str, cases: list[tuple[Case, str]]) -> list[torch.Tensor]:
    """Train an engine of every case, save it in its folder, the model's config in ``like`` there; the live logits."""
    import deepspeed

    found = []
    for case, folder in cases:
        module = build(model, 0)
        module.config.save_pretrained(Path(folder) / "like")
        engine, *_ = deepspeed.initialize(
            model=module, config=make_config(case), model_parameters=list(module.parameters())
        )
        for _ in range(2):
            out = engine(**inputs(model), use_cache=False).logits.float()
            engine.backward(torch.nn.functional.cross_entropy(out.flatten(0, 1), inputs(model)["input_ids"].flatten()))
            engine.step()
        engine.save_checkpoint(folder, "trained")
        found.append(logits(model, engine))
    return found


def load(model: str, case: Case, folder: str) -> tuple[Truth | None, torch.Tensor]:
    """Load a model folder's weights into an engine that began with others; what it holds then, and its logits."""
    import ucp.deepspeed
    from ucp.errors import Mismatch

    module = build(model, 1)
    config = make_config(case) | {"ucp": {"enabled": True}}
    engine, *_ = ucp.deepspeed.initialize(model=module, config=config, model_parameters=list(module.parameters()))
    try:
        engine.load_checkpoint(folder)
        raise RuntimeError("a folder without an optimizer was taken for a whole checkpoint")
    except Mismatch as error:
        if "optimizer's states" not in error.whole:
            raise
    path, _ = engine.load_checkpoint(folder, load_module_only=True)
    if path is None:
        raise FileNotFoundError(folder)
    return gather(engine), logits(model, engine)


def train_adapter(case: Case, folder: str, base: str) -> torch.Tensor:
    """Train a LoRA adapter on the model folder ``base``, save it by DeepSpeed, and its config in ``like``."""
    import deepspeed
    import peft
    import transformers

    torch.manual_seed(3)
    lora = peft.LoraConfig(r=3, target_modules=["q_proj", "down_proj"], modules_to_save=["norm"], use_dora=True)
    module = peft.get_peft_model(transformers.AutoModelForCausalLM.from_pretrained(base), lora)
    lora.save_pretrained(Path(folder) / "like")
    trained = [p for p in module.parameters() if p.requires_grad]
    engine, *_ = deepspeed.initialize(model=module, config=make_config(case), model_parameters=trained)
    for _ in range(2):
        out = engine(**inputs("llama"), use_cache=False).logits.float()
        engine.backward(torch.nn.functional.cross_entropy(out.flatten(0, 1), inputs("llama")["input_ids"].flatten()))
        engine.step()
    engine.save_checkpoint(folder, "trained")
    return logits("llama", engine)
