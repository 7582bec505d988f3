"""What the ranks of a Megatron run are told to do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core import dist_checkpointing

import ucp.megatron
from tests.engines.megatron import families, run
from tests.engines.megatron.cases import Case


def save(job: dict[str, Any]) -> None:
    """Two steps from values by hash, and a save; ``also``: another save, with another content; ``ranks``: one in
    the older layout; ``ours``: one of ours; ``common_object``: one without common.pt; ``scales``: with FP8's scales."""
    made = run.made(Case(**job["case"]))
    made.scales = job.get("scales", False)
    made.fill()
    for number in range(run.STEPS):
        made.step(number)
    made.save(job["save"])
    for folder, content in job.get("also", {}).items():
        made.save(folder, **content)
    if "common_object" in job:
        made.save_with_common_object(job["common_object"], job["save"])
    if "ranks" in job:
        made.save_rank_folders(job["ranks"])
    if "ours" in job:
        ucp.megatron.save_checkpoint(made.state(), job["ours"])


def save_fsdp(job: dict[str, Any]) -> None:
    """A run under Megatron-FSDP saves itself."""
    from tests.engines.megatron import fsdp  # it changes torch's meshes for the whole process

    fsdp.save(job)


def save_mixers(job: dict[str, Any]) -> None:
    """Mamba's mixers are saved."""
    from tests.engines.megatron import mixers

    mixers.save(job)


def load_mixers(job: dict[str, Any]) -> None:
    """Mamba's mixers are loaded, and compared."""
    from tests.engines.megatron import mixers

    mixers.load(job)


def truths(job: dict[str, Any]) -> None:
    """Every tensor of some folders by Megatron's own loader, each as a file of torch's. load: file -> folder."""
    for file, folder in job["load"].items():
        found = dist_checkpointing.load_plain_tensors(folder)
        torch.save({key: value for key, value in found.items() if isinstance(value, torch.Tensor)}, file)


def load(job: dict[str, Any]) -> None:
    """Stock Megatron loads a folder into a run, everything in it and nothing else, and saves it again."""
    made = run.made(Case(**job["case"]))
    made.step(9)  # without Transformer Engine, Megatron's optimizer says its state only when it has one
    found = made.load(job["load"], **job.get("content", {}))
    assert found["iteration"] == run.STEPS
    made.check_scales(found["model"], job.get("scales", False))
    made.save(job["save"])


def resume(job: dict[str, Any]) -> None:
    """A run is filled by `ucp.megatron.load_checkpoint`, and saved by Megatron (``save``) and by us (``ours``)."""
    made = run.made(Case(**job["case"]))
    made.step(9)
    found, report = ucp.megatron.load_checkpoint(made.state(loading=True), job["load"], **job.get("opening", {}))
    assert found["iteration"] == run.STEPS
    assert report.proof is None or report.proof.complete
    made.check_scales(found["model"], job.get("scales", False))
    made.fill_from(found)
    made.save(job["save"])


def train(job: dict[str, Any]) -> None:
    """A family's model trains: from a checkpoint (``load``) or from values of its own, ``steps`` from number ``first``
    on; ``saved`` after the first two of them; ``losses``: the file of its losses."""
    case = Case(**job["case"])
    made = families.megatron_model(job["family"], lambda config, **options: run.trained_model(case, config, **options))
    losses = []
    if "load" in job:
        made.train_step(*families.batch(9))  # without Transformer Engine, Megatron's optimizer has no state before it
        found, _ = ucp.megatron.load_checkpoint(made.state(loading=True), job["load"], **job["opening"])
        made.fill_from(found)
    for number in range(job["steps"]):
        if number == 2 and "saved" in job:
            ucp.megatron.save_checkpoint(made.state(), job["saved"])
        losses.append(made.train_step(*families.batch(job["first"] + number)))
    if torch.distributed.get_rank() == 0:
        torch.save(losses, job["losses"])


def large(job: dict[str, Any]) -> None:
    """A Llama of some size, after a step with gradients of 0, saved by Megatron."""
    case, hidden = Case(**job["case"]), job["hidden"]
    sizes = {
        "num_layers": job["layers"],
        "hidden_size": hidden,
        "num_attention_heads": hidden // 64,
        "num_query_groups": hidden // 64,
        "ffn_hidden_size": hidden * 8 // 3 // 64 * 64,
        "normalization": "RMSNorm",
        "gated_linear_unit": True,
        "add_bias_linear": False,
        "activation_func": torch.nn.functional.silu,
    }
    made = run.trained_model(case, sizes, position_embedding_type="rope", share_embeddings=False)
    made.wrapped.zero_grad_buffer()
    made.wrapped.finish_grad_sync()
    made.optimizer.step()
    made.save(job["save"])


def logits(job: dict[str, Any]) -> None:
    """The logits of Megatron's models with the weights that some folders hold. load: name of a family -> folder.
    live: name -> transformers' folder, which `ucp.megatron.load_checkpoint` takes as it is."""
    out = {}
    for name, folder in job["load"].items():
        pattern = families.HYBRID.get(name)
        model = families.megatron_model(name, run.inference_model) if pattern is None else _hybrid(name, pattern)
        for key, load in ((name, _by_megatron(folder)), (f"{name} live", _by_us(job["live"][name]))):
            state = {"model": model.sharded_state_dict(metadata={"non_homogeneous_layers": True})}
            for part in state["model"].values():
                part.key = _by_transformer_engine(name, part.key)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.fill_(float("nan"))
            model.load_state_dict(load(state)["model"], strict=True)
            ids = families.tokens()
            mask = torch.triu(torch.ones(16, 16, dtype=torch.bool), 1)[None, None]
            with torch.no_grad():
                out[key] = model(ids, torch.arange(16)[None].expand(2, 16), mask)
    torch.save(out, job["save"])


def _hybrid(name: str, pattern: str) -> Any:
    """A model with mixers, which are only imported where there is one."""
    from tests.engines.megatron import hybrid

    run.groups_of_one_rank()
    return hybrid.model(pattern, dict(families.FAMILIES[name].megatron))


def _by_transformer_engine(name: str, key: str) -> str:
    if name not in families.HYBRID:
        return families.by_transformer_engine(name, key)
    from tests.engines.megatron import hybrid

    return hybrid.by_transformer_engine(families.HYBRID[name], key)


def _by_megatron(folder: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda state: dist_checkpointing.load(state, folder, strict="raise_all")


def _by_us(folder: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda state: ucp.megatron.load_checkpoint(state, folder)[0]
