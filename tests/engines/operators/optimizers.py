"""The optimizers that DeepSpeed compiles, built in a seventh of the time: with its own options and of its own sources,
each group of them as one unit. By DeepSpeed's own way each operator takes 121 s of processor time."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path
from typing import Any

from tests.engines.operators import unit

NAMES = {"CPUAdamBuilder": "cpu_adam", "FusedAdamBuilder": "fused_adam", "CPULionBuilder": "cpu_lion"}
# Of one unit, which each has a copy of: they share sources, but what these keep is each operator's own.
UNITS = (("CPUAdamBuilder", "FusedAdamBuilder"), ("CPULionBuilder",))


def library(folder: Path, builder: str) -> Path:
    """The file that is built for this builder's operator."""
    return unit.library(folder, NAMES[builder])


def build(folder: Path) -> None:
    """Build what is missing. Raises CalledProcessError where that fails."""
    for builders in UNITS:
        if not all(library(folder, builder).exists() for builder in builders):
            _build(folder, builders)


def _build(folder: Path, builders: tuple[str, ...]) -> None:
    import deepspeed

    theirs = Path(deepspeed.__file__).parent / "ops"
    text: list[str] = []
    done: set[str] = set()
    for builder in builders:
        sources = [source for source in _made(builder).sources() if source not in done]
        done.update(sources)
        text += unit.lines(NAMES[builder], [theirs / source for source in sources])
    first = _made(builders[0])
    options = [option for option in first.cxx_args() if option and option != "-g"]
    first_library = library(folder, builders[0])
    unit.compile_unit(text, options, [theirs / place for place in first.include_paths()], first_library)
    for builder in builders[1:]:
        copy = library(folder, builder)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(first_library, copy)


def use(folder: Path) -> None:
    """Have DeepSpeed take what is built in this folder, then or later, in this process and its forks."""
    for builder, name in NAMES.items():
        with contextlib.suppress(LookupError):  # of another release
            _made(builder)  # imports its class
            unit.use(builder, name, library(folder, builder))


def _made(builder: str) -> Any:
    from deepspeed.accelerator import get_accelerator

    found = get_accelerator().create_op_builder(builder)
    if found is None:
        raise LookupError(f"this DeepSpeed has no operator {builder}")
    return found
