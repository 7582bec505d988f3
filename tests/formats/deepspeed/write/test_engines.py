"""Stock DeepSpeed loads what is written for it, without this project, and holds the source engine's state to the bit.

Real engines train and save; the checkpoint is converted; fresh engines of another layout load the result with
DeepSpeed's own loader. Both sides' truths are read from their live buffers.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

import ucp
from tests.deepspeed.agree import differences
from tests.engines import operators, releases
from tests.engines.configs import Case, make_config
from tests.engines.pool import RankPool
from tests.engines.resume import resume
from tests.engines.runs import CLIENT_STATE, FURTHER, Run
from tests.engines.sources import Sources, preload_for
from tests.s3 import get

pytestmark = pytest.mark.slow

RICH = Case(frozen=True, tied=True, groups=3, scheduler=True)
NATIVE = [
    # Every stage from every other, several ranks, all element types.
    (Case(1, "bf16", 2), Case(1, "bf16", 3)),
    (Case(1, "bf16", 2), Case(3, "bf16", 2)),
    (Case(1, "fp32", 2), Case(2, "fp32", 3)),
    (Case(1, "fp32", 2), Case(0, "fp32", 2)),
    (Case(0, "fp32", 2), Case(2, "fp32", 1)),
    (Case(0, "fp32", 2), Case(3, "fp32", 4)),
    (Case(0, "bf16", 2), Case(3, "bf16", 2, sub_group_size=100)),
    (Case(1, "fp32", 2), Case(3, "bf16", 4)),
    (Case(3, "bf16", 4, zero_init=True), Case(1, "fp16", 1)),
    # Frozen and tied parameters, buffers, three param groups, a scheduler, loss scaling.
    (RICH.but(stage=2, dtype="fp16"), RICH.but(stage=3, dtype="fp16", dp=3, sub_group_size=500)),
    (RICH.but(stage=3, dtype="fp16", dp=3, sub_group_size=500), RICH.but(stage=1, dtype="fp16", dp=4)),
    (RICH.but(stage=2, dtype="fp16"), RICH.but(stage=0, dtype="fp16")),
    (RICH.but(stage=3, dtype="bf16"), RICH.but(stage=3, dtype="bf16", dp=1)),
    (Case(2, "fp16", 2, scale_power=30), Case(3, "fp16", 2, scale_power=30)),
    (Case(2, "fp16", 2, static_scale=64.0), Case(0, "fp16", 2, static_scale=64.0)),
    # What the layout alone does not determine.
    (Case(3, "bf16", 4, groups=2), Case(2, "bf16", 3, groups=2, round_robin=True, parameter_alignment=True)),
    (Case(1, "bf16", 2, round_robin=True), Case(1, "bf16", 3, round_robin=True)),
    (Case(2, "fp32", 3, parameter_alignment=True), Case(1, "bf16", 2, parameter_alignment=True)),
    (Case(3, "bf16", 4, groups=2), Case(1, "bf16_optimizer", 3, groups=2)),
    (Case(1, "bf16_optimizer", 3, groups=2), Case(0, "bf16", 2, groups=2)),
    (Case(2, "bf16", 2, low_masters=True, low_states=True), Case(3, "bf16", 2, low_masters=True, low_states=True)),
    (Case(1, "bf16", 2), Case(2, "bf16", 2, elastic=True)),
    (Case(1, "bf16", 2), Case(3, "bf16", 2, clip=0.1)),
    # Other optimizers, and other forms of the step.
    (Case(2, "fp32", 2, optimizer="sgd"), Case(3, "fp32", 3, optimizer="sgd")),
    (Case(2, "fp32", 2, optimizer="adagrad"), Case(1, "fp32", 3, optimizer="adagrad")),
    (Case(2, "bf16", 2, optimizer="nadam"), Case(0, "bf16", 3, optimizer="nadam")),
    (Case(2, "bf16", 2, optimizer="lion_reference"), Case(3, "bf16", 3, optimizer="lion_reference")),
    (Case(2, "bf16", 2, optimizer="muon"), Case(1, "bf16", 3, optimizer="muon")),
    (Case(2, "bf16", 2, optimizer="muon"), Case(3, "bf16", 3, optimizer="muon")),
    (Case(3, "bf16", 2, optimizer="muon"), Case(2, "bf16", 4, optimizer="muon")),
    (Case(3, "bf16", 2, optimizer="muon"), Case(0, "bf16", 2, optimizer="muon")),
]
# Optimizers that count their steps in Python numbers; FusedAdam has flat masters at stage 0.
COMPILED = [
    (Case(2, "bf16", 2, optimizer="cpu_adam", offload=True), Case(3, "bf16", 3, optimizer="cpu_adam", offload=True)),
    (Case(2, "bf16", 2, optimizer="cpu_adam", offload=True), Case(1, "bf16", 3)),
    (Case(1, "bf16", 3), Case(2, "bf16", 2, optimizer="cpu_adam", offload=True)),
    (Case(1, "bf16", 3, groups=2), Case(0, "bf16", 2, groups=2, optimizer="fused_adam")),
    (Case(2, "fp32", 2, optimizer="fused_adam"), Case(0, "fp16", 2, optimizer="fused_adam")),
    (Case(0, "fp16", 2, optimizer="fused_adam"), Case(3, "fp16", 2, optimizer="fused_adam")),
]
UNIVERSAL = [
    (Case(1, "bf16", 2, groups=2), Case(2, "bf16", 3, groups=2)),
    (Case(1, "bf16", 2, groups=2), Case(3, "bf16", 3, groups=2)),
    (Case(1, "bf16", 2, groups=2), Case(1, "bf16_optimizer", 3, groups=2)),
    (Case(3, "fp16", 2, tied=True, scheduler=True), Case(3, "fp16", 3, tied=True, scheduler=True, sub_group_size=300)),
    (Case(3, "fp16", 2, tied=True, scheduler=True), Case(2, "fp16", 3, tied=True, scheduler=True)),
    (Case(0, "fp32", 2), Case(2, "fp32", 3)),
    (Case(1, "fp32", 2, optimizer="sgd"), Case(2, "fp32", 3, optimizer="sgd")),
]
AS_WRITTEN = [
    RICH.but(stage=1, dtype="fp32", dp=3),
    RICH.but(stage=2, dtype="fp16", parameter_alignment=True),
    RICH.but(stage=3, dtype="bf16", sub_group_size=400),
    RICH.but(stage=0, dtype="fp16"),
    Case(0, "fp32", 2, tied=True, scheduler=True),
    Case(1, "bf16_optimizer", 3, groups=2),
]


def label(pair: tuple[Case, Case]) -> str:
    return f"{pair[0].label}->{pair[1].label}"


def load_with_deepspeed(ranks: RankPool, case: Case, folder: Path, run: Run) -> Run:
    loaded: Run = ranks.run(resume, case, str(folder), None, run.steps, world_size=case.dp, preload=preload_for(case))[
        0
    ]
    return loaded


@pytest.mark.parametrize("pair", NATIVE, ids=label)
def test_native_checkpoint(pair: tuple[Case, Case], ranks: RankPool, sources: Sources, tmp_path: Path) -> None:
    check_native(pair, ranks, sources, tmp_path)


@pytest.mark.parametrize("pair", COMPILED, ids=label)
def test_native_checkpoint_for_deepspeeds_compiled_optimizers(
    pair: tuple[Case, Case], ranks: RankPool, sources: Sources, tmp_path: Path
) -> None:
    if not operators.are_built(*(case.optimizer for case in pair)):
        pytest.skip("DeepSpeed's operators are not built: python -m tests.engines.operators")
    check_native(pair, ranks, sources, tmp_path)


def check_native(pair: tuple[Case, Case], ranks: RankPool, sources: Sources, tmp_path: Path) -> None:
    source, target = pair
    if source.low_masters and not releases.knows("bf16_master_weights_and_grads"):
        pytest.skip(releases.without("has no masters of few bits"))
    if target.stage == 0 and target.dtype == "bf16" and not releases.knows("DDP_BFLOAT16"):
        pytest.skip(releases.without("its stage 0 in bf16 is its BF16_Optimizer, and loads the files of ZeRO-1"))
    run = sources.get(source)
    layout = f"dp={target.dp},zero={target.stage}"
    ucp.convert(run.folder, tmp_path / "out", to="deepspeed", layout=layout, ds_config=make_config(target))
    loaded = load_with_deepspeed(ranks, target, tmp_path / "out", run)
    assert run.truth is not None
    assert loaded.truth is not None
    assert differences(run.truth, loaded.truth) == []
    # It trains on: the counts of the steps are of the kind that the optimizer works with, and go on from there.
    assert loaded.truth_after is not None
    before, after = loaded.truth.scalars, loaded.truth_after.scalars
    for name, values in before.items():
        if "step" in values:
            assert type(after[name]["step"]) is type(values["step"])
            assert FURTHER >= after[name]["step"] - values["step"] > 0
    assert len(loaded.further) == FURTHER
    # fp16 stage 0 divides gradients by a scale that the loss never had, and so trains differently.
    if source.dtype == target.dtype and source.optimizer == target.optimizer and 0 not in (source.stage, target.stage):
        assert loaded.further == pytest.approx(run.further, abs=1e-3 if target.clip == source.clip else 2e-2)


@pytest.mark.parametrize(
    "case",
    [
        Case(1, "bf16", 2),
        RICH.but(stage=2, dtype="fp16"),
        RICH.but(stage=3, dtype="fp32"),
        Case(0, "fp32", 2),
    ],
    ids=lambda case: case.label,
)
def test_training_goes_on_exactly(case: Case, ranks: RankPool, sources: Sources, tmp_path: Path) -> None:
    """By way of one rank and another stage, back to the source's own layout: the same losses, to the last bit."""
    run = sources.get(case)
    other = case.but(dp=1, stage=1)
    ucp.convert(run.folder, tmp_path / "other", to="deepspeed", layout="dp=1,zero=1", ds_config=make_config(other))
    layout = f"dp={case.dp},zero={case.stage}"
    ucp.convert(tmp_path / "other", tmp_path / "back", to="deepspeed", layout=layout, ds_config=make_config(case))
    assert load_with_deepspeed(ranks, case, tmp_path / "back", run).further == run.further


