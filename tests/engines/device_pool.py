"""Ranks on GPUs for tests: ``DevicePool.run(function, *args, world_size=N)`` on N of this machine's, over NCCL.

CUDA cannot be used in forked processes, so ranks are no forks of a warm process as those of ``pool`` are: for each
world size N processes are started once, one on each GPU, and run one job after the other until one of them fails.

Run as ``python -m tests.engines.device_pool <read fd> <write fd>``: one rank.
"""

from __future__ import annotations

import gc
import os
import pickle
import select
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.engines.zygote import die_with_parent, read_frame, resolve, write_frame

ROOT = Path(__file__).resolve().parents[2]
DEVICE = "cuda"


class DevicePool:
    """Runs jobs on ranks that have a GPU each. Use it from one thread; what is left of it ends with this process."""

    def __init__(self) -> None:
        self._teams: dict[int, _Team] = {}

    def run(self, function: Callable[..., Any], *args: Any, world_size: int, timeout: float = 240.0) -> list[Any]:
        """Run ``function(*args)`` on ``world_size`` ranks; the ranks' values, in order.

        Raises RuntimeError with the traceback of the first rank that failed, after ending all of them.
        """
        team = self._teams.get(world_size)
        if team is None:
            team = self._teams[world_size] = _Team(world_size)
        try:
            return team.run(function, args, timeout)
        except BaseException:
            self._teams.pop(world_size).close()
            raise

    def close(self) -> None:
        for team in self._teams.values():
            team.close()
        self._teams.clear()


class _Team:
    def __init__(self, size: int) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self._folder = tempfile.TemporaryDirectory(prefix="ranks-")
        self._pipes: list[tuple[int, int]] = []
        self._processes: list[subprocess.Popen[bytes]] = []
        for rank in range(size):
            request_read, request = os.pipe()
            response, response_write = os.pipe()
            with self._log(rank).open("wb") as log:
                process = subprocess.Popen(
                    [sys.executable, "-m", "tests.engines.device_pool", str(request_read), str(response_write)],
                    pass_fds=(request_read, response_write),
                    stdout=log,
                    stderr=log,
                    cwd=ROOT,
                    env={
                        **os.environ,
                        "RANK": str(rank),
                        "LOCAL_RANK": str(rank),
                        "WORLD_SIZE": str(size),
                        "LOCAL_WORLD_SIZE": str(size),
                        "MASTER_ADDR": "127.0.0.1",
                        "MASTER_PORT": str(port),
                        "DS_ACCELERATOR": DEVICE,
                        "OMP_NUM_THREADS": "4",
                        "TOKENIZERS_PARALLELISM": "false",
                        "TORCHDYNAMO_DISABLE": "1",
                    },
                )
            os.close(request_read)
            os.close(response_write)
            self._pipes.append((request, response))
            self._processes.append(process)

    def run(self, function: Callable[..., Any], args: tuple[Any, ...], timeout: float) -> list[Any]:
        name = f"{function.__module__}:{function.__qualname__}"
        for request, _ in self._pipes:
            write_frame(request, (name, pickle.dumps(args)))
        deadline = time.monotonic() + timeout
        waiting = {response: rank for rank, (_, response) in enumerate(self._pipes)}
        values: list[Any] = [None] * len(self._pipes)
        while waiting:
            ready, _, _ = select.select(list(waiting), [], [], max(deadline - time.monotonic(), 0))
            if not ready:
                raise RuntimeError(f"{name}: ranks {sorted(waiting.values())} are still busy after {timeout:g} s")
            for fd in ready:
                rank = waiting.pop(fd)
                try:
                    failed, values[rank] = read_frame(fd)
                except EOFError:
                    failed, values[rank] = True, "died"
                if failed:
                    log = self._log(rank).read_text(errors="replace")
                    raise RuntimeError(f"{name}: rank {rank}: {values[rank]}\n{log[-3000:]}")
        return values

    def close(self) -> None:
        for process in self._processes:
            process.kill()
            process.wait()
        for request, response in self._pipes:
            os.close(request)
            os.close(response)
        self._folder.cleanup()

    def _log(self, rank: int) -> Path:
        return Path(self._folder.name) / f"rank-{rank}.log"


def main(request: int, response: int) -> None:
    die_with_parent()
    import deepspeed
    import torch

    if DEVICE == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    deepspeed.init_distributed("nccl" if DEVICE == "cuda" else "gloo", verbose=False)
    while True:
        try:
            name, arguments = read_frame(request)
        except EOFError:
            os._exit(0)
        try:
            report = (False, resolve(name)(*pickle.loads(arguments)))
        except BaseException:  # noqa: BLE001 - a rank reports whatever stopped it
            report = (True, traceback.format_exc())
        write_frame(response, report)
        del report
        gc.collect()  # engines, in which there are cycles


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
