"""A job for ranks: how many times the mean gradient a stock engine of the installed DeepSpeed steps with."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.utils import safe_get_full_fp32_param
from torch import Tensor, nn

from tests.engines import models, pipe_models, pipe_runs, releases
from tests.engines.build import build_engine
from tests.engines.configs import OPTIMIZERS, Case, make_config
from tests.engines.pipe_runs import PipeCase
from tests.engines.truth import Truth, known
from ucp import deepspeed as ours
from ucp.deepspeed.live import releases as live_releases
from ucp.deepspeed.supported import warn_of_training
from ucp.errors import Unsupported

STEPS = 2


@dataclass(frozen=True)
class Measured:
    """steps: for each of two steps, parameter -> its step over what plain SGD takes with the mean gradient of all micro
    batches and ranks, by the plain module's names. pipelines: the capability of the release. warnings: what an engine
    of ours would say."""

    steps: list[dict[str, float]]
    pipelines: str
    warnings: list[str]


class _Kept(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


def first_steps(pipes: Sequence[PipeCase]) -> list[Measured | None]:
    """What the first steps of stock DeepSpeed are in each of these layouts (rank 0)."""
    return [_first_steps(pipe) for pipe in pipes]


def _first_steps(pipe: PipeCase) -> Measured | None:
    """The release is as it comes, without what other tests mend."""
    kept = _Kept()
    logging.getLogger("ucp").addHandler(kept)
    with releases.as_released():
        engine = pipe_runs.build_engine(pipe)
        truths = [pipe_runs.gather(engine)]
        for step in range(STEPS):
            pipe_runs.continue_training(engine, pipe, step, 1)
            truths.append(pipe_runs.gather(engine))
        warn_of_training(engine)
        pipelines = live_releases.pipeline_gradients()
    logging.getLogger("ucp").removeHandler(kept)
    if truths[0] is None:
        return None
    weights = [_weights(known(truth), pipe) for truth in truths]
    lr = OPTIMIZERS[pipe.case.optimizer][1]["lr"]
    steps = []
    for step, gradients in enumerate(_mean_gradients(pipe, weights)):
        moved = {n: (weights[step][n] - weights[step + 1][n]) / lr for n in gradients}
        steps.append({n: float((moved[n] * g).sum() / (g * g).sum()) for n, g in gradients.items()})
    return Measured(steps, pipelines, kept.texts)


class Returns(nn.Module):
    """Returns a loss and what it came from, as transformers' models do."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, inputs: Tensor) -> dict[str, Tensor]:
        hidden = self.first(inputs)
        logits = self.second(hidden)
        return {"loss": logits.square().mean(), "logits": logits, "hidden": hidden}


def returned(stages: Sequence[int], mended: bool, direct: str = "") -> list[tuple[dict[str, float], list[str]]]:
    """For each stage, parameter -> the first step of a module that returns more than its loss, over what plain SGD
    takes with the mean gradient of two micro steps; and what an engine of ours would say. direct: the program calls
    backward of the 'loss' that the module returned, or of one that it computes from 'logits', and not the engine's."""
    found = []
    for stage in stages:
        with nullcontext() if mended else releases.as_released():
            found.append(_returned(Case(stage=stage, dp=1, accumulation=2, optimizer="plain_sgd"), direct))
    return found


def _returned(case: Case, direct: str) -> tuple[dict[str, float], list[str]]:
    kept = _Kept()
    logging.getLogger("ucp").addHandler(kept)
    inputs = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(1))
    plain, model = Returns(), Returns()
    before = {name: weight.detach().clone() for name, weight in plain.named_parameters()}
    engine, *_ = deepspeed.initialize(model=model, config=make_config(case), model_parameters=model.parameters())
    warn_of_training(engine)
    for micro in inputs:
        (plain(micro)["loss"] / len(inputs)).backward()
        outputs = engine(micro)
        if direct:
            (outputs["loss"] if direct == "loss" else outputs["logits"].square().mean()).backward()
        else:
            engine.backward(outputs["loss"])
        engine.step()
    logging.getLogger("ucp").removeHandler(kept)
    lr, steps = OPTIMIZERS[case.optimizer][1]["lr"], {}
    for (name, weight), own in zip(engine.module.named_parameters(), plain.parameters(), strict=True):
        after = safe_get_full_fp32_param(weight) if case.stage else weight.detach()
        moved = (before[name] - after) / lr
        steps[name] = float((moved * own.grad).sum() / own.grad.square().sum())
    return steps, kept.texts


def own_backward(direct: bool, folder: str) -> tuple[list[str], list[str]]:
    """An engine of ours trains a module that returns more than its loss, and saves. What an engine that has not trained
    is told of the gradients when it loads that, and then one that has trained in the same way. direct: the program
    calls the loss's own backward."""
    told = []
    for _ in range(2):
        model = Returns()
        config = {
            **make_config(Case(stage=1, dp=1, accumulation=2)),
            "ucp": {"enabled": True, "save": {"async": False}},
        }
        engine, *_ = ours.initialize(model=model, config=config, model_parameters=model.parameters())
        for trained in range(2):
            if trained:
                _train(engine, direct)
            if Path(folder, "latest").exists():
                engine.load_checkpoint(folder)
                told.append([text for text in engine.ucp.last_load.warnings if "gradients" in text])
        engine.save_checkpoint(folder)
    return told[0], told[1]


def _train(engine: Any, direct: bool) -> None:
    for micro in torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(1)):
        loss = engine(micro)["loss"]
        loss.backward() if direct else engine.backward(loss)
        engine.step()


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


def muon(stage: int, **zero: Any) -> str:
    """What a Muon engine of this project says where ranks would keep other momenta of one matrix; '' if it is made."""
    live_releases.muon_has_whole_gradients = lambda: False
    case = Case(stage=stage, dp=2, optimizer="muon", dtype="bf16", zero=tuple(zero.items()))
    try:
        build_engine(case, "ucp.deepspeed:initialize", {"ucp": {"enabled": True}})
    except Unsupported as error:
        return str(error)
    return ""


def _weights(truth: Truth, pipe: PipeCase) -> dict[str, Tensor]:
    """By the plain module's names."""
    names = [name for name, _ in pipe_models.Plain(0, pipe.case.frozen, pipe.blocks).named_parameters()]
    found = {name: pipe_models.pipeline_name(name) if pipe.pp else name for name in names}
    return {name: truth.params[own]["param"].double() for name, own in found.items() if own in truth.params}


def _mean_gradients(pipe: PipeCase, weights: Sequence[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """Of each step, by plain torch, from the weights that the engine had before it."""
    case = pipe.case
    total: list[dict[str, Tensor]] = [{} for _ in range(STEPS)]
    for rank in range(case.dp):
        model = pipe_models.Plain(case.seed, case.frozen, pipe.blocks)
        for step in range(STEPS):
            model.load_state_dict({n: w.float() for n, w in weights[step].items()}, strict=False)
            model.zero_grad()
            for micro in range(case.accumulation):
                model(*models.batch("odd", step * case.accumulation + micro, rank, case.dp)).backward()
            for name, parameter in model.named_parameters():
                if parameter.grad is not None:
                    share = parameter.grad.double() / (case.accumulation * case.dp)
                    total[step][name] = total[step].get(name, 0) + share
    return total
