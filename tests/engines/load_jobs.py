"""Jobs that run on the ranks: this project's load into real engines, with the truth of what came of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tests.engines import releases
from tests.engines.build import build_engine
from tests.engines.configs import Case
from tests.engines.resume import continue_training
from tests.engines.runs import FURTHER
from tests.engines.truth import Truth, gather


@dataclass(frozen=True)
class Resumed:
    """What a load left: truths on rank 0 only, the rest on every rank. further: losses of the steps after the load."""

    path: str
    client_state: Mapping[str, Any]
    truth: Truth | None
    further: tuple[float, ...]
    truth_after: Truth | None


def build_target(case: Case, section: Mapping[str, Any] | None = None, trained: int = 0) -> Any:
    """A bound engine. section: the config's "ucp" section beside "enabled"; trained: steps it has done already, on
    data of their own."""
    trying = {} if releases.is_pinned() else {"allow_untested_version": True}
    extra = {"ucp": {"enabled": True, **trying, **(section or {})}}
    engine = build_engine(case, "ucp.deepspeed:initialize", extra)
    continue_training(engine, case, 50, trained)
    return engine


def resume(
    case: Case,
    folder: str,
    tag: str | None,
    steps: int,
    further: int = FURTHER,
    trained: int = 0,
    section: Mapping[str, Any] | None = None,
    options: Mapping[str, Any] | None = None,
) -> Resumed:
    """Load ``folder`` into an engine of ``case`` and train on. options: load_checkpoint's own."""
    engine = build_target(case, section, trained)
    path, client_state = engine.load_checkpoint(folder, tag, **(options or {}))
    if path is None:
        raise FileNotFoundError(f"nothing was found in {folder}")
    truth = gather(engine)
    after = continue_training(engine, case, steps, further)
    return Resumed(path, client_state, truth, tuple(after), gather(engine) if further else truth)