@pytest.mark.parametrize("pair", UNIVERSAL, ids=label)
def test_universal_folder(pair: tuple[Case, Case], ranks: RankPool, sources: Sources, tmp_path: Path) -> None:
    """Without buffers and frozen parameters, which DeepSpeed's own loader leaves alone."""
    source, target = (case.but(buffers=False) for case in pair)
    run = sources.get(source)
    ucp.convert(run.folder, tmp_path / "out", to="deepspeed-universal")
    target = target.but(config=(("checkpoint", {"load_universal": True}),))
    loaded = load_with_deepspeed(ranks, target, tmp_path / "out", run)
    assert run.truth is not None
    assert loaded.truth is not None
    assert differences(run.truth, loaded.truth) == []
    assert len(loaded.further) == FURTHER
    with ucp.open(run.folder) as first, ucp.open(tmp_path / "out") as again:
        assert again.parameters.keys() == first.parameters.keys()
        for name, state in again.catalog.tensors:
            assert torch.equal(again.read(name, state), first.read(name, state)), (name, state)


@pytest.mark.parametrize("to", ["deepspeed", "deepspeed-universal"])
def test_by_way_of_object_storage(to: str, bucket: str, ranks: RankPool, sources: Sources, tmp_path: Path) -> None:
    """Written behind a URL as one stream each, and copied from there."""
    source, target = (case.but(buffers=False) for case in UNIVERSAL[0])
    run = sources.get(source)
    options: dict[str, Any] = {}
    if to == "deepspeed":
        options = {"layout": f"dp={target.dp},zero={target.stage}", "ds_config": make_config(target)}
    else:
        target = target.but(config=(("checkpoint", {"load_universal": True}),))
    ucp.convert(run.folder, f"{bucket}/engines-{to}", to, **options)
    get(f"{bucket}/engines-{to}", tmp_path / "out")
    loaded = load_with_deepspeed(ranks, target, tmp_path / "out", run)
    assert run.truth is not None
    assert loaded.truth is not None
    assert differences(run.truth, loaded.truth) == []


