"""The kernel for digests on a GPU: its own source, run here as C++ with a fiber for each thread, and on a GPU if any.

What stands in for CUDA is the language alone: blocks one after the other, and threads that wait at each barrier.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import sys
from contextlib import nullcontext

import numpy as np
import pytest
import torch

from ucp.geometry import flat_ranges, whole
from ucp.job import device_kernel, live_digest, runtime_compiler
from ucp.job.device_kernel import SOURCE, KernelSums, is_right, launch_of
from ucp.job.live_digest import LiveElements, digests, on_device
from ucp.logical.record import drawn

_AROUND = """
#include <ucontext.h>
#include <vector>
struct Place { unsigned int x; };
static Place threadIdx, blockIdx;
static ucontext_t scheduler, threads[256];
static bool ended[256];
static void wait_for_all() { unsigned int own = threadIdx.x; swapcontext(&threads[own], &scheduler); }
#define __global__
#define __device__ static
#define __shared__ static
#define __syncthreads wait_for_all
static void atomicAdd(unsigned long long *to, unsigned long long value) { *to += value; }
SOURCE
static const i64 *given_table, *given_keys;
static u64 *given_sums;
static int given_count;
static void body() {
    ucp_add_runs(given_table, given_keys, given_sums, given_count);
    ended[threadIdx.x] = true;
}
extern "C" void run(const i64 *table, const i64 *keys, u64 *sums, int count, int blocks) {
    given_table = table; given_keys = keys; given_sums = sums; given_count = count;
    static std::vector<char> stacks(256 << 14);
    for (int block = 0; block < blocks; ++block) {
        blockIdx.x = block;
        for (int k = 0; k < 256; ++k) {
            getcontext(&threads[k]);
            threads[k].uc_stack.ss_sp = stacks.data() + (k << 14);
            threads[k].uc_stack.ss_size = 1 << 14;
            threads[k].uc_link = &scheduler;
            makecontext(&threads[k], body, 0);
            ended[k] = false;
        }
        for (bool more = true; more;) {
            more = false;
            for (int k = 0; k < 256; ++k)
                if (!ended[k]) { threadIdx.x = k; swapcontext(&scheduler, &threads[k]); more |= !ended[k]; }
        }
    }
}
"""


@pytest.fixture(scope="module")
def launch(tmp_path_factory: pytest.TempPathFactory) -> device_kernel.Launch:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++")
    folder = tmp_path_factory.mktemp("kernel")
    (folder / "kernel.cpp").write_text(_AROUND.replace("SOURCE", SOURCE))
    subprocess.run(
        [compiler, "-O1", "-shared", "-fPIC", "-o", folder / "kernel.so", folder / "kernel.cpp"],
        check=True,
        capture_output=True,
    )
    run = ctypes.CDLL(str(folder / "kernel.so")).run

    def launched(table: torch.Tensor, keys: torch.Tensor, sums: torch.Tensor, count: int, blocks: int) -> None:
        assert len(table) == 5 * count + blocks
        run(*(ctypes.c_void_p(t.contiguous().data_ptr()) for t in (table, keys, sums)), count, blocks)

    return launched


def test_the_kernel_gives_what_the_host_does(launch: device_kernel.Launch) -> None:
    assert is_right(launch, torch.device("cpu"))


def test_a_kernel_that_is_wrong_is_found_out(launch: device_kernel.Launch) -> None:
    def wrong(table: torch.Tensor, keys: torch.Tensor, sums: torch.Tensor, count: int, blocks: int) -> None:
        launch(table, keys, sums, count, blocks)
        sums[-1, 0] += 1

    assert not is_right(wrong, torch.device("cpu"))


def test_tensors_of_every_kind_at_once(monkeypatch: pytest.MonkeyPatch, launch: device_kernel.Launch) -> None:
    """Whole, in parts of a flat buffer, cut by columns, converted on the way, sampled, and none: in few launches."""
    launches: list[int] = []

    def counted(table: torch.Tensor, keys: torch.Tensor, sums: torch.Tensor, count: int, blocks: int) -> None:
        launches.append(count)
        launch(table, keys, sums, count, blocks)

    generator = torch.Generator().manual_seed(0)
    flat = torch.randn(70_000, generator=generator)
    lives = [LiveElements(flat, (70_000,), whole((70_000,)))]
    lives += [LiveElements(flat[n : n + 300], (3, 100), whole((3, 100))) for n in range(0, 3000, 300)]
    lives.append(LiveElements(flat, (90_001,), flat_ranges((90_001,), [20_001], [90_001], [0])))
    lives.append(LiveElements(flat.view(700, 100)[:, 3:40], (700, 37), whole((700, 37))))
    lives.append(LiveElements(flat, (70_000,), whole((70_000,)), "bfloat16", rounded=True))
    lives.append(LiveElements(flat.to(torch.bfloat16)[1:], (69_999,), whole((69_999,)), one_nan=True))
    lives.append(LiveElements(torch.zeros(5, dtype=torch.int8), (5,), whole((5,))))
    lives.append(LiveElements(torch.zeros(0), (0,), whole((0,))))
    monkeypatch.setattr(live_digest, "launch_of", lambda device: counted)
    for sample in (None, drawn(3)):
        assert on_device(lives, sample) == digests(lives, sample=sample)
        assert len(launches) == 1
        launches.clear()
    monkeypatch.setattr(device_kernel, "WAITING", 1000)
    assert on_device(lives) == digests(lives)
    assert 2 < len(launches) < len(lives)


def test_no_function_is_called_for_each_of_many_that_are_alike(
    monkeypatch: pytest.MonkeyPatch, launch: device_kernel.Launch
) -> None:
    monkeypatch.setattr(live_digest, "launch_of", lambda device: launch)
    calls: list[int] = []
    for count in (200, 20, 200):  # the first one does what is done once
        shapes = [(300,), (5, 40)] * (count // 2)
        cuts = {shape: whole(shape) for shape in shapes}
        lives = [LiveElements(torch.full(shape, 1.5 + k), shape, cuts[shape]) for k, shape in enumerate(shapes)]
        found: list[str] = []
        sys.setprofile(lambda frame, event, _, found=found: found.append(event))
        try:
            made = on_device(lives)
        finally:
            sys.setprofile(None)
        assert made == digests(lives)
        calls.append(found.count("call"))
    assert calls[2] - calls[1] < 18


def test_runs_of_no_bytes_add_nothing(launch: device_kernel.Launch) -> None:
    sums = KernelSums(torch.device("cpu"), 2, launch)
    none = np.zeros(1, np.int64)
    sums.add(0, torch.zeros(4, dtype=torch.uint8), live_digest.Runs(none, none, none))
    assert not sums.finish().any()


def test_there_is_no_kernel_where_it_cannot_be_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    assert launch_of(torch.device("cpu")) is None
    launch_of.cache_clear()
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert launch_of(torch.device("cuda", 0)) is None or torch.cuda.is_available()
    launch_of.cache_clear()


def test_torch_compiles_where_its_ways_are_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def lacking(source: str, name: str) -> None:
        raise AttributeError("no such way")

    asked: list[tuple[str, str]] = []
    monkeypatch.setattr(runtime_compiler, "kernel", lacking)
    monkeypatch.setattr(torch.cuda, "_compile_kernel", lambda *what: asked.append(what), raising=False)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(device_kernel, "is_right", lambda launch, device: True)
    launch_of.cache_clear()
    assert launch_of(torch.device("cuda", 0)) is not None
    launch_of.cache_clear()
    assert asked == [(SOURCE, "ucp_add_runs")]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_compiling_imports_little() -> None:
    """Imports keep the threads of a load from the interpreter."""
    program = (
        "import sys, torch; from ucp.job.device_kernel import launch_of; "
        "assert launch_of(torch.device('cuda', 0)) is not None; print('torch.utils.cpp_extension' in sys.modules)"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "False"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu() -> None:
    device = torch.device("cuda", 0)
    assert launch_of(device) is not None or not hasattr(torch.cuda, "_compile_kernel")
    flat = torch.randn(3_000_001, device=device)
    lives = [LiveElements(flat[n:], (3_000_001 - n,), whole((3_000_001 - n,))) for n in (0, 1, 2_999_000)]
    wanted = digests([LiveElements(live.tensor.cpu(), live.shape, live.blocks) for live in lives])
    assert digests(lives) == wanted
