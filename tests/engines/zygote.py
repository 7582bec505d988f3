"""The warm process that every rank of every job is forked from.

Importing torch and DeepSpeed costs seconds, and DeepSpeed keeps state in module globals, patched classes and hooks
that nothing resets completely.  So one process imports everything once, never computes anything, and forks the ranks
of each job: a rank starts warm, yet as clean as a fresh process, with no list of globals to reset that could go stale,
and a rank that hangs or dies takes nothing with it.

Forking is safe here because this process stays single-threaded: it runs no operator, opens no process group, and all
thread pools are limited to one thread before they are imported.

Run as ``python -m tests.engines.zygote <read fd> <write fd>``; frames are an 8-byte length and a pickle.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import os
import pickle
import pkgutil
import selectors
import signal
import socket
import struct
import sys
import time
import traceback
from typing import Any

PR_SET_PDEATHSIG = 1
OPERATOR = "operator:"  # in a job's preload: a compiled optimizer of DeepSpeed, by its builder's name

# Environment of every rank, set before anything is imported. One thread each: the machines that run these tests have
# fewer cores than the jobs have ranks.
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "DS_ACCELERATOR": "cpu",
    "CUDA_VISIBLE_DEVICES": "",  # where there are GPUs, modules of DeepSpeed's begin to use them, in a thread of theirs
    "GLOO_SOCKET_IFNAME": "lo",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
    "PYTHONWARNINGS": "ignore",
    # DeepSpeed's Muon is decorated with torch.compile; compiled in every rank anew, it would take minutes.
    "TORCHDYNAMO_DISABLE": "1",
}


def read_exactly(fd: int, size: int) -> bytes:
    parts = []
    while size:
        part = os.read(fd, min(size, 1 << 20))
        if not part:
            raise EOFError
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def read_frame(fd: int) -> Any:
    (size,) = struct.unpack("<Q", read_exactly(fd, 8))
    return pickle.loads(read_exactly(fd, size))


def write_frame(fd: int, value: Any) -> None:
    data = pickle.dumps(value, protocol=pickle.HIGHEST_PROTOCOL)
    view = memoryview(struct.pack("<Q", len(data)) + data)
    while view:
        view = view[os.write(fd, view) :]


def resolve(qualified: str) -> Any:
    module_name, _, path = qualified.partition(":")
    found: Any = importlib.import_module(module_name)
    for part in path.split("."):
        found = getattr(found, part)
    return found


def die_with_parent() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def init_process_group(rank: int, world_size: int, listener: socket.socket) -> None:
    """Join the job's gloo group over a socket that was bound before the fork, so that no port can be taken between."""
    import torch.distributed as torch_dist

    host, port = listener.getsockname()
    options = {"wait_for_workers": False}
    if not importlib.import_module("tests.engines.releases").is_pinned("torch"):
        options["use_libuv"] = False  # which Debian's build lacks
    if rank == 0:
        store = torch_dist.TCPStore(host, port, world_size, True, master_listen_fd=listener.detach(), **options)
    else:
        listener.close()
        store = torch_dist.TCPStore(host, port, world_size, False, **options)
    torch_dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)

    import deepspeed

    deepspeed.init_distributed("gloo", verbose=False)


def run_rank(job: dict[str, Any], rank: int, listener: socket.socket) -> tuple[Any, ...]:
    try:
        host, port = listener.getsockname()
        os.environ.update(
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE=str(job["world_size"]),
            LOCAL_WORLD_SIZE=str(job["world_size"]),
            LOCAL_SIZE=str(job["world_size"]),  # else DeepSpeed 0.15 asks numactl
            MASTER_ADDR=host,
            MASTER_PORT=str(port),
        )
        os.environ.update(job["environment"])
        if job["cwd"] is not None:
            os.chdir(job["cwd"])
        args, kwargs = pickle.loads(job["arguments"])
        function = resolve(job["function"])
        if job["distributed"]:
            init_process_group(rank, job["world_size"], listener)
        importlib.import_module("tests.engines.proving").install()
        value = function(*args, **kwargs)
        return ("value", importlib.import_module("tests.engines.packing").packed(value))
    except BaseException as error:  # noqa: BLE001 - a rank reports whatever stopped it, SystemExit included
        kind = type(error)
        return (
            "raised",
            f"{kind.__module__}.{kind.__qualname__}",
            getattr(error, "whole", str(error)),
            traceback.format_exc(),
        )


