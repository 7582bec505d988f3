"""Jobs that run on the ranks: experts with pipelines, tensor and sequence parallelism, as DeepSpeed has them."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tests.engines import autoep, moe_models, sequences
from tests.engines.autoep import AutoCase
from tests.engines.configs import Case
from tests.engines.zygote import resolve

OURS = "ucp.deepspeed:initialize"
STOCK = "deepspeed:initialize"
PLANNED = {"tensor_parallel": {"autotp_size": 2}}


class Mixture(nn.Module):
    """A layer of experts of which two ranks have two each."""

    def __init__(self, ep: int = 2) -> None:
        from deepspeed.moe.layer import MoE

        super().__init__()
        self.moe = MoE(moe_models.HIDDEN, moe_models.Expert(False), num_experts=4, ep_size=ep, drop_tokens=False)

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + self.moe(hidden)[0]


def pipeline(
    initialize: str,
    extra: dict[str, Any],
    stage: int = 1,
    stages: int = 2,
    ep: int = 2,
    seed: int = 0,
    last: bool = False,
    method: str = "uniform",
) -> Any:
    """Two stages of two ranks, each with experts. last: only the last one has some, and a scheduler has an entry for
    each param group. method: how layers are divided."""
    from deepspeed.pipe import PipelineModule

    if last and stage:
        norms_of_stages()
    torch.manual_seed(seed)
    size = moe_models.HIDDEN
    layers = [nn.Linear(size, size), nn.Linear(size, size) if last else Mixture(ep), nn.Linear(size, size), Mixture(ep)]
    model = PipelineModule(layers, num_stages=stages, loss_fn=nn.functional.mse_loss, partition_method=method)
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 2,
        "steps_per_print": 10**6,
        "zero_optimization": {"stage": stage},
        "optimizer": {"type": "AdamW", "params": {"torch_adam": True}},
        "gradient_clipping": 0.0,
    }
    more = {"lr_scheduler": lambda inner: torch.optim.lr_scheduler.ExponentialLR(inner, 0.9)} if last else {}
    given = {"model": model, "model_parameters": list(model.parameters()), "config": config | extra}
    return resolve(initialize)(**given, **more)[0]


def norms_of_stages() -> None:
    """ZeRO asks all stages for the norm of each param group, and those without experts have one group less."""
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    optimizer: Any = DeepSpeedZeroOptimizer
    optimizer._model_parallel_all_reduce = lambda self, tensor, op: None


def step_of_pipeline(engine: Any) -> float:
    shape = (2, 3, moe_models.HIDDEN)
    loss = engine.train_batch(iter([(torch.randn(shape), torch.randn(shape)) for _ in range(2)]))
    return float(loss)


def further_steps(engine: Any) -> list[float]:
    torch.manual_seed(100 + dist.get_rank())
    return [step_of_pipeline(engine) for _ in range(3)]


def live_in_stages(source: str, folder: str, stage: int, stages: int, ep: int, last: bool = False) -> Any:
    """This project's engine of a pipeline with experts: loads, saves, and takes three steps."""
    from tests.engines import moe

    section = {"enabled": True, "load": {"prove": "always"}, "save": {"async": False}}
    engine = pipeline(OURS, {"ucp": section}, stage, stages, ep, 7, last)
    engine.load_checkpoint(source)
    report, truth = engine.ucp.last_load, moe.gather(engine)
    engine.save_checkpoint(folder)
    return (None if truth is None else dict(truth.params)), report.proof.complete, further_steps(engine), report.nbytes


def stock_in_stages(source: str, stage: int, stages: int, ep: int, last: bool = False) -> Any:
    """The same by DeepSpeed alone, without saving. last: only the last stage has experts, and nothing else."""
    from tests.engines import moe

    engine = pipeline(STOCK, {}, stage, stages, ep, 9, last, "parameters" if last else "uniform")
    if engine.load_checkpoint(source)[0] is None:
        raise FileNotFoundError(source)
    truth = moe.gather(engine)
    return (None if truth is None else dict(truth.params)), further_steps(engine)


def in_stages(folder: str, stage: int, last: bool = False) -> Any:
    """Stock DeepSpeed's pipeline, trained and saved; what all its ranks hold, on the first rank, and further losses."""
    from tests.engines import moe

    engine = pipeline(STOCK, {}, stage, last=last)
    torch.manual_seed(dist.get_rank())
    step_of_pipeline(engine)
    truth = moe.gather(engine)
    engine.save_checkpoint(folder)
    return ({} if truth is None else dict(truth.params)), further_steps(engine)


def sliced(initialize: str, extra: dict[str, Any], ep: int = 2, seed: int = 0) -> Any:
    """DeepSpeed's own experts under AutoTP, each over two of four ranks."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 12, bias=False), nn.Linear(12, 6, bias=False), Mixture(ep))
    cut = [{"patterns": [r"^0.weight$"], "partition_type": "column"}]
    cut += [{"patterns": [r"^1.weight$"], "partition_type": "row"}]
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "zero_optimization": {"stage": 1},
        "optimizer": {"type": "AdamW", "params": {"torch_adam": True}},
        "tensor_parallel": {
            "autotp_size": 2,
            "partition_config": {"use_default_specs": False, "layer_specs": cut},
        },
    }
    return resolve(initialize)(model=model, model_parameters=list(model.parameters()), config=config | extra)[0]


def step_of_sliced() -> None:
    """Stock DeepSpeed's."""
    engine = sliced(STOCK, {})
    engine.backward(engine(torch.randn(2, 3, moe_models.HIDDEN)).pow(2).mean())


def planned() -> None:
    """Mixtral under AutoEP and AutoTP by transformers' own plan."""
    autoep.build_engine(AutoCase(Case(stage=1, dp=4, model="llama"), ep=2), STOCK, PLANNED)


def ulysses() -> None:
    """Stock DeepSpeed's AutoEP under its own sequence parallelism over two ranks."""
    import deepspeed

    mesh = sequences.mesh(2)
    stock = deepspeed.initialize
    deepspeed.initialize = lambda **more: stock(mpu=mesh, **more)
    autoep.build_engine(AutoCase(Case(stage=1, dp=4, model="llama"), ep=2))
