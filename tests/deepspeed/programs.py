"""What the programs of `test_trainer` have in common: their arguments, how they tell losses, how they die; and, for
the tests, how they are started, on ranks of the CPU or on GPUs, and what they said."""

from __future__ import annotations

import argparse
import atexit
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tests import startup
from tests.engines import releases

if TYPE_CHECKING:
    from tests.engines.pool import Outcome, RankPool

ROOT = Path(__file__).resolve().parents[2]
BATCH = 8  # samples of a step, on all ranks together
LOSS = "loss of step "
FRAMEWORKS = (
    "transformers.trainer", "transformers.models.llama.modeling_llama", "accelerate", "peft",
    "pytorch_lightning.strategies.deepspeed",
)  # fmt: skip


@dataclass(frozen=True)
class Options:
    """A program's arguments, and what its launcher says. memory: where keepers of its snapshots are, if it has any."""

    folder: str
    stage: int
    steps: int
    resume: bool
    die: int | None
    lora: bool
    bf16: bool
    ranks: int
    torch_adam: bool  # else FusedAdam, which is compiled for GPUs
    memory: str | None = None


def options() -> Options:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder")
    parser.add_argument("stage", type=int)
    parser.add_argument("steps", type=int)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--die", type=int)
    parser.add_argument("--lora", action="store_true")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--torch-adam", action="store_true")
    parser.add_argument("--memory")
    return Options(**vars(parser.parse_args()), ranks=int(os.environ["WORLD_SIZE"]))


def zero(stage: int) -> dict[str, int]:
    """The config's section; with buckets that suit a tiny model, where by default they take 4 GB of every GPU."""
    return {"stage": stage, "reduce_bucket_size": 1_000_000, "allgather_bucket_size": 1_000_000}


def data() -> Tensor:
    """The training data, (32, 16): an epoch is four steps, so that losses fall when the same samples come again."""
    return torch.randint(97, (4 * BATCH, 16), generator=torch.Generator().manual_seed(1))


def say(step: int, loss: float) -> None:
    sys.stdout.write(f"\n{LOSS}{json.dumps([step, loss])}\n")
    sys.stdout.flush()


def on_processors() -> None:
    """Where there is no GPU, have Accelerate give DeepSpeed as many ranks as the launcher has started, over gloo.

    It knows ranks without GPUs only where DeepSpeed is not used, and takes each for a job of its own here.
    """
    if torch.cuda.is_available():
        return
    from accelerate.state import DistributedType, PartialState

    PartialState._prepare_backend = lambda self, *args, **kwargs: ("gloo", DistributedType.MULTI_CPU)


def die() -> None:
    """What the kernel does to a job that takes too much memory, and a scheduler to one whose time is over."""
    os.kill(os.getpid(), signal.SIGKILL)


def in_this_process(program: str, *arguments: str) -> None:
    """Run ``tests.deepspeed.<program>`` on a rank of a pool, from the first line to what is done at exit."""
    sys.argv = [program, *arguments]
    importlib.import_module(f"tests.deepspeed.{program}").main(options())
    atexit._run_exitfuncs()


def warm(pool: RankPool, program: str, *arguments: object, ranks: int = 1) -> Outcome:
    """As `start`, on the CPU, in processes that are forked from one which has imported the frameworks."""
    return pool.attempt(
        in_this_process,
        program,
        *map(str, arguments),
        "--torch-adam",
        world_size=ranks,
        timeout=300,
        distributed=False,
        preload=FRAMEWORKS,
        environment=on_cpu(program),
    )


def on_cpu(program: str) -> dict[str, str]:
    """The environment of a program's processes on the CPU, but for what their launcher says to each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return {
        **releases.environment(),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),  # the pool has a store of its own on that which it tells its ranks
        "DS_ACCELERATOR": "cpu",
        "CUDA_VISIBLE_DEVICES": "",
        **({"ACCELERATE_USE_DEEPSPEED": "true"} if program == "accelerated" else {}),
    }


def start(program: str, *arguments: object, gpus: int = 0, ranks: int = 1) -> subprocess.Popen[str]:
    """Start ``tests.deepspeed.<program>`` under torchrun, on so many GPUs; 0: so many ranks on the CPU."""
    modules = startup.search_path([os.environ.get("PYTHONPATH")])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": modules}
    if gpus:
        if program == "accelerated":
            environment["ACCELERATE_USE_DEEPSPEED"] = "true"
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, range(gpus)))
    else:
        environment |= on_cpu(program)
        arguments = (*arguments, "--torch-adam")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(gpus or ranks)]
    return subprocess.Popen(
        [*command, "-m", f"tests.deepspeed.{program}", *map(str, arguments)],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def losses(job: subprocess.Popen[str] | Outcome, killed: bool = False, timeout: float = 300) -> dict[int, float]:
    """What a program said once it has ended, step by step. killed: it has to end by being killed."""
    if isinstance(job, subprocess.Popen):
        out, err = job.communicate(timeout=timeout)
        ended = "SIGKILL" in err or job.returncode == -signal.SIGKILL
        assert ended if killed else job.returncode == 0, f"exit code {job.returncode}\n{out[-3000:]}\n{err[-6000:]}"
    else:
        out = "\n".join(job.logs)
        found = [(failure.kind, failure.message) for failure in job.failures]
        if reason := releases.fault(message for _, message in found):
            import pytest  # which programs do without

            pytest.skip(reason)
        # All ranks kill themselves in that step; one that is late finds the others gone.
        ended = len(found) == len(job.logs) and ("died", f"exit code {-signal.SIGKILL}") in found
        assert ended if killed else not found, f"{found}\n{[f.traceback for f in job.failures]}\n{out[-6000:]}"
    said = [line.removeprefix(LOSS) for line in out.splitlines() if line.startswith(LOSS)]
    return dict(json.loads(text) for text in said)


def furthest(folder: Path, prefix: str) -> Path:
    """The entry of ``folder`` whose name is ``prefix`` and the highest number."""
    return max(folder.glob(f"{prefix}*"), key=lambda path: int(path.stem.removeprefix(prefix)))


def apart(found: dict[int, float], wanted: dict[int, float]) -> float:
    """The largest difference of the losses found from those wanted."""
    return max(abs(loss - wanted[step]) for step, loss in found.items())
