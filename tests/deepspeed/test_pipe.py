"""Pipelines resume and save: any number of stages into any other, and into one module without stages, to the bit."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import pytest

import ucp
from tests.deepspeed import parallel_pairs
from tests.deepspeed.parallel_pairs import Pair, load
from tests.engines import parallel_runs, pipe_models, pipe_runs, releases
from tests.engines.configs import Case
from tests.engines.parallel_runs import ParallelRun, ParallelSources
from tests.engines.pipe_runs import PipeCase
from tests.engines.pool import RankPool
from tests.engines.truth import Truth, known
from tests.formats.deepspeed.read.test_matrix import check_parameters, check_tensors

pytestmark = pytest.mark.slow(seconds=110)

V = TypeVar("V")

TRAINED = Case(stage=1, dp=1, accumulation=2)
OPTIONS = TRAINED.but(groups=2, scheduler=True, frozen=True)
LOW = TRAINED.but(dtype="bf16")
HALF = TRAINED.but(dtype="fp16")
PLAIN = PipeCase(pp=0)
SLICED = PipeCase(pp=2, tp=2, case=TRAINED.but(frozen=True, groups=2))


PAIRS = [
    # the same layout
    *(
        Pair(pipe, pipe, "equal")
        for pipe in (
            PipeCase(pp=2, case=OPTIONS.but(dp=2)),
            PipeCase(pp=4, method="type:block", case=LOW.but(groups=2)),
            SLICED,
        )
    ),
    # other numbers of stages, other splits, other heads
    Pair(PipeCase(pp=2, case=OPTIONS.but(dp=2)), PipeCase(pp=1, case=OPTIONS.but(dp=3))),
    Pair(PipeCase(pp=2, case=OPTIONS.but(dp=2)), PipeCase(pp=4, method="type:block", case=OPTIONS)),
    Pair(
        PipeCase(pp=4, method="type:block", case=LOW.but(groups=2)),
        PipeCase(pp=2, topology=True, case=LOW.but(groups=2)),
    ),
    Pair(PipeCase(pp=1, case=LOW), PipeCase(pp=3, method="parameters", head_module=True, case=LOW)),
    # unevenly split: three layers, three and two; with tensor parallelism; five blocks, of which one stage has two
    Pair(PipeCase(pp=3, case=LOW.but(stage=0)), PipeCase(pp=3, case=LOW.but(stage=0)), "equal"),
    Pair(PipeCase(pp=3, case=LOW.but(stage=0)), PipeCase(pp=2, tp=2, case=LOW)),
    Pair(PipeCase(pp=3, tp=2, case=LOW), PipeCase(pp=3, case=LOW.but(stage=0))),
    Pair(
        PipeCase(pp=4, method="type:block", blocks=5, case=LOW), PipeCase(pp=3, blocks=5, case=LOW.but(stage=0, dp=2))
    ),
    # stage 0, its optimizers, fp16's loss scale
    Pair(PipeCase(pp=2, case=LOW.but(stage=0, dp=2)), PipeCase(pp=4, case=LOW.but(stage=0))),
    Pair(PipeCase(pp=2, case=LOW.but(dtype="bf16_optimizer")), PipeCase(pp=1, case=TRAINED.but(stage=1, dtype="bf16"))),
    Pair(PipeCase(pp=2, case=TRAINED), PipeCase(pp=2, case=TRAINED.but(stage=0))),
    Pair(PipeCase(pp=2, case=HALF), PipeCase(pp=2, case=HALF.but(stage=0)), losses=""),
    Pair(PipeCase(pp=2, case=OPTIONS.but(stage=0)), PipeCase(pp=2, case=OPTIONS.but(stage=0)), "equal"),
    Pair(PipeCase(pp=2, case=OPTIONS.but(stage=0)), PipeCase(pp=4, method="type:block", case=OPTIONS)),
    Pair(PipeCase(pp=2, case=HALF.but(stage=0)), PipeCase(pp=1, case=HALF), losses=""),
    # Megatron's way: the last stage has an idle copy of what else is in the tied module
    *(
        Pair(PipeCase(pp=2, shift=True, case=LOW), PipeCase(pp=pp, shift=True, case=LOW.but(dp=dp)))
        for pp, dp in ((2, 1), (1, 2))
    ),
    # other flat orders and states, the host
    Pair(
        PipeCase(pp=2, case=LOW.but(dp=2, round_robin=True, parameter_alignment=True)),
        PipeCase(pp=1, case=LOW.but(dp=2, elastic=True)),
    ),
    Pair(PipeCase(pp=2, case=LOW.but(dp=2, optimizer="muon")), PipeCase(pp=1, case=LOW.but(optimizer="muon"))),
    Pair(PipeCase(pp=1, case=TRAINED), PipeCase(pp=2, case=TRAINED.but(dp=2, offload=True))),
    # without stages, whose names are others
    Pair(PipeCase(pp=2, case=OPTIONS.but(dp=2)), replace(PLAIN, case=OPTIONS.but(stage=3, dp=3))),
    Pair(replace(PLAIN, case=OPTIONS.but(stage=3, dp=2)), PipeCase(pp=2, case=OPTIONS.but(dp=2))),
    # tensor, pipeline and data parallelism
    Pair(SLICED, PipeCase(pp=1, case=SLICED.case.but(dp=2))),
    Pair(PipeCase(pp=1, case=SLICED.case.but(dp=2)), SLICED),
    Pair(PipeCase(pp=1, tp=2, case=SLICED.case.but(dp=2)), SLICED),
    Pair(SLICED, replace(PLAIN, case=SLICED.case.but(stage=3, dp=3))),
    Pair(replace(PLAIN, case=SLICED.case.but(stage=2, dp=2)), SLICED),
    Pair(SLICED, PipeCase(pp=4, method="type:block", case=SLICED.case)),
    # eight ranks
    Pair(SLICED.but(dp=2, dtype="bf16"), replace(PLAIN, case=SLICED.case.but(stage=3, dp=4, dtype="bf16"))),
]


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("spec") / "pipe.yaml"
    path.write_text(pipe_models.SPEC)
    return str(path)


def piped(truth: Truth | None, pipe: PipeCase) -> Truth:
    """The truth under the pipeline's names."""
    found = known(truth)
    if pipe.pp:
        return found

    def named(values: Mapping[str, V]) -> dict[str, V]:
        return {pipe_models.pipeline_name(name): value for name, value in values.items()}

    return replace(
        found,
        params=named(found.params),
        scalars=named(found.scalars),
        frozen=named(found.frozen),
        buffers=named(found.buffers),
        module=named(found.module),
        groups=tuple({**g, "names": list(map(pipe_models.pipeline_name, g["names"]))} for g in found.groups),
    )


