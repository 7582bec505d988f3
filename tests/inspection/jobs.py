"""Jobs that run on the ranks."""

from __future__ import annotations

from typing import Any

from tests.engines.build import build_engine
from tests.engines.configs import Case
from tests.engines.resume import continue_training


def save_and_load(case: Case, folder: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Save twice and load, with timings recorded; what the reports say of this rank."""
    engine = build_engine(case, "ucp.deepspeed:initialize", {"ucp": {"enabled": True, "metrics": True}})
    continue_training(engine, case, 0, 1)
    engine.save_checkpoint(folder)
    engine.ucp.wait()
    first = dict(engine.ucp.last_save.seconds)
    continue_training(engine, case, 1, 1)
    engine.save_checkpoint(folder, "global_step1")  # the same tag again
    engine.ucp.wait()
    saved = engine.ucp.last_save
    engine.load_checkpoint(folder)
    loaded = engine.ucp.last_load
    return (
        {"first": first, "seconds": dict(saved.seconds), "wall": saved.wall, "written": saved.written},
        {"seconds": dict(loaded.seconds), "bytes_read": loaded.bytes_read},
    )


def bytes_loaded(family: str, case: Any, folder: str, section: dict[str, Any]) -> int:
    """Load into a fresh engine of a family of cases; the bytes that were brought to this rank."""
    from tests.engines import autoep, moe, pipe_runs, tp_runs

    engine: Any
    if family in ("pipe", "tp"):
        engine = (pipe_runs if family == "pipe" else tp_runs).build_engine(case, section)
    else:
        build = moe.build_engine if family == "moe" else autoep.build_engine
        engine = build(case, "ucp.deepspeed:initialize", {"ucp": {"enabled": True, **section}})
    engine.load_checkpoint(folder)
    nbytes: int = engine.ucp.last_load.nbytes
    return nbytes
