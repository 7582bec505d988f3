"""Folders that Megatron-Core wrote, and their tensors as its own loader reads them; made once for all tests."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from tests.engines.kept import Kept
from tests.engines.megatron.cases import Case
from tests.engines.megatron.launch import launch

BUCKETS = {"distrib_optim_sharding_type": "dp_reshardable"}

# Name -> the run that wrote it. Those of one kind and type hold the same values.
WRITTEN: Mapping[str, Case] = {
    "llama": Case(dp=2, bf16=True, per_layer=True),
    "llama tp2 pp2": Case(tp=2, pp=2, bf16=True),
    "llama tp2 plain": Case(tp=2, bf16=True, sharding=None),
    "moe tp2 ep2": Case(tp=2, dp=2, ep=2, kind="moe"),
    "gpt tp4": Case(tp=4, kind="gpt"),
}

# Of these the modules have states of Transformer Engine's form.
SCALES = "llama tp2 pp2"

# The last of them, saved as newer releases do it.
COMMON_OBJECT = f"{list(WRITTEN)[-1]} common object"

# Runs under Megatron-FSDP, with what is sharded. What they hold is made by hash of each element's place.
UNDER_FSDP: Mapping[str, tuple[Case, str]] = {
    "llama tp2 fsdp": (Case(dp=2, tp=2, bf16=True), "optim_grads_params"),
    "moe ep2 fsdp": (Case(dp=2, ep=2, kind="moe", bf16=True), "optim_grads"),
    "gpt fsdp": (Case(dp=2, kind="gpt"), "optim"),
}


def folder(kept: Path) -> Path:
    """A folder with those of `WRITTEN` in it: ``NAME``, ``NAME.pt`` with Megatron's own reading; ``NAME ours``
    as `ucp.megatron.save_checkpoint` saved the same run, ``NAME ranks`` in Megatron's older layout; where there is a
    distributed optimizer ``NAME buckets``; those of `UNDER_FSDP`; ``mixers tp2``,
    Mamba's alone. kept: the session's folder for what is made
    once."""
    return Path(Kept(kept).get("megatron", write))


def write(path: str | Path) -> str:
    """Make such a folder."""
    path = Path(path)
    path.mkdir()
    jobs = []
    for name, case in WRITTEN.items():
        also = {} if case.sharding is None else {str(path / f"{name} buckets"): BUCKETS}
        jobs.append(
            {
                "case": vars(case),
                "save": str(path / name),
                "also": also,
                "ours": str(path / f"{name} ours"),
                "ranks": str(path / f"{name} ranks"),
                "scales": name == SCALES,
            }
        )
    jobs[-1]["common_object"] = str(path / COMMON_OBJECT)
    for name, (case, sharding) in UNDER_FSDP.items():
        jobs.append({"do": "save_fsdp", "case": vars(case), "sharding": sharding, "save": str(path / name)})
    jobs.append({"do": "save_mixers", "case": vars(Case(tp=2)), "save": str(path / "mixers tp2")})
    load = {str(path / f"{name}.pt"): str(path / name / "iter_0000002") for name in WRITTEN}
    jobs.append({"do": "truths", "case": vars(Case()), "load": load})
    launch(jobs, path)
    return str(path)
