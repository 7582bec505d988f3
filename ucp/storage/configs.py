"""Configs: files that hold one JSON object, such as a model's ``config.json``."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ucp import limits
from ucp.errors import DamagedCheckpoint, UcpError
from ucp.storage import locations

MODEL = "config.json"


def read(path: str | os.PathLike[str], error: type[UcpError] = DamagedCheckpoint) -> dict[str, Any]:
    """The object in the file. Raises ``error`` if the file is missing, can't be read, or holds anything else."""
    found = _read(path, error)
    if found is None:
        raise error(f"{path}: there is no such file")
    return found


def given(config: str | os.PathLike[str] | Mapping[str, Any] | None, error: type[UcpError]) -> Mapping[str, Any] | None:
    """The config itself, or what its file holds; None for None. Raises as `read` does."""
    return config if config is None or isinstance(config, Mapping) else read(config, error)


def names_of_groups(value: Any, what: str, error: type[UcpError]) -> list[Sequence[str]]:
    """Lists of names, one for each param group: as they are given, or from the JSON file at this path.

    Raises ``error`` for a file that can't be read, and for anything else than lists of texts.
    """
    name, found = _given(value, what, error)
    if not isinstance(found, (list, tuple)) or not all(
        isinstance(group, (list, tuple)) and all(isinstance(one, str) for one in group) for group in found
    ):
        raise error(f'{name}: holds no list of lists of names, one for each param group, such as [["w"], ["b"]]')
    return list(found)


def shapes_by_name(value: Any, what: str, error: type[UcpError]) -> dict[str, tuple[int, ...]]:
    """Names and shapes, in their order: as they are given, or from the JSON file at this path.

    Raises ``error`` for a file that can't be read, and for anything else than names with lengths.
    """
    name, found = _given(value, what, error)
    if not isinstance(found, Mapping) or not all(isinstance(key, str) for key in found):
        raise error(f'{name}: holds no shapes by name, such as {{"w": [4, 2], "b": [4]}}')
    for key, shape in found.items():
        if not isinstance(shape, (list, tuple)) or not all(type(n) is int and 0 <= n < 2**62 for n in shape):
            raise error(f"{name}: '{key}' is to have a shape such as [4, 2], and has {shape!r}")
    return {key: tuple(shape) for key, shape in found.items()}


def _given(value: Any, what: str, error: type[UcpError]) -> tuple[str, Any]:
    """What to call it in messages, and the value: itself, or what the JSON file at this path holds."""
    if not isinstance(value, (str, os.PathLike)):
        return what, value
    name = f"{what}: {value}"
    try:
        raw = locations.read(value)
        limits.check_json(str(value), raw)
        return name, json.loads(raw)
    except OSError as reason:
        raise error(f"{name}: cannot be read: {reason.strerror or reason}") from reason
    except (ValueError, RecursionError) as reason:
        raise error(f"{name}: is not valid JSON: {reason}") from reason


def of_model(*folders: Path, error: type[UcpError] = DamagedCheckpoint) -> dict[str, Any] | None:
    """The model's config in the first of these folders that has one; None if none has.

    Raises ``error`` for one that can't be read. Treating it as missing would change how the checkpoint is read.
    """
    return next((found for folder in folders if (found := _read(folder / MODEL, error)) is not None), None)


def _read(path: str | os.PathLike[str], error: type[UcpError]) -> dict[str, Any] | None:
    name = str(path)
    try:
        raw = locations.read(path)
        limits.check_json(name, raw)
        found = json.loads(raw)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as reason:
        raise error(f"{name}: cannot be read: {reason.strerror or reason}") from reason
    except (ValueError, RecursionError) as reason:
        raise error(f"{name}: is not valid JSON: {reason}") from reason
    if not isinstance(found, dict):
        raise error(f"{name}: is not a JSON object")
    return found
