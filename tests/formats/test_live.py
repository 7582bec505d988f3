"""What other libraries wrote, resumed in live DeepSpeed engines and under FSDP2: theirs to the bit, and in losses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import ucp
from tests.deepspeed.agree import IMPLEMENTATION
from tests.engines.fsdp import STEPS, State
from tests.engines.pool import RankPool
from tests.formats import harm, live_jobs, odd_programs, ways_on
from tests.formats.foreign_jobs import Run
from ucp.errors import UcpError

pytestmark = pytest.mark.slow(seconds=40)

pytest.importorskip("torchtitan", reason="torchtitan needs Python 3.11")

FORMATS = {
    "accelerate-dcp": "accelerate",
    "accelerate-ranks": "accelerate",
    "accelerate-full": "accelerate",
    "torch-checkpointing": "torch-checkpointing",
    "torchtitan": "dcp",
    "dcp-numbers": "dcp",
    "file": "torch-file",
    "deepspeed-universal": "deepspeed-universal",
}
# Whose optimizers number their parameters, and leave open which these are.
NUMBERED = {"dcp-numbers", "file"}
Saved = dict[str, tuple[str, Run]]


@pytest.fixture(scope="module")
def saved(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Saved:
    folder, preload = tmp_path_factory.mktemp("live"), odd_programs.TITAN
    return ranks.run(odd_programs.all_of_them, str(folder), world_size=2, preload=preload, timeout=300)[0]


@pytest.fixture(scope="module")
def resumed(ranks: RankPool, saved: Saved) -> Callable[[str], dict[str, live_jobs.Resumed]]:
    """What a target held and saw after each of the checkpoints, which it took one after the other."""
    done: dict[str, dict[str, live_jobs.Resumed]] = {}

    def resume(target: str) -> dict[str, live_jobs.Resumed]:
        if target not in done:
            paths = {name: path for name, (path, _) in saved.items()}
            done[target] = ranks.run(live_jobs.odd_goes_on, target, paths, world_size=2, timeout=300)[0]
        return done[target]

    return resume


@pytest.mark.parametrize("kind", FORMATS)
def test_it_is_read_whole(saved: Saved, kind: str) -> None:
    path, run = saved[kind]
    with ucp.open(path) as opened:
        assert opened.format == FORMATS[kind]
        assert opened.unread == ()
        assert opened.training_state.lr_scheduler["last_epoch"] == STEPS
    assert Path(path).exists()
    assert run.state.params


@pytest.mark.parametrize("kind", FORMATS)
def test_it_is_converted(saved: Saved, kind: str, tmp_path: Path) -> None:
    path, run = saved[kind]
    names = {"param_names": [list(group["names"]) for group in run.state.groups]} if kind in NUMBERED else {}
    ways_on.is_converted(Path(path), run.state.params, tmp_path, **names)


# The loss of these files nothing tells: not every run has a scheduler; in its full form Accelerate says no number of
# ranks; torch_checkpointing's files of ranks are read without metadata, too; DeepSpeed's model file has its buffers.
SPARE = {
    "accelerate-dcp": {"scheduler.bin"},
    "accelerate-ranks": {"scheduler.bin"},
    "accelerate-full": {"scheduler.bin", "random_states_1.pkl"},
    "torch-checkpointing": {"metadata.pkl"},
    "deepspeed-universal": {"zero/running/fp32.pt", "zero/seen/fp32.pt"},
}
NOT_READ = {"deepspeed-universal": {"zero/running/fp32.pt", "zero/seen/fp32.pt"}}


@pytest.mark.parametrize("kind", FORMATS)
def test_no_loss_goes_unsaid(saved: Saved, kind: str) -> None:
    path = Path(saved[kind][0])
    assert harm.unnoticed(path, harm.remove) == SPARE.get(kind, set())
    assert harm.unnoticed(path, harm.truncate) == NOT_READ.get(kind, set())
    assert issubclass(harm.of_half(path)[0], UcpError)


@pytest.mark.parametrize("kind", FORMATS)
def test_a_key_too_many_is_kept_or_named(saved: Saved, kind: str) -> None:
    path = Path(saved[kind][0])
    plain = {file: says for file, says in harm.with_surplus(path, {}).items() if "/zero/" not in file}
    assert all("tests.formats.harm.Own" in says for says in plain.values())
    assert all("--skip-unknown-objects" in says for says in plain.values())
    for file, says in harm.with_surplus(path, {"skip_unknown_objects": True}).items():
        if file in plain:
            assert says == "kept" or harm.SURPLUS in says, says


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("target", live_jobs.TARGETS)
def test_live_engines_go_on_with_its_losses(
    saved: Saved, resumed: Callable[[str], dict[str, live_jobs.Resumed]], kind: str, target: str
) -> None:
    _, run = saved[kind]
    found = resumed(target)[kind]
    assert found.state is not None
    assert holds(run.state, found.state) == []
    assert found.further == pytest.approx(run.further, rel=1e-5)


def holds(saved: State, live: State) -> list[str]:
    """What of a run's state a live one does not hold to the bit."""
    lines = [] if saved.params.keys() == live.params.keys() else ["other parameters"]
    for name, states in saved.params.items():
        if states.keys() != live.params[name].keys():
            lines.append(f"{name}: {sorted(live.params[name])}")
        lines += [f"{name} {kind}" for kind, t in states.items() if not torch.equal(live.params[name][kind], t)]
    lines += [name for name, tensor in saved.buffers.items() if not torch.equal(live.buffers[name], tensor)]
    for group in live.groups:
        (origin,) = (g for g in saved.groups if set(g["names"]) == set(group["names"]))
        for key in (origin.keys() & group.keys()) - IMPLEMENTATION - {"param_names"}:
            if origin[key] != group[key] and list(origin[key]) != list(group[key]):
                lines.append(f"group of {group['names'][0]}: {key} is {group[key]}, not {origin[key]}")
    return lines
