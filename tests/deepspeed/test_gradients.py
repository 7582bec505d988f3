"""What stock engines of this release step with, measured against plain torch's gradients; the capabilities say the
same, and engines of this project warn where it is not the mean."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import ucp
from tests.deepspeed import gradient_jobs
from tests.engines import pipe_models, releases
from tests.engines.configs import Case
from tests.engines.parallel_runs import ParallelSources
from tests.engines.pipe_runs import PipeCase
from tests.engines.pool import RankPool
from tests.engines.sources import Sources
from ucp.deepspeed.live.releases import divides_gradients_once
from ucp.errors import Mismatch
from ucp.formats.shared.gradients import KEY, MEAN, OUTPUTS, SUM, Gradients, of_pipeline, recorded

pytestmark = pytest.mark.slow(seconds=30)

TWICE = Case(stage=1, dp=1, accumulation=2, optimizer="plain_sgd")
PIPES = {
    "one stage": PipeCase(pp=1, case=TWICE),
    "two": PipeCase(pp=2, case=TWICE.but(dp=2)),
    "three": PipeCase(pp=3, case=TWICE.but(stage=0)),
    "bf16": PipeCase(pp=2, case=TWICE.but(dtype="bf16")),
    "bf16 at stage 0": PipeCase(pp=2, case=TWICE.but(stage=0, dtype="bf16")),
    "BF16_Optimizer": PipeCase(pp=2, case=TWICE.but(dtype="bf16_optimizer", dp=2)),
}
PLAIN = PipeCase(pp=0, case=TWICE.but(dp=2))
BF16 = replace(PLAIN, case=PLAIN.case.but(dtype="bf16_optimizer"))
IMMEDIATE = BF16.but(config=(("bf16", {"enabled": True, "immediate_grad_update": True}),))
MODULES = {
    **{f"stage {stage}": replace(PLAIN, case=PLAIN.case.but(stage=stage)) for stage in range(4)},
    "stage 0 in bf16": replace(PLAIN, case=PLAIN.case.but(stage=0, dtype="bf16")),
    "stage 2 offloaded": replace(PLAIN, case=PLAIN.case.but(stage=2, offload=True)),
    "BF16_Optimizer": BF16,
    "BF16_Optimizer, immediate": IMMEDIATE,
}
STAGES = (0, 1, 2, 3)
# A block's place among four, in which of so many stages; as pipelines split evenly (8 layers, of which block 0 is 2).
STAGE_OF_BLOCK = {1: (0, 0, 0, 0), 2: (0, 0, 1, 1), 3: (0, 1, 1, 1)}


Measure = Callable[[PipeCase], gradient_jobs.Measured]


@pytest.fixture(scope="module")
def measured(ranks: RankPool) -> Measure:
    """What is measured of a layout; modules without stages share a job, as DeepSpeed's groups let them."""
    known: dict[str, gradient_jobs.Measured] = {}

    def of(pipe: PipeCase) -> gradient_jobs.Measured:
        if repr(pipe) not in known:
            pipes = [pipe] if pipe.pp else list(MODULES.values())
            found = ranks.run(gradient_jobs.first_steps, pipes, world_size=pipe.world_size)[0]
            known.update(zip(map(repr, pipes), found, strict=True))
        return known[repr(pipe)]

    return of


@pytest.mark.parametrize("pipe", PIPES.values(), ids=PIPES)
def test_pipelines_step_with_what_the_capability_says(measured: Measure, pipe: PipeCase) -> None:
    found = measured(pipe)
    count = pipe.case.accumulation
    for block, stage in enumerate(STAGE_OF_BLOCK[pipe.pp]):
        later = pipe.pp - 1 - stage
        factor = {"mean": 1.0, "sum": float(count), "divided again": count**-later}[found.pipelines]
        assert found.steps[0][f"blocks.{block}.gate_up.weight"] == pytest.approx(factor, rel=0.02)
    odd = found.pipelines == "sum" or (found.pipelines == "divided again" and pipe.pp > 1)
    assert sum("steps a pipeline with" in text for text in found.warnings) == odd
    name = "blocks.3.gate_up.weight"  # the last stage's
    adds_up = found.steps[1][name] != pytest.approx(found.steps[0][name], rel=0.1)
    assert len(found.warnings) == odd + adds_up


@pytest.mark.parametrize("pipe", MODULES.values(), ids=MODULES)
def test_modules_step_with_the_mean_or_a_warning_says_otherwise(measured: Measure, pipe: PipeCase) -> None:
    found = measured(pipe)
    odd = [name for step in found.steps for name, times in step.items() if times != pytest.approx(1.0, rel=0.05)]
    told = [text for text in found.warnings if "gathers alone" not in text]
    assert bool(odd) == bool(told), (odd, told)


