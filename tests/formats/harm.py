"""Harm done to a checkpoint's files one after the other, in place and undone again, and what opening it says then."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

import ucp
from ucp.errors import UcpError
from ucp.formats import beside

SURPLUS = "a_key_too_many"


class Own:
    """A class that nothing here knows."""

    def __init__(self) -> None:
        self.patience = torch.tensor([3])


def files_of(path: Path) -> list[Path]:
    return [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())


@contextmanager
def undone(files: Sequence[Path]) -> Iterator[None]:
    """Whatever is done to the files meanwhile is undone."""
    held = {file: (file.read_bytes(), file.stat().st_mtime_ns) for file in files}
    try:
        yield
    finally:
        for file, (content, time) in held.items():
            file.write_bytes(content)
            os.utime(file, ns=(time, time))


def remove(file: Path) -> None:
    file.unlink()


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def of_another(folder: Path, other: Path) -> Callable[[Path], None]:
    """Each file becomes the one of the same name in the other checkpoint, if that has one."""

    def replace(file: Path) -> None:
        theirs = other / file.relative_to(folder)
        if theirs.exists():
            file.write_bytes(theirs.read_bytes())

    return replace


def notes(path: Path) -> tuple[Any, ...]:
    """What opening says: how it refuses, or what it is and what is not read or could not be checked. Any error other
    than ours is a fault."""
    try:
        with ucp.open(path) as opened:
            around = beside.around(opened.path, opened.format)
            return opened.format, opened.unread, opened.catalog.unchecked, around
    except UcpError as error:
        return (type(error), str(error))


def unnoticed(path: Path, harm: Callable[[Path], None]) -> set[str]:
    """The files of the checkpoint of which opening it says nothing when they are harmed."""
    before, found = notes(path), set()
    for file in files_of(path):
        with undone([file]):
            content = file.read_bytes()
            harm(file)
            if (not file.exists() or file.read_bytes() != content) and notes(path) == before:
                found.add(file.name if path.is_file() else file.relative_to(path).as_posix())
    return found


def of_half(path: Path) -> tuple[Any, ...]:
    """What opening says when every second file is gone."""
    files = files_of(path)[::2]
    with undone(files):
        for file in files:
            file.unlink()
        return notes(path)


def with_surplus(path: Path, options: Mapping[str, Any]) -> dict[str, str]:
    """What becomes of one key more, of an unknown class, in each of torch.save's files: how opening refuses it; "kept"
    or "lost"."""
    found = {}
    for file in files_of(path):
        graph = _loaded(file)
        if not isinstance(graph, dict):
            continue
        with undone([file]):
            torch.save({**graph, SURPLUS: Own()}, file)
            try:
                with ucp.open(path, options=options) as opened:
                    found[str(file)] = "kept" if _kept(opened) else "lost"
            except UcpError as error:
                found[str(file)] = str(error)
    return found


def _kept(opened: Any) -> bool:
    """Whether the key is in what was opened, or named."""
    state = opened.training_state
    return (
        any(map(_holds, (state.client_state, state.extra, state.lr_scheduler, state.param_groups)))
        or any(SURPLUS in name for name in opened.parameters)
        or any(SURPLUS in note for note in opened.catalog.unchecked)
    )


def _holds(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(str(key).endswith(SURPLUS) or _holds(item) for key, item in value.items())
    return isinstance(value, (list, tuple)) and any(map(_holds, value))


def _loaded(file: Path) -> Any:
    if file.suffix not in (".pt", ".pth", ".bin", ".ckpt", ".pkl") or file.name in (
        "training_args.bin",
        "metadata.pkl",
    ):
        return None
    return torch.load(file, weights_only=False)
