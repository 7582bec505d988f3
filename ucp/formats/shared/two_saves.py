"""Signs that files of one checkpoint may be of two saves though nothing in them says so. They are reported."""

from __future__ import annotations

import re
import time
from collections.abc import Iterable
from pathlib import Path

from ucp import limits
from ucp.catalog import Catalog, SourceFile


def far_apart(files: Iterable[SourceFile]) -> str | None:
    """A sentence on files whose times are far apart; None if they are not, or if the storage tells no times."""
    known = sorted((file for file in files if file.mtime_ns), key=lambda file: file.mtime_ns)
    if not known or known[-1].mtime_ns - known[0].mtime_ns <= limits.SAVED_APART_SECONDS * 10**9:
        return None
    first, last = (
        f"'{Path(f.path).name}' {time.strftime('%Y-%m-%d %H:%M', time.gmtime(f.mtime_ns // 10**9))} UTC"
        for f in (known[0], known[-1])
    )
    return (
        f"its files were last written far apart ({first}, {last}); if they were not copied so, they may be of two saves"
    )


def uneven_steps(catalog: Catalog) -> str | None:
    """A sentence on parameters of one param group whose step counts differ; None if none do."""
    for group in catalog.training_state.param_groups:
        counted = {n: catalog.parameters[n].scalars.get("step") for n in group.names if n in catalog.parameters}
        steps = {float(step): name for name, step in counted.items() if isinstance(step, (int, float))}
        if len(steps) > 1:
            (least, one), (most, other) = min(steps.items()), max(steps.items())
            return (
                f"parameters of one param group have taken {least:g} and {most:g} steps ('{one}' and '{other}'); if "
                "none was frozen or went unused for a while, files of two saves are mixed"
            )
    return None


_STEP_IN_NAME = re.compile(r"(?:global_step|checkpoint-)(\d{1,18})(?:_universal)?", re.IGNORECASE)
"""Names that programs make of the step: DeepSpeed's and our own tags, the Trainer's folders."""


def other_step(path: Path, catalog: Catalog) -> str | None:
    """A sentence on a folder that is named after another step than the one that its files are of; else None."""
    named, steps = _STEP_IN_NAME.fullmatch(path.name), catalog.training_state.global_steps
    if named is None or steps is None or int(named[1]) == steps:
        return None
    return (
        f"its files are of step {steps}, and it is named after step {int(named[1])}; if it was not renamed on purpose, "
        "it is another checkpoint in that one's place"
    )
