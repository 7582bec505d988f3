"""Jobs for ranks: loads that fail in their second phase, on one rank, at every read; and what the engine does then."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from tests.engines.configs import Case
from tests.engines.load_jobs import build_target
from tests.engines.resume import continue_training
from tests.engines.truth import Truth, gather


@dataclass(frozen=True)
class Fallen:
    """What came of it on one rank. texts: of the loads that failed. refused: name of a method -> what it said after
    that. truth: after a load that succeeded (rank 0). strategy: of that load."""

    texts: tuple[str, ...]
    refused: Mapping[str, str]
    truth: Truth | None
    strategy: str
    trained: bool


def fall(case: Case, folder: str, tag: str, way: str, windows: bool, spoil: str = "") -> Fallen:
    """Fail at every read that rank 1 does in the second phase, each time with the same engine; then load and train.

    way: which every load takes. windows: as on the way to a device. spoil: instead of failing, touch a file that every
    rank reads, once the second phase has begun.
    """
    from ucp import limits
    from ucp.deepspeed.live import LiveEngine
    from ucp.errors import PartlyLoaded
    from ucp.loading import bring, strategy
    from ucp.loading import load as loading
    from ucp.storage.files import Files

    strategy.choose = lambda every: way
    loading.reading_threads = lambda: 1  # so that there are as many reads every time
    if windows:
        bring.is_on_host = lambda flat: False
        limits.LOAD_WINDOW_BYTES = 1 << 10
    engine = build_target(case, None, 1)
    state: dict[str, Any] = {"begun": False, "reads": 0, "fail": None}
    read, begin = Files.read_parts, LiveEngine.begin

    def read_parts(self: Any, path: Any, offset: int, parts: Any) -> None:
        if state["begun"]:
            state["reads"] += 1
            if state["reads"] - 1 == state["fail"] and torch.distributed.get_rank() == 1:
                raise OSError(5, "Input/output error")
        read(self, path, offset, parts)

    def begins(self: Any) -> None:
        begin(self)
        state.update(begun=True, reads=0)
        if spoil and state["fail"] is not None:
            os.utime(spoil)

    Files.read_parts, LiveEngine.begin = read_parts, begins  # type: ignore[method-assign]
    texts = []

    def load(fail: int | None) -> None:
        state.update(begun=False, reads=0, fail=fail)
        try:
            engine.load_checkpoint(folder, tag)
        except PartlyLoaded as error:
            texts.append(error.whole)
        state["begun"] = False

    engine.ucp.config = engine.ucp.config.model_copy(
        update={"load": engine.ucp.config.load.model_copy(update={"prove": False})}
    )
    load(None)
    count = torch.tensor([state["reads"]])
    torch.distributed.broadcast(count, 1)
    for number in range(1 if spoil else int(count)):
        load(number)
    refused = {name: _said(engine, name) for name in ("forward", "backward", "step", "save_checkpoint")}
    refused["snapshot"] = _said(engine.ucp, "snapshot")
    refused["module"] = _said(engine, "module")
    refused["state_dict"] = _said(engine.module, "state_dict")
    load(None)
    engine.module.state_dict()
    truth = gather(engine)
    continue_training(engine, case, 3, 1)
    return Fallen(tuple(texts), refused, truth, engine.ucp.last_load.strategy, True)


def _said(owner: Any, name: str) -> str:
    from ucp.errors import PartlyLoaded

    try:
        getattr(owner, name)(*([] if name == "state_dict" else ["anything"]))
    except PartlyLoaded as error:
        return error.whole
    return ""


def perish(case: Case, folder: str, tag: str, way: str, at: int) -> tuple[str, float, str]:
    """Rank 1 is killed before its so many'th read of the second phase. Returns what the other says, after how many
    seconds, and what its engine says then."""
    from ucp.deepspeed.live import LiveEngine
    from ucp.errors import PartlyLoaded
    from ucp.loading import load as loading
    from ucp.loading import strategy
    from ucp.storage.files import Files

    strategy.choose = lambda every: way
    loading.reading_threads = lambda: 1
    engine = build_target(case, None, 1)
    state: dict[str, Any] = {"begun": False, "reads": 0}
    read, begin = Files.read_parts, LiveEngine.begin

    def read_parts(self: Any, path: Any, offset: int, parts: Any) -> None:
        if state["begun"] and torch.distributed.get_rank() == 1:
            if state["reads"] == at:
                os.kill(os.getpid(), signal.SIGKILL)
            state["reads"] += 1
        read(self, path, offset, parts)

    def begins(self: Any) -> None:
        begin(self)
        state["begun"] = True

    Files.read_parts, LiveEngine.begin = read_parts, begins  # type: ignore[method-assign]
    began = time.monotonic()
    try:
        engine.load_checkpoint(folder, tag)
    except PartlyLoaded as error:
        return error.whole, time.monotonic() - began, _said(engine, "step")
    return "", time.monotonic() - began, ""
