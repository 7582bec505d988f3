"""One rank's file of another step or run, or without its data: each contradiction is refused with files and values."""

from __future__ import annotations

import copy
import io
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import ucp
from tests.formats.deepspeed.read.test_damaged import OLDER, TAG, files, refusal
from ucp.errors import DamagedCheckpoint, Unsupported
from ucp.inspection.verify import verify

Change = Callable[[dict[str, Any]], None]


@pytest.fixture(autouse=True, scope="module")
def _deepspeed() -> None:
    """Its classes are in the files, which torch itself rewrites here."""
    pytest.importorskip("deepspeed")


def saved(tmp_path: Path, which: str) -> Path:
    shutil.copytree(OLDER[which], tmp_path / "saved")
    return tmp_path / "saved"


def rewrite(path: Path, change: Change) -> None:
    content = torch.load(path, weights_only=False)
    change(content)
    torch.save(content, path)


def optimizer_of(folder: Path, rank: int) -> Path:
    return next(folder / TAG / n for n in files(folder) if f"zero_pp_rank_{rank}_" in n and "optim" in n)


def set_lr(content: dict[str, Any]) -> None:
    state = content["optimizer_state_dict"]
    for group in state.get("base_optimizer_state", state.get("optimizer_state_dict"))["param_groups"]:
        group["lr"] = 0.125


def set_step(content: dict[str, Any]) -> None:
    state = content["optimizer_state_dict"]
    for found in state.get("base_optimizer_state", state.get("optimizer_state_dict"))["state"].values():
        found["step"] = torch.tensor(77.0)


def set_scale(content: dict[str, Any]) -> None:
    scaler = content["optimizer_state_dict"].get("loss_scaler")
    content["optimizer_state_dict"]["loss_scaler"] = scaler = copy.copy(scaler)
    scaler.cur_scale = 4096.0


def set_config(content: dict[str, Any]) -> None:
    content["ds_config"]["gradient_accumulation_steps"] = 31


def set_version(content: dict[str, Any]) -> None:
    content["ds_version"] = "0.9.9"


CHANGES = {
    "lr": (set_lr, "0.125"),
    "step": (set_step, "77.0"),
    "loss scale": (set_scale, "4096.0"),
    "config": (set_config, "31"),
    "version": (set_version, "0.9.9"),
}


@pytest.mark.parametrize("what", CHANGES)
@pytest.mark.parametrize("which", ["z1", "z2", "z3"])
def test_an_optimizer_file_that_says_otherwise(tmp_path: Path, which: str, what: str) -> None:
    change, value = CHANGES[what]
    folder = saved(tmp_path, which)
    path = optimizer_of(folder, 1)
    if what == "loss scale" and "loss_scaler" not in torch.load(path, weights_only=False)["optimizer_state_dict"]:
        pytest.skip("BF16_Optimizer has no loss scaler")
    rewrite(path, change)
    text = refusal(folder)
    assert path.name in text
    assert optimizer_of(folder, 0).name in text
    assert value in text
    assert not verify(folder / TAG).whole


@pytest.mark.parametrize("key", ["global_steps", "global_samples", "skipped_steps", "ds_version"])
def test_a_model_file_that_says_otherwise(tmp_path: Path, key: str) -> None:
    folder = saved(tmp_path, "z3")
    one, other = (folder / TAG / n for n in files(folder) if "model_states" in n)
    rewrite(other, lambda content: content.update({key: 91}))
    text = refusal(folder)
    assert one.name in text
    assert other.name in text
    assert "91" in text
    assert key in text


def test_a_scheduler_of_another_step(tmp_path: Path) -> None:
    folder = saved(tmp_path, "z3")
    for rank, name in enumerate(n for n in files(folder) if "model_states" in n):
        rewrite(folder / TAG / name, lambda content, rank=rank: content.update(lr_scheduler={"last_epoch": 5 + rank}))
    text = refusal(folder)
    assert "the scheduler's 'last_epoch' is 6" in text
    assert "says 5" in text


def test_what_may_differ_between_ranks_does(tmp_path: Path) -> None:
    """Paths and monitors of a rank's own, and a scheduler's view of a metric."""
    folder = saved(tmp_path, "z3")
    with ucp.open(folder) as checkpoint:
        truth = {name: checkpoint.read(name) for name in checkpoint.parameters}
    for rank, name in enumerate(files(folder)):
        rewrite(folder / TAG / name, lambda content, rank=rank: content["ds_config"].update(csv_monitor=f"/of/{rank}"))
    with ucp.open(folder) as checkpoint:
        assert all(torch.equal(checkpoint.read(name), tensor) for name, tensor in truth.items())


