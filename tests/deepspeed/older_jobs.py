"""A job for ranks: engines of the installed DeepSpeed go on from checkpoints that other releases wrote."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file

FILES = Path(__file__).resolve().parents[1] / "formats/deepspeed/older"
STEPS = 3
"""How many steps the checkpoints' runs had taken."""


def folders() -> list[Path]:
    """The checkpoints, each with its truth."""
    return sorted(path.parent for path in FILES.glob("*/truth.safetensors"))


def resumed(name: str, stage: int, native: str) -> list[str]:
    """What of a checkpoint's truth is not live after a resume at this stage, and what else went wrong; [] if nothing.

    Once by our plugin from the files as they are, and once by stock DeepSpeed from what they were converted to
    (``native``, which the first rank makes).
    """
    import deepspeed

    import ucp
    import ucp.deepspeed

    truth, world = load_file(FILES / name / "truth.safetensors"), dist.get_world_size()
    make = _make()
    ours = _engine(make, name, stage, ucp.deepspeed.initialize, {"ucp": {"enabled": True}})
    path, client_state = ours.load_checkpoint(str(FILES / name))
    wrong = _differences(make, ours, stage, truth)
    wrong += [f"{path}: {client_state}"] * (client_state != {"note": "older"})
    wrong += _train(ours)
    if dist.get_rank() == 0:
        ucp.convert(FILES / name, native, to="deepspeed", layout=f"dp={world},zero={stage}")
    dist.barrier()
    stock = _engine(make, name, stage, deepspeed.initialize, {})
    stock.load_checkpoint(native)
    wrong += [f"stock: {line}" for line in _differences(make, stock, stage, truth)]
    return wrong + _train(stock)


def _make() -> ModuleType:
    """The script that made the checkpoints: its model, and its own way to read an engine's buffers."""
    spec = importlib.util.spec_from_file_location("older_make", FILES / "make.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _engine(make: ModuleType, name: str, stage: int, initialize: Any, more: dict[str, Any]) -> Any:
    torch.manual_seed(7)  # other weights than the checkpoint's
    model = make.Model()
    config = make.config_of(stage, name.split("-")[2])
    return initialize(model=model, optimizer=make.optimizer_of(model, tiny="tiny" in name), config=config | more)[0]


def _differences(make: ModuleType, engine: Any, stage: int, truth: dict[str, torch.Tensor]) -> list[str]:
    """Elements of this rank's buffers that differ from the truth. Frozen weights are compared whole."""
    import deepspeed

    wrong = [] if engine.global_steps == STEPS else [f"{engine.global_steps} steps"]
    for name, state, first, values in make.pieces(engine, stage):
        wanted = truth[f"{name}|{state}"].reshape(-1)[first : first + values.numel()]
        if not torch.equal(values, wanted):
            wrong.append(f"{name}|{state} from {first}")
    with deepspeed.zero.GatheredParameters([engine.module.frozen]):
        if not torch.equal(engine.module.frozen.detach(), truth["frozen|param"]):
            wrong.append("frozen")
    return wrong


def _train(engine: Any) -> list[str]:
    """Take a step, as a run that goes on does; what is wrong with it."""
    loss = engine((torch.arange(6).reshape(2, 3) + dist.get_rank()) % 11)
    engine.backward(loss)
    engine.step()
    return [] if loss.isfinite() and engine.global_steps == STEPS + 1 else [f"the next step: loss {loss.item()}"]
