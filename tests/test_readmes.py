"""Every command and snippet in the READMEs, run; every link, followed. `tests.readmes` says which fence is run how."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests import readmes
from tests.readmes import ROOT, Fence, fences, of_kind

if TYPE_CHECKING:
    from tests.engines.pool import RankPool


def test_every_readme_is_looked_after() -> None:
    skip = {"build", "quickstart-run", "bench-run"}
    found = set()
    for folder, below, files in os.walk(ROOT):
        linked = {name for name in below if (Path(folder) / name).is_symlink()}
        below[:] = [name for name in below if name not in skip | linked and not name.startswith(".")]
        found |= {str((Path(folder) / name).relative_to(ROOT)) for name in files if name == "README.md"}
    assert found == {*readmes.READMES, *readmes.ELSEWHERE}


def test_the_first_is_short() -> None:
    assert (ROOT / "README.md").stat().st_size <= 9216


@pytest.mark.parametrize("readme", readmes.READMES)
def test_every_fence_is_of_a_kind_that_is_run(readme: str) -> None:
    for fence in fences(readme):
        assert fence.language in readmes.KINDS, fence.where
        assert fence.kind in readmes.KINDS[fence.language], fence.where
    text = re.sub(r"^```.*?^```$", "", (ROOT / readme).read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    assert "```" not in text


@pytest.mark.parametrize("readme", [*readmes.READMES, *readmes.ELSEWHERE])
def test_every_link_leads_somewhere(readme: str) -> None:
    text = (ROOT / readme).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)]+)\)", text):
        path, _, anchor = target.partition("#")
        file = (ROOT / readme).parent / path if path else ROOT / readme
        assert file.exists(), target
        if anchor:
            titles = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", t.lower()).replace(" ", "-") for t in titles}, target


def test_every_room_is_told_of() -> None:
    table = (ROOT / "ucp/README.md").read_text(encoding="utf-8").partition("## Rooms")[2].partition("\n## ")[0]
    for path in (ROOT / "ucp").iterdir():
        name = f"{path.name}/" if (path / "__init__.py").exists() else path.name
        if name.endswith((".py", "/")) and (name == "__init__.py" or not name.startswith("_")):
            assert f"`{name}`" in table, name


def test_every_test_that_is_named_exists() -> None:
    text = (ROOT / "tests/README.md").read_text(encoding="utf-8")
    everything = {str(p.relative_to(ROOT / "tests")) for p in (ROOT / "tests").rglob("*")}
    names = {Path(p).name for p in everything}
    for name in re.findall(r"`([\w/.]+(?:\.py|/))(?:::\w+)?(?:\[[\w-]+\])?`", text):
        known = name.rstrip("/") in everything or ("/" not in name and name in names)
        assert known, name


CHANGES = "ucp/changes/README.md"  # its file is used by its command
PLAIN = [r for r in readmes.READMES if any(f.language in ("bash", "python") and not f.kind for f in fences(r))]


@pytest.mark.parametrize("readme", PLAIN)
def test_commands_and_snippets(readme: str, tmp_path: Path) -> None:
    names = readmes.make_runs(tmp_path)
    ran = [f for f in fences(readme) if f.language in ("bash", "python") and not f.kind]
    if readme == "ucp/cli/README.md":  # what the first README's `ucp convert runs/llama universal` leaves
        readmes.run(Fence(readme, "bash", "", "ucp convert runs/llama universal"), tmp_path, names)
    if readme == CHANGES:
        (tmp_path / "changes.yaml").write_text(next(f.text for f in fences(readme) if f.language == "yaml"))
    for fence in ran:
        readmes.run(fence, tmp_path, names)


@pytest.mark.parametrize("fence", of_kind("json", ""), ids=lambda f: f.where)
def test_configs_are_read(fence: Fence) -> None:
    pytest.importorskip("deepspeed")
    from ucp.deepspeed import config

    assert config.parse(json.loads(fence.text)).enabled


@pytest.mark.parametrize(
    "fence", of_kind("yaml", "", [r for r in readmes.READMES if r != CHANGES]), ids=lambda f: f.where
)
def test_merge_files_are_read(fence: Fence, tmp_path: Path) -> None:
    readmes.make_runs(tmp_path)
    (tmp_path / "merge.yaml").write_text(fence.text)
    readmes.run(Fence(fence.where, "bash", "", "ucp merge out --recipe merge.yaml"), tmp_path, {})
    assert (tmp_path / "out/merge.json").exists()


def test_every_key_is_told_of_and_known() -> None:
    pytest.importorskip("deepspeed")
    from ucp.deepspeed import config

    table = re.search(r'^## Keys under `"ucp"`$(.*?)^## ', (ROOT / "ucp/deepspeed/README.md").read_text(), re.M | re.S)
    assert table is not None
    keys = [key for row in re.findall(r"^\| (`.*?`) \|", table[1], re.MULTILINE) for key in re.findall(r"`(.*?)`", row)]
    sections = {"load": config.LoadSection.keys(), "save": config.SaveSection.keys()}
    own = config.Config.keys()
    known = [key for key in own if key not in sections]
    known += [f"{room}.{key}" for room, inside in sections.items() for key in inside]
    assert sorted(keys) == sorted(known)
    values: dict[str, Any] = {
        **{"spec": "llama", "sizes": {"vocab": 8}, "load.allow_missing": ["a.*"], "load.allow_unused": ["b.*"]},
        **{"load.changes": {"frozen": ["a.*"]}, "load.options": {"model_key": "ema"}, "load.verify": False},
        **{"load.read_once": "adaptive", "load.prove": "full", "load.memory": "256MiB", "load.lr_scheduler": "reset"},
        **{"load.override": {"weight_decay": 0.0}, "save.format": "universal", "save.async": False, "save.timeout": 10},
        **{"save.memory": 1 << 30, "save.policy": "skip", "save.cache": "keep", "save.keep_last": 2},
        **{"save.keep_every": 100, "save.gradient_norms": 100, "memory": {"enabled": True}, "elastic": {}},
    }
    section: dict[str, Any] = {}
    for key in keys:
        room, _, name = key.rpartition(".")
        (section.setdefault(room, {}) if room else section)[name] = values.get(key, True)
    assert config.parse({"ucp": section}).save.keep_every == 100


@pytest.mark.parametrize("fence", of_kind("bash", "scripts"), ids=lambda f: f.where)
def test_the_projects_own_commands(fence: Fence) -> None:
    for command in fence.commands:
        script, *arguments = shlex.split(command)
        path = ROOT / script
        assert os.access(path, os.X_OK), command
        assert subprocess.run(["bash", "-n", str(path)], check=False).returncode == 0
        if path.name == "test":
            named = [a for a in arguments if a.startswith("tests/")]
            assert all((ROOT / a).exists() for a in named)
        elif path.name == "release":
            assert not arguments
        else:
            python = {"bench": "bench_run.py", "quickstart": "quickstart_run.py"}[path.name]
            # With --help last, argparse has read all that stands before it and has found nothing wrong.
            done = subprocess.run(
                [sys.executable, str(ROOT / "scripts" / python), *arguments, "--help"],
                env={**os.environ, "PYTHONPATH": str(ROOT)},
                capture_output=True,
                text=True,
                check=False,
            )
            assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("fence", of_kind("bash", "install"), ids=lambda f: f.where)
def test_what_is_installed(fence: Fence) -> None:
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    extras = project.partition("[project.optional-dependencies]")[2].partition("\n[")[0]
    for command in fence.commands:
        match = re.fullmatch(r"pip install '\.\[([\w,]+)\]'", command)
        assert match, command
        assert all(re.search(rf"^{extra} = \[", extras, re.MULTILINE) for extra in match[1].split(","))


@pytest.mark.parametrize("fence", of_kind("bash", "cluster"), ids=lambda f: f.where)
def test_what_needs_a_cluster_is_parsed(fence: Fence) -> None:
    for command in fence.commands:
        words = shlex.split(command)
        if words[0] == "srun":
            words = words[next(k for k, word in enumerate(words) if word in ("python", "torchrun")) :]
        if words[0] == "torchrun":
            from torch.distributed.run import get_args_parser

            parsed = get_args_parser().parse_args(words[1:])
            program = parsed.training_script_args[-1] if parsed.module else parsed.training_script
            assert program == "train.py"
            continue
        if words[:2] == ["python", "-m"]:
            program = next(name for name, module in readmes.PROGRAMS.items() if module == words[2])
            words = [program, *words[3:]]
        if words[:2] == ["ucp", "convert"]:
            words = ["ucp-convert", *words[2:]]
        readmes.parser_of(words)(words[1:])


@pytest.mark.slow
@pytest.mark.parametrize("fence", of_kind("bash", "ranks"), ids=lambda f: f.where)
def test_what_starts_ranks(fence: Fence, tmp_path: Path) -> None:
    readmes.make_runs(tmp_path)
    for command in fence.commands:
        done = readmes.shell(command, tmp_path, OMP_NUM_THREADS="1")
        assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("readme", sorted({f.where.partition(":")[0] for f in of_kind("python", "deepspeed")}))
def test_snippets_on_engines(readme: str, ranks: RankPool, tmp_path: Path) -> None:
    readmes.make_runs(tmp_path)
    ran = ranks.run(readmes.run_deepspeed_snippets, readme, str(tmp_path), world_size=2)
    assert ran == [len(of_kind("python", "deepspeed", (readme,)))] * 2


@pytest.mark.slow(seconds=25)
def test_the_tutorial(tmp_path: Path) -> None:
    """Five minutes from a config to a resumed run, as it is written; and the capture at the top of the first README."""
    (program,) = of_kind("python", "tutorial")
    (commands,) = of_kind("bash", "tutorial")
    (tmp_path / "train.py").write_text(program.text)
    said = {}
    for command in commands.commands:
        done = readmes.shell(command, tmp_path, OMP_NUM_THREADS="1")
        assert done.returncode == (1 if " diff " in command else 0), done.stdout + done.stderr
        said[command] = done.stdout
    (capture,) = of_kind("text", "", ("README.md",))
    steps = re.findall(r"step (\d+), loss ([\d.]+)", capture.text)
    found = re.findall(r"step (\d+), loss ([\d.]+)", "".join(said.values()))
    assert [n for n, _ in found] == [n for n, _ in steps] == ["20", "40"]
    assert [float(loss) for _, loss in found] == pytest.approx([float(loss) for _, loss in steps], abs=1e-3)
    listed = [line.split("\t") for line in said["ucp ls runs/tiny"].splitlines()]
    table = [re.split(r"  +", line.strip()) for line in capture.text.splitlines() if "  global_step" in line]
    kept = (0, 1, 2, 3, 6)  # not when it was written, nor how large
    assert [[row[k] for k in kept] for row in listed] == [[row[k] for k in kept] for row in table]
    assert (tmp_path / "report.html").stat().st_size > 10_000
