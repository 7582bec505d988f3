"""DeepSpeed's asynchronous files (``async_io``), by which it offloads to NVMe, built in a tenth of the time.

DeepSpeed builds the operator from fifteen sources: 346 s of processor time, and libaio with its headers. Here the same
sources are one unit, with the kernel's own calls in libaio's place: 23 s.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from tests.engines.operators import unit

NAME, PINNED = "async_io", "pin_memory"  # both operators are in the one library


def library(folder: Path) -> Path:
    """The file that is built."""
    return unit.library(folder, NAME)


def build(folder: Path) -> None:
    """Build the operator in a folder of its own below this one. Raises CalledProcessError where that fails."""
    import deepspeed
    from deepspeed.ops.op_builder.async_io import AsyncIOBuilder
    from deepspeed.ops.op_builder.pin_memory import PinMemoryBuilder

    theirs, own = Path(deepspeed.__file__).parent / "ops", folder / NAME
    shutil.rmtree(own, ignore_errors=True)
    sources = [
        s for s in AsyncIOBuilder().sources() if "pin_tensor_client" not in s
    ]  # which looks for PINNED's library
    pinned = PinMemoryBuilder().sources()
    includes = sorted({str(Path(source).parent) for source in (*sources, *pinned)})
    for name in includes:
        (own / name).mkdir(parents=True)
        for path in (theirs / name).glob("*.*"):
            once = "#pragma once\n" if path.suffix == ".h" else ""  # a header may be taken in once, and does not say so
            (own / name / path.name).write_text(once + path.read_text())
    text = [*unit.lines(NAME, [own / s for s in sources]), *unit.lines(PINNED, [own / s for s in pinned])]
    unit.compile_unit(text, ("-O0", "-march=native"), [own / name for name in includes], library(folder))


def use(folder: Path) -> None:
    """Have DeepSpeed take the operator that is built in this folder, in this process."""
    # Imported, so that there are classes to change.
    from deepspeed.ops.op_builder import async_io, pin_memory  # noqa: F401

    for builder, name in (("AsyncIOBuilder", NAME), ("PinMemoryBuilder", PINNED)):
        unit.use(builder, name, library(folder))