def section(spec: str, *pipes: PipeCase) -> dict[str, Any]:
    """The config's section; it names the spec only where one is needed."""
    return {"spec": spec} if any(pipe.tp > 1 or not pipe.pp for pipe in pipes) else {}


def check(pair: Pair, run: ParallelRun, loaded: ParallelRun) -> None:
    truths = piped(run.truth, pair.source), piped(loaded.truth, pair.target)
    parallel_pairs.check(pair, run, loaded, truths)


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: pair.label)
def test_loads_exactly(ranks: RankPool, pipes: ParallelSources, spec: str, pair: Pair) -> None:
    run = pipes.get(pair.source)
    trained = 0 if pair.losses == "equal" else 1
    check(pair, run, load(ranks, pair.target, run.folder, section(spec, pair.source, pair.target), trained))


SAVES = [
    Pair(PipeCase(pp=2, case=OPTIONS.but(dp=2)), PipeCase(pp=2, case=OPTIONS.but(dp=2)), "equal"),
    Pair(PipeCase(pp=2, case=OPTIONS.but(dp=2)), replace(PLAIN, case=OPTIONS.but(stage=3, dp=2))),
    Pair(PipeCase(pp=2, case=LOW.but(stage=0, dp=2)), PipeCase(pp=1, case=LOW.but(dp=1))),
    Pair(PipeCase(pp=2, case=HALF.but(stage=0)), PipeCase(pp=2, method="parameters", case=HALF.but(stage=0))),
    Pair(PipeCase(pp=2, shift=True, case=LOW), PipeCase(pp=4, shift=True, case=LOW)),
    Pair(SLICED, SLICED, "equal"),
    Pair(SLICED, PipeCase(pp=1, case=SLICED.case.but(dp=2))),
]


@pytest.mark.parametrize("pair", SAVES, ids=lambda pair: pair.label)
def test_saves_all_that_the_stages_hold(ranks: RankPool, pipes: ParallelSources, spec: str, pair: Pair) -> None:
    """Fragments of every stage, each tensor once; they resume in any layout."""
    saving = section(spec, pair.source)  # in the background
    run = pipes.get(pair.source, saving)
    with ucp.open(run.folder) as checkpoint:
        assert checkpoint.format == "universal"
        truth = known(run.truth)
        check_tensors(checkpoint, truth)
        check_parameters(checkpoint, truth)
        # Nothing that several stages or slices hold is written twice.
        held = sum(t.nbytes for t in checkpoint.catalog.tensors.values())
        files = Path(run.folder) / run.tag
        written = sum(os.path.getsize(f) for f in files.glob("*.safetensors"))
        assert held <= written < held + 4000 * pair.source.world_size
    check(pair, run, load(ranks, pair.target, run.folder, section(spec, pair.source, pair.target), 1))