@pytest.mark.parametrize("which", ["z1", "z3"])
def test_times_far_apart_are_told(tmp_path: Path, which: str, caplog: pytest.LogCaptureFixture) -> None:
    folder = saved(tmp_path, which)
    for name in files(folder):
        os.utime(folder / TAG / name, (1.7e9, 1.7e9))
    with caplog.at_level(logging.WARNING, "ucp"), ucp.open(folder):
        assert not caplog.records
    os.utime(optimizer_of(folder, 1), (1.7e9 + 7200, 1.7e9 + 7200))
    with caplog.at_level(logging.WARNING, "ucp"), ucp.open(folder):
        (record,) = caplog.records
    assert "last written far apart" in record.getMessage()
    assert optimizer_of(folder, 1).name in record.getMessage()
    assert "2023-11-15 00:13 UTC" in record.getMessage()


def through_a_stream(path: Path) -> None:
    content, stream = torch.load(path, weights_only=False), io.BytesIO()
    torch.save(content, stream)
    path.write_bytes(stream.getvalue())


@pytest.mark.parametrize("which", ["z1", "z2"])
def test_slices_tell_ranks_apart_where_names_do_not(tmp_path: Path, which: str) -> None:
    """Written through a stream, as DeepSpeed's fast engine does; the model's weights are all alike, so that they say
    nothing."""
    folder = saved(tmp_path, which)
    model = next(folder / TAG / n for n in files(folder) if "model_states" in n)
    rewrite(model, lambda content: [t.detach().zero_() for t in content["module"].values()])
    for rank in (0, 1):
        rewrite(
            optimizer_of(folder, rank),
            lambda content: [
                t.detach().zero_() for t in content["optimizer_state_dict"]["single_partition_of_fp32_groups"]
            ],
        )
        through_a_stream(optimizer_of(folder, rank))
    with ucp.open(folder, tag=TAG):
        pass
    one, other = optimizer_of(folder, 0), optimizer_of(folder, 1)
    one.rename(folder / "kept")
    other.rename(one)
    (folder / "kept").rename(other)
    with pytest.raises(DamagedCheckpoint, match=r"'param_slice_mappings' are those of .*swapped|partition size") as e:
        ucp.open(folder, tag=TAG)
    assert one.name in str(e.value)
    assert other.name in str(e.value)


@pytest.mark.parametrize("kind", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("which", ["z3"])
def test_whole_weights_beside_tell_stage_3_ranks_apart(tmp_path: Path, which: str, kind: str) -> None:
    """As Hugging Face's Trainer leaves them. Weights of another step are no reason to refuse."""
    from safetensors.torch import save_file

    folder = saved(tmp_path, which)
    with ucp.open(folder) as checkpoint:
        weights = {name: checkpoint.read(name).to(torch.bfloat16) for name in checkpoint.parameters}
    save = save_file if kind.endswith("safetensors") else torch.save
    one, other = optimizer_of(folder, 0), optimizer_of(folder, 1)
    for path in (one, other):
        through_a_stream(path)
    save(weights, folder / kind)
    with ucp.open(folder, tag=TAG):
        pass
    one.rename(folder / "kept")
    other.rename(one)
    (folder / "kept").rename(other)
    text = refusal(folder)
    assert "swapped" in text
    assert one.name in text
    assert other.name in text
    save({name: weight * 1.5 for name, weight in weights.items()}, folder / kind)
    with ucp.open(folder, tag=TAG):
        pass


def emptied(content: dict[str, Any], masters: bool) -> None:
    """As DeepSpeed's swapper leaves the first subgroup."""
    state = content["optimizer_state_dict"]
    if masters:
        state["fp32_flat_groups"][0] = torch.empty(0)
    for key in ("exp_avg", "exp_avg_sq"):
        state["optimizer_state_dict"]["state"][0][key] = torch.empty(0)


@pytest.mark.parametrize("masters", [True, False])
@pytest.mark.parametrize("beside", [True, False])
def test_states_on_nvme_are_no_damage(tmp_path: Path, masters: bool, beside: bool) -> None:
    folder = saved(tmp_path, "z3")
    for rank in (0, 1):
        rewrite(optimizer_of(folder, rank), lambda content: emptied(content, masters))
    if beside:
        (folder / TAG / "offloaded_tensors" / "rank00").mkdir(parents=True)
        (folder / TAG / "offloaded_tensors" / "rank00" / "0.tensor.swp").write_bytes(b"x" * 100)
    with pytest.raises((Unsupported, DamagedCheckpoint), match="offloaded to NVMe") as caught:
        ucp.open(folder, tag=TAG)
    assert optimizer_of(folder, 0).name in str(caught.value)
    assert "mixed" not in str(caught.value)
