"""One file of each rank that a program wrote with ``torch.save``: ``run_rank0.pt``, ``run_rank1.pt``, …

Their DTensors and ShardedTensors, and what FSDP1 keeps flat, are put together. Names are those of programs that do so:
the number comes last, after "rank" or "shard".
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from ucp.formats.base import Format
from ucp.formats.shared.options import PARAM_NAMES, PARAM_SHAPES, SKIP_UNKNOWN_OBJECTS, TRUST_CLIENT_STATE
from ucp.formats.torch_file import MODEL_KEY, OPTIMIZER_KEY

if TYPE_CHECKING:
    from pathlib import Path

    from ucp.catalog import Catalog
    from ucp.formats.nouns import FolderNames, ReadRequest
    from ucp.storage.files import Files

NAME = "torch-ranks"
_FILE = re.compile(r"(.*?)[-_.]?(?:rank|shard)[-_]?(\d{1,8})(-of-\d{1,8})?\.(pt|pth|bin|ckpt)")
# Accelerate's, which reads them itself.
_OTHERS = ("pytorch_model_fsdp", "optimizer")


class RankFiles(Format):
    name = NAME
    sign = "one file of each rank, 'run_rank0.pt'"
    read_options = (
        TRUST_CLIENT_STATE,
        SKIP_UNKNOWN_OBJECTS,
        MODEL_KEY,
        OPTIMIZER_KEY,
        PARAM_NAMES,
        PARAM_SHAPES,
    )

    def detect(self, folder: FolderNames) -> bool:
        return len(sets_of(folder.names)) > 0

    def read(self, path: Path, files: Files, request: ReadRequest) -> Catalog:
        from ucp.formats.torch_ranks import reader

        return reader.read(path, files, request)

    def file_owners(self, names: Sequence[str]) -> Mapping[str, str]:
        return {name: f"rank {int(found[2])}" for name in names if (found := _FILE.fullmatch(name))}

    def knows(self, name: str) -> bool:
        return _FILE.fullmatch(name) is not None


def sets_of(names: Iterable[str]) -> dict[tuple[str, str, str], dict[int, str]]:
    """The files that are alike but for a rank's number, by what they have in common: rank -> name."""
    found: dict[tuple[str, str, str], dict[int, str]] = {}
    for name in names:
        match = _FILE.fullmatch(name)
        if match is not None and not match[1].startswith(_OTHERS):
            found.setdefault((match[1], match[3] or "", match[4]), {})[int(match[2])] = name
    return found


FORMAT = RankFiles()
