"""Settings for writing a checkpoint from others: which of them belong to reading, to the run and to the target."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from ucp import formats, run_folder
from ucp.catalog import Catalog
from ucp.errors import BadArgument, DestinationError
from ucp.formats.base import WriteTarget
from ucp.formats.signature import defaults_of
from ucp.parallel.mesh import Layout
from ucp.transfer.destination import Running

# The settings that `ucp.open` takes. The others are fields of Running and the target's options.
OPENING = (
    "tag", "model_config", "sizes", "trust_client_state", "trust_paths", "param_names", "param_shapes",
    "allow_approximate",
)  # fmt: skip
RUNNING = tuple(field.name for field in fields(Running))


def check_layout(target: WriteTarget, layout: Layout | None) -> None:
    """Raise BadArgument if a target needs a layout and has none, or is given one that it does not take."""
    if layout is not None and not target.takes_layout:
        takers = " or ".join(f"'{one.name}'" for known in formats.every() for one in known.targets if one.takes_layout)
        raise BadArgument(f"a layout is for {takers} only: '{target.name}' checkpoints have none, and resume in any")
    if layout is None and target.takes_layout:
        raise BadArgument(f"converting to '{target.name}' needs a layout to write for, such as dp=4,zero=3")


def divide_settings(target: WriteTarget, settings: Mapping[str, Any]) -> tuple[dict[str, Any], Running, dict[str, Any]]:
    """The given settings, checked and divided into those of reading, of the run and of the target.

    Raises BadArgument for a setting that nothing takes, or that only another target takes.
    """
    opening = {name: value for name, value in settings.items() if name in OPENING}
    running = Running(**{name: value for name, value in settings.items() if name in RUNNING})
    others = {name: value for name, value in settings.items() if name not in (*OPENING, *RUNNING)}
    foreign = others.keys() - {option.name for option in target.options} - defaults_of().keys()
    reading = {name: others.pop(name) for name in foreign if formats.is_read_option(name)}
    if reading:
        opening["options"] = reading
    return opening, running, formats.own_options(target, others, (*RUNNING, *OPENING))


def check_replaced(destination: Path, source: Catalog) -> None:
    """Raise DestinationError if replacing would lose the source, or something other than a checkpoint."""
    if not os.path.lexists(destination):
        return
    if not run_folder.is_checkpoint(destination):
        raise DestinationError(f"{destination}: holds no checkpoint, so it is not replaced; choose another destination")
    inside = os.path.realpath(destination)
    for file in source.files:
        if os.path.commonpath([inside, os.path.realpath(file.path)]) == inside:
            raise DestinationError(
                f"{destination}: holds '{file.path}', which is part of the source, so it is not replaced; choose "
                "another destination"
            )
