"""What the measurements share: interleaved timing, a cold page cache, launches of ranks, the table."""

from __future__ import annotations

import json
import mmap
import os
import platform
import queue
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil

SCRIPTS = Path(__file__).resolve().parent
TIME_LIMIT = 1200  # seconds for one command


def interleaved(
    works: Mapping[str, Callable[[], float]], repeats: int, before: Callable[[str], None]
) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Every work's seconds, in turns, so that what else the machine does falls on all of them; and the least processor
    time (of all its processes) that each took in a turn.

    before: called with the work's name ahead of every turn, outside the time.
    """
    seconds: dict[str, list[float]] = {name: [] for name in works}
    processor = dict.fromkeys(works, float("inf"))
    for turn in range(repeats):
        for name, work in works.items():
            before(name)
            used = _processor_time()
            seconds[name].append(work())
            processor[name] = min(processor[name], round(_processor_time() - used, 2))
            progress(f"{name}, turn {turn + 1} of {repeats}: {seconds[name][-1]:.2f} s, {processor[name]} s processor")
    return seconds, processor


def _processor_time() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def row(name: str, seconds: Sequence[float], reference: Sequence[float], **more: Any) -> dict[str, Any]:
    """One line of the result; ``ratio`` compares the minima, since noise only ever adds."""
    return {
        "what": name,
        "min s": round(min(seconds), 2),
        "median s": round(statistics.median(seconds), 2),
        "ratio": round(min(seconds) / min(reference), 2),
        **more,
    }


def timed(command: Sequence[str | os.PathLike[str]], **options: Any) -> float:
    """Run a command to its end; seconds from start to exit. Raises RuntimeError with the end of its output.

    Modules are kept compiled from the first turn on, as those of an installed package are, whatever the caller's
    environment says: compiling ours each time takes 0.2 s."""
    given = options.pop("env", os.environ)
    options["env"] = {name: value for name, value in given.items() if name != "PYTHONDONTWRITEBYTECODE"}
    began = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIME_LIMIT, check=False, **options)
    seconds = time.perf_counter() - began
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))} ended with {done.returncode}:\n{done.stderr[-4000:]}")
    return seconds


def copy_and_sync(source: Path, to: Path) -> float:
    """``cp -r``, then every file to the device: what a copy that survives a power cut takes."""
    seconds = timed(["cp", "-r", source, to])
    began = time.perf_counter()
    for path in (*files(to), *(p for p in to.rglob("*") if p.is_dir()), to):
        fd = os.open(path, os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)
    return seconds + time.perf_counter() - began


def launch(role: str, ranks: int, **options: Any) -> dict[str, Any]:
    """Run a role of bench_rank.py on that many ranks; returns what rank 0 reported."""
    report = Path(options["data"]) / f"report-{role}.json"
    report.unlink(missing_ok=True)
    flags = [f"--{key.replace('_', '-')}={value}" for key, value in options.items()]
    began = time.perf_counter()
    environment = {
        **os.environ,
        "DS_ACCELERATOR": str(options.get("device", "cpu")),
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": "1",
    }
    timed(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"),
            *(SCRIPTS / "bench_rank.py", role, f"--report={report}", *flags),
        ],
        env=environment,
    )
    progress(f"{role} on {ranks} ranks: {time.perf_counter() - began:.1f} s in all")
    return json.loads(report.read_text())


def files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def nbytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in files(folder))


def drop_cache(folder: Path) -> None:
    """Have the kernel forget the pages of these files (of these alone, and without being root)."""
    for path in files(folder):
        fd = os.open(path, os.O_RDONLY)
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


def warm_cache(folder: Path) -> None:
    """Read all of these files once."""
    for path in files(folder):
        with open(path, "rb", buffering=0) as stream:
            buffer = bytearray(1 << 20)
            while stream.readinto(buffer):
                pass


def read_plainly(
    folder: Path, part: tuple[int, int], direct: bool, threads: int = 8, buffers: Sequence[Any] | None = None
) -> int:
    """Read this rank's part (index, how many) of every file into reused buffers; how many bytes. direct: past the page
    cache, whole blocks only. buffers: of 8 MiB, at least one for each thread; memory of its own without."""
    index, count = part
    block = 8 << 20
    free: queue.SimpleQueue[Any] = queue.SimpleQueue()
    for k in range(threads):
        free.put(mmap.mmap(-1, block) if buffers is None else buffers[k])

    def read(work: tuple[Path, int]) -> int:
        path, start = work
        buffer = free.get()
        fd = os.open(path, os.O_RDONLY | (os.O_DIRECT if direct else 0))
        try:
            return os.preadv(fd, [buffer], start)
        finally:
            os.close(fd)
            free.put(buffer)

    work = [(path, start) for path in files(folder) for start in range(0, path.stat().st_size, block)]
    with ThreadPoolExecutor(threads) as pool:
        return sum(pool.map(read, work[index::count]))


class HostMemory:
    """While it is entered, the peak of this process's anonymous memory over what it was: ``growth``, in bytes."""

    def __enter__(self) -> HostMemory:
        self.growth = 0
        self._before = psutil.Process().memory_info()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        me = psutil.Process()
        held = self._before.rss - self._before.shared
        while not self._over.wait(0.01):
            now = me.memory_info()
            self.growth = max(self.growth, now.rss - now.shared - held)


def warm_memory(nbytes: int) -> None:
    """Take so much fresh memory, touch it and give it back.

    A hypervisor takes back what a virtual machine leaves idle, and finding it again takes longer than a load. Who comes
    first after a pause would pay for that; on a machine of its own nobody does.
    """
    with mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        memory.madvise(mmap.MADV_HUGEPAGE)  # so that whole blocks of it are there, for pages of any size
        for start in range(0, nbytes, mmap.PAGESIZE):
            memory[start] = 1


def remove(*folders: Path) -> None:
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)
        folder.unlink(missing_ok=True) if folder.is_file() else None


def machine(folder: Path) -> dict[str, Any]:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    system = subprocess.run(["stat", "-f", "-c", "%T", folder], capture_output=True, text=True, check=False).stdout
    return {
        "processors": os.cpu_count(),
        "memory GiB": round(memory / 2**30, 1),
        "file system": system.strip(),
        "kernel": platform.release(),
        "load before": [round(x, 1) for x in os.getloadavg()],
    }


def table(result: Mapping[str, Any]) -> str:
    """The title, the rows with aligned columns, and the machine."""
    rows = result["rows"]
    columns = list(dict.fromkeys(key for one in rows for key in one))
    cells = [columns, *([_cell(one.get(column, "")) for column in columns] for one in rows)]
    widths = [max(len(line[k]) for line in cells) for k in range(len(columns))]
    lines = [
        "  ".join(
            cell.ljust(width) if k == 0 else cell.rjust(width)
            for k, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in cells
    ]
    machine_text = ", ".join(f"{key} {value}" for key, value in result["machine"].items())
    notes = [f"  {note}" for note in result.get("notes", ())]
    return "\n".join([result["title"], "", *lines, "", *notes, f"  machine: {machine_text}"])


def _cell(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value)


def progress(text: str) -> None:
    print(f"  … {text}", file=sys.stderr, flush=True)
