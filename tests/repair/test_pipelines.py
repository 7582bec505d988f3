"""A pipeline of four stages that loses one: filled from its neighbours by the formula, marked, and trained on."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch

import ucp
from tests.engines import parallel_runs, pipe_models
from tests.engines.configs import Case
from tests.engines.parallel_runs import ParallelSources
from tests.engines.pipe_runs import PipeCase
from tests.engines.pool import RankPool
from tests.engines.truth import known
from tests.repair import norm_jobs
from ucp.cli import main as command
from ucp.errors import ApproximateCheckpoint, DamagedCheckpoint, Mismatch, UcpError, Unsupported
from ucp.repair import repair

pytestmark = pytest.mark.slow

PIPE = PipeCase(pp=4, method="type:block", blocks=8, case=Case(stage=1, dp=1, accumulation=2, dtype="bf16"))
LOST = (6, 7)  # stage 2's blocks; its neighbours' are 4, 5 and 8, 9
NORMS = {"4": 3.0, "5": 2.0, "8": 1.0, "9": 0.5}
SPEC = pipe_models.SPEC.replace('"6.', '"10.')


def damaged(pipes: ParallelSources, to: Path, *patterns: str) -> Path:
    """A copy of the run without these files; its tag's folder."""
    run = pipes.get(PIPE)
    shutil.copytree(run.folder, to)
    for pattern in patterns:
        found = list((to / run.tag).glob(pattern))
        assert found, pattern
        for path in found:
            path.unlink()
    return to / run.tag


STAGE = ("layer_06*", "layer_07*", "mp_rank_02_*", "*mp_rank_02_optim*")


@pytest.fixture
def lost(pipes: ParallelSources, tmp_path: Path) -> Path:
    return damaged(pipes, tmp_path / "run", *STAGE)


def is_lost(name: str) -> bool:
    return name.split(".")[0] in map(str, LOST)


@pytest.mark.parametrize(("power", "shares"), [(2, (0.9, 0.1)), (1, (0.75, 0.25))])
def test_lost_layers_are_the_weighted_mean_and_all_else_is_as_it_was(
    pipes: ParallelSources, lost: Path, tmp_path: Path, power: int, shares: tuple[float, float]
) -> None:
    report = repair(lost, tmp_path / "fixed", norms=NORMS, norm_power=power)
    assert report.layers["6"] == f"{shares[0]:.4g} of layer 4 + {shares[1]:.4g} of layer 8"
    truth = known(pipes.get(PIPE).truth)
    with ucp.open(tmp_path / "fixed", allow_approximate=True) as fixed:
        assert set(fixed.parameters) == {*truth.params, *truth.buffers, *truth.frozen}
        assert set(fixed.catalog.approximate) == {n for n in fixed.parameters if is_lost(n)}
        for name, states in truth.params.items():
            index, _, rest = name.partition(".")
            for state, tensor in states.items():
                if not is_lost(name):
                    assert torch.equal(fixed.read(name, state), tensor), (name, state)
                elif state == "param":
                    left, right = (truth.params[f"{int(index) + by}.{rest}"]["param"].double() for by in (-2, 2))
                    a, b = (NORMS[str(int(index) + by)] ** power for by in (-2, 2))
                    assert torch.equal(fixed.read(name), ((a * left + b * right) / (a + b)).to(tensor.dtype)), name
                else:
                    assert not fixed.read(name, state).any()
            steps = {info.scalars["step"] for n, info in fixed.parameters.items() if n in truth.params and is_lost(n)}
            assert steps == {0}