@pytest.mark.parametrize("mended", [False, True], ids=["as released", "as the other tests have it"])
def test_modules_that_return_more_than_the_loss_step_with_the_mean_or_a_warning_says_otherwise(
    ranks: RankPool, mended: bool
) -> None:
    found = ranks.run(gradient_jobs.returned, STAGES, mended, world_size=1)[0]
    for stage, (steps, warnings) in zip(STAGES, found, strict=True):
        odd = [name for name, times in steps.items() if times != pytest.approx(1.0, rel=1e-3)]
        told = [text for text in warnings if "gathers alone" not in text]
        if mended:
            assert not odd, (stage, steps)
        else:
            assert bool(odd) == bool(told), (stage, steps, warnings)


def test_a_programs_own_backward_steps_with_the_mean_or_a_warning_says_otherwise(ranks: RankPool) -> None:
    """From the loss that the module returned with what it came from, or from one that the program makes of that."""
    if not releases.knows("_backward_prologue_per_tensor"):
        pytest.skip(releases.without("takes engine.backward alone"))
    for direct in ("loss", "logits"):
        found = ranks.run(gradient_jobs.returned, STAGES[1:], False, direct, world_size=1)[0]
        for stage, (steps, warnings) in zip(STAGES[1:], found, strict=True):
            odd = [name for name, times in steps.items() if times != pytest.approx(1.0, rel=1e-3)]
            told = [text for text in warnings if "gathers alone" not in text]
            assert bool(odd) == (len(told) == 1) == (stage < 3), (direct, stage, steps, warnings)


@pytest.mark.parametrize("direct", [True, False], ids=["its own backward", "the engine's"])
def test_a_programs_own_backward_is_noted_in_its_checkpoints(ranks: RankPool, tmp_path: Path, direct: bool) -> None:
    """A load into an engine that has not trained is told, as the engine was that did; in one that trains alike there is
    nothing to tell."""
    if not releases.knows("_backward_prologue_per_tensor"):
        pytest.skip(releases.without("takes engine.backward alone"))
    odd = direct or not divides_gradients_once()
    fresh, alike = ranks.run(gradient_jobs.own_backward, direct, str(tmp_path), world_size=1)[0]
    assert ["divided once more in tensors that the module returned" in text for text in fresh] == [True] * odd
    assert alike == []
    with ucp.open(tmp_path) as checkpoint:
        assert recorded(checkpoint.training_state) == (Gradients(OUTPUTS, 2) if odd else Gradients())


# What wrote the checkpoint of a pipeline, and what a load says of its moments.
WRITERS = [("0.15.4", ""), ("0.16.9", "the sum over its 2 micro steps"), ("0.18.9", "divided once more")]


@pytest.mark.parametrize(("release", "words"), WRITERS)
def test_moments_of_other_gradients_are_told(
    ranks: RankPool, pipes: ParallelSources, tmp_path: Path, release: str, words: str
) -> None:
    """Into the plain module, and by way of a conversion. Of weights alone there is nothing to tell."""
    saved = pipes.get(PipeCase(pp=2)).folder
    spec, native, whole = (str(tmp_path / name) for name in ("pipe.yaml", "native", "whole"))
    Path(spec).write_text(pipe_models.SPEC)
    ucp.convert(gradient_jobs.written_by(release, saved, native), whole)
    target = PipeCase(pp=0)
    loaded, converted, weights = ranks.run(gradient_jobs.told, target, [native, whole], {"spec": spec}, world_size=1)[0]
    assert loaded == converted
    assert [words in text for text in loaded] == [True] * bool(words)
    assert weights == []


def test_saves_record_other_gradients_than_the_mean(ranks: RankPool, tmp_path: Path) -> None:
    for how in (SUM, MEAN):
        ranks.run(gradient_jobs.save_as, how, PipeCase(pp=2), str(tmp_path / how), world_size=2)
        with ucp.open(tmp_path / how) as checkpoint:
            assert recorded(checkpoint.training_state) == of_pipeline(how, 2, 2)
            assert (KEY in checkpoint.training_state.extra) == (how != MEAN)


def test_a_muon_whose_ranks_keep_other_momenta_of_a_matrix_is_refused(ranks: RankPool) -> None:
    """On all ranks, though only those that have the matrix's end can see it; and not with the advice followed."""
    for text in ranks.run(gradient_jobs.muon, 2, world_size=2):
        assert 'Muon with "reduce_scatter"' in text
    assert ranks.run(gradient_jobs.muon, 2, reduce_scatter=False, world_size=2) == ["", ""]


def test_momenta_that_differ_between_ranks_are_refused(sources: Sources, tmp_path: Path) -> None:
    """As DeepSpeed 0.17.6 to 0.19.2 leave them in the files of stages 1 and 2."""
    run = sources.get(Case(stage=2, dp=3, optimizer="muon", dtype="bf16"))
    shutil.copytree(run.folder, tmp_path / "run")
    path = next((tmp_path / "run").glob("*/*zero_pp_rank_1_mp_rank_00_optim_states.pt"))
    saved = torch.load(path, weights_only=False)
    for state in saved["optimizer_state_dict"]["base_optimizer_state"]["state"].values():
        if "momentum_buffer" in state:
            state["momentum_buffer"] *= 2
    torch.save(saved, path)
    with pytest.raises(Mismatch, match=r"'middle\.weight' \(momentum_buffer\) is not what"):
        ucp.open(tmp_path / "run")
