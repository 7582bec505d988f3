"""The weight files of a Hugging Face model folder, and whether all of them are there.

transformers writes one file, ``model.safetensors`` or ``pytorch_model.bin``, or several that are numbered,
``model-00001-of-00003.safetensors``, with an index: ``{"metadata": {...}, "weight_map": {name: file}}`` in
``model.safetensors.index.json`` or ``pytorch_model.bin.index.json``.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ucp.errors import DamagedCheckpoint, Unsupported
from ucp.printable import logger
from ucp.storage import configs, graphs, locations, safetensors
from ucp.storage.torch_pt import reader
from ucp.storage.torch_pt.values import TensorRef

log = logger(__name__)

_NUMBERED = re.compile(r"(model|pytorch_model)-(\d{5,})-of-(\d{5,})\.(safetensors|bin)")


@dataclass(frozen=True)
class Kind:
    """One of the two kinds of weight files: the name of a single file, and of the index if there are several."""

    single: str
    index: str

    def in_folder(self, folder: Path) -> bool:
        return locations.is_file(folder / self.single) or locations.is_file(folder / self.index)


# In transformers' order of preference.
KINDS = (
    Kind("model.safetensors", "model.safetensors.index.json"),
    Kind("pytorch_model.bin", "pytorch_model.bin.index.json"),
)


def in_folder(folder: Path) -> bool:
    """Whether the folder has weight files of either kind."""
    return any(kind.in_folder(folder) for kind in KINDS)


def weights(folder: Path) -> dict[str, TensorRef]:
    """Every tensor of the folder's weight files by its name. No data is read.

    Raises DamagedCheckpoint if files are missing, truncated or contradict the index, Unsupported and UnsafePickle as
    reading the files does.
    """
    kind = next(kind for kind in KINDS if kind.in_folder(folder))
    index = folder / kind.index
    numbered = _numbered(folder, kind)
    if not locations.is_file(index):
        if numbered:
            raise DamagedCheckpoint(
                f"{folder}: holds '{kind.single}' and '{numbered[0]}', and no '{kind.index}' says which of them is the "
                "model; remove what is not part of it"
            )
        return _tensors(folder / kind.single)
    if locations.is_file(folder / kind.single):
        raise DamagedCheckpoint(
            f"{folder}: holds '{kind.single}' and '{kind.index}', two models; remove the one that is not meant"
        )
    weight_map, total_size = _index(index)
    files = list(dict.fromkeys(weight_map.values()))
    _check_files(index, files, numbered)
    out: dict[str, TensorRef] = {}
    for file in files:
        found = _tensors(folder / file)
        listed = {name for name, where in weight_map.items() if where == file}
        for name in sorted(listed ^ found.keys()):
            says = f"'{kind.index}' lists '{name}' in it" if name in listed else f"it holds '{name}'"
            but = "it has no such tensor" if name in listed else f"'{kind.index}' does not list that there"
            raise DamagedCheckpoint(f"{folder / file}: {says}, but {but}; files of two models are mixed")
        out.update(found)
    held = sum(ref.nbytes for ref in out.values())
    if total_size is not None and total_size != held:
        log.warning("%s: 'total_size' is %s, and the tensors it lists have %d bytes", index, total_size, held)
    return out


def _index(path: Path) -> tuple[dict[str, str], Any]:
    body = configs.read(path)
    weight_map, metadata = body.get("weight_map"), body.get("metadata")
    if not isinstance(weight_map, dict) or not weight_map:
        raise DamagedCheckpoint(f"{path}: has no 'weight_map', which says in which file each tensor lies")
    for name, file in weight_map.items():
        if not isinstance(file, str) or os.path.basename(file) != file or file in ("", ".", ".."):
            raise DamagedCheckpoint(f"{path}: '{name}' lies in {file!r}, which is no name of a file in this folder")
    return weight_map, metadata.get("total_size") if isinstance(metadata, Mapping) else None


def _check_files(index: Path, files: list[str], numbered: list[str]) -> None:
    """Raise DamagedCheckpoint unless the files that the index lists are there, all of those that belong together."""
    for file in files:
        if not locations.is_file(index.parent / file):
            raise DamagedCheckpoint(f"{index.parent / file}: is missing, and '{index.name}' lists tensors in it")
        found = _NUMBERED.fullmatch(file)
        if found is not None:
            for number in range(1, int(found[3]) + 1):
                other = f"{found[1]}-{number:0{len(found[2])}d}-of-{found[3]}.{found[4]}"
                if other not in files:
                    raise DamagedCheckpoint(f"{index}: lists no tensor in '{other}', though it lists some in '{file}'")
    strays = sorted(set(numbered) - set(files))
    if strays:
        raise DamagedCheckpoint(
            f"{index}: lists no tensor in '{strays[0]}', which is in the folder; remove what is not part of the model"
        )


def _numbered(folder: Path, kind: Kind) -> list[str]:
    """The numbered weight files of this kind in the folder."""
    stem, _, suffix = kind.single.partition(".")
    found = [m for name in locations.names(folder) if (m := _NUMBERED.fullmatch(name)) is not None]
    return [m[0] for m in found if (m[1], m[4]) == (stem, suffix)]


def _tensors(path: Path) -> dict[str, TensorRef]:
    if path.suffix == ".safetensors":
        return safetensors.read_header(path).tensors
    found = reader.load(path, trust=None)
    graphs.check(str(path), found)
    if not isinstance(found, Mapping):
        raise DamagedCheckpoint(f"{path}: holds a {type(found).__name__}, not a state dict")
    for name, value in found.items():
        if not isinstance(value, TensorRef):
            raise Unsupported(f"{path}: '{name}' is a {type(value).__name__}, not a tensor")
    return dict(found)
