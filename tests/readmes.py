"""The READMEs' fences, and what their commands and snippets run against.

A fence's info string says what is done with it: ``bash`` and ``python`` alone run here, in the README's order, in a
folder with small real checkpoints. A second word says otherwise:

- ``bash scripts``: the project's own commands, which run all of this; their arguments are parsed by their parsers.
- ``bash install``: pip would change the environment that the tests run in; the extras are looked up.
- ``bash cluster``: needs several machines or a bucket; the arguments are parsed by the command's own parser.
- ``bash ranks``, ``python deepspeed``, ``bash tutorial``, ``python tutorial``: start ranks, in tests marked slow.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from tests import startup

ROOT = Path(__file__).parents[1]
READMES = (
    "README.md",
    "scripts/README.md",
    "tests/README.md",
    "ucp/README.md",
    "ucp/changes/README.md",
    "ucp/cli/README.md",
    "ucp/deepspeed/README.md",
    "ucp/elastic/README.md",
    "ucp/formats/README.md",
    "ucp/formats/megatron/README.md",
    "ucp/formats/universal/README.md",
    "ucp/megatron/README.md",
    "ucp/memory/README.md",
    "ucp/merging/README.md",
    "ucp/repair/README.md",
    "ucp/storage/README.md",
    "ucp/torchdist/README.md",
)
# Its examples are run by tests/spec/test_readme.py.
ELSEWHERE = ("specs/README.md",)
PROGRAMS = {"ucp": "ucp.cli.main", "ucp-convert": "ucp.cli.convert", "ucp-spec": "ucp.cli.spec"}
KINDS = {
    "bash": ("", "scripts", "install", "cluster", "ranks", "tutorial", "recipe"),
    "python": ("", "deepspeed", "tutorial"),
    "json": ("",),
    "yaml": ("", "recipe"),
    "toml": ("",),
    "text": ("",),
}


@dataclass(frozen=True)
class Fence:
    """A fenced block. where: README and line, for messages. kind: the info string's second word."""

    where: str
    language: str
    kind: str
    text: str

    @property
    def commands(self) -> list[str]:
        """Its lines, without comments and those that are empty."""
        lines = [re.sub(r"(^|\s+)#.*$", "", line) for line in self.text.splitlines()]
        return [line for line in lines if line.strip()]


def fences(readme: str) -> list[Fence]:
    """All fenced blocks of a README, in order."""
    found, text = [], (ROOT / readme).read_text(encoding="utf-8")
    for match in re.finditer(r"^```([^\n]*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        language, _, kind = match[1].partition(" ")
        line = text.count("\n", 0, match.start()) + 1
        found.append(Fence(f"{readme}:{line}", language, kind, match[2]))
    return found


def of_kind(language: str, kind: str, readmes: tuple[str, ...] = READMES) -> list[Fence]:
    """The fences of all READMEs that have this info string."""
    return [f for readme in readmes for f in fences(readme) if (f.language, f.kind) == (language, kind)]


def environment(folder: Path) -> dict[str, str]:
    """Of a shell in which the programs are those of this clone, installed or not."""
    bin_folder = folder / "bin"
    if not bin_folder.exists():
        bin_folder.mkdir()
        for name, module in PROGRAMS.items():
            (bin_folder / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" -m {module} "$@"\n')
            (bin_folder / name).chmod(0o755)
    path = [str(bin_folder), os.path.dirname(sys.executable), os.environ["PATH"]]
    modules = startup.search_path([ROOT])
    return {**os.environ, "PATH": os.pathsep.join(path), "PYTHONPATH": modules, "DS_ACCELERATOR": "cpu"}


def shell(command: str, folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """The command's end, run by bash in the folder."""
    return subprocess.run(
        ["bash", "-c", command],
        cwd=folder,
        env={**environment(folder), **variables},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def run_command(command: str, folder: Path) -> tuple[int, str]:
    """The exit code and what was said. Our own programs run in this process, which has imported torch already."""
    words = shlex.split(command)
    if words[0] not in PROGRAMS or "$(" in command or {"||", "&&", "|", ">"} & set(words):
        done = shell(command, folder)
        return done.returncode, done.stdout + done.stderr
    try:
        return import_module(PROGRAMS[words[0]]).main(words[1:]), ""
    except SystemExit as end:
        return int(end.code or 0), ""


@contextlib.contextmanager
def inside(folder: Path) -> Iterator[None]:
    """In this folder."""
    before = os.getcwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def run(fence: Fence, folder: Path, names: dict[str, Any]) -> None:
    """Run what a fence of the plain kind says; ``names`` are the snippets' variables, kept from one to the next."""
    with inside(folder):
        if fence.language == "python":
            execute(fence, names)
        for command in fence.commands if fence.language == "bash" else ():
            code, said = run_command(command, folder)
            assert code == 0, f"{fence.where}: {command}: exit code {code}\n{said}"


def execute(fence: Fence, names: dict[str, Any]) -> None:
    exec(compile(fence.text, fence.where, "exec"), names)


class Loader:
    """A data loader that knows where it is."""

    at = 5

    def state_dict(self) -> dict[str, Any]:
        return {"at": self.at}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.at = state["at"]


def make_runs(folder: Path) -> dict[str, Any]:
    """A Llama's checkpoints, as DeepSpeed and we saved them on 2 ranks, under ``runs/llama``, and its model folder
    ``base``. Returns the snippets' names, with a model that has been trained for two steps."""
    import torch
    from torch.distributed.checkpoint.state_dict import get_state_dict

    released = ROOT / "tests/released/0.1.0"
    shutil.copytree(released / "llama", folder / "runs/llama")
    shutil.copytree(released / "llama-base", folder / "base")
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Embedding(11, 6), torch.nn.Linear(6, 11))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2)
    for _ in range(2):
        model(torch.arange(11)).logsumexp(-1).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
    model_state, optimizer_state = get_state_dict(model, optimizer)
    return {
        "model": model,
        "optimizer": optimizer,
        "scheduler": scheduler,
        "loader": Loader(),
        "epoch": 3,
        "model_state_dict": model_state,
        "optimizer_state_dict": optimizer_state,
        "state_dict": {"model": model_state, "optim": optimizer_state, "epoch": 3},
    }


def run_deepspeed_snippets(readme: str, folder: str) -> int:
    """On a rank: run a README's DeepSpeed snippets, each with a fresh engine's names. Returns how many ran."""
    import torch
    import torch.distributed as dist
    from torch.utils.data import DataLoader, TensorDataset

    from tests.released import make

    os.chdir(folder)
    model = make.llama()
    names: dict[str, Any] = {
        "model": model,
        "ds_config": {
            "train_micro_batch_size_per_gpu": 2,
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
            "zero_optimization": {"stage": 1},
        },
        "DataLoader": DataLoader,
        "data": TensorDataset(torch.arange(32)),
        "micro_batch": 2,
        "rank": dist.get_rank(),
        "world_size": dist.get_world_size(),
    }
    found = of_kind("python", "deepspeed", (readme,))
    for fence in found:
        execute(fence, names)
    engine = names["engine"]
    engine.ucp.wait()
    assert engine.global_steps == 4
    assert engine.ucp.last_load.tensors > 0
    return len(found)


def parser_of(words: list[str]) -> Callable[[list[str]], Any]:
    """The parser of one of our programs, which takes the further words."""
    module = import_module(PROGRAMS[words[0]])
    return module.parser().parse_args
