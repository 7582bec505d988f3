"""Opening checkpoints: which one of a folder is taken, what is refused, and what the refusal says."""

from __future__ import annotations

import logging
import os
import shutil
import threading
from pathlib import Path

import pytest
import torch

import ucp
from tests.formats import raw
from ucp.catalog import TrainingState
from ucp.errors import BadArgument, DamagedCheckpoint, NotACheckpoint, UcpError


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, raw.Raw]:
    folder = tmp_path_factory.mktemp("one")
    made = raw.make(folder / "source", aliases={"embed.weight": ("head.weight",)})
    return raw.write_form("consolidated", folder / "checkpoint", made), made


@pytest.fixture
def several(one: tuple[Path, raw.Raw], tmp_path: Path) -> Path:
    """Checkpoints ``step1`` to ``step3``, written in this order; ``latest`` names the second."""
    folder = tmp_path / "run"
    for number in (1, 2, 3):
        shutil.copytree(one[0], folder / f"step{number}")
        for file in (folder / f"step{number}").iterdir():
            os.utime(file, ns=(0, 10**18 + number * 10**9))
    (folder / "latest").write_text("step2")
    (folder / ".ucp-tmp-step9-1-0").mkdir()  # what a process that died leaves
    return folder


def test_latest_is_taken(several: Path) -> None:
    with ucp.open(several) as checkpoint:
        assert checkpoint.path == several / "step2"
    (several / "latest").write_text("step1\n")
    with ucp.open(str(several)) as checkpoint:
        assert checkpoint.path == several / "step1"


def test_a_tag_picks(several: Path) -> None:
    with ucp.open(several, tag="step3") as checkpoint:
        assert checkpoint.path == several / "step3"
    with pytest.raises(NotACheckpoint, match=r"no checkpoint with the tag 'step33'; did you mean 'step3'"):
        ucp.open(several, tag="step33")
    with pytest.raises(NotACheckpoint, match="there is no such file or folder"):
        ucp.open(several / "nowhere", tag="step3")
    for tag in ("../run/step1", "", ".", ".."):
        with pytest.raises(BadArgument, match="is not the name of a folder"):
            ucp.open(several, tag=tag)


def test_without_latest_the_newest_is_taken_with_a_line(several: Path, caplog: pytest.LogCaptureFixture) -> None:
    (several / "latest").unlink()
    with caplog.at_level(logging.WARNING, "ucp"), ucp.open(several) as checkpoint:
        assert checkpoint.path == several / "step3"
    (record,) = caplog.records
    assert "taking 'step3', the newest checkpoint" in record.getMessage()


