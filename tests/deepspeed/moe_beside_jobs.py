"""Jobs that run on the ranks: experts beside slices of tensors and beside shared sequences, and what all ranks hold."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import ucp.deepspeed
from tests.deepspeed import moe_parallel_jobs as parallel
from tests.engines import autoep, moe, moe_models, sequences, truth
from tests.engines.autoep import AutoCase
from tests.engines.moe import MoeCase
from tests.engines.resume import continue_training
from tests.engines.runs import FURTHER, STEPS, Run

LOAD = {"ucp": {"enabled": True, "load": {"prove": "always"}, "save": {"async": False}}}
CUT = {"0.weight": 0, "1.weight": 1}  # the axes along which AutoTP cuts `moe_parallel_jobs.sliced`


def gather_flat() -> None:
    """DeepSpeed's layers of experts gather tokens into a flat buffer, which NCCL takes and gloo does not ("invalid
    tensor size"). The same elements, given flat, arrive in the same order."""
    import deepspeed

    stock = deepspeed.comm.all_gather_into_tensor
    deepspeed.comm.all_gather_into_tensor = lambda out, own, *more, **how: stock(out, own.reshape(-1), *more, **how)


def _share_sequences(own: bool | None) -> None:
    """Engines of this process get a mesh of which two ranks share each sequence. own: DeepSpeed's, which its layers of
    experts take for one of slices; None for none."""
    import deepspeed

    if own is None:
        return
    gather_flat()
    mesh = sequences.mesh(2) if own else sequences.SequenceMesh(2)
    for module in (deepspeed, ucp.deepspeed):
        module.initialize = partial(module.initialize, mpu=mesh)


def trained_beside_sequences(case: MoeCase | AutoCase, folder: str) -> Run:
    """Stock DeepSpeed's, trained and saved."""
    _share_sequences(False)
    return moe.train(case, folder) if isinstance(case, MoeCase) else autoep.train(case, folder)


def loaded_beside_sequences(case: MoeCase | AutoCase, folder: str, save: str, own: bool | None) -> Any:
    """What an engine of this project holds after a load, whether all was proved, further losses, and what it warned of
    its training."""
    _share_sequences(own)
    kind: Any = moe if isinstance(case, MoeCase) else autoep
    warned: list[str] = []
    listener = logging.Handler()
    listener.emit = lambda record: warned.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("ucp").addHandler(listener)
    engine = kind.build_engine(case, parallel.OURS, LOAD)
    engine.load_checkpoint(folder)
    complete, found = engine.ucp.last_load.proof.complete, kind.gather(engine)
    engine.save_checkpoint(save)
    # DeepSpeed's own mesh has ranks exchange tokens in pieces of unequal sizes.
    return found, complete, [] if own else continue_training(engine, case.case, STEPS, FURTHER + 1), warned


def held(engine: Any, tp: int, cut: Mapping[str, int]) -> dict[str, dict[str, Tensor]] | None:
    """Masters and states of the whole model on rank 0: experts from all ranks, all else from the ranks of each slice.
    cut: the axes of what is cut. Collective."""
    renamed = moe.global_names(engine.module)
    names = {p: renamed.get(n, n) for n, p in engine.module.named_parameters()}
    pieces = [piece for slot in moe.slots(engine, names) for piece in truth.pieces_of(slot) if piece.values.numel()]
    everyone: list[Any] = [None] * dist.get_world_size()
    mine = (pieces, {name: parameter.shape for parameter, name in names.items()})
    dist.gather_object(mine, everyone if dist.get_rank() == 0 else None)
    if dist.get_rank() != 0:
        return None
    out = _assembled(everyone, lambda name: "deepspeed_experts" in name)
    lanes = [_assembled(everyone[slice_::tp], lambda name: "deepspeed_experts" not in name) for slice_ in range(tp)]
    for name, states in lanes[0].items():
        out[name] = {state: _whole(name, [lane[name][state] for lane in lanes], cut) for state in states}
    return out


def _assembled(everyone: list[Any], wanted: Any) -> dict[str, dict[str, Tensor]]:
    shapes: Mapping[str, Any] = {name: shape for _, found in everyone for name, shape in found.items()}
    return truth.assembled(
        [piece for pieces, _ in everyone for piece in pieces if wanted(piece.name)],
        {name: shape for name, shape in shapes.items() if wanted(name)},
    )


