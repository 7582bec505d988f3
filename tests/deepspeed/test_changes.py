"""An engine goes on with a changed model from a real DeepSpeed run; what stays is equal to the source's own buffers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import ucp
from tests.deepspeed import change_jobs
from tests.deepspeed.agree import differences
from tests.deepspeed.change_jobs import CHANGES, Gone
from tests.engines.configs import Case, make_config
from tests.engines.models import LLAMA_VOCABULARY, VOCABULARY
from tests.engines.pool import RankPool
from tests.engines.runs import Run
from tests.engines.sources import Sources
from tests.engines.truth import known

pytestmark = pytest.mark.slow(seconds=40)

SOURCE = Case(stage=1, dp=2, frozen=True)
INTO = {
    "ZeRO-1": Case(stage=1, dp=3, seed=4, frozen=True),
    "ZeRO-2, trained before": Case(stage=2, dp=1, seed=4, frozen=True),
    "ZeRO-3": Case(stage=3, dp=2, seed=4, frozen=True, sub_group_size=700),
    "stage 0": Case(stage=0, dp=2, seed=4, frozen=True),
    "bf16": Case(stage=3, dp=2, seed=4, frozen=True, dtype="bf16"),
}


@pytest.fixture(scope="module")
def source(sources: Sources) -> Run:
    return sources.get(SOURCE)


@pytest.fixture(scope="module")
def losses() -> dict[str, tuple[float, ...]]:
    return {}


def goes_on(ranks: RankPool, run: Run, into: str, changes: object, trained: int = 0, save: str = "") -> Gone:
    case = INTO[into]
    found: Gone = ranks.run(
        change_jobs.gone_on, case, run.folder, run.tag, run.steps, changes, trained, save, world_size=case.dp
    )[0]
    return found


@pytest.mark.parametrize("into", INTO)
def test_a_changed_model(ranks: RankPool, source: Run, losses: dict[str, tuple[float, ...]], into: str) -> None:
    gone = goes_on(ranks, source, into, CHANGES, trained=2 if "trained" in into else 0)
    before, after, truth = known(gone.before), known(gone.after), known(source.truth)
    assert len(gone.changes) >= 5, gone.text
    assert gone.complete, gone.text
    for name, tensors in after.params.items():
        if name.startswith("fresh"):
            assert torch.equal(tensors["param"], before.params[name]["param"])
            assert not any(t.any() for s, t in tensors.items() if s != "param")
        elif name.startswith("adapter."):
            assert torch.equal(tensors["param"], truth.frozen[name].to(tensors["param"].dtype))
            assert not any(t.any() for s, t in tensors.items() if s != "param")
        elif name in ("embed.weight", "head.weight"):
            for state, tensor in tensors.items():
                assert torch.equal(tensor[:VOCABULARY], truth.params[name][state]), (name, state)
                rest = tensor[VOCABULARY:]
                assert (
                    torch.equal(rest, before.params[name]["param"][VOCABULARY:]) if state == "param" else not rest.any()
                )
        else:
            assert tensors.keys() == truth.params[name].keys()
            assert all(torch.equal(t, truth.params[name][s]) for s, t in tensors.items()), name
    for name in ("up.weight", "up.bias"):
        assert torch.equal(after.frozen[name].float(), truth.params[name]["param"].to(after.frozen[name].dtype).float())
    if INTO[into].dtype == "fp32":
        losses[into] = gone.losses


def test_losses_agree_in_every_layout(losses: dict[str, tuple[float, ...]]) -> None:
    if len(losses) < 3:
        pytest.skip("the tests of the layouts have not run")
    first = losses["ZeRO-1"]
    # Where parameters share a buffer, they share a step count, so only layouts that share them alike agree.
    assert losses["ZeRO-3"] == pytest.approx(first, abs=5e-3)


def test_undeclared_it_is_refused_and_the_declaration_suggested(ranks: RankPool, source: Run) -> None:
    gone = goes_on(ranks, source, "ZeRO-3", None)
    assert '"ucp": {"load": {"changes": {' in gone.text
    for part in ('"resized": ["embed.weight", "head.weight"]', '"unfrozen"', '"frozen": ["up.', '"added": ["fresh.'):
        assert part in gone.text, gone.text


def test_a_save_of_it_resumes_with_the_same_declaration(ranks: RankPool, source: Run, tmp_path: Path) -> None:
    first = goes_on(ranks, source, "ZeRO-1", CHANGES, save=str(tmp_path))
    run = type("Saved", (), {"folder": str(tmp_path), "tag": None, "steps": source.steps + 3})
    again = goes_on(ranks, run, "ZeRO-3", CHANGES)  # type: ignore[arg-type]
    assert again.changes == (), again.text
    assert len(again.losses) == len(first.losses) == 3


def test_fsdp2_goes_on_with_a_changed_model(ranks: RankPool, source: Run) -> None:
    case = SOURCE.but(seed=4)
    before, after, (changes, proof) = ranks.run(
        change_jobs.fsdp_goes_on, case, source.folder, source.tag, CHANGES, world_size=2
    )[0]
    truth = known(source.truth)
    assert len(changes) >= 5
    assert "not proved" not in proof
    for key, tensor in after.items():
        name, _, state = key.rpartition(":")
        if name.startswith("fresh"):
            assert torch.equal(tensor, before[key] if state == "param" else torch.zeros_like(tensor))
        elif name.startswith("adapter."):
            assert torch.equal(tensor, truth.frozen[name] if state == "param" else torch.zeros_like(tensor))
        elif name in ("embed.weight", "head.weight") and state != "step":
            assert torch.equal(tensor[:VOCABULARY], truth.params[name][state])
            rest = before[key][VOCABULARY:] if state == "param" else torch.zeros_like(tensor[VOCABULARY:])
            assert torch.equal(tensor[VOCABULARY:], rest)
        elif name in truth.params and state != "step":
            assert torch.equal(tensor, truth.params[name][state]), key
        elif state == "step":
            assert tensor == truth.scalars[name]["step"]


LLAMA = Case(stage=1, dp=2, model="llama")
ROWS = ("model.embed_tokens.weight", "lm_head.weight")
MLP = "model.layers.{i}.mlp"


def resized(rows: int) -> dict[str, object]:
    return {"resized": {name: [rows, 64] for name in ROWS}, "new_rows": "zeros", "frozen": ["model.norm.weight"]}


FUSED = {
    "sizes": {"gate": 112, "up": 112, "hidden": 64},
    "parameters": {f"{MLP}.gate_proj.weight": "gate hidden", f"{MLP}.up_proj.weight": "up hidden"},
    "names": {
        f"{MLP}.gate_up_proj.weight": {
            "from": [f"{MLP}.gate_proj.weight", f"{MLP}.up_proj.weight"],
            "as": "(gate | up) hidden",
        }
    },
    **resized(LLAMA_VOCABULARY + 3),
}
APART = {
    "sizes": FUSED["sizes"],
    "parameters": {f"{MLP}.gate_up_proj.weight": "(gate | up) hidden"},
    "names": {f"{MLP}.gate_up_proj.weight": {"to": [f"{MLP}.gate_proj.weight", f"{MLP}.up_proj.weight"]}},
    **resized(LLAMA_VOCABULARY),
}


def test_fused_grown_and_frozen_for_stock_deepspeed(ranks: RankPool, sources: Sources, tmp_path: Path) -> None:
    """A conversion with changes, loaded by stock DeepSpeed; the source, loaded live with the same changes; and what was
    converted, live in the first model again at stage 3."""
    run, fused = sources.get(LLAMA), LLAMA.but(seed=4)
    ucp.convert(run.folder, tmp_path / "out", "deepspeed", "dp=2,zero=1", changes=FUSED, ds_config=make_config(fused))
    rows = LLAMA_VOCABULARY + 3

    def goes_on(case: Case, folder: object, changes: object, rows: int, fused: bool) -> Any:
        arguments = (case, str(folder), run.steps, changes, rows, fused)
        return ranks.run(change_jobs.llama_goes_on, *arguments, world_size=case.dp)[0]

    stock = goes_on(fused, tmp_path / "out", None, rows, True)
    ours = goes_on(fused, run.folder, FUSED, rows, True)
    back = goes_on(fused.but(stage=3), tmp_path / "out", APART, LLAMA_VOCABULARY, False)
    had, loaded = known(run.truth).params, known(stock.truth)
    for name, tensors in loaded.params.items():
        for state, tensor in tensors.items():
            if "gate_up" in name:
                parts = [had[name.replace("gate_up", part)][state] for part in ("gate", "up")]
                assert torch.equal(tensor, torch.cat(parts)), (name, state)
            else:
                assert torch.equal(tensor[: len(had[name][state])], had[name][state]), (name, state)
                assert not tensor[len(had[name][state]) :].any()
    assert torch.equal(loaded.frozen["model.norm.weight"], had["model.norm.weight"]["param"])
    assert differences(loaded, known(ours.truth)) == []
    assert stock.further == ours.further
    for name, tensors in known(back.truth).params.items():
        assert all(torch.equal(tensor, had[name][state]) for state, tensor in tensors.items()), name
    assert back.further == pytest.approx(run.further, abs=2e-2)  # its norm is trained no longer
