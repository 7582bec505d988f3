"""Pipelines' own files, layers and all, against what the engines of all stages held; and files that are damaged."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

import ucp
from tests.engines import pipe_models
from tests.engines.configs import Case
from tests.engines.parallel_runs import ParallelSources
from tests.engines.pipe_runs import PipeCase
from tests.formats.deepspeed.read.test_matrix import (
    check_parameters,
    check_regions,
    check_tensors,
    check_training_state,
    known,
)
from ucp.errors import DamagedCheckpoint, Mismatch, UcpError, Unsupported

pytestmark = pytest.mark.slow

TRAINED = Case(stage=1, dp=1, accumulation=2)
CASES = [
    PipeCase(pp=2, case=TRAINED.but(dp=2, groups=2, scheduler=True)),
    PipeCase(pp=4, method="type:block", case=TRAINED.but(dtype="bf16", frozen=True, groups=2)),
    PipeCase(pp=3, method="parameters", head_module=True, case=TRAINED.but(frozen=True)),
    PipeCase(pp=1, topology=True, case=TRAINED.but(dp=2, dtype="bf16", frozen=True)),
    PipeCase(pp=2, case=TRAINED.but(dp=2, dtype="bf16", stage=0, groups=2)),  # BF16_Optimizer
    PipeCase(pp=2, case=TRAINED.but(dtype="bf16_optimizer")),
    PipeCase(pp=2, case=TRAINED.but(dtype="fp16", optimizer="sgd")),
    PipeCase(pp=2, shift=True, head_module=True, case=TRAINED),
    PipeCase(pp=2, shift=True, case=TRAINED.but(stage=0, dtype="bf16")),
    PipeCase(pp=2, tp=2, case=TRAINED.but(frozen=True, groups=2)),
]
PLAIN = CASES[0]
SLICED = CASES[-1]


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("spec") / "pipe.yaml"
    path.write_text(pipe_models.SPEC)
    return path


@pytest.mark.parametrize("pipe", CASES, ids=lambda pipe: pipe.label)
def test_everything_read_is_what_the_stages_held(pipes: ParallelSources, spec: Path, pipe: PipeCase) -> None:
    run = pipes.get(pipe)
    truth = known(run.truth)
    with ucp.open(run.folder, spec if pipe.tp > 1 else None) as checkpoint:
        layout = checkpoint.layout
        assert (layout.dp, layout.tp, layout.pp, layout.zero) == (pipe.case.dp, pipe.tp, pipe.pp, 1)
        check_tensors(checkpoint, truth)
        check_regions(checkpoint, truth)
        check_parameters(checkpoint, truth)
        check_training_state(checkpoint, truth, pipe.case)
        copies = {copy.name for copy in checkpoint.catalog.copies}
        assert ("tied_modules.embed.weight" in copies) == (pipe.pp > 1)


def copied(pipes: ParallelSources, pipe: PipeCase, to: Path) -> Path:
    run = pipes.get(pipe)
    shutil.copytree(run.folder, to / "run")
    return to / "run" / run.tag


def refusal(folder: Path, kind: type[UcpError], spec: Path | None = None) -> str:
    with pytest.raises(kind) as caught, ucp.open(folder.parent, spec):
        pass
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_missing_layer_file_is_named(pipes: ParallelSources, spec: Path, tmp_path: Path) -> None:
    folder = copied(pipes, SLICED, tmp_path)
    (folder / "layer_04-model_01-model_states.pt").unlink()
    assert "'layer_04-model_01-model_states.pt'" in refusal(folder, DamagedCheckpoint, spec)
    (folder / "layer_04-model_00-model_states.pt").unlink()
    text = refusal(folder, DamagedCheckpoint, spec)
    assert "'4." in text
    assert "layer 4 " in text
    for file in folder.glob("layer_*"):
        file.unlink()
    assert "no layer files" in refusal(folder, DamagedCheckpoint, spec)


def test_a_missing_stage_is_named(pipes: ParallelSources, tmp_path: Path) -> None:
    folder = copied(pipes, PLAIN, tmp_path)
    (folder / "mp_rank_01_model_states.pt").unlink()
    assert "no model file of rank 1" in refusal(folder, DamagedCheckpoint)
    for file in folder.glob("*mp_rank_01*"):
        file.unlink()
    assert "2 model-parallel ranks (tp=1, pp=2)" in refusal(folder, DamagedCheckpoint)


@pytest.mark.parametrize("pipe", CASES[:1] + [p for p in CASES if p.tp > 1][:1], ids=lambda pipe: pipe.label)
def test_releases_that_do_not_write_the_degrees(
    pipes: ParallelSources, spec: Path, tmp_path: Path, pipe: PipeCase
) -> None:
    """Before 0.19 the model files say how many model-parallel ranks there were, and not how many of them are stages."""
    folder = copied(pipes, pipe, tmp_path)
    for file in folder.glob("mp_rank_*"):
        raw = torch.load(file, weights_only=False)
        raw.pop("checkpoint_parallel_dimensions", None)  # which this release itself may not write
        torch.save(raw, file)
    with ucp.open(folder, spec if pipe.tp > 1 else None) as checkpoint:
        assert (checkpoint.layout.tp, checkpoint.layout.pp) == (pipe.tp, pipe.pp)
        check_tensors(checkpoint, known(pipes.get(pipe).truth))


def test_copies_of_an_untied_parameter_are_refused_unless_the_model_declares_them(pipes: ParallelSources) -> None:
    run = pipes.get(PipeCase(pp=2, shift=True, declared=False, case=TRAINED))
    assert "'tied_modules.embed.shift'" in refusal(Path(run.folder) / run.tag, Mismatch)


def test_a_layer_file_of_another_run_is_found(pipes: ParallelSources, tmp_path: Path) -> None:
    """Its weights are not the masters that the optimizer files have."""
    folder = copied(pipes, PLAIN, tmp_path)
    for file in folder.glob("layer_0[2345]-*"):
        torch.save({k: v + 1 for k, v in torch.load(file).items()}, file)
    assert "files of two runs" in refusal(folder, DamagedCheckpoint)


def test_tied_copies_that_drifted_apart_are_found(pipes: ParallelSources, tmp_path: Path) -> None:
    folder = copied(pipes, PLAIN, tmp_path)
    for file in folder.glob("zero_pp_rank_0_mp_rank_01_optim_states.pt"):
        saved = torch.load(file, weights_only=False)
        saved["optimizer_state_dict"]["base_optimizer_state"]["state"][0]["exp_avg"].mul_(1.5)
        torch.save(saved, file)
    text = refusal(folder, Mismatch)
    assert "'tied_modules.embed.weight' (exp_avg)" in text
    assert "drifted apart" in text


UNNAMED = [
    PipeCase(pp=2, case=TRAINED.but(stage=0, dp=2, groups=2, frozen=True)),
    PipeCase(pp=4, method="type:block", case=TRAINED.but(stage=0, dtype="fp16")),
    PipeCase(pp=3, method="parameters", head_module=True, case=TRAINED.but(stage=0, dtype="fp16", groups=2)),
    PipeCase(pp=1, case=TRAINED.but(stage=0)),
    PipeCase(pp=2, tp=2, case=TRAINED.but(stage=0, groups=2)),
]


@pytest.mark.parametrize("pipe", UNNAMED, ids=lambda pipe: pipe.label)
def test_without_zero_the_engines_names_tell_the_split(pipes: ParallelSources, spec: Path, pipe: PipeCase) -> None:
    run = pipes.get(pipe)
    truth = known(run.truth)
    choice = spec if pipe.tp > 1 else None
    names = [list(group["names"]) for group in truth.groups]
    with ucp.checkpoint.open(run.folder, choice, param_names=names) as checkpoint:
        assert checkpoint.layout.zero == 0
        check_tensors(checkpoint, truth)
        check_parameters(checkpoint, truth)
        check_training_state(checkpoint, truth, pipe.case)


def test_without_zero_and_names_a_tied_pipeline_is_refused(pipes: ParallelSources) -> None:
    run = pipes.get(UNNAMED[1])
    text = refusal(Path(run.folder) / run.tag, Unsupported)
    assert "no splits of its 6 layers" in text
    assert "the pipeline's own engine" in text
