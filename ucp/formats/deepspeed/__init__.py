"""DeepSpeed's native checkpoints, read straight from their files, and written for any layout.

Neither DeepSpeed nor torch is needed: the files' pickles are read with an allow-list, and every tensor in them is a
byte range. Every model-parallel rank's files are read as a part of its own (`read.mp_rank`). A spec, or the checkpoint
itself, says how the model is cut, and the parts are put together by that (`read.assemble`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ucp.errors import BadArgument
from ucp.formats.base import CONFIG, Format, Option, WriteTarget
from ucp.formats.shared.options import PARAM_NAMES, SKIP_UNKNOWN_OBJECTS, TRUST_CLIENT_STATE
from ucp.printable import logger

if TYPE_CHECKING:
    from pathlib import Path

    from ucp.catalog import Catalog
    from ucp.formats.nouns import Division, FolderNames, ModelFacts, ReadRequest, Remains, WriteRequest
    from ucp.parallel.mesh import Layout
    from ucp.spec.select import Choice
    from ucp.storage.files import Files
    from ucp.transfer.targets import TargetFile, WritePlan

log = logger(__name__)

NAME = "deepspeed"
SCRIPT = "zero_to_fp32.py"


class DeepSpeedTarget(WriteTarget):
    """A native checkpoint for the ranks of one layout."""

    name = NAME
    also = ("ds", "zero")
    takes_layout = True
    options = (
        Option(
            "ds_config",
            CONFIG,
            "DeepSpeed config for what the layout leaves open: element types, each pipeline stage's layers, AutoTP, "
            "AutoEP (default: as recorded)",
            "FILE",
            elsewhere="a DeepSpeed config is for 'deepspeed' only, not for '{to}'",
        ),
    )

    def plan(self, catalog: Catalog, request: WriteRequest) -> WritePlan:
        from ucp.formats.deepspeed.write import native
        from ucp.formats.shared.training_state import with_sources_of_state

        if request.layout is None:
            raise BadArgument(f"converting to '{NAME}' needs a layout to write for, such as dp=4,zero=3")
        source = with_sources_of_state(catalog)
        files = native.plan(source, request.layout, request.options.get("ds_config"), request.choice)
        if request.changed:
            log.warning(
                "%s: DeepSpeed's own files know parameters by their order, which is the source's: a changed model has "
                "to have its parameters in the same order, or DeepSpeed loads one as another",
                request.destination,
            )
        beside = _scripts() if request.layout.zero else []
        return _tagged(source, files, request.tag, "latest", request.layout, beside)

    def divide(self, catalog: Catalog, layout: Layout, choice: Choice, options: Mapping[str, Any]) -> Division:
        from ucp.formats.deepspeed import division

        return division.divide(catalog, layout, choice, options.get("ds_config"))


class DeepSpeedUniversalTarget(WriteTarget):
    """DeepSpeed's own universal checkpoint, which its engines load with ``load_universal``."""

    name = "deepspeed-universal"

    def plan(self, catalog: Catalog, request: WriteRequest) -> WritePlan:
        from ucp.formats.deepspeed.write import universal_folder
        from ucp.formats.shared.training_state import with_sources_of_state

        source = with_sources_of_state(catalog)
        return _tagged(source, universal_folder.plan(source), request.tag, "latest_universal", None)


def _scripts() -> list[TargetFile]:
    """The script that DeepSpeed puts beside its ZeRO checkpoints, which makes one file of their weights: the installed
    DeepSpeed's own. None where there is no DeepSpeed."""
    import os
    from importlib.util import find_spec

    from ucp.transfer.targets import TargetFile

    found = find_spec("deepspeed")  # which imports nothing
    for folder in () if found is None else found.submodule_search_locations or ():
        path = os.path.join(folder, "utils", SCRIPT)
        if os.path.isfile(path):
            with open(path, "rb") as file:
                text = file.read()
            return [TargetFile(SCRIPT, len(text), ((0, text),), ())]
    return []


def _tagged(
    catalog: Catalog,
    files: list[TargetFile],
    tag: str,
    pointer: str,
    layout: Layout | None,
    beside: Sequence[TargetFile] = (),
) -> WritePlan:
    """A plan by DeepSpeed's convention: everything is in a folder named by the tag, and a file beside it names it.
    beside: more files beside that folder."""
    from dataclasses import replace

    from ucp.storage import names
    from ucp.transfer.targets import TargetFile, WritePlan

    folder = names.entry(tag, "the source's tag", BadArgument, "rename its folder")
    placed = [replace(file, name=f"{folder}/{file.name}") for file in files]
    placed += beside
    text = tag.encode("utf-8")
    placed.append(TargetFile(pointer, len(text), ((0, text),), ()))
    return WritePlan(catalog, tuple(placed), tag=tag, layout=layout)


class DeepSpeed(Format):
    name = NAME
    sign = "a DeepSpeed one '*_model_states.pt'"
    read_options = (TRUST_CLIENT_STATE, SKIP_UNKNOWN_OBJECTS, PARAM_NAMES)
    targets = (DeepSpeedTarget(), DeepSpeedUniversalTarget())

    def detect(self, folder: FolderNames) -> bool:
        """Whether it is one tag's folder."""
        from ucp.formats.deepspeed.read import names

        return any(map(folder.any_name, (names.MODEL, names.OPTIM, names.LAYER)))

    def read(self, path: Path, files: Files, request: ReadRequest) -> Catalog:
        from ucp.formats.deepspeed.read import checkpoint

        return checkpoint.read(path, files, choice=request.choice, compare=request.compare, **request.options)

    def remains(self, path: Path, files: Files, request: ReadRequest) -> Remains | None:
        from ucp.formats.deepspeed.read import remains

        return remains.remains(path, files, request.choice, **request.options)

    def tag(self, path: Path) -> str | None:
        return path.name

    def file_owners(self, names: Sequence[str]) -> Mapping[str, str]:
        from ucp.formats.deepspeed.read.names import owners

        return owners(names)

    def knows(self, name: str) -> bool:
        from ucp.formats.deepspeed.read.names import is_ours

        return is_ours(name)

    def model_facts(self, path: Path) -> ModelFacts | None:
        from ucp.formats.deepspeed.read import checkpoint

        return checkpoint.model_facts(path)


FORMAT = DeepSpeed()