def child_main(job: dict[str, Any], rank: int, listener: socket.socket, report_fd: int) -> None:
    os.setpgid(0, 0)
    die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    log = os.open(job["logs"][rank], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    os.dup2(log, 1)
    os.dup2(log, 2)
    report = run_rank(job, rank, listener)
    sys.stdout.flush()
    sys.stderr.flush()
    write_frame(report_fd, report)
    # Stay until killed: rank 0 serves the store, and others may still be in their last collective.
    while True:
        time.sleep(3600)


def collect(
    children: dict[int, int], report_fds: dict[int, int], timeout: float, grace: float
) -> dict[int, tuple[Any, ...]]:
    """Wait for every rank's report; once one has failed, the others get ``grace`` seconds, being likely blocked."""
    reports: dict[int, tuple[Any, ...]] = {}
    deadline = time.monotonic() + timeout
    with selectors.DefaultSelector() as selector:
        for rank, fd in report_fds.items():
            selector.register(fd, selectors.EVENT_READ, rank)
        while len(reports) < len(report_fds):
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                break
            for key, _ in selector.select(remaining):
                rank = key.data
                selector.unregister(key.fd)
                try:
                    reports[rank] = read_frame(key.fd)
                except EOFError:
                    _, status = os.waitpid(children.pop(rank), 0)
                    reports[rank] = ("died", os.waitstatus_to_exitcode(status))
                if reports[rank][0] != "value":
                    deadline = min(deadline, time.monotonic() + grace)
    return reports


def run_job(job: dict[str, Any]) -> dict[int, tuple[Any, ...]]:
    # Imported here, before the fork, so that the next job finds them warm. What they raise, the ranks will report.
    for name in (*job["preload"], job["function"].partition(":")[0]):
        try:
            if name.startswith(OPERATOR):
                load_operator(name.removeprefix(OPERATOR))
            else:
                importlib.import_module(name)
        except Exception:  # noqa: BLE001 - a module of the tests may raise anything
            traceback.print_exc()
    # A rank's collections of garbage would look at everything that is imported, and so copy the pages that it lies in.
    gc.freeze()
    listener = socket.create_server(("127.0.0.1", 0), backlog=64)
    children: dict[int, int] = {}
    report_fds: dict[int, int] = {}
    try:
        for rank in range(job["world_size"]):
            read_fd, write_fd = os.pipe()
            child = os.fork()
            if child == 0:
                try:
                    os.close(read_fd)
                    child_main(job, rank, listener, write_fd)
                finally:
                    os._exit(70)
            os.close(write_fd)
            children[rank] = child
            report_fds[rank] = read_fd
        listener.close()
        return collect(children, report_fds, job["timeout"], job["grace"])
    finally:
        for child in children.values():
            for kill in (os.killpg, os.kill):  # the group does not exist yet if the child has not run
                try:
                    kill(child, signal.SIGKILL)
                except ProcessLookupError:
                    continue
            os.waitpid(child, 0)
        for fd in report_fds.values():
            os.close(fd)


def load_operator(builder_name: str) -> None:
    """Load one of DeepSpeed's native operators once for all later ranks."""
    from deepspeed.accelerator import get_accelerator

    builder = get_accelerator().create_op_builder(builder_name)
    if builder is None:
        raise LookupError(f"this DeepSpeed has no operator {builder_name}")
    builder.load(verbose=False)


def warm_up() -> None:
    import logging

    import torch

    torch.set_num_threads(1)
    torch.set_num_interop_threads(1)
    import deepspeed.accelerator

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    for name in (
        "deepspeed.runtime.zero.stage_1_and_2",
        "deepspeed.runtime.zero.stage3",
        "deepspeed.runtime.bf16_optimizer",
        "deepspeed.runtime.superoffload.superoffload_stage3",  # since 0.17
        "deepspeed.runtime.zero.muon.muon_optimizer",  # since 0.18
        "torch._dynamo",
        # What every engine, or every save, imports late.
        "deepspeed.module_inject.auto_ep",  # since 0.19
        "deepspeed.module_inject.auto_ep_comm",
        "deepspeed.module_inject.auto_ep_layer",
        "deepspeed.moe.ep_kernels",
        "deepspeed.moe.ep_repack",
        "torch._subclasses.schema_check_mode",
        "torch.profiler._cupti_monitor",
        "torch.utils.serialization.config",
        "numpy.ma",
        # With all of the rig, which imports pytest.
        "tests.engines.moe",
    ):
        with contextlib.suppress(ModuleNotFoundError):
            importlib.import_module(name)
    importlib.import_module("tests.engines.releases").mend()
    # Never built in a rank: that takes minutes, and a rank that is ended in the middle of it leaves a lock behind, on
    # which every later build waits for ever.
    operators = importlib.import_module("tests.engines.operators")
    operators.optimizers.use(operators.folder())
    import_ours()
    # Stage 3 writes out every parameter for a line that it then does not log.
    torch.nn.Parameter.__repr__ = object.__repr__
    # DeepSpeed refuses fp16 on processors without instructions for it; torch computes it on all of them.
    type(deepspeed.accelerator.get_accelerator()).is_fp16_supported = lambda self: True
    # DeepSpeed probes its native operators (compiler runs included) when it first joins a process group: once, here.
    # The one it would then build and use serves inference only; building it takes minutes of the first test's time.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def import_ours() -> None:
    """All of the package that ranks may use: much of it is imported late, and that would be in each rank anew."""
    import ucp

    for module in pkgutil.walk_packages(ucp.__path__, "ucp."):
        alters_deepspeed = module.name == "ucp.deepspeed.auto"
        if not (alters_deepspeed or module.name.startswith(("ucp.cli", "ucp.megatron")) or "__main__" in module.name):
            with contextlib.suppress(ImportError):  # of what is not installed; whoever uses it is told
                importlib.import_module(module.name)


def main(request_fd: int, response_fd: int) -> None:
    os.environ.update(ENVIRONMENT)
    die_with_parent()
    warm_up()
    threads = len(os.listdir("/proc/self/task"))
    write_frame(response_fd, {"pid": os.getpid(), "threads": threads})
    while True:
        try:
            job = read_frame(request_fd)
        except EOFError:
            os._exit(0)  # nothing to save; an interpreter with all of DeepSpeed takes seconds to end in order
        write_frame(response_fd, run_job(job))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
