"""Jobs for ranks: runs under FSDP whose checkpoints Accelerate writes, and runs that resume from them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

import ucp
from tests.engines.fsdp import STEPS, Live, Mesh, State

FURTHER = 3


@dataclass(frozen=True, eq=False)
class Run:
    """What a run held when it saved or after it had loaded, and the losses of its steps after that."""

    state: State
    further: tuple[float, ...]
    step: int | None = None


def accelerate_saves(folder: str, mesh: Mesh, forms: tuple[str, ...] = ("dcp", "ranks", "full")) -> Run:
    """An FSDP2 run that is saved in every form that Accelerate has for it: ``dcp``, ``ranks``, ``full``.

    further: of a run that Accelerate itself has resumed, in the same layout.
    """
    from accelerate import PartialState
    from accelerate.checkpointing import save_accelerator_state
    from accelerate.utils.fsdp_utils import (
        load_fsdp_model,
        load_fsdp_optimizer,
        save_fsdp_model,
        save_fsdp_optimizer,
    )

    PartialState(cpu=True)  # for Accelerate's log
    live = Live(mesh)
    live.train(0, STEPS, scheduler=True)
    for form in forms:
        plugin, accelerator, path = _plugin(form), _accelerator(), str(Path(folder) / form)
        options: dict[str, Any] = {"use_dcp": form == "dcp"}
        save_fsdp_model(plugin, accelerator, live.model, path, **options)
        save_fsdp_optimizer(plugin, accelerator, live.optimizer, live.model, path, **options)
        dist.barrier()
        # What Accelerator.save_state does besides under FSDP.
        save_accelerator_state(path, [], [], [live.scheduler] if not dist.get_rank() else [], [], dist.get_rank(), 4)
    state = live.state()
    if "dcp" not in forms:
        return Run(state, ())
    again = Live(Mesh(**{**vars(mesh), "seed": 9}))
    again.train(0, 1)
    load_fsdp_model(_plugin("dcp"), _accelerator(), again.model, str(Path(folder) / "dcp"))
    load_fsdp_optimizer(_plugin("dcp"), _accelerator(), again.optimizer, again.model, str(Path(folder) / "dcp"))
    again.scheduler.load_state_dict(live.scheduler.state_dict())
    return Run(state, tuple(again.train(STEPS, FURTHER, scheduler=True)))


def _plugin(form: str) -> Any:
    from accelerate import FullyShardedDataParallelPlugin

    kind = "FULL_STATE_DICT" if form == "full" else "SHARDED_STATE_DICT"
    return FullyShardedDataParallelPlugin(fsdp_version=2, state_dict_type=kind)


def _accelerator() -> Any:
    """What Accelerate's functions ask of it; on the CPU an Accelerator takes every rank for a job of its own."""
    from types import SimpleNamespace

    return SimpleNamespace(
        process_index=dist.get_rank(),
        num_processes=dist.get_world_size(),
        is_main_process=not dist.get_rank(),
        is_fsdp2=True,
        wait_for_everyone=dist.barrier,
    )


def resume(source: str, mesh: Mesh) -> Run:
    """A run with other weights that loads a checkpoint, and trains on."""
    live = Live(Mesh(**{**vars(mesh), "seed": 7}))
    report = ucp.load_training(source, model=live.model, optimizer=live.optimizer, lr_scheduler=live.scheduler)
    return Run(live.state(), tuple(live.train(STEPS, FURTHER, scheduler=True)), report.step)


def torch_writers(folder: str) -> dict[str, Any]:
    """What DCP's rarer writers leave. Returns the whole tensors that were saved."""
    import torch
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.filesystem import FileSystemWriter, SerializationFormat
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    torch.manual_seed(0)
    whole = {
        "model.rows": torch.randn(7, 4),
        "model.columns": torch.randn(3, 5).bfloat16(),
        "model.same": torch.randn(5),
        "model.plain": torch.arange(3.0),
    }
    cuts = {"model.rows": Shard(0), "model.columns": Shard(1), "model.same": Replicate()}
    state = {n: distribute_tensor(t, mesh, [cuts[n]]) if n in cuts else t for n, t in whole.items()}
    shards = dcp.HuggingFaceStorageWriter(path=f"{folder}/shards", save_distributed=True)
    dcp.save(state, storage_writer=shards)
    form = SerializationFormat.SAFETENSORS
    dcp.save(state, storage_writer=FileSystemWriter(f"{folder}/safetensors", serialization_format=form))
    return whole


def fsdp1_local(folder: str) -> None:
    """FSDP1's LOCAL_STATE_DICT, by DCP."""
    import torch
    import torch.distributed.checkpoint as dcp
    from torch.distributed.fsdp import FullyShardedDataParallel, StateDictType

    layers = torch.nn.Sequential(torch.nn.Linear(6, 4), torch.nn.Linear(4, 3))
    model = FullyShardedDataParallel(layers, device_id=torch.device("cpu"), use_orig_params=False)
    with FullyShardedDataParallel.state_dict_type(model, StateDictType.LOCAL_STATE_DICT):
        dcp.save({"model": model.state_dict()}, checkpoint_id=folder)


def torch_checkpointing_saves(folder: str, mesh: Mesh) -> Run:
    """An FSDP2 run that torch_checkpointing saves, with metadata for other layouts (``told``) and without (``bare``).

    further: of a run that the library itself has resumed, in the same layout.
    """
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    live = Live(mesh)
    live.train(0, STEPS, scheduler=True)
    for form in ("told", "bare"):
        model, optimizer = get_state_dict(live.model, live.optimizer)
        items = {"model": model, "optimizer": optimizer, "lr_scheduler": live.scheduler.state_dict()}
        manager = _manager(form == "told")
        manager.save(f"{folder}/{form}", {**items, "step": STEPS, "loader": {f"dp_rank_{dist.get_rank()}": 7}})
        manager.close()
    state = live.state()
    again = Live(Mesh(**{**vars(mesh), "seed": 9}))
    again.train(0, 1)
    model, optimizer = get_state_dict(again.model, again.optimizer)
    manager = _manager(True)
    loaded = manager.load(f"{folder}/told", into={"model": model, "optimizer": optimizer})
    manager.close()
    set_state_dict(again.model, again.optimizer, model_state_dict=loaded["model"], optim_state_dict=loaded["optimizer"])
    again.scheduler.load_state_dict(live.scheduler.state_dict())
    return Run(state, tuple(again.train(STEPS, FURTHER, scheduler=True)))


def _manager(told: bool) -> Any:
    """The library's manager without its direct writes. It gathers metadata on CUDA devices only; here, as objects."""
    from torch_checkpointing import CheckpointManager, ItemSpec
    from torch_checkpointing.default_resharder import DefaultResharder
    from torch_checkpointing.metadata_manager import DefaultMetadataManager
    from torch_checkpointing.storage.filesystem import LocalFileSystemStorageConfig

    def gather(_: Any, data: Any, process_group: Any = None) -> dict[int, Any]:
        found: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(found, data, group=process_group)
        return dict(enumerate(found))

    DefaultMetadataManager._all_gather_pickled_data = gather
    config = CheckpointManager.Config.with_sync_save()
    config.storage_config = LocalFileSystemStorageConfig(use_direct_io=False)
    if told:
        config.items.update({name: ItemSpec(resharder=DefaultResharder()) for name in ("model", "optimizer")})
    return config.build()