@pytest.mark.skipif(not releases.is_pinned(), reason=releases.without("writes other keys than 0.19.8"))
@pytest.mark.parametrize("by_way_of", [None, "consolidated", "virtual"])
@pytest.mark.parametrize("case", AS_WRITTEN, ids=lambda case: case.label)
def test_files_are_those_that_deepspeed_writes(
    case: Case, by_way_of: str | None, sources: Sources, tmp_path: Path
) -> None:
    """For the source's own layout: the same files with the same keys, values, types and bits."""
    run = sources.get(case)
    source = run.folder
    if by_way_of:
        source = str(tmp_path / "universal")
        ucp.convert(run.folder, source, virtual=by_way_of == "virtual")
    ucp.convert(source, tmp_path / "out", to="deepspeed", layout=f"dp={case.dp},zero={case.stage}")
    theirs, ours = Path(run.folder, run.tag), tmp_path / "out" / run.tag
    assert {path.name for path in ours.iterdir()} == {path.name for path in theirs.iterdir()}
    assert (tmp_path / "out" / "latest").read_text() == run.tag
    if case.stage == 3:
        model = torch.load(theirs / "zero_pp_rank_0_mp_rank_00_model_states.pt", weights_only=False)
    for path in sorted(theirs.iterdir()):
        wanted = torch.load(path, weights_only=False)
        found = torch.load(ours / path.name, weights_only=False)
        if case.stage == 3:
            rank = int(path.name.split("_rank_")[1].split("_")[0])
            clear_padding(wanted, model, rank)
        lines: list[str] = []
        compare(path.name, wanted, found, lines)
        assert lines == []


