"""``ucp-spec infer`` and ``check`` on the checkpoints of tensor-parallel engines."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

import ucp
from tests.cli.test_spec import call
from tests.engines import tp_models
from tests.engines.configs import Case
from tests.engines.parallel_runs import ParallelRun, ParallelSources
from tests.engines.tp_runs import TpCase
from tests.engines.truth import known
from tests.formats.deepspeed.read.test_matrix import check_tensors
from tests.spec.models import config_of
from ucp.spec import shipped

pytestmark = pytest.mark.slow

LLAMA = TpCase(kv_heads=3, case=Case(stage=1, dp=2, dtype="bf16"))
GPT = TpCase("megatron")
SILENT = TpCase("megatron", tp=4, info=False, case=Case(stage=2, dp=1, dtype="bf16", groups=2))
PLAIN = TpCase("megatron", tp=1, case=Case(stage=3, dp=2))


@pytest.fixture
def gpt(sliced: ParallelSources) -> ParallelRun:
    return sliced.get(GPT)


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config_of(tp_models.llama(0, 3))))
    return path


def test_a_draft_of_a_checkpoint_that_describes_itself_reads_it(
    sliced: ParallelSources, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for k, tp in enumerate((LLAMA, GPT)):
        run = sliced.get(tp)
        code, out, err = call(capsys, "infer", run.folder)
        assert (code, err) == (0, "")
        assert "unknown" not in out
        draft = tmp_path / f"draft{k}.yaml"
        draft.write_text(out)
        with ucp.open(run.folder, draft) as checkpoint:
            check_tensors(checkpoint, known(run.truth))
        code, out, _ = call(capsys, "check", draft, run.folder, "--json")
        assert code == 0
        assert json.loads(out)["merged"] == len(known(run.truth).module) - (tp is GPT)


def test_a_draft_without_information_says_what_is_to_be_decided(
    sliced: ParallelSources, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    run = sliced.get(SILENT)
    code, out, err = call(capsys, "infer", run.folder)
    assert code == 0
    assert "7 lines are marked unknown" in err
    assert "# The catalogue's spec 'megatron_gpt_plain' has lines for all of its names." in out
    # Norms and biases that are equal on all ranks are known; the rest is not guessed.
    assert 'language_model.encoder.layers.{i}.input_layernorm.weight: "8"' in out
    assert "language_model.encoder.layers.{i}.mlp.dense_h_to_4h.weight: {unknown" in out
    draft = tmp_path / "draft.yaml"
    draft.write_text(out)
    code, _, err = call(capsys, "check", draft, run.folder)
    assert code == 2
    assert "' is marked unknown: [" in err
    assert "6 more are: 'language_model" in err


def test_plain_checkpoints_are_drafted_whole(sliced: ParallelSources, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = call(capsys, "infer", sliced.get(PLAIN).folder, "--json")
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert found["unknown"] == {}
    assert 'language_model.encoder.layers.{i}.mlp.dense_h_to_4h.weight: "24 8"' in found["spec"]


def test_check_merges_all_shards_and_cuts_them_again(
    sliced: ParallelSources, gpt: ParallelRun, capsys: pytest.CaptureFixture[str], config: Path
) -> None:
    code, out, _ = call(capsys, "check", "megatron_gpt_plain", gpt.folder)
    assert code == 0
    assert "the shards of 28 parameters merge, and cut again are what they were; 15 of them are held" in out
    assert "padding: vocab is 29, kept as 30" in out
    assert "that the segments of '(q_per_kv | 1 | 1)' lie in this order" in out
    code, out, _ = call(capsys, "check", "llama", sliced.get(LLAMA).folder, "--config", config)
    assert code == 0
    assert "the shards of 21 parameters merge, and cut again are what they were; 6 of them are held" in out


@pytest.mark.parametrize(
    ("right", "wrong", "message"),
    [
        (
            'dense_4h_to_h.weight: "hidden ffn/tp"',
            'dense_4h_to_h.weight: "ffn/tp hidden"',
            "dense_4h_to_h.weight' over tp hold 8 \\+ 8 = 16",
        ),
        (
            'swiglu, else: "ffn/tp hidden"}',
            'swiglu and false, else: "(ffn/tp 3) hidden"}',
            "'ffn' is 12, but the shards of '.*dense_h_to_4h.weight' over tp hold 4",
        ),
        ("*layernorm.weight: hidden", "*nrom.weight: hidden", "no line under parameters: matches '.*layernorm.weight'"),
        ('axes: "(ffn/tp | ffn/tp)"', 'axes: "(2 ffn)"', "is 24 .* but '.*dense_h_to_4h.bias' has 12"),
        ("  vocab: config.vocab_size or config.padded_vocab_size", "  vocab: 31", "'vocab' is 31"),
        (
            'dense_h_to_4h.weight: {axes: "(ffn/tp | ffn/tp) hidden"',
            'dense_h_to_4h.weight: {axes: "ffn/tp hidden"',
            "those on tp rank 1 differ from another rank's",
        ),
    ],
)
def test_wrong_specs_are_refused_by_the_shards(
    gpt: ParallelRun, capsys: pytest.CaptureFixture[str], tmp_path: Path, right: str, wrong: str, message: str
) -> None:
    text = (shipped.FOLDER / "megatron_gpt_plain.yaml").read_text()
    assert right in text
    path = tmp_path / "wrong.yaml"
    path.write_text(text.replace(right, wrong))
    code, _, err = call(capsys, "check", path, gpt.folder)
    assert code == 2
    assert re.search(message, err), err
