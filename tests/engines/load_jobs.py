"""Jobs that run on the ranks: this project's load into real engines, with the truth of what came of it."""

from __future__ import annotations

from typing import Any

from tests.engines.configs import Case
from tests.engines.resume import continue_training
from tests.engines.sources import FURTHER, Run, build_engine
from tests.engines.truth import Truth, gather


def resume(
    case: Case,
    folder: str,
    tag: str | None,
    steps: int,
    further: int = FURTHER,
    trained: int = 0,
    section: dict[str, Any] | None = None,
    options: dict[str, Any] | None = None,
) -> Run:
    """Load ``folder`` into an engine of ``case`` and train on. trained: steps the engine has already done (on other
    data) before it loads. section: the config's "ucp" section beside "enabled"; options: load_checkpoint's own."""
    import ucp.deepspeed

    extra = {"ucp": {"enabled": True, **(section or {})}}
    engine = build_engine(case, initialize=ucp.deepspeed.initialize, extra=extra)
    continue_training(engine, case, 50, trained)
    path, client_state = engine.load_checkpoint(folder, tag, **(options or {}))
    if path is None:
        raise FileNotFoundError(f"nothing was found in {folder}")
    truth = gather(engine)
    after = continue_training(engine, case, steps, further)
    return Run(case, folder, str(client_state.get("note")), steps, (), tuple(after), truth, gather(engine) if further else truth)


def refused(case: Case, folder: str, tag: str | None = None, trained: int = 0, **kwargs: Any) -> tuple[str, str, Truth | None, Truth | None]:
    """Load a checkpoint that does not fit: the error's class and text, and the truth before and after."""
    import ucp.deepspeed
    from ucp.errors import UcpError

    extra = {"ucp": {"enabled": True, **kwargs.pop("section", {})}}
    engine = build_engine(case, initialize=ucp.deepspeed.initialize, extra=extra)
    continue_training(engine, case, 50, trained)
    before = gather(engine)
    try:
        engine.load_checkpoint(folder, tag, **kwargs)
    except UcpError as error:
        return type(error).__name__, str(error), before, gather(engine)
    return "", "", before, gather(engine)