def test_a_damaged_checkpoint_is_passed_over_only_for_the_tag_newest(
    several: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (several / "latest").write_text("step3")
    (several / "step3/model-00001-of-00001.safetensors").unlink()
    (several / "step2/ucp.json").write_bytes(b"")
    with pytest.raises(DamagedCheckpoint, match=r"step3/model-00001-of-00001\.safetensors.*tag='newest'"):
        ucp.open(several)
    with caplog.at_level(logging.WARNING, "ucp"), ucp.open(several, tag="newest") as checkpoint:
        assert checkpoint.path == several / "step1"
    (record,) = caplog.records
    assert "taking 'step1'" in record.getMessage()
    assert "step3/model-00001-of-00001.safetensors" in record.getMessage()
    assert "step2/ucp.json" in record.getMessage()


def test_a_damaged_checkpoint_that_was_asked_for_is_an_error(several: Path) -> None:
    (several / "step3/model-00001-of-00001.safetensors").unlink()
    for path, tag in ((several, "step3"), (several / "step3", None)):
        with pytest.raises(DamagedCheckpoint, match=r"step3/model-00001-of-00001\.safetensors"):
            ucp.open(path, tag=tag)


def test_where_none_is_whole_the_first_reason_is_given(several: Path) -> None:
    for number in (1, 2, 3):
        (several / f"step{number}/model-00001-of-00001.safetensors").unlink()
    with pytest.raises(DamagedCheckpoint, match="step2/model"):
        ucp.open(several)


def test_what_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(NotACheckpoint, match=r"nowhere: there is no such file or folder"):
        ucp.open(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        NotACheckpoint,
        match=r"empty: no checkpoint was recognised here; the folder holds nothing; looked for: a universal",
    ):
        ucp.open(tmp_path / "empty")
    (tmp_path / "file").write_text("x")
    with pytest.raises(NotACheckpoint, match=r"file: is a file; a checkpoint is a folder"):
        ucp.open(tmp_path / "file")
    for name in "abcdefg":
        (tmp_path / "empty" / name).write_text("x")
    with pytest.raises(NotACheckpoint, match=r"holds a, b, c, d, e and 2 more"):
        ucp.open(tmp_path / "empty")
    (tmp_path / "empty/latest").write_text("step1")
    with pytest.raises(NotACheckpoint, match=r"latest' names a checkpoint, but none is there"):
        ucp.open(tmp_path / "empty")


def test_specs_that_are_not_there_are_refused_by_name(one: tuple[Path, raw.Raw]) -> None:
    with pytest.raises(BadArgument, match=r"llama\.yaml: can't be read as a spec"):
        ucp.open(one[0], "llama.yaml")
    with pytest.raises(BadArgument, match=r"no spec 'lama' in the catalogue; did you mean 'llama'"):
        ucp.open(one[0], "lama")


def test_wrong_names_are_told_the_near_ones(one: tuple[Path, raw.Raw]) -> None:
    path, _ = one
    with ucp.open(path) as checkpoint:
        with pytest.raises(BadArgument, match=r"no parameter 'embed\.weights'; did you mean 'embed\.weight'"):
            checkpoint.read("embed.weights")
        with pytest.raises(BadArgument, match=r"no parameter 'q'; there are 10: 'embed\.weight', 'head\.weight', "):
            checkpoint.read("q")
        with pytest.raises(BadArgument, match=r"'scale' has no state 'exp'; it has .*exp_avg_sq"):
            checkpoint.read("scale", "exp")
        with pytest.raises(BadArgument, match=r"no state 'step' \(it is a single value"):
            checkpoint.read("scale", "step")
        with pytest.raises(BadArgument, match=r"'mask' has no state 'exp_avg'; it has param"):
            checkpoint.read("mask", "exp_avg")
        with pytest.raises(
            BadArgument, match=r"^\S+: no parameter 'embed\.weights'; did you mean 'embed\.weight' .*\?$"
        ):
            checkpoint.parameters["embed.weights"]
        with pytest.raises(KeyError, match=r"it is tied to 'embed\.weight', under which it is listed"):
            checkpoint.parameters["head.weight"]
        assert "q" not in checkpoint.parameters
        assert checkpoint.parameters.get("q") is None
        assert checkpoint.parameters == checkpoint.catalog.parameters


def test_a_training_state_is_shown_short() -> None:
    """As it is in a Python prompt: generators' states are cut, and what is not there is left out."""
    state = {"torch": torch.zeros(5056, dtype=torch.uint8), "python": [3, tuple(range(625)), None]}
    shown = repr(TrainingState(global_steps=7, extra={"ranks": [{"rng": state}] * 64}))
    assert shown.startswith("TrainingState(global_steps=7, extra={'ranks': [{'rng': {")
    assert "clip_grad" not in shown
    assert len(shown) < 4000
    assert "\n" not in shown


@pytest.mark.parametrize(
    ("region", "message"),
    [
        ((slice(None),) * 3, r"3 slices, but the tensor has 2 dimensions"),
        ((slice(0, 4, 2),), r"step 2"),
        ((slice(4, 0, -1),), r"step -1"),
        ((3,), r"give a tuple of slices"),
        (3, r"give a tuple of slices"),
        ("ab", r"give a tuple of slices"),
        ((slice("a", None),), r"region of 'embed\.weight'"),
    ],
)
def test_wrong_regions_are_refused(one: tuple[Path, raw.Raw], region: object, message: str) -> None:
    with ucp.open(one[0]) as checkpoint, pytest.raises(BadArgument, match=message):
        checkpoint.read("embed.weight", region=region)  # type: ignore[arg-type]


def test_a_tensor_that_was_read_is_the_callers_own(one: tuple[Path, raw.Raw]) -> None:
    with ucp.open(one[0]) as checkpoint:
        checkpoint.read("embed.weight").zero_()
        assert checkpoint.read("embed.weight", region=slice(2)).equal(one[1].tensor("embed.weight", "param")[:2])
        checkpoint.close()
        assert checkpoint.read("embed.weight").equal(one[1].tensor("embed.weight", "param"))
        assert "universal" in repr(checkpoint)


def test_many_threads_may_read(one: tuple[Path, raw.Raw]) -> None:
    path, made = one
    wrong: list[str] = []
    with ucp.open(path) as checkpoint:

        def work(seed: int) -> None:
            for name, state in sorted(made.truth)[seed % 3 :: 3] * 5:
                found, truth = checkpoint.read(name, state), made.tensor(name, state)
                if not found.reshape(-1).view(torch.uint8).equal(truth.reshape(-1).view(torch.uint8)):
                    wrong.append(name)

        threads = [threading.Thread(target=work, args=(k,)) for k in range(9)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong


def test_every_refusal_can_be_caught_as_one(tmp_path: Path) -> None:
    with pytest.raises(UcpError):
        ucp.open(tmp_path)