def clear_padding(saved: dict[str, Any], model: dict[str, Any], rank: int) -> None:
    """Zero what lies behind parameters' ends in stage 3's pieces: DeepSpeed leaves there whatever memory held."""

    def clear(pieces: torch.Tensor, shapes: list[torch.Size]) -> None:
        at = 0
        for shape in shapes:
            share = -(-shape.numel() // model["dp_world_size"])
            held = max(min(shape.numel() - rank * share, share), 0)
            pieces.data[at + held : at + share] = 0
            at += share

    for name, fragment in (saved.get("frozen_param_fragments") or {}).items():
        clear(fragment, [model["frozen_param_shapes"][name]])
    if "optimizer_state_dict" in saved:
        state = saved["optimizer_state_dict"]
        for subgroup, shapes in enumerate(model["param_shapes"]):
            buffers = [state["fp32_flat_groups"][subgroup], *state["optimizer_state_dict"]["state"][subgroup].values()]
            for buffer in buffers:
                if buffer.dim():
                    clear(buffer, list(shapes.values()))


def compare(where: str, wanted: Any, found: Any, lines: list[str]) -> None:
    if isinstance(wanted, torch.Tensor):
        same = isinstance(found, torch.Tensor) and wanted.dtype == found.dtype and wanted.shape == found.shape
        if not same or not torch.equal(wanted.reshape(-1), found.reshape(-1)):
            lines.append(f"{where}: {wanted!r} != {found!r}")
    elif isinstance(wanted, Mapping):
        if wanted.keys() != found.keys():
            lines.append(f"{where}: {sorted(wanted)} != {sorted(found)}")
        for key in wanted.keys() & found.keys():
            compare(f"{where}[{key!r}]", wanted[key], found[key], lines)
        if isinstance(wanted, OrderedDict) and "module" not in where and list(wanted) != list(found):
            lines.append(f"{where}: the order {list(wanted)} != {list(found)}")
    elif isinstance(wanted, list | tuple):
        if type(wanted) is not type(found) or len(wanted) != len(found):
            lines.append(f"{where}: {wanted!r} != {found!r}")
        else:
            for index, (a, b) in enumerate(zip(wanted, found, strict=True)):
                compare(f"{where}[{index}]", a, b, lines)
    elif hasattr(wanted, "__dict__") and type(wanted).__module__.startswith("deepspeed"):
        if type(wanted) is not type(found):
            lines.append(f"{where}: {wanted!r} != {found!r}")
        else:
            compare(where, vars(wanted), vars(found), lines)
    elif type(wanted) is not type(found) or wanted != found:
        lines.append(f"{where}: {wanted!r} != {found!r}")


def test_client_state_and_counters(ranks: RankPool, sources: Sources, tmp_path: Path) -> None:
    """What ``load_checkpoint`` returns is checked inside the ranks; here, what it returns it from."""
    run = sources.get(Case(1, "bf16", 2))
    ucp.convert(run.folder, tmp_path / "out", to="deepspeed", layout="dp=1,zero=3")
    saved = torch.load(tmp_path / "out" / run.tag / "zero_pp_rank_0_mp_rank_00_model_states.pt", weights_only=False)
    assert {key: saved[key] for key in CLIENT_STATE} == CLIENT_STATE
