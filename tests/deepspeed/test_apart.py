"""Optimizers whose states have other shapes than the weights: at stage 0 whole, in flat buffers by the buffers' shape.

Adafactor keeps a row and a column for a matrix, Shampoo keeps square matrices. SOAP takes a minute here, and has them
in lists: `tests.formats.deepspeed.read.test_apart`.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import ucp
from tests.deepspeed import apart_jobs as jobs
from tests.engines import releases
from tests.engines.eight_bits import dequantised
from tests.engines.pool import RankPool
from ucp.errors import Unsupported

pytestmark = pytest.mark.slow(seconds=30)

APART = ("Adafactor", "transformers' Adafactor", "Shampoo")


def equal(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> None:
    assert one.keys() == two.keys()
    for key, value in one.items():
        assert two[key].shape == value.shape, key
        assert torch.equal(two[key], value), key


@pytest.mark.parametrize(("name", "dtype"), [*((name, "fp32") for name in APART), ("CAME", "bf16"), ("Muon", "bf16")])
def test_stage_0(ranks: RankPool, tmp_path: Path, name: str, dtype: str) -> None:
    """Two ranks' checkpoints into one rank that has not stepped: ours, DeepSpeed's own, and one that is converted."""
    if dtype == "bf16" and not releases.knows("DDP_BFLOAT16"):
        pytest.skip(releases.without("its stage 0 in bf16 is its BF16_Optimizer, and loads the files of ZeRO-1"))
    truth, losses = ranks.run(jobs.saved, name, 0, dtype, str(tmp_path), world_size=2)[0]
    with ucp.open(tmp_path / "ours") as checkpoint:
        assert (name == "Muon") != any(known.startswith("optim.state.") for known in checkpoint.parameters)
    # Products of matrices may differ in their last bits with where the matrices lie in memory.
    close = 0.0 if name in ("Adafactor", "Muon") else 1e-7
    for place in ("ours", "theirs"):
        found, further = ranks.run(jobs.resumed, name, 0, dtype, str(tmp_path / place), world_size=1)[0]
        releases.skip_lacking(found if isinstance(found, str) else "")
        assert isinstance(found, dict), found
        equal(found, truth)
        assert further == pytest.approx(losses, abs=5e-5 if dtype == "fp32" else 4e-3)
    found, further = ranks.run(jobs.resumed, name, 0, dtype, str(tmp_path / "ours"), world_size=2)[0]
    equal(found, truth)
    assert further == pytest.approx(losses, abs=close)
    ucp.convert(tmp_path / "ours", tmp_path / "made", to="deepspeed", layout="dp=2,zero=0")
    found, further = ranks.run(jobs.resumed, name, 0, dtype, str(tmp_path / "made"), True, world_size=2)[0]
    equal(found, truth)
    assert further == pytest.approx(losses, abs=close)
    if name == "Muon":
        return
    with pytest.raises(Unsupported, match=r"has shape \[.*choose zero=0 without pipeline"):
        ucp.convert(tmp_path / "ours", tmp_path / "no", to="deepspeed", layout="dp=2,zero=1")
    if dtype == "fp32":
        found, _ = ranks.run(jobs.plain, name, str(tmp_path / "ours"), str(tmp_path / "plain"), world_size=1)[0]
        equal(found, truth)
        found, again = ranks.run(jobs.resumed, name, 0, dtype, str(tmp_path / "plain"), world_size=1)[0]
        equal(found, truth)
        assert again == pytest.approx(losses, abs=5e-5)


@pytest.mark.parametrize(("stage", "dtype"), [(1, "fp32"), (2, "bf16")])
def test_adafactor_in_flat_buffers(ranks: RankPool, tmp_path: Path, stage: int, dtype: str) -> None:
    """Its buffers are vectors, for which it keeps one state of their shape: cut over any ranks. In other stages it
    steps otherwise, so only the state is compared, by the engines' proofs."""
    _, losses = ranks.run(jobs.saved, "Adafactor", stage, dtype, str(tmp_path), world_size=2)[0]
    for place in ("ours", "theirs"):
        _, further = ranks.run(jobs.resumed, "Adafactor", stage, dtype, str(tmp_path / place), world_size=2)[0]
        assert further == losses
        _, further = ranks.run(jobs.resumed, "Adafactor", 3 - stage, dtype, str(tmp_path / place), world_size=1)[0]
        assert len(further) == 3


@pytest.mark.parametrize("name", ["EightBits", "AdamW8bit"])
def test_codes_of_8_bits(ranks: RankPool, tmp_path: Path, name: str) -> None:
    """At stage 0 they come back bit for bit on any number of ranks, or as float32 in a plain AdamW; a flat buffer's are
    not saved."""
    if name == "AdamW8bit":
        pytest.importorskip("bitsandbytes")
    truth, losses = ranks.run(jobs.saved, name, 0, "fp32", str(tmp_path), world_size=2)[0]
    assert {tensor.dtype for key, tensor in truth.items() if ":state" in key} == {torch.uint8}
    for world in (1, 2):
        found, further = ranks.run(jobs.resumed, name, 0, "fp32", str(tmp_path / "ours"), world_size=world)[0]
        assert isinstance(found, dict), found
        equal(found, truth)
        assert further == losses if world == 2 else further == pytest.approx(losses, abs=5e-3)
    into_adamw = ("AdamW", 0, "fp32", str(tmp_path / "ours"))
    said, untouched = ranks.run(jobs.resumed, *into_adamw, world_size=1)[0]
    assert untouched
    assert '"states": "dequantised"' in said
    found, further = ranks.run(jobs.resumed, *into_adamw, False, {"states": "dequantised"}, world_size=1)[0]
    assert isinstance(found, dict), found
    for key, tensor in found.items():
        parameter, _, state = key.partition(":")
        number = {"exp_avg": "1", "exp_avg_sq": "2"}[state]
        held = {of.partition(":")[2]: value for of, value in truth.items() if of.startswith(f"{parameter}:")}
        assert torch.equal(tensor, dequantised(held, number)), key
    assert len(further) == 3
    outcome = ranks.attempt(jobs.saved, name, 1, "fp32", str(tmp_path / "no"), world_size=1)
    assert any("nothing is saved" in failure.message for failure in outcome.failures)


def test_another_optimizer_is_refused(ranks: RankPool, tmp_path: Path) -> None:
    ranks.run(jobs.saved, "Adafactor", 0, "fp32", str(tmp_path), world_size=1)
    said, untouched = ranks.run(jobs.resumed, "AdamW", 0, "fp32", str(tmp_path / "ours"), world_size=1)[0]
    assert untouched
    assert "would stay unused" in said
    assert "optim.state.0.weight.row_var" in said
    said, untouched = ranks.run(jobs.resumed, "Adafactor", 1, "fp32", str(tmp_path / "ours"), world_size=1)[0]
    assert untouched
    assert said.startswith("Mismatch")
    ranks.run(jobs.saved, "AdamW", 0, "fp32", str(tmp_path / "adamw"), world_size=1)
    said, untouched = ranks.run(jobs.resumed, "Adafactor", 0, "fp32", str(tmp_path / "adamw" / "ours"), world_size=1)[0]
    assert untouched
    assert "optim.state.0.weight.row_var" in said
