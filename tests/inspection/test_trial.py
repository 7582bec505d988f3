"""``ucp-spec check --model``: mistakes that neither shapes nor copies show are caught by running the model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.test_spec import call
from tests.engines import tp_models
from tests.engines.configs import Case
from tests.engines.parallel_runs import ParallelRun, ParallelSources
from tests.engines.tp_runs import TpCase
from tests.spec.models import config_of
from ucp.spec.shipped import FOLDER

pytestmark = pytest.mark.slow(seconds=30)

GPT = "tests.inspection.trial_models:gpt"
RIGHT = (FOLDER / "megatron_gpt_plain.yaml").read_text()
# Each fits all shapes and all copies, and puts the shards together wrongly.
MISTAKES = {
    "heads contiguous, not interleaved by group": (
        "(kv_heads/tp (q_per_kv | 1 | 1) head_dim)",
        "(kv_heads/tp q_per_kv head_dim | kv_heads/tp head_dim | kv_heads/tp head_dim)",
    ),
    "keys before queries": (
        "(kv_heads/tp (q_per_kv | 1 | 1) head_dim)",
        "(kv_heads/tp head_dim | kv_heads/tp q_per_kv head_dim | kv_heads/tp head_dim)",
    ),
    "parts outermost": (
        "(kv_heads/tp (q_per_kv | 1 | 1) head_dim)",
        "((q_per_kv | 1 | 1) kv_heads/tp head_dim)",
    ),
    "heads innermost": ("(kv_heads/tp q_per_kv head_dim)", "(q_per_kv head_dim kv_heads/tp)"),
    "gate and up cut straight through": ("(ffn/tp | ffn/tp)", "(2 ffn)/tp"),
    "gate and up interleaved": ("(ffn/tp | ffn/tp)", "(ffn/tp 2)"),
    "heads of a group outermost": ("(kv_heads/tp q_per_kv head_dim)", "(q_per_kv kv_heads/tp head_dim)"),
}


@pytest.fixture(scope="module")
def gpt(sliced: ParallelSources) -> ParallelRun:
    return sliced.get(TpCase("megatron"))


def test_the_right_spec_passes(gpt: ParallelRun, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = call(capsys, "check", "megatron_gpt_plain", gpt.folder, "--model", GPT, "--json")
    assert (code, err) == (0, ""), err
    trial = json.loads(out)["trial"]
    assert trial["difference"] < 1e-6 * trial["scale"]
    code, out, _ = call(capsys, "check", "megatron_gpt_plain", gpt.folder, "--model", GPT)
    assert "the merged model computes what its shards do" in out


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_that_shapes_do_not_show(
    gpt: ParallelRun, capsys: pytest.CaptureFixture[str], tmp_path: Path, mistake: str
) -> None:
    right, wrong = MISTAKES[mistake]
    assert right in RIGHT
    spec = tmp_path / "wrong.yaml"
    spec.write_text(RIGHT.replace(right, wrong))
    code, out, _ = call(capsys, "check", spec, gpt.folder)
    assert code == 0
    assert "taken on trust" in out
    code, _, err = call(capsys, "check", spec, gpt.folder, "--model", GPT)
    assert code == 2
    assert "the model merged by it computes other logits than its shards do" in err


def test_models_of_transformers_under_autotp(
    sliced: ParallelSources, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    run = sliced.get(TpCase(case=Case(stage=3, dp=2)))
    config = tmp_path / "config.json"
    config.write_text(json.dumps(config_of(tp_models.llama(0, 2))))
    code, out, err = call(capsys, "check", "llama", run.folder, "--config", config, "--model", "autotp", "--json")
    assert code == 0, err
    trial = json.loads(out)["trial"]
    assert trial["difference"] < 1e-5 * trial["scale"]


def test_factories_that_are_none(gpt: ParallelRun, capsys: pytest.CaptureFixture[str]) -> None:
    for factory, words in (
        ("nowhere:gpt", "--model nowhere:gpt: can't be imported"),
        ("tests.inspection.trial_models:nothing", "has no attribute 'nothing'"),
        ("tests.inspection.trial_models:other", "the model has 'weight' [4, 3], which the checkpoint lacks"),
        ("autotp", "its model_type is 'megatron_gpt_plain'"),
    ):
        code, _, err = call(capsys, "check", "megatron_gpt_plain", gpt.folder, "--model", factory)
        assert code == 2, err
        assert words in err


def test_without_shards_there_is_nothing_to_try(sliced: ParallelSources, capsys: pytest.CaptureFixture[str]) -> None:
    run = sliced.get(TpCase("megatron", tp=1, case=Case(stage=3, dp=2)))
    code, _, err = call(capsys, "check", "megatron_gpt_plain", run.folder, "--model", GPT)
    assert code == 2
    assert "one tensor-parallel rank saved it, so there are no shards to try" in err
