"""What a report shows, as plain data: the same numbers that the other commands print, in columns."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ucp import limits
from ucp.catalog import Catalog
from ucp.inspection.owners import file_owners
from ucp.inspection.planning import ResumePlan
from ucp.inspection.report.maps import rectangles
from ucp.inspection.summary import Summary
from ucp.inspection.verify import Verdict
from ucp.version import version

SCHEMA = "ucp.report/1"


def report_data(
    verdict: Verdict,
    summary: Summary | None,
    catalog: Catalog | None,
    plan: ResumePlan | None,
    timings: Sequence[Mapping[str, Any]],
    timeline: Sequence[Mapping[str, Any]] = (),
) -> dict[str, Any]:
    """The page's data. summary, catalog: None if the checkpoint can't be opened. Then there are only findings."""
    return {
        "schema": SCHEMA,
        "made_by": f"universal-checkpoint {version()}",
        "made_at": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "verdict": verdict.as_json(),
        "summary": None if summary is None else _summary(summary),
        "parameters": None if summary is None or catalog is None else _parameters(summary, catalog),
        "plan": None if plan is None else _plan(plan),
        "timings": list(timings),
        "timeline": list(timeline),
    }


def _summary(summary: Summary) -> dict[str, Any]:
    body = summary.as_json()
    for column in ("parameters", "files"):
        del body[column]
    body["files"] = len(summary.files)
    body["digested_files"] = sum(file.digests for file in summary.files)
    return body


def _parameters(summary: Summary, catalog: Catalog) -> dict[str, Any]:
    who = file_owners(catalog)
    state_sets: dict[str, int] = {}
    state_list: list[list[list[Any]]] = []
    maps: dict[str, int] = {}
    map_list: list[dict[str, Any]] = []
    which_states, which_map = [], []
    for p in summary.parameters:
        states = [[name, s.dtype, s.fragments] for name, s in p.states.items()]
        key = repr(states)
        if key not in state_sets:
            state_sets[key] = len(state_list)
            state_list.append(states)
        which_states.append(state_sets[key])
        blocks = catalog.tensors[p.name, "param" if "param" in p.states else next(iter(p.states))].blocks
        drawn = rectangles(p.shape, blocks, who.of_file[blocks.buffers])
        key = repr(drawn)
        if key not in maps:
            maps[key] = len(map_list)
            map_list.append(drawn)
        which_map.append(maps[key])
    return {
        "name": [p.name for p in summary.parameters],
        "shape": [list(p.shape) for p in summary.parameters],
        "kind": [p.kind for p in summary.parameters],
        "elements": [p.elements for p in summary.parameters],
        "bytes": [p.bytes for p in summary.parameters],
        "cut": [p.cut for p in summary.parameters],
        "aliases": {p.name: list(p.aliases) for p in summary.parameters if p.aliases},
        "states": which_states,
        "state_sets": state_list,
        "map": which_map,
        "maps": map_list,
    }


def _plan(plan: ResumePlan) -> dict[str, Any]:
    body = {key: value for key, value in plan.as_json().items() if key not in ("moved", "sources", "ranks")}
    rows, row_labels = _binned(plan.moved, plan.sources)
    cells, column_labels = _binned(rows.T, [f"rank {r.rank}" for r in plan.ranks])
    return {
        **body,
        "ranks": len(plan.ranks),
        "rank_bytes": [r.bytes for r in plan.ranks],
        "rank_files": [r.files for r in plan.ranks],
        "matrix": cells.T.tolist(),
        "rows": row_labels,
        "columns": column_labels,
    }


def _binned(matrix: np.ndarray, labels: Sequence[str]) -> tuple[np.ndarray, list[str]]:
    """The rows, with neighbours added together so that at most `limits.MATRIX_CELLS_COUNT` are left."""
    n = len(matrix)
    if n <= limits.MATRIX_CELLS_COUNT:
        return matrix, list(labels)
    edges = np.linspace(0, n, limits.MATRIX_CELLS_COUNT + 1).astype(np.int64)
    spans = list(zip(edges[:-1].tolist(), (edges[1:] - 1).tolist(), strict=True))
    return np.add.reduceat(matrix, edges[:-1], axis=0), [f"{labels[a]} to {labels[b]}" for a, b in spans]


def timeline_of(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What has happened to the run, in order: its saves, loads and snapshots, and what it recorded about restarts."""
    out = []
    for record in records:
        when, world, what = record.get("time"), record.get("world"), record.get("what")
        if record.get("rank", 0) != 0 or not isinstance(when, (int, float)) or not isinstance(world, int):
            continue
        lane = str(record.get("event")) if what == "event" else str(what)
        step = record.get("step") if what == "event" else str(record.get("checkpoint", "")).rsplit("/", 1)[-1]
        took = sum(s for s in record["seconds"].values() if isinstance(s, (int, float)))
        wall = record.get("wall", took)
        out.append(
            {"what": lane, "time": when, "world": world, "step": "" if step is None else str(step), "seconds": wall}
        )
    return sorted(out, key=lambda one: one["time"])[-limits.TIMELINE_RECORDS_COUNT :]


def timings_of(records: Sequence[Mapping[str, Any]], path: str) -> list[Mapping[str, Any]]:
    """The last save and the last load that were recorded for this checkpoint, one record for each rank."""
    out: list[Mapping[str, Any]] = []
    for what in ("save", "load"):
        mine = [r for r in records if r.get("what") == what and r.get("checkpoint") == path]
        out += [record for record in mine if record.get("id") == mine[-1].get("id")]
    return out