def _whole(name: str, slices: list[Tensor], cut: Mapping[str, int]) -> Tensor:
    if name in cut and len(slices) > 1:
        return torch.cat(slices, cut[name])
    if not all(torch.equal(slices[0], other) for other in slices):
        raise ValueError(f"slices hold other values of '{name}'")
    return slices[0]


def _sliced(initialize: str, extra: dict[str, Any], tp: int, ep: int, stage: int, seed: int) -> Any:
    gather_flat()
    config = {"zero_optimization": {"stage": stage}, **extra} | ({"tensor_parallel": {}} if tp == 1 else {})
    return parallel.sliced(initialize, config, ep, seed)


def _steps(engine: Any, tp: int, first: int, count: int) -> list[float]:
    losses = []
    for step in range(first, first + count):
        whole = torch.randn((8, 3, moe_models.HIDDEN), generator=torch.Generator().manual_seed(step))
        share = whole.chunk(dist.get_world_size() // tp)[dist.get_rank() // tp]
        loss = engine(share).pow(2).mean()
        engine.backward(loss)
        engine.step()
        mean = loss.detach().double()
        dist.all_reduce(mean)
        losses.append(mean.item() / dist.get_world_size())
    return losses


def trained_beside_slices(folder: str, tp: int, ep: int, stage: int) -> Any:
    """Stock DeepSpeed's own layers of experts, trained and saved."""
    engine = _sliced(parallel.STOCK, {}, tp, ep, stage, 0)
    _steps(engine, tp, 0, 2)
    found = held(engine, tp, CUT)
    engine.save_checkpoint(folder)
    return found, _steps(engine, tp, 2, 3)


def loaded_beside_slices(folder: str, save: str, tp: int, ep: int, stage: int) -> Any:
    """What an engine of this project holds after a load, whether all was proved, further losses, and bytes read."""
    engine = _sliced(parallel.OURS, LOAD, tp, ep, stage, 7)
    engine.load_checkpoint(folder)
    report, found = engine.ucp.last_load, held(engine, tp, CUT)
    engine.save_checkpoint(save)
    return found, report.proof.complete, _steps(engine, tp, 2, 3), report.nbytes


def _in_stages(initialize: str, extra: dict[str, Any], stages: int, tp: int, ep: int, seed: int) -> Any:
    """Two layers of experts in so many stages, on four ranks."""
    from deepspeed.pipe import PipelineModule
    from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology

    gather_flat()
    torch.manual_seed(seed)
    size = moe_models.HIDDEN
    layers = [nn.Linear(size, size), parallel.Mixture(ep), nn.Linear(size, size), parallel.Mixture(ep)]
    topology = PipeModelDataParallelTopology(stages, tp, 4 // stages // tp)
    model = PipelineModule(layers, topology=topology, loss_fn=nn.functional.mse_loss, partition_method="uniform")
    config = {
        "train_batch_size": 8,
        "gradient_accumulation_steps": 2,
        "zero_optimization": {"stage": 1},
        "optimizer": {"type": "AdamW", "params": {"torch_adam": True}},
    }
    given = {"model": model, "model_parameters": list(model.parameters()), "config": config | extra}
    return parallel.resolve(initialize)(**given)[0]


def _steps_in_stages(engine: Any, first: int, count: int) -> list[float]:
    replica, replicas = engine.grid.get_data_parallel_rank(), engine.grid.get_data_parallel_world_size()
    losses = []
    for step in range(first, first + count):
        random = torch.Generator().manual_seed(step)
        batches = [torch.randn((2, 4, 3, moe_models.HIDDEN), generator=random) for _ in range(2)]
        losses.append(
            float(engine.train_batch(iter([tuple(t.chunk(replicas)[replica] for t in both) for both in batches])))
        )
    return losses


def trained_in_stages_and_slices(folder: str) -> Any:
    """Stock DeepSpeed's own layers of experts in two stages of two slices, trained and saved."""
    engine = _in_stages(parallel.STOCK, {}, 2, 2, 2, 0)
    _steps_in_stages(engine, 0, 2)
    found = held(engine, 2, {})
    engine.save_checkpoint(folder)
    return found
