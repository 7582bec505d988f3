"""A job for ranks: one resume in the middle of a chain of layouts."""

from __future__ import annotations

from tests.engines.configs import Case
from tests.engines.load_jobs import build_target
from tests.engines.truth import Truth, gather


def load_and_save(case: Case, folder: str, tag: str, to: str) -> Truth | None:
    """Resume, tell the truth of it, and save in our format."""
    engine = build_target(case)
    path, client_state = engine.load_checkpoint(folder, tag)
    if path is None:
        raise FileNotFoundError(folder)
    truth = gather(engine)
    engine.save_checkpoint(to, tag, client_state=client_state)
    engine.ucp.wait()
    return truth
