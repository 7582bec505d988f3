"""The recipes of the README, as they stand there: with a scheduler's commands played by stand-ins that start the real
torchrun on two "nodes" of this machine, and an operator that sets what Kubeflow's sets."""

from __future__ import annotations

import json
import os
import re
import shlex
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests import startup
from tests.engines.zygote import ENVIRONMENT
from tests.memory.conftest import keepers

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]

__all__ = ["keepers"]

SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do shift; done
for node in $(seq 0 $((SLURM_JOB_NUM_NODES - 1))); do SLURM_NODEID=$node "$@" & pids+=($!); done
code=0
for pid in "${pids[@]}"; do wait "$pid" || code=$?; done
exit $code
"""
SCONTROL = """#!/bin/bash
echo "$*" >> scontrol.log
[[ "$1 $2" == "show hostnames" ]] && for name in ${3//,/ }; do echo "$name"; done
"""


def recipe(language: str, sign: str) -> str:
    text = (ROOT / "ucp/elastic/README.md").read_text(encoding="utf-8")
    return next(found for found in re.findall(rf"```{language} recipe\n(.*?)```", text, re.S) if sign in found)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return int(probe.getsockname()[1])


def environment(folder: Path, more: Mapping[str, str]) -> dict[str, str]:
    """Commands are looked for in the folder first, then beside this interpreter."""
    path = os.pathsep.join([str(folder / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]])
    return {**os.environ, **ENVIRONMENT, "PYTHONPATH": startup.search_path([ROOT]), "PATH": path, **more}


def at_work(folder: Path) -> None:
    """A folder where `train.py` is the tests' program, which kills a rank once and goes on from memory."""
    (folder / "runs/llama").mkdir(parents=True)
    (folder / "bin").mkdir()
    program = ROOT / "tests/elastic/program.py"
    lines = (
        "import runpy, sys",
        "sys.argv[1:] = ['runs/llama', 'memory']",
        f"runpy.run_path({str(program)!r}, None, M)",
    )
    (folder / "train.py").write_text("\n".join(lines).replace("M)", "'__main__')"))


def went_on(folder: Path) -> None:
    told: list[dict[str, Any]] = [json.loads(line) for line in (folder / "runs/llama/told").read_text().splitlines()]
    assert [one["resumed"] for one in told if "resumed" in one] == [0, 3]
    assert [one["step"] for one in told if "step" in one][-3:] == [4, 5, 6]


def play(command: Sequence[str], folder: Path, environments: Sequence[Mapping[str, str]]) -> None:
    started = [
        subprocess.Popen(command, cwd=folder, env=env, stderr=subprocess.PIPE, text=True) for env in environments
    ]
    try:
        said = [process.communicate(timeout=150)[1] for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0] * len(started), said[0][-3000:]


def test_slurm(tmp_path: Path, keepers: Path) -> None:
    at_work(tmp_path)
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    (tmp_path / "job.sh").write_text(recipe("bash", "#SBATCH"))
    job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "localhost,other"}
    play(["bash", "job.sh"], tmp_path, [environment(tmp_path, {**job, "PORT": str(free_port())})])
    assert (tmp_path / "scontrol.log").read_text() == "show hostnames localhost,other\n"
    went_on(tmp_path)


def test_kubernetes(tmp_path: Path, keepers: Path) -> None:
    at_work(tmp_path)
    spec = yaml.safe_load(recipe("yaml", "PyTorchJob"))["spec"]
    policy, worker = spec["elasticPolicy"], spec["pytorchReplicaSpecs"]["Worker"]
    assert policy["minReplicas"] <= worker["replicas"] <= policy["maxReplicas"]
    (container,) = worker["template"]["spec"]["containers"]
    assert container["name"] == "pytorch"  # the operator looks for this one
    # As the operator's elastic.go does, for two pods.
    operator = {
        "PET_RDZV_BACKEND": policy["rdzvBackend"],
        "PET_RDZV_ENDPOINT": f"localhost:{free_port()}",
        "PET_NNODES": f"{policy['minReplicas']}:2",
        "PET_NPROC_PER_NODE": str(policy["nProcPerNode"]),
        "PET_MAX_RESTARTS": str(policy["maxRestarts"]),
    }
    own = {one["name"]: one["value"] for one in container["env"]}
    play(container["command"], tmp_path, [environment(tmp_path, {**operator, **own})] * 2)
    went_on(tmp_path)


def test_options_are_slurms_own() -> None:
    """What is asked of sbatch and srun, by the names in their manual pages."""
    script = recipe("bash", "#SBATCH")
    asked = shlex.split(
        next(line for line in script.splitlines() if line.startswith("#SBATCH")).removeprefix("#SBATCH")
    )
    known = {"--nodes", "--ntasks-per-node", "--no-kill", "--requeue", "--open-mode"}
    assert {option.split("=")[0] for option in asked} == known