def test_converted_pipelines_resume(ranks: RankPool, pipes: ParallelSources, tmp_path: Path) -> None:
    pair = Pair(PipeCase(pp=2, case=OPTIONS.but(dp=2)), PipeCase(pp=4, method="type:block", case=OPTIONS))
    run = pipes.get(pair.source)
    ucp.convert(run.folder, tmp_path / "whole")
    check(pair, run, load(ranks, pair.target, str(tmp_path / "whole"), {}, 1))


@pytest.mark.parametrize(
    ("target", "kind", "words"),
    [
        # Two of four stages have one; the others have nothing to complain of, and refuse all the same.
        (PipeCase(pp=4, method="type:block", case=OPTIONS.but(groups=2)), "Mismatch", "'3.gain'"),
        # Without a spec nothing says what the plain module calls them.
        (replace(PLAIN, case=OPTIONS.but(stage=3, dp=2, frozen=False)), "Mismatch", "'embed.weight'"),
        # The tied module has a group of its own.
        (PipeCase(pp=3, case=OPTIONS.but(stage=0, groups=3)), "Unsupported", "has 2 param groups on tp rank 0 of pipe"),
    ],
    ids=("a stage lacks something", "other names", "a stage lacks a param group"),
)
def test_all_stages_refuse_together(
    ranks: RankPool, pipes: ParallelSources, target: PipeCase, kind: str, words: str
) -> None:
    run = pipes.get(PipeCase(pp=2, case=OPTIONS.but(dp=2, frozen=False)))
    outcome = ranks.attempt(parallel_runs.resume, target, run.folder, {}, world_size=target.world_size)
    assert outcome.all_raised
    assert {failure.type_name for failure in outcome.failures} == {f"ucp.errors.{kind}"}
    assert any(words in failure.message for failure in outcome.failures)


def test_a_tied_module_with_weights_of_its_own_is_refused(ranks: RankPool) -> None:
    """Stages would train copies of them that go their own ways."""
    outcome = ranks.attempt(pipe_runs.build_engine, PipeCase(pp=2, shift=True, declared=False), {}, world_size=2)
    assert outcome.all_raised
    for failure in outcome.failures:
        assert failure.type_name == "ucp.errors.Unsupported"
        assert "'tied_modules.embed.shift'" in failure.message


# DualPipeV: two virtual stages a rank, one from either end; it takes four micro-batches for two ranks.
FOUR = TRAINED.but(accumulation=4)
DUAL = PipeCase(pp=2, dual=True, case=FOUR)
VIRTUAL = [
    Pair(DUAL, DUAL, "equal"),
    Pair(DUAL, PipeCase(pp=2, case=FOUR.but(dp=2))),
    Pair(DUAL, replace(PLAIN, case=FOUR.but(stage=3, dp=2))),
    Pair(PipeCase(pp=4, case=FOUR), DUAL),
]


@pytest.mark.skipif(not releases.is_pinned(), reason="DeepSpeed has DualPipeV since 0.19")
@pytest.mark.parametrize("pair", VIRTUAL, ids=lambda pair: pair.label)
def test_virtual_stages(ranks: RankPool, pipes: ParallelSources, spec: str, pair: Pair) -> None:
    """From DeepSpeed's own files, and from what this project's engine saves of the same."""
    for saving in (None, {"save": {"async": False}}):
        run = pipes.get(pair.source, saving)
        check(pair, run, load(ranks, pair.target, run.folder, section(spec, pair.source, pair.target), 0))


@pytest.mark.skipif(not releases.is_pinned(), reason="what the pinned DeepSpeed does")
def test_deepspeeds_pipelines_take_no_sequence_parallelism(ranks: RankPool) -> None:
    """Its groups are told by an ``mpu``, which a pipeline brings itself. So there is no run with all four kinds."""
    outcome = ranks.attempt(pipe_runs.with_sequences, PipeCase(pp=2), world_size=4)
    assert all("mpu must be None with pipeline parallelism" in failure.message for failure in outcome.failures)
    assert outcome.all_raised
