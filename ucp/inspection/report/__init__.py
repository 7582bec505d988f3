"""A checkpoint as one self-contained HTML page: no network, no other file, readable offline and on paper."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ucp import checkpoint, formats, printable
from ucp.errors import DestinationError
from ucp.formats.signature import defaults_of, showing
from ucp.inspection.planning import plan
from ucp.inspection.report.data import report_data, timeline_of, timings_of
from ucp.inspection.summary import summarise
from ucp.inspection.verify import Progress, verify
from ucp.parallel.mesh import Layout
from ucp.storage import locations
from ucp.storage.metrics import read_metrics
from ucp.units import bytes_text, counted

_HERE = Path(__file__).parent


@dataclass(frozen=True)
class WrittenReport:
    """Where a report was written. bytes: the page's. parameters: how many it shows. whole: what `verify` said."""

    path: str
    bytes: int
    parameters: int
    whole: bool

    def as_json(self) -> dict[str, Any]:
        return {"schema": "ucp.report-written/1", **asdict(self)}

    def __str__(self) -> str:
        state = "whole" if self.whole else "damaged: see its findings"
        size = f"{counted(self.parameters, 'parameter')}, {bytes_text(self.bytes)}"
        return f"wrote {self.path}: {size}; the checkpoint is {state}"


@showing(defaults_of([formats.dividing()]))
def write_report(
    path: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    tag: str | None = None,
    layout: Layout | None = None,
    spec: str | os.PathLike[str] | None = None,
    model_config: str | os.PathLike[str] | None = None,
    sizes: Mapping[str, int] | None = None,
    trust_paths: bool = False,
    quick: bool = False,
    finite: bool = False,
    progress: Progress | None = None,
    **options: Any,
) -> WrittenReport:
    """Write a page about a checkpoint, damaged ones included.

    Parameters
    ----------
    path, tag, spec, model_config, sizes, trust_paths, quick, finite, progress
        As for `verify`.
    output
        The page's file.
    layout, options
        Plan a resume on this layout, with options as for `plan`.

    Returns
    -------
    WrittenReport

    Raises
    ------
    DestinationError
        Where the page can't be written; and what `verify` and `plan` raise.
    """
    choice: dict[str, Any] = {"model_config": model_config, "sizes": sizes, "trust_paths": trust_paths}
    verdict = verify(path, tag, spec=spec, **choice, quick=quick, finite=finite, progress=progress)
    summary, planned, catalog = None, None, None
    if verdict.layout is not None:
        with checkpoint.open(verdict.path, spec, **choice, verify=False, allow_approximate=True) as opened:
            summary, catalog = summarise(opened), opened.catalog
            if layout is not None:
                planned = plan(opened, layout, spec=spec, model_config=model_config, sizes=sizes, **options)
    records = read_metrics(locations.locate(verdict.path).parent)
    timings, timeline = timings_of(records, verdict.path), timeline_of(records)
    page = render(report_data(verdict, summary, catalog, planned, timings, timeline))
    raw = page.encode("utf-8")
    try:
        Path(output).write_bytes(raw)
    except OSError as error:
        raise DestinationError(f"{os.fspath(output)}: can't be written: {error.strerror or error}") from error
    return WrittenReport(os.fspath(output), len(raw), len(summary.parameters) if summary else 0, verdict.whole)


def render(data: Mapping[str, Any]) -> str:
    """The page for this data."""
    text = json.dumps(printable.data(data), separators=(",", ":"), ensure_ascii=False, allow_nan=False, default=str)
    # In a script element "</" would end it and "<!--" begin a comment; JSON has no "<" of its own.
    parts = {
        "/*style*/": (_HERE / "report.css").read_text(encoding="utf-8"),
        "/*script*/": (_HERE / "report.js").read_text(encoding="utf-8"),
        "/*data*/": text.replace("<", "\\u003c"),
    }
    page = (_HERE / "template.html").read_text(encoding="utf-8")
    for mark, content in parts.items():
        head, _, tail = page.partition(mark)
        page = head + content + tail
    return page
