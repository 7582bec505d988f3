"""Checkpoints of Megatron-Core: ``torch_dist`` folders, with the optimizer's states under their parameters.

A ``torch_dist`` folder is one of torch's DCP (``.metadata``, ``*.distcp``) with ``metadata.json``, which is written
last, and what all ranks have in common in ``common.pt`` (megatron/core/dist_checkpointing/serialization.py). Its keys
are the modules' names, the layers of a block stacked along a first axis or one by one; here every parameter has the
name that one rank's whole model would have for it: `ucp.formats.megatron.keys`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from ucp.formats.base import FLAG, TEXT, Format, Option, WriteTarget
from ucp.formats.shared.options import SKIP_UNKNOWN_OBJECTS, TRUST_CLIENT_STATE

if TYPE_CHECKING:
    from pathlib import Path

    from ucp.catalog import Catalog
    from ucp.formats.nouns import FolderNames, ReadRequest, WriteRequest
    from ucp.storage.files import Files
    from ucp.transfer.targets import WritePlan

NAME = "megatron"
CONFIG, COMMON, INTEGRITY = "metadata.json", "common.pt", "integrity.json"
WRITTEN_FOR = "ucp_written_for"
"""An attribute of the metadata that we write, whose chunks do not show the layout: {"tp": …, "pp": …, …}."""
_PARTS = (".metadata", CONFIG, COMMON)

_DATA = re.compile(r"__(\d+)_\d+\.distcp")
_RANK_FOLDER = re.compile(r"mp_rank_\d{2,4}(_\d{3,5}){0,2}")
_ITERATION = re.compile(r"iter_(\d{7,17})")


class MegatronTarget(WriteTarget):
    """What stock ``megatron.core.dist_checkpointing.load`` takes at any layout, with the optimizer."""

    name = NAME
    takes_layout = True
    options = (
        Option("dtype", TEXT, "element type of the weights: bf16, fp16, fp32", "T"),
        Option("per_layer", FLAG, "give each layer keys of its own", default=False),
        Option("plain_optimizer", FLAG, "for a run without Megatron's distributed optimizer", default=False),
    )

    def plan(self, catalog: Catalog, request: WriteRequest) -> WritePlan:
        from ucp.formats.megatron.write import names, torch_dist
        from ucp.formats.shared.training_state import with_sources_of_state
        from ucp.parallel.mesh import Layout
        from ucp.transfer.targets import WritePlan

        layout = request.layout or Layout()
        source = with_sources_of_state(names.megatron(catalog, request))
        step = catalog.training_state.global_steps
        tag = "release" if step is None else f"iter_{step:07d}"
        options = request.options
        files = torch_dist.plan(
            source,
            layout,
            dtype=options.get("dtype"),
            per_layer=options.get("per_layer", False),
            plain=options.get("plain_optimizer", False),
        )
        return WritePlan(source, tuple(torch_dist.placed(files, tag)), tag=tag, layout=layout)


def _is_fsdp(folder: Path) -> bool:
    """Whether DCP's metadata have entries that only Megatron's training program makes under Megatron-FSDP: the param
    groups by parameter, or a model without an optimizer."""
    from ucp.storage import locations

    try:
        raw = locations.read(folder / ".metadata")
    except OSError:
        return False
    return b"param_to_group_meta" in raw or (b"checkpoint_version" in raw and b"optimizer." not in raw)


class Megatron(Format):
    name = NAME
    sign = f"one of Megatron-Core '{CONFIG}' beside '.metadata'"
    parts = ("dcp",)
    read_options = (TRUST_CLIENT_STATE, SKIP_UNKNOWN_OBJECTS)
    targets = (MegatronTarget(),)

    def detect(self, folder: FolderNames) -> bool:
        """Two of the three files that tell it: what is missing then is said when it is read. Megatron-FSDP writes the
        metadata alone."""
        if folder.any_name(_RANK_FOLDER) or sum(folder.has_file(name) for name in _PARTS) > 1:
            return True
        return folder.has_file(".metadata") and _is_fsdp(folder.path)

    def read(self, path: Path, files: Files, request: ReadRequest) -> Catalog:
        from ucp.formats.megatron.read import torch_dist
        from ucp.formats.shared.unknown_objects import UnknownObjects
        from ucp.storage import locations

        unknown = UnknownObjects.of(request.options)
        if any(map(_RANK_FOLDER.fullmatch, locations.names(path))) and not locations.is_file(path / CONFIG):
            from ucp.formats.megatron.read import rank_folders

            return rank_folders.read(path, files, unknown)
        if not any(locations.is_file(path / name) for name in (CONFIG, COMMON)):
            from ucp.formats.megatron.read import fsdp_dtensor

            return fsdp_dtensor.read(locations.locate(path), files, unknown)
        return torch_dist.read(path, files, request.choice, unknown)

    def step(self, path: Path) -> int | None:
        found = _ITERATION.fullmatch(path.name)
        return None if found is None else int(found[1])

    def tag(self, path: Path) -> str | None:
        return path.name if _ITERATION.fullmatch(path.name) or path.name == "release" else None

    def file_owners(self, names: Sequence[str]) -> Mapping[str, str]:
        ranks = {name: f"rank {int(found[1])}" for name in names if (found := _DATA.fullmatch(name))}
        parts = [(name, *name.partition("/")[::2]) for name in names]
        return {**ranks, **{name: folder for name, folder, file in parts if file and _RANK_FOLDER.fullmatch(folder)}}

    def facts(self, catalog: Catalog) -> Mapping[str, str]:
        from ucp.formats.megatron.read import about

        return about.facts(catalog)

    def file_hashes(self, path: Path) -> Mapping[str, str]:
        from ucp.formats.megatron.read import integrity

        return integrity.recorded(path)

    def knows(self, name: str) -> bool:
        return name in (*_PARTS, INTEGRITY) or any(p.fullmatch(name) is not None for p in (_DATA, _RANK_FOLDER))


FORMAT = Megatron()
