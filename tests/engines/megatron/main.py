"""Several Megatron runs, one after the other: ``python -m tests.engines.megatron.main JOBS``.

JOBS is a file of JSON: a list of {"do": what, "case": {...}, ...}, as `jobs` has them. Megatron is imported once and
every rank is a fork of that process, which takes seconds less than starting them.
"""

from __future__ import annotations

import contextlib
import gc
import json
import multiprocessing
import os
import signal
import sys
import tempfile
import traceback
from typing import Any

import torch
import torch.distributed as dist

from tests.engines.megatron import cpu


def main(path: str) -> int:
    torch.set_num_threads(1)
    cpu.stand_in()
    from tests.engines.megatron import run  # noqa: F401 (the import that takes long)

    gc.freeze()  # as for the ranks of `tests.engines.zygote`
    with open(path) as file:
        jobs = json.load(file)
    done = [_ran(job) for job in jobs]
    return int(not all(done))


def _ran(job: dict[str, Any]) -> bool:
    from tests.engines.megatron.cases import Case

    world = Case(**job["case"]).world
    with tempfile.TemporaryDirectory() as meeting:
        fork = multiprocessing.get_context("fork")
        ranks = [fork.Process(target=_rank, args=(job, rank, world, f"{meeting}/store")) for rank in range(world)]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join()
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid or 0, signal.SIGKILL)  # the writers that Megatron keeps for a next save
    return all(process.exitcode == 0 for process in ranks)


def _rank(job: dict[str, Any], rank: int, world: int, meeting: str) -> None:
    os.setsid()
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank))
    try:
        dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=world)
        from tests.engines.megatron import jobs

        getattr(jobs, job.get("do", "save"))(job)
        dist.barrier()
    except BaseException:  # noqa: BLE001 (whatever it is, the rank has to end)
        print(f"{job}: rank {rank}:\n{traceback.format_exc()}", file=sys.stderr, flush=True)
        os._exit(1)
    os._exit(0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
