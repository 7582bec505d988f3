"""Ranks that have this project's plugin imported already: once, in the process that they are forked from."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator

import pytest

from tests.engines import rig_jobs
from tests.engines.pool import RankPool


@pytest.fixture(scope="session")
def ranks(ranks: RankPool) -> RankPool:
    ranks.run(rig_jobs.leave_a_mark, world_size=1, preload=("ucp.deepspeed",))
    return ranks


@pytest.fixture(scope="module")
def one_gpu() -> Iterator[None]:
    """This process as the only rank, on the first GPU."""
    import deepspeed
    import torch

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    os.environ["MASTER_PORT"] = str(port)
    torch.cuda.set_device(0)
    deepspeed.init_distributed("nccl")
    yield
    torch.distributed.destroy_process_group()
