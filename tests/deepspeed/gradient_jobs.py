"""A job for ranks: how many times the mean gradient a stock engine of the installed DeepSpeed steps with."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.engines import models, pipe_models, pipe_runs, releases
from tests.engines.configs import OPTIMIZERS
from tests.engines.pipe_runs import PipeCase
from tests.engines.truth import Truth, known
from ucp.deepspeed.live import releases as live_releases
from ucp.deepspeed.supported import warn_of_training


@dataclass(frozen=True)
class Measured:
    """steps: parameter -> its step over what plain SGD takes with the mean gradient of all micro batches and ranks, by
    the plain module's names. pipelines: the capability of the release. warnings: what an engine of ours would say."""

    steps: dict[str, float]
    pipelines: str
    warnings: list[str]


class _Kept(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


def first_steps(pipes: Sequence[PipeCase]) -> list[Measured | None]:
    """What one step of stock DeepSpeed was in each of these layouts (rank 0)."""
    return [first_step(pipe) for pipe in pipes]


def first_step(pipe: PipeCase) -> Measured | None:
    """The release is as it comes, without what other tests mend."""
    kept = _Kept()
    logging.getLogger("ucp").addHandler(kept)
    with releases.as_released():
        engine = pipe_runs.build_engine(pipe)
        before = pipe_runs.gather(engine)
        pipe_runs.continue_training(engine, pipe, 0, 1)
        after = pipe_runs.gather(engine)
        warn_of_training(engine)
        pipelines = live_releases.pipeline_gradients()
    logging.getLogger("ucp").removeHandler(kept)
    if before is None or after is None:
        return None
    wanted = _mean_gradients(pipe)
    lr = OPTIMIZERS[pipe.case.optimizer][1]["lr"]
    steps = {name: _weight(before, pipe, name) - _weight(after, pipe, name) for name in wanted}
    times = {n: float((steps[n] * g).sum() / (g * g).sum()) / lr for n, g in wanted.items()}
    return Measured(times, pipelines, kept.texts)


def written_by(release: str, folder: str, into: str) -> str:
    """A copy of what DeepSpeed saved, as a checkpoint that this release says it wrote."""
    shutil.copytree(folder, into)
    for path in Path(into).glob("*/*.pt"):
        saved = torch.load(path, weights_only=False)
        if "ds_version" in saved:
            torch.save({**saved, "ds_version": release}, path)
    return into


def told(pipe: PipeCase, folders: Sequence[str], section: dict[str, Any]) -> list[list[str]]:
    """What is told of the gradients when each of these is loaded, and the last one's weights alone: the reports'
    warnings, each of which the log has once."""
    kept = _Kept()
    logging.getLogger("ucp").addHandler(kept)
    engine = pipe_runs.build_engine(pipe, section)
    out = []
    for folder, only in [*((folder, False) for folder in folders), (folders[-1], True)]:
        kept.texts.clear()
        engine.load_checkpoint(folder, load_module_only=only)
        texts = [text for text in engine.ucp.last_load.warnings if "gradients" in text]
        assert [text for text in kept.texts if text in texts] == texts
        out.append(texts)
    return out


def save_as(how: str, pipe: PipeCase, folder: str) -> None:
    """An engine of this project saves as if this release's pipelines stepped with these."""
    live_releases.pipeline_gradients = lambda: how
    pipe_runs.build_engine(pipe, {"save": {"async": False}}).save_checkpoint(folder)


def _weight(truth: Truth, pipe: PipeCase, name: str) -> Tensor:
    return known(truth).params[pipe_models.pipeline_name(name) if pipe.pp else name]["param"].double()


def _mean_gradients(pipe: PipeCase) -> dict[str, Tensor]:
    case = pipe.case
    total: dict[str, Tensor] = {}
    for rank in range(case.dp):
        model = pipe_models.Plain(case.seed, case.frozen, pipe.blocks)
        for micro in range(case.accumulation):
            model(*models.batch("odd", micro, rank, case.dp)).backward()
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                total[name] = total.get(name, 0) + parameter.grad.double() / (case.accumulation * case.dp)
    return total
