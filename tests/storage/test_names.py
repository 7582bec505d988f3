"""Names out of a checkpoint never lead out of the destination, and never become two names of one file."""

from __future__ import annotations

import uuid
from pathlib import Path

import pytest
import torch

import ucp
from tests.formats import raw
from ucp.catalog import ParamGroup, TrainingState
from ucp.errors import BadArgument, DestinationError, Unsupported
from ucp.saving import commit
from ucp.storage import names

CONFIG = {
    "train_batch_size": 2,
    "optimizer": {"type": "AdamW", "params": {"lr": 0.1}},
    "bf16": {"enabled": True},
    "zero_optimization": {"stage": 1},
}

HOSTILE = {
    "upwards": "../../../../x",
    "absolute": "/tmp/x",
    "a folder": "a/b",
    "dots": "..",
    "dot": ".",
    "nothing": "",
    "backslash": "..\\x",
    "a drive": "C:x",
    "nul": "a\0b",
    "newline": "a\nb",
    "escape": "a\x1b[2Jb",
    "c1": "a\x9bb",
    "right to left": "a\u202eb",
    "long": "n" * 256,
    "long in bytes": "é" * 128,
    "a device": "NUL",
    "another device": "com1",
    "a dot at the end": "a.",
    "a space at the end": "a ",
    "no Unicode": "a\ud800",
}
PLAIN = ["model.layers.0.weight", "aux.weight", "nulls", "é", "n" * 255, "a b", ".hidden", "1.attn", "a=b,c"]


@pytest.mark.parametrize("kind", HOSTILE)
def test_no_path_is_made_of_it(kind: str) -> None:
    with pytest.raises(Unsupported, match=r"the parameter '.*' cannot be a file's name, since it"):
        names.entry(HOSTILE[kind], "the parameter")
    if "/" not in HOSTILE[kind] or ".." in HOSTILE[kind]:
        with pytest.raises(Unsupported):
            names.below("/out", f"zero/{HOSTILE[kind]}/fp32.pt")
        with pytest.raises(Unsupported):
            names.below("s3://bucket/out", f"zero/{HOSTILE[kind]}/fp32.pt")


@pytest.mark.parametrize("name", PLAIN)
def test_plain_names_stay(name: str) -> None:
    assert names.entry(name, "the parameter") == name
    assert names.below("/out", f"zero/{name}/fp32.pt") == f"/out/zero/{name}/fp32.pt"
    assert names.below("s3://bucket/out/", name) == f"s3://bucket/out/{name}"


@pytest.mark.parametrize("kind", HOSTILE)
def test_any_text_can_be_escaped(kind: str) -> None:
    name = f"optimizer.{names.escaped(HOSTILE[kind])}-00001-of-00001.safetensors"
    assert names.entry(name, "the state") == name


def test_escaped_texts_differ() -> None:
    texts = [*HOSTILE.values(), "exp_avg", "n" * 257, "n" * 256 + "m"]
    assert len({names.escaped(text) for text in texts}) == len(texts)
    assert names.escaped("exp_avg_sq") == "exp_avg_sq"


@pytest.mark.parametrize(
    "planned",
    [
        ["zero/W/fp32.pt", "zero/w/fp32.pt"],
        ["zero/w\u0065\u0301/fp32.pt", "zero/w\u00e9/fp32.pt"],
        ["zero/straße/a", "zero/STRASSE/a"],
        ["a", "a"],
        ["a", "a/b"],
        ["a/b", "a"],
    ],
)
def test_no_two_names_are_one_file(planned: list[str]) -> None:
    with pytest.raises(Unsupported, match="would be"):
        names.check_planned(planned)


def test_what_is_told_apart_is_planned() -> None:
    names.check_planned(["zero/a/fp32.pt", "zero/a/exp_avg.pt", "zero/b/fp32.pt", "latest_universal"])


def source(folder: Path, parameter: str, states: tuple[str, ...] = raw.STATES, other: str = "b") -> Path:
    groups = (ParamGroup((parameter, other), {"lr": 0.1, "weight_decay": 0.0}),)
    state = TrainingState(groups, global_steps=7, config=CONFIG)
    made = raw.make(folder / "raw", shapes={parameter: (3, 2), other: (2,)}, states=states, training_state=state)
    return raw.write_consolidated(folder / "source", made.catalog)


def everything(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


@pytest.mark.parametrize("kind", [kind for kind in HOSTILE if kind != "no Unicode"])
def test_a_conversion_stays_in_its_destination(tmp_path: Path, kind: str) -> None:
    """On the disk and behind a URL; the universal format, whose files are not named by parameters, keeps the name."""
    where = tmp_path / "a/b/c/d"
    made = source(where, HOSTILE[kind])
    before = everything(tmp_path)
    for destination in (str(where / "out"), f"memory://{uuid.uuid4().hex}/deep/out"):
        with pytest.raises(Unsupported, match=r"the parameter '.*' cannot be a file's name.*--to universal"):
            ucp.convert(made, destination, to="deepspeed-universal")
    assert everything(tmp_path) == before
    ucp.convert(made, where / "universal")
    with ucp.open(made) as a, ucp.open(where / "universal") as b:
        assert torch.equal(a.read(HOSTILE[kind]), b.read(HOSTILE[kind]))


def test_states_with_odd_names_stay_in_the_destination(tmp_path: Path) -> None:
    states = ("param", "../../x", "exp_avg" * 60)
    made = source(tmp_path / "a", "weight", states)
    assert everything(tmp_path) == {p for p in everything(tmp_path) if p.startswith("a")}
    with ucp.open(made) as opened:
        assert set(opened.parameters["weight"].states) == set(states)
    with pytest.raises(Unsupported, match=r"'\.\./\.\./x' cannot be a file's name"):
        ucp.convert(made, tmp_path / "out", to="deepspeed-universal")


def test_parameters_that_differ_in_capitals_only(tmp_path: Path) -> None:
    made = source(tmp_path, "W", other="w")
    with pytest.raises(Unsupported, match="would be one file"):
        ucp.convert(made, tmp_path / "out", to="deepspeed-universal")


@pytest.mark.parametrize("tag", ["a\\b", "C:x", "a\x1b[2J", "t" * 256, "NUL", "a.", "a\u202eb"])
def test_tags_are_names(tmp_path: Path, tag: str) -> None:
    for folder in (tmp_path, f"memory://{uuid.uuid4().hex}"):
        with pytest.raises(BadArgument, match=r"tag '.*' cannot be a file's name"):
            commit.begin(folder, tag, 1)
    assert not everything(tmp_path)


def test_a_name_that_is_no_text_is_damage(tmp_path: Path) -> None:
    """Nothing could be written under it; a pickle can have one."""
    path = tmp_path / "model"
    path.mkdir()
    torch.save({"a\ud800": torch.ones(2)}, path / "pytorch_model.bin")
    with pytest.raises(ucp.errors.DamagedCheckpoint, match="is no text"):
        ucp.open(path)


def test_what_is_planned_is_looked_at_again(tmp_path: Path) -> None:
    """Whoever plans a file: the last step before the system call refuses, too."""
    from ucp.transfer.pieces import create_files
    from ucp.transfer.targets import TargetFile

    with pytest.raises((Unsupported, DestinationError)):
        create_files(tmp_path / "out", [TargetFile("../x", 1, ((0, b"x"),), ())])
    assert not everything(tmp_path)
