"""Which checkpoint of a folder is meant: all ways in say the same, and nobody takes the newest unasked."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import ucp
from tests.formats import raw
from ucp import formats, run_folder
from ucp.catalog import Catalog
from ucp.cli import convert as convert_command
from ucp.cli import main as commands
from ucp.errors import BadArgument, DamagedCheckpoint, NotACheckpoint, RemovedMeanwhile
from ucp.formats import universal
from ucp.formats.nouns import ReadRequest
from ucp.inspection.listing import listing
from ucp.inspection.verify import verify
from ucp.saving.retention import Keep, prune
from ucp.storage.files import Files


@pytest.fixture(scope="module")
def steps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model's ``step1`` to ``step3``, each other values, in this order."""
    folder = tmp_path_factory.mktemp("steps")
    for number in (1, 2, 3):
        ucp.save_training(folder / f"step{number}", model=model(number), step=number, rng=False)
        for path in (folder / f"step{number}").iterdir():
            os.utime(path, ns=(0, 10**18 + number * 10**9))
    return folder


@pytest.fixture
def run(steps: Path, tmp_path: Path) -> Path:
    shutil.copytree(steps, tmp_path / "run")
    return tmp_path / "run"


def model(number: int) -> torch.nn.Module:
    module = torch.nn.Linear(2, 2)
    torch.nn.init.constant_(module.weight, float(number))
    return module


def by_open(folder: Path, out: Path) -> str:
    with ucp.open(folder) as opened:
        return opened.path.name


def by_verify(folder: Path, out: Path) -> str:
    return Path(verify(folder).path).name


def by_listing(folder: Path, out: Path) -> str:
    found = listing(folder)
    if found.taken is None:
        raise NotACheckpoint(found.refused or "")
    return Path(found.taken).name


def by_convert(folder: Path, out: Path) -> str:
    ucp.convert(folder, out)
    with ucp.open(out) as opened:
        return f"step{opened.training_state.global_steps}"


def by_load_training(folder: Path, out: Path) -> str:
    live = model(0)
    report = ucp.load_training(folder, model=live, rng=False)
    assert live.weight[0, 0].item() == report.step
    return f"step{report.step}"


WAYS = [by_open, by_verify, by_listing, by_convert, by_load_training]
Way = Callable[[Path, Path], str]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "content",
    [
        b"step1",
        b"step1/",
        b"./step1",
        b".//step1/.",
        b"step2/../step1",
        b"{folder}/step1",
        b"{folder}/step1/\n",
        b"\xef\xbb\xbfstep1",
        b"step1\r\n",
        b"  step1 \n\n",
        "step1".encode("utf-16"),
        "step1\r\n".encode("utf-16"),
    ],
)
def test_what_latest_means_is_taken(
    run: Path, tmp_path: Path, way: Way, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    (run / "latest").write_bytes(content.replace(b"{folder}", os.fsencode(run)))
    assert way(run, tmp_path / "out") == "step1"
    assert not [r for r in caplog.records if "newest" in r.getMessage()]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\n",
        b"step9",
        b"../run/step1",
        b"..",
        b".",
        b"/",
        b"/tmp",
        b"notes",
        b"\xff\xff",
        b"step1\nstep2",
        b"x" * 5000,
    ],
)
def test_what_latest_names_wrongly_is_refused(run: Path, tmp_path: Path, way: Way, content: bytes) -> None:
    (run / "notes").mkdir()
    (run / "latest").write_bytes(content)
    with pytest.raises(NotACheckpoint, match=r"(?s)latest: .*tag='newest' \(--newest\) takes the newest whole one"):
        way(run, tmp_path / "out")


@pytest.mark.parametrize("way", WAYS)
def test_without_latest_all_take_the_newest(
    run: Path, tmp_path: Path, way: Way, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "ucp"):
        assert way(run, tmp_path / "out") == "step3"
    lines = [r.getMessage() for r in caplog.records if "newest" in r.getMessage()]
    assert [line.split(" of ")[0] for line in lines] == (
        [] if way is by_listing else ["taking 'step3', the newest checkpoint"]
    )


