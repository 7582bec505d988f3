"""A training program for torchrun: ``program.py FOLDER MODE``; rank 1 is killed in its fourth step, once.

MODE: 'memory' resumes from memory, 'plain' loads nothing and begins anew; 'refuse' wants a global batch that no
micro-batch divides; 'memory-drain' resumes from memory, and has the node 'bad' left out before the kill.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

STEPS = 6


def tell(folder: str, **record: object) -> None:
    if os.environ["RANK"] == "0" or "kill" in record:
        with open(Path(folder, "told"), "a") as stream:
            stream.write(json.dumps({"at": time.time(), **record}) + "\n")


def main(folder: str, mode: str) -> None:
    os.environ.setdefault("UCP_NODE", "node" + os.environ["RANK"])
    again = os.environ["TORCHELASTIC_RESTART_COUNT"] != "0"
    tell(folder, start=again)
    import torch
    import torch.distributed as dist

    from ucp.elastic import fitted
    from ucp.elastic.running import drain
    from ucp.torchdist.memory import MemorySnapshots

    dist.init_process_group("gloo")
    elastic = {"micro": [7] if mode == "refuse" else [1, 2, 3]}
    what = fitted({"train_batch_size": 12, "ucp": {"elastic": elastic}}, dist.get_world_size())
    torch.manual_seed(1)
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Linear(16, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    memory = MemorySnapshots(folder)
    report = memory.load_training(model=model, optimizer=optimizer) if mode.startswith("memory") else None
    done = 0 if report is None else report.step or 0
    tell(folder, resumed=done, world=dist.get_world_size())
    for step in range(done, STEPS):
        torch.manual_seed(step)
        model(torch.randn(what.micro, 8)).square().mean().backward()
        for parameter in model.parameters():
            dist.all_reduce(parameter.grad)
        if not again and step == 3 and os.environ["RANK"] == "1":
            memory.wait()
            if mode == "memory-drain":
                drain(Path(folder), "bad")
            tell(folder, kill=True)
            os.kill(os.getpid(), signal.SIGKILL)
        memory.hold()
        optimizer.step()
        optimizer.zero_grad()
        tell(folder, step=step + 1)
        if mode.startswith("memory"):
            memory.snapshot(step + 1, model=model, optimizer=optimizer)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