def test_every_load_needs_leave_and_commands_show_it(
    pipes: ParallelSources, lost: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def said(*arguments: object) -> tuple[int, str]:
        code = command.main([*map(str, arguments)])
        return code, "".join(capsys.readouterr())

    with pytest.raises(DamagedCheckpoint):
        ucp.open(lost)
    code, text = said("verify", lost)
    assert code == 1
    assert "ucp repair can make it loadable; it would fill in layers 6-7" in text
    (tmp_path / "norms.json").write_text(json.dumps(NORMS))
    fixed = tmp_path / "fixed"
    code, text = said("repair", lost, fixed, "--norms", tmp_path / "norms.json")
    assert code == 0, text
    assert "0.9 of layer 4 + 0.1 of layer 8" in text
    with pytest.raises(ApproximateCheckpoint, match="allow_approximate"):
        ucp.open(fixed)
    state = {"model": {"10.weight": torch.zeros(pipe_models.HIDDEN)}}
    with pytest.raises(ApproximateCheckpoint):
        ucp.load(state, fixed)
    ucp.load(state, fixed, allow_approximate=True)
    code, text = said("convert", fixed, tmp_path / "no")
    assert (code, (tmp_path / "no").exists()) == (2, False)
    code, text = said("convert", fixed, tmp_path / "kept", "--allow-approximate")
    assert code == 0, text
    code, text = said("inspect", tmp_path / "kept")
    assert "layers 6-7 (checkfree)" in text
    code, text = said("verify", fixed)
    assert code == 0
    assert "approximate" in text
    capsys.readouterr()
    assert command.main(["diff", pipes.get(PIPE).folder, str(fixed), "--json"]) == 1
    differ = json.loads(capsys.readouterr().out)
    assert not any(differ[key] for key in ("only_a", "only_b", "shapes", "training_state"))
    assert {is_lost(tensor["name"]) for tensor in differ["tensors"]} == {True}
    assert {is_lost(name) for name in differ["scalars"]} == {True}


TARGETS = {
    "pp2": PipeCase(pp=2, blocks=8, case=PIPE.case.but(seed=5)),
    "ZeRO-3": PipeCase(pp=0, blocks=8, case=PIPE.case.but(stage=3, dp=2, seed=5)),
}


@pytest.mark.parametrize("target", TARGETS)
def test_training_goes_on(ranks: RankPool, lost: Path, tmp_path: Path, target: str) -> None:
    (tmp_path / "pipe.yaml").write_text(SPEC)
    repair(lost, tmp_path / "fixed", norms=NORMS, moments="average")
    case = TARGETS[target]
    section = {"load": {"allow_approximate": True}, **({} if case.pp else {"spec": str(tmp_path / "pipe.yaml")})}
    found = ranks.run(parallel_runs.resume, case, str(tmp_path / "fixed"), section, world_size=case.world_size)[0]
    truth = known(found.truth)
    with ucp.open(tmp_path / "fixed", allow_approximate=True) as fixed:
        for name, states in truth.params.items():
            there = name if case.pp or name.startswith("norm.") else pipe_models.pipeline_name(name)
            there = f"10.{name[5:]}" if name.startswith("norm.") else there
            for state, tensor in states.items():
                assert torch.equal(fixed.read(there, state), tensor), (name, state)
    assert all(loss == loss for loss in found.further)


@pytest.mark.parametrize("stage", [1, 3])
def test_zero_moments_in_a_group_of_their_own(
    pipes: ParallelSources, ranks: RankPool, lost: Path, tmp_path: Path, stage: int
) -> None:
    """Filled layers begin again at step 0 with more learning rate, all others go on; in one group with them that is
    refused, since DeepSpeed counts a group's steps together."""
    (tmp_path / "pipe.yaml").write_text(SPEC)
    spec = str(tmp_path / "pipe.yaml")
    repair(lost, tmp_path / "fixed", norms=NORMS, lr_scale=1.1)
    case = PipeCase(pp=0, blocks=8, case=PIPE.case.but(stage=stage, dp=2, seed=5))
    filled = ("blocks.4.", "blocks.5.")
    arguments = (case, str(tmp_path / "fixed"), spec)
    truth, rates, steps, losses = ranks.run(norm_jobs.in_groups, *arguments, filled, world_size=2)[0]
    assert rates[1] == pytest.approx(1.1 * rates[0])
    assert {name: step for name, step in steps.items() if (step == 0) != name.startswith(filled)} == {}
    assert any(name.startswith(filled) for name in steps)
    assert all(map(math.isfinite, losses))
    original = known(pipes.get(PIPE).truth)
    for name, states in known(truth).params.items():
        if name.startswith(filled):
            assert not states["exp_avg"].any()
            assert not states["exp_avg_sq"].any()
        elif name.startswith("blocks."):
            there = original.params[pipe_models.pipeline_name(name)]
            assert all(torch.equal(states[state], there[state]) for state in states), name
    repair(lost, tmp_path / "joined", norms=NORMS)
    with pytest.raises(Exception, match="step"):
        ranks.run(norm_jobs.in_groups, case, str(tmp_path / "joined"), spec, (), world_size=2)


@pytest.mark.parametrize(
    ("patterns", "kind", "message"),
    [
        (("layer_04*", "layer_05*", "*mp_rank_01*", *STAGE), Unsupported, "are both its neighbours|nothing tells"),
        (("layer_08*", "*mp_rank_03*"), Unsupported, "last stage's model file"),
    ],
)
def test_what_cannot_be_filled_is_refused(
    pipes: ParallelSources, tmp_path: Path, patterns: tuple[str, ...], kind: type[UcpError], message: str
) -> None:
    folder = damaged(pipes, tmp_path / "run", *patterns)
    with pytest.raises((kind, Mismatch), match=message):
        repair(folder, tmp_path / "fixed")
    assert not (tmp_path / "fixed").exists()


def test_the_first_and_the_last_stage(pipes: ParallelSources, tmp_path: Path) -> None:
    """The tied embedding has a copy on the last stage, and is exact; the blocks are copies of their only neighbours."""
    folder = damaged(pipes, tmp_path / "run", "layer_00*", "layer_02*", "layer_03*", "*mp_rank_00_optim*")
    report = repair(folder, tmp_path / "fixed")
    assert report.layers == {"2": "copy of layer 4", "3": "copy of layer 5"}
    truth = known(pipes.get(PIPE).truth)
    with ucp.open(tmp_path / "fixed", allow_approximate=True) as fixed:
        tied = "tied_modules.embed.weight"
        assert tied not in fixed.catalog.approximate
        for state, tensor in truth.params[tied].items():
            assert torch.equal(fixed.read(tied, state), tensor)
        name = "2.down.weight"
        assert torch.equal(fixed.read(name), truth.params["4.down.weight"]["param"])


def test_a_layers_file_keeps_its_weights(pipes: ParallelSources, tmp_path: Path) -> None:
    folder = damaged(pipes, tmp_path / "run", "*mp_rank_02_optim*")
    report = repair(folder, tmp_path / "fixed")
    assert not report.layers
    assert all(map(is_lost, report.stateless))
    truth = known(pipes.get(PIPE).truth)
    with ucp.open(tmp_path / "fixed", allow_approximate=True) as fixed:
        for name, states in truth.params.items():
            if is_lost(name):
                assert torch.equal(fixed.read(name), states["param"].to(torch.bfloat16)), name
                assert not fixed.read(name, "exp_avg").any()
        for name, buffer in truth.buffers.items():
            assert torch.equal(fixed.read(name), buffer), name