def test_the_tag_newest_overrules_latest(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "latest").write_text("nothing")
    with ucp.open(run, tag="newest") as opened:
        assert opened.path.name == "step3"
    assert ucp.load_training(run, model=model(0), rng=False, tag="newest").step == 3
    for command in ("inspect", "verify"):
        assert commands.main([command, str(run)]) == 2
        assert commands.main([command, str(run), "--newest", "--json"]) == 0
        assert "/step3" in capsys.readouterr().out
    assert convert_command.main([str(run), str(tmp_path / "out")]) == 2
    assert convert_command.main([str(run), str(tmp_path / "out"), "--newest"]) == 0
    (run / "step3").rename(run / "newest")
    with pytest.raises(BadArgument, match="'newest' is a checkpoint's own name"):
        ucp.open(run, tag="newest")


def test_a_folder_reached_by_a_link(run: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(run)
    for text, opened in ((run / "step1", tmp_path / "link"), (tmp_path / "link/step1", run)):
        (run / "latest").write_text(str(text))
        assert by_open(opened, tmp_path) == "step1"


def test_latest_as_a_link_to_the_checkpoint(run: Path, tmp_path: Path) -> None:
    (run / "latest").symlink_to("step2")
    for k, way in enumerate(WAYS):
        assert way(run, tmp_path / f"out{k}") == "step2"
    assert [entry.tag for entry in listing(run).checkpoints] == ["step1", "step2", "step3"]
    (run / "latest").unlink()
    (run / "latest").symlink_to("step7")
    with pytest.raises(NotACheckpoint, match="is a link to nothing"):
        ucp.open(run)


def test_tags_with_slashes_and_numbers(run: Path) -> None:
    (run / "old").mkdir()
    (run / "step1").rename(run / "old/step1")
    (run / "step2").rename(run / "7")
    for tag, step in (("old/step1", 1), ("old/step1/", 1), ("./old//step1", 1), (7, 2), ("7", 2), (str(run / "7"), 2)):
        assert ucp.load_training(run, model=model(0), rng=False, tag=tag).step == step
    (run / "latest").write_text("old/step1\n")
    assert by_open(run, run) == "step1"
    (entry,) = [e for e in listing(run).checkpoints if e.latest]
    assert entry.tag == "old/step1"
    for tag in ("../run/7", "old/../../run/7", "/", "old/..", "", "a\0b", 1.5):
        with pytest.raises(BadArgument, match="is not the name of a folder"):
            ucp.open(run, tag=tag)  # type: ignore[arg-type]


def test_retention_spares_what_latest_means(run: Path) -> None:
    (run / "latest").write_text("./step1/\r\n")
    assert prune(run, "step3", Keep(1)) == ["step2"]
    assert sorted(p.name for p in run.iterdir()) == ["latest", "step1", "step3"]


def retired_while_opened(monkeypatch: pytest.MonkeyPatch, *victims: Path) -> None:
    """Let each of these be removed once its opening has begun."""
    read = universal.Universal.read

    def slow(self: universal.Universal, path: Path, files: Files, request: ReadRequest) -> Catalog:
        if path in victims:
            shutil.rmtree(path)
        return read(self, path, files, request)

    monkeypatch.setattr(universal.Universal, "read", slow)


def test_a_checkpoint_that_is_retired_while_it_is_opened(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    retired_while_opened(monkeypatch, run / "step3", run / "step2")
    with pytest.raises(RemovedMeanwhile, match=r"step2: was removed while it was read.*keep_last"):
        ucp.open(run, tag="step2")
    with ucp.open(run) as opened:
        assert opened.path.name == "step1"


def test_a_checkpoint_that_is_retired_after_it_was_opened(run: Path) -> None:
    with ucp.open(run, tag="step2") as opened:
        shutil.rmtree(run / "step2")
        with pytest.raises(RemovedMeanwhile, match=r"its folder is no longer there: .*removed meanwhile"):
            opened.read("weight")
        with pytest.raises(RemovedMeanwhile):
            opened.verify()


@pytest.mark.parametrize(
    "names",
    [("pytorch_model_fsdp_0", "optimizer_0"), ("pytorch_model_fsdp_0",), ("model", "optim"), ("model", "step9")],
)
def test_parts_beside_each_other_are_never_the_whole(run: Path, tmp_path: Path, names: tuple[str, ...]) -> None:
    for name in names:
        shutil.copytree(run / "step1", tmp_path / "parts" / name)
    for way in WAYS:
        with pytest.raises(NotACheckpoint, match=f"holds parts of one checkpoint.*{names[0]}"):
            way(tmp_path / "parts", tmp_path / "out")
    with pytest.raises(NotACheckpoint, match="holds parts of one checkpoint"):
        ucp.open(tmp_path / "parts", tag="newest")
    with ucp.open(tmp_path / "parts", tag=names[0]) as opened:
        assert opened.path.name == names[0]


def test_what_a_listing_says(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "latest").write_text("gone")
    assert commands.main(["ls", str(run)]) == 0
    assert "names 'gone', which is not there" in capsys.readouterr().err
    assert run_folder.latest_name(run) == "gone"


def test_the_forms_of_files_all_say_that_they_were_removed(tmp_path: Path) -> None:
    made = raw.make(tmp_path / "source")
    for form in ("consolidated", "fragmented"):
        path = raw.write_form(form, tmp_path / form, made)
        with ucp.open(path) as opened:
            shutil.rmtree(path)
            with pytest.raises(RemovedMeanwhile):
                opened.read("embed.weight")


def timed(path: Path, seconds: int) -> None:
    for file in path.iterdir():
        os.utime(file, ns=(0, 10**18 + seconds * 10**9))


def test_steps_in_names_go_before_times(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    (run / "step3").rename(run / "step10")
    timed(run / "step2", 99)
    with caplog.at_level(logging.WARNING, "ucp"):
        assert by_open(run, run) == "step10"
    (line,) = [r.getMessage() for r in caplog.records]
    assert "by the steps in their names (though 'step2' was written later)" in line


def test_numbers_of_unlike_names_are_no_steps(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    (run / "step3").rename(run / "llama-70b")
    timed(run / "step2", 99)
    with caplog.at_level(logging.WARNING, "ucp"):
        assert by_open(run, run) == "step2"
    assert "by the times of their files" in caplog.records[0].getMessage()


def test_steps_that_checkpoints_say_go_first(
    run: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(universal.Universal, "step", lambda self, path: {"step1": 30, "step2": 5}.get(path.name, 7))
    with caplog.at_level(logging.WARNING, "ucp"):
        assert by_open(run, run) == "step1"
    assert "by the steps that they say" in caplog.records[0].getMessage()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("file", "text", "name"),
    [
        ("latest_checkpointed_iteration.txt", "1\n", "iter_0000001"),
        ("latest_checkpointed_iteration.txt", "release", "release"),
        ("latest_universal", "global_step1_universal", "global_step1_universal"),
    ],
)
def test_other_programs_pointers(run: Path, tmp_path: Path, way: Way, file: str, text: str, name: str) -> None:
    (run / "step1").rename(run / name)
    (run / file).write_text(text)
    assert way(run, tmp_path / "out") in (name, "step1")
    (run / file).write_text("9" * 30)
    with pytest.raises(NotACheckpoint, match=rf"{file}: names '9+', which is not there"):
        way(run, tmp_path / "out")


@pytest.fixture
def nested(run: Path, tmp_path: Path) -> Path:
    """As a Trainer on DeepSpeed leaves them: ``checkpoint-1/global_step1`` with ``checkpoint-1/latest``."""
    out = tmp_path / "trainer"
    for number in (1, 2):
        shutil.copytree(run / f"step{number}", out / f"checkpoint-{number}/global_step{number}")
        (out / f"checkpoint-{number}/latest").write_text(f"global_step{number}")
    return out


@pytest.mark.parametrize("way", WAYS)
def test_checkpoints_that_lie_one_deeper(nested: Path, tmp_path: Path, way: Way) -> None:
    assert way(nested, tmp_path / "out") in ("global_step2", "step2")
    with ucp.open(nested, tag="checkpoint-1") as opened:
        assert opened.path == nested / "checkpoint-1/global_step1"


def test_a_listing_of_any_parent(nested: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run").rename(tmp_path / "trainer/other")
    assert [e.tag for e in listing(nested).checkpoints] == [
        "checkpoint-1/global_step1",
        "other/step1",
        "checkpoint-2/global_step2",
        "other/step2",
        "other/step3",
    ]
    assert commands.main(["ls", str(tmp_path)]) == 0
    shown = capsys.readouterr()
    assert "trainer/checkpoint-2/global_step2" in shown.out
    assert "latest" not in shown.out  # each of a Trainer's has a file of its own, which tells nothing apart
    with pytest.raises(NotACheckpoint, match=r"5 checkpoints below it; give the path of one, such as .*/step3'"):
        ucp.open(tmp_path)


def test_a_listing_of_a_trainers_folder_marks_the_one_that_is_taken(
    nested: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert commands.main(["ls", str(nested)]) == 0
    marks = [line.split("\t")[-1] for line in capsys.readouterr().out.splitlines()]
    assert marks == ["", "newest"]
    assert commands.main(["ls", str(nested / "checkpoint-1")]) == 0
    assert capsys.readouterr().out.endswith("\tlatest\n")


@pytest.mark.parametrize("where", ["env/pyvenv.cfg", "conda/conda-meta/history", "target/site-packages/x.dist-info/M"])
def test_installed_packages_are_not_looked_through(run: Path, tmp_path: Path, where: str) -> None:
    """DeepSpeed brings a script ``bin/deepspeed.pt``, setuptools ``distutils-precedence.pth``."""
    mark = tmp_path / where
    packages = tmp_path / where.partition("/")[0] / ("bin" if "site" not in where else "site-packages")
    for folder in (mark.parent, packages):
        folder.mkdir(parents=True, exist_ok=True)
    mark.touch()
    (packages / "deepspeed.pt").write_text("#!/usr/bin/python")
    assert [e.tag for e in listing(tmp_path).checkpoints] == ["run/step1", "run/step2", "run/step3"]


def test_a_listing_from_one_level_too_high_has_them_all(run: Path, tmp_path: Path) -> None:
    """Also where `latest` names one of them; and a refusal's advice is a path that opens."""
    (run / "latest").write_text("step2")
    found = {e.tag: e.latest for e in listing(tmp_path).checkpoints}
    assert found == {"run/step1": False, "run/step2": True, "run/step3": False}
    (tmp_path / "deep").mkdir()
    run.rename(tmp_path / "deep/run")
    with pytest.raises(NotACheckpoint, match="give the path of one, such as") as refused:
        ucp.open(tmp_path)
    advised = str(refused.value).rpartition("such as '")[2].rstrip("'")
    with ucp.open(advised) as opened:
        assert opened.path.parent == tmp_path / "deep/run"


def test_weights_alone_beside_a_runs_checkpoints(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A Trainer's folder after training: the model, and the checkpoints on the way to it."""
    ucp.convert(run / "step1", run / "model", to="huggingface")
    (run / "model/model.safetensors").rename(run / "model.safetensors")
    shutil.rmtree(run / "model")
    with caplog.at_level(logging.WARNING, "ucp"), ucp.open(run) as opened:
        assert opened.format == "huggingface"
    assert "of a training run there are 3: 'step1', 'step2', 'step3' in it" in caplog.text
    assert [e.format for e in listing(run).checkpoints].count("universal") == 3


def test_the_format_that_has_the_others_as_parts_is_taken(
    run: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """And what is no part of it is told."""
    with caplog.at_level(logging.WARNING, "ucp"), ucp.open(run / "step1") as opened:
        assert opened.format == "universal"
    assert not caplog.records
    (run / "step1/.metadata").write_bytes(b"")
    with caplog.at_level(logging.WARNING, "ucp"), ucp.open(run / "step1") as opened:
        assert opened.format == "universal"
    assert "is read as the format 'universal'; it has files of 'dcp', too" in caplog.text
    ucp.convert(run / "step1", run / "equal", to="huggingface")
    (run / "equal/.metadata").write_bytes(b"")
    with caplog.at_level(logging.WARNING, "ucp"), pytest.raises(DamagedCheckpoint):
        ucp.open(run / "equal")
    note = run_folder.choose(run / "equal").note
    assert "is read as the format 'dcp'; it has files of 'huggingface', too" in note
    (dcp,) = [known for known in formats.built_in() if known.name == "dcp"]
    monkeypatch.setattr(type(dcp), "parts", ("universal",))
    assert formats.find(run / "step1") is dcp
    known = {one.name for one in formats.built_in()}
    assert all(set(one.parts) <= known - {one.name} for one in formats.built_in())
