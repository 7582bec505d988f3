"""The timeline of a run: what its metrics tell, in order, whatever else is in the file."""

from __future__ import annotations

from ucp.inspection.report.data import timeline_of


def record(what: str, when: float, **more: object) -> dict[str, object]:
    return {"what": what, "time": when, "world": 4, "rank": 0, "seconds": {"copy": 0.5}, **more}


def test_saves_snapshots_and_restarts_in_order() -> None:
    found = timeline_of(
        [
            record("snapshot", 3.0, checkpoint="memory:///runs/a/global_step2", wall=0.25),
            record("save", 1.0, checkpoint="/runs/a/global_step1"),
            record("save", 1.0, checkpoint="/runs/a/global_step1", rank=1),
            {"what": "event", "event": "resumed", "time": 2.0, "world": 3, "seconds": {}, "step": 2},
            record("load", "yesterday"),  # type: ignore[arg-type]
        ]
    )
    assert [(one["what"], one["step"], one["world"], one["seconds"]) for one in found] == [
        ("save", "global_step1", 4, 0.5),
        ("resumed", "2", 3, 0),
        ("snapshot", "global_step2", 4, 0.25),
    ]
