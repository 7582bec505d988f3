"""A small checkpoint of every format, and all that can be read of one.

A format gives the same bytes wherever and whenever it is made, so that the seed of a mutation means the same anywhere.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import pickle
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

import ucp
from tests.attacks import foreign, ours
from tests.formats import raw
from tests.formats.dcp import states
from ucp.catalog import ParamGroup, TrainingState
from ucp.formats.universal import manifest

FOREIGN = tuple(foreign.MAKERS)
OLDER = Path(__file__).parents[1] / "formats/deepspeed/older"
FORMATS = ("zero0", "zero1", "zero3", "dcp", "huggingface", "bin", "fragmented", "consolidated", "virtual", *FOREIGN)
PLACED = tuple(ours.MAKERS)
"""Those whose bytes say where they were made."""
_OLDER = {"zero0": "0.14.4-z0-bf16", "zero1": "0.14.4-z1-bf16", "zero3": "0.14.4-z3-fp32"}
CONFIG = {"model_type": "llama", "hidden_size": 7, "vocab_size": 13, "architectures": ["Nobody"]}


def make(name: str, folder: Path) -> Path:
    """Write the checkpoint of that format at ``folder/run`` (a run's folder or the checkpoint itself)."""
    run = folder / "run"
    if name in _OLDER:
        shutil.copytree(OLDER / _OLDER[name], run)
        (run / "truth.safetensors").unlink()
        (run / "made_with.json").unlink()
    elif name in FOREIGN:
        foreign.MAKERS[name](run)
    elif name in PLACED:
        ours.MAKERS[name](run)
    elif name == "dcp":
        import torch.distributed.checkpoint as dcp

        dcp.save(states.nested(), checkpoint_id=run, no_dist=True)
        _anonymous(run / ".metadata")
    elif name == "megatron ranks":
        _megatron_ranks(run)
    elif name in ("huggingface", "bin"):
        from safetensors.torch import save_file

        run.mkdir(parents=True)
        drawn = torch.Generator().manual_seed(1)
        tensors = {
            "model.embed.weight": torch.randn(13, 7, generator=drawn),
            "model.norm.weight": torch.randn(7, generator=drawn).bfloat16(),
        }
        (run / "config.json").write_text(json.dumps(CONFIG))
        if name == "bin":
            torch.save(tensors, run / "pytorch_model.bin")
        else:
            for k, (key, tensor) in enumerate(tensors.items(), 1):
                save_file({key: tensor}, run / f"model-{k:05d}-of-00002.safetensors", {"format": "pt"})
            where = {key: f"model-{k:05d}-of-00002.safetensors" for k, key in enumerate(tensors, 1)}
            (run / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    elif name == "fragmented":
        ucp.save(states.nested(), run)
        _sampled_alike(run / manifest.NAME)
    else:
        groups = (ParamGroup(tuple(raw.SHAPES), {"lr": 0.1, "betas": (0.9, 0.99)}),)
        client = {"epoch": 2, "rng": torch.arange(5).numpy(), "seen": {1, 2}}
        state = TrainingState(groups, global_steps=7, client_state=client)
        made = raw.make(folder / "raw", training_state=state, mtime_ns=10**18)
        (raw.virtual_checkpoint if name == "virtual" else _consolidated)(run / "step7", made)
        (run / "latest").write_text("step7")
    return run


def _megatron_ranks(run: Path) -> None:
    """Megatron's older layout on two tensor-parallel ranks, with a distributed optimizer of two buckets."""
    drawn = torch.Generator().manual_seed(1)
    for rank in range(2):
        folder = run / f"iter_0000003/mp_rank_{rank:02d}"
        folder.mkdir(parents=True)
        masters = {
            "embedding.word_embeddings.weight": torch.randn(6, 4, generator=drawn),
            "decoder.layers.0.self_attention.linear_proj.weight": torch.randn(4, 3, generator=drawn),
            "decoder.final_layernorm.weight": torch.ones(4),
        }
        world: dict[str, Any] = {state: torch.zeros(100) for state in ("param", "exp_avg", "exp_avg_sq")}
        for at, master in zip((0, 64, 76), reversed(masters.values()), strict=True):
            world["param"][at : at + master.numel()] = master.reshape(-1)
        world["numel_unpadded"] = 100
        group = {"lr": 0.1, "wd_mult": 1.0, "lr_mult": 1.0, "is_expert_parallel": False, "is_decoupled_lr": False}
        groups = [{**group, "step": 3}, {**group, "wd_mult": 0.0, "step": 3}]
        args = argparse.Namespace(tensor_model_parallel_size=2, pipeline_model_parallel_size=1, world_size=2)
        model = {name: master.bfloat16() for name, master in masters.items()}
        optimizer = {"optimizer": {"param_groups": groups}}
        torch.save(
            {"args": args, "iteration": 3, "model": model, "optimizer": optimizer}, folder / "model_optim_rng.pt"
        )
        buffers = {"buckets_coalesced": True, 0: {(torch.bfloat16, torch.float32): world}}
        torch.save(buffers, folder / "distrib_optim.pt")
    (run / "latest_checkpointed_iteration.txt").write_text("3")


def _anonymous(metadata: Path) -> None:
    """Without the folder that it was written to, and the save's random number."""
    found = pickle.loads(metadata.read_bytes())
    storage = dataclasses.replace(found.storage_meta, checkpoint_id="run", save_id="a save")
    metadata.write_bytes(pickle.dumps(dataclasses.replace(found, storage_meta=storage)))


def _sampled_alike(path: Path) -> None:
    """The seed by which large tensors would be sampled, random in every save, is this one. (All are small.)"""
    body = json.loads(path.read_bytes())
    del body["digest"]
    body["logical_digests"]["seed"] = 1
    path.write_bytes(manifest.frame(body))


def _consolidated(folder: Path, made: raw.Raw) -> Path:
    return raw.write_consolidated(folder, made.catalog)


def files(run: Path) -> list[Path]:
    """All files of the run's folder."""
    return sorted(path for path in run.rglob("*") if path.is_file())


def everything(run: Path, **options: Any) -> Mapping[str, str]:
    """All that reading the checkpoint tells, as texts and digests by name, so that two readings can be compared."""
    out: dict[str, str] = {}
    with ucp.open(run, **options) as opened:
        out["format"] = opened.format
        out["layout"] = str(opened.layout)
        for name, info in opened.parameters.items():
            told = (info.shape, dict(info.states), info.kind, sorted(info.scalars.items()), sorted(info.aliases))
            out[f"parameter {name}"] = repr(told)
            for state in info.states:
                tensor = opened.read(name, state)
                bits = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
                kind = f"{tensor.dtype} {tuple(tensor.shape)}"
                out[f"tensor {name} {state}"] = f"{kind} {hashlib.sha256(bits).hexdigest()}"
        for field, value in vars(opened.training_state).items():
            out[f"state {field}"] = text(value)
    return out


def text(value: Any) -> str:
    """A value of a training state as text, tensors and arrays with all their elements."""
    if isinstance(value, torch.Tensor):
        return f"tensor({value.dtype}, {value.tolist()})"
    if hasattr(value, "tolist"):
        return f"array({value.dtype}, {value.tolist()})"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{text(k)}: {text(v)}" for k, v in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return f"{type(value).__name__}[" + ", ".join(map(text, value)) + "]"
    if hasattr(value, "__dataclass_fields__"):
        return f"{type(value).__name__}({', '.join(text(getattr(value, k)) for k in value.__dataclass_fields__)})"
    return repr(value)
