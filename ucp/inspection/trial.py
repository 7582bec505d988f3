"""Find out by running what shapes and copies cannot show: whether a model merged by a spec computes what its shards do.

The sharded model runs as it was trained, one process for each tensor-parallel rank, each with that rank's own weights.
The merged one runs in this process. Both compute in float64 on the same tokens, so their logits differ by little more
than what a model itself rounds (many take norms in float32); weights put together wrongly differ by far more.
"""

from __future__ import annotations

import importlib
import json
import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import Tensor, nn

from ucp import limits
from ucp.errors import BadArgument, Mismatch, Unsupported
from ucp.inspection.shards import Shards, bits, solved
from ucp.spec.bound import Bound
from ucp.spec.check import merge
from ucp.storage import locations

# The built-in factory: transformers' model of the checkpoint's config, cut by DeepSpeed's AutoTP.
AUTOTP = "autotp"

Factory = Callable[[int, int], nn.Module]


@dataclass(frozen=True)
class Trial:
    """difference: the largest difference of any logit. scale: the largest logit."""

    difference: float
    scale: float

    @property
    def agrees(self) -> bool:
        return self.difference <= limits.TRIAL_TOLERANCE_RATIO * self.scale


def try_model(
    bound: Bound, shards: Shards, factory: str, config: Mapping[str, Any] | None = None, tokens: Tensor | None = None
) -> Trial:
    """Compare the logits of the merged model with those of the sharded one.

    factory: 'autotp', or ``MODULE:FUNCTION``. The function gets the number of tensor-parallel ranks and this rank's own
    number, and makes a module. The module's parameters have the checkpoint's local names. It maps token numbers,
    (batch, length) int64, to logits: a tensor, or the attribute ``logits`` of what it returns. With several ranks the
    function is called in one process for each, in a torch.distributed group of just these. config: the model's, for
    'autotp'. tokens: the default is four rows of four numbers below the spec's 'vocab' (or 16).

    Raises BadArgument for an unknown factory, Mismatch if weights don't fit its modules, Unsupported for models with
    experts over several ranks.
    """
    tp = shards.layout.tp
    if tp == 1:
        raise BadArgument(f"{shards.path}: one tensor-parallel rank saved it, so there are no shards to try (--model)")
    if shards.layout.ep > 1:
        raise Unsupported("models whose experts lie on several ranks can't be tried; tensor parallelism alone can")
    if tokens is None:
        tokens = (torch.arange(16) * 7 % min(bound.sizes.get("vocab", 16), 1 << 30)).view(4, 4)
    slices = {name: shards.tensors(name) for name in shards.names}
    with tempfile.TemporaryDirectory(prefix="ucp-trial-") as folder:
        Path(folder, "config.json").write_text(json.dumps(dict(config or {}), default=str))
        torch.save(tokens, Path(folder, "tokens"))
        torch.save(_merged(bound, shards, slices), Path(folder, "whole"))
        for rank in range(tp):
            torch.save({name: held[rank] for name, held in slices.items()}, Path(folder, f"rank{rank}"))
        whole = _run(factory, folder, "whole", 1, 0)
        torch.multiprocessing.start_processes(_rank, (factory, folder, tp), nprocs=tp, start_method="spawn")
        sharded: Tensor = torch.load(Path(folder, "logits"))
    if sharded.shape != whole.shape:
        raise Mismatch(f"the sharded model's logits are {list(sharded.shape)}, the merged one's {list(whole.shape)}")
    return Trial(float((whole - sharded).abs().max()), float(whole.abs().max()))


def _merged(bound: Bound, shards: Shards, slices: Mapping[str, Mapping[int, Tensor]]) -> dict[str, Tensor]:
    """All parameters and buffers, put together by the spec."""
    expressions, cuttings = solved(bound, shards)
    out = {}
    for name, held in slices.items():
        first = next(iter(held.values()))
        if name not in expressions:
            out[name] = first
            continue
        if expressions[name].average is not None:
            raise Unsupported(f"'{name}' is an average of its copies, so the merged model cannot compute what they do")
        parts = [({"tp": rank}, bits(tensor)) for rank, tensor in held.items()]
        whole = merge(expressions[name], bound.sizes, cuttings[name], parts, name)
        out[name] = torch.from_numpy(whole).view(first.dtype) if whole.size else first
    return out


def _rank(rank: int, factory: str, folder: str, tp: int) -> None:
    """One process of the sharded model."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=tp)
    try:
        logits = _run(factory, folder, f"rank{rank}", tp, rank)
        if rank == 0:
            torch.save(logits, Path(folder, "logits"))
        dist.barrier()
    finally:
        dist.destroy_process_group()
    # All is done. A normal exit is avoided: a gloo thread that still drops a tensor aborts it (torchdist/README.md).
    os._exit(0)


@torch.no_grad()
def _run(factory: str, folder: str, weights: str, tp: int, rank: int) -> Tensor:
    module = _maker(factory, folder)(tp, rank)
    _put(module, torch.load(Path(folder, weights)), f"tp rank {rank} of {tp}")
    out = module.double().eval()(torch.load(Path(folder, "tokens")))
    return getattr(out, "logits", out).double()


def _put(module: nn.Module, weights: Mapping[str, Tensor], where: str) -> None:
    """Fill all parameters and persistent buffers. One that is longer (padding of another width) ends in zeros."""
    for name, own in module.state_dict(keep_vars=True).items():
        if name not in weights:
            if any(other is own for other, tied in _tied(module, weights) if tied != name):
                continue
            raise Mismatch(f"{where}: the model has '{name}' {list(own.shape)}, which the checkpoint lacks")
        given = weights[name]
        if given.dim() != own.dim() or any(g > o for g, o in zip(given.shape, own.shape, strict=True)):
            raise Mismatch(
                f"{where}: '{name}' is {list(own.shape)} in the model, {list(given.shape)} in the checkpoint"
            )
        own.data.zero_()
        own.data[tuple(slice(n) for n in given.shape)] = given.to(own.dtype)


def _tied(module: nn.Module, weights: Mapping[str, Tensor]) -> list[tuple[Tensor, str]]:
    return [(t, name) for name, t in module.state_dict(keep_vars=True).items() if name in weights]


def _maker(factory: str, folder: str) -> Factory:
    if factory == AUTOTP:
        return _autotp(json.loads(locations.read(Path(folder, "config.json"))))
    module, _, function = factory.partition(":")
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise BadArgument(f"--model {factory}: can't be imported ({error}); write MODULE:FUNCTION") from None
    return found


def _autotp(config: Mapping[str, Any]) -> Factory:
    """transformers' causal language model of this config, cut as DeepSpeed's AutoTP cuts it."""
    from transformers import AutoConfig, AutoModelForCausalLM

    kind = str(config.get("model_type"))
    try:
        found = AutoConfig.for_model(**{"model_type": kind, **config})
    except (ValueError, KeyError):
        raise BadArgument(
            f"--model autotp: needs the config.json of a transformers model (--config); its model_type is {kind!r}"
        ) from None

    def make(tp: int, rank: int) -> nn.Module:
        model: nn.Module = AutoModelForCausalLM.from_config(found)
        if tp == 1:
            return model
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        import deepspeed

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # compiled at first use, and not needed here
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(tp), "LOCAL_SIZE": str(tp)}
        deepspeed.init_distributed("gloo")
        engine, *_ = deepspeed.initialize(
            model=model, config={"train_micro_batch_size_per_gpu": 1, "tensor_parallel": {"autotp_size": tp}}
        )
        module: nn.Module = engine.module
        return module

    return make
