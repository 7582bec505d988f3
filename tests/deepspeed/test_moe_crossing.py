"""Experts of one kind into another: AutoEP's stacks into the lists of a pipeline's stages and back, by declaration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import ucp
from tests.deepspeed import moe_pipe_jobs as jobs
from tests.deepspeed.test_changed_parallel import FUSED
from tests.engines import autoep, releases
from tests.engines.autoep import PRELOAD, AutoCase
from tests.engines.configs import Case, make_config
from tests.engines.moe import MoeSources
from tests.engines.pool import RankError, RankPool
from tests.engines.truth import known

pytestmark = [
    pytest.mark.slow(seconds=35),
    pytest.mark.skipif(not releases.knows("autoep_folding"), reason=releases.without("has no AutoEP")),
]

TWO = Case(stage=1, dp=2, model="llama")
FOUR: Any = {"world_size": 4, "preload": PRELOAD}
CLOSE = 5e-5
SPLIT = {"pipeline": {"partition": [0, 2, 5]}}
Tensors = dict[str, dict[str, torch.Tensor]]
LISTED = "moe.deepspeed_moe.experts.deepspeed_experts.{e}"
OF_A_LAYER = (
    *(f"self_attn.{p}_proj.weight" for p in "qkvo"),
    "input_layernorm.weight",
    "post_attention_layernorm.weight",
)
PLAIN = {"0.weight": "model.embed_tokens.weight", "3.weight": "model.norm.weight", "4.weight": "lm_head.weight"}
SIZES = {"experts": 4, "ffn": 24, "hidden": 16}
AXES = {"w1": "ffn hidden", "w3": "ffn hidden", "w2": "hidden ffn"}
ROUTERS = ("moe.deepspeed_moe.gate.wg.weight", "mlp.router.gate.weight")


def to_stages(listed: bool) -> dict[str, Any]:
    """The pipeline's parameters, made of AutoEP's without stages."""
    names: dict[str, Any] = dict(PLAIN)
    names |= {f"{{n}}.{rest}": f"model.layers.{{n-1}}.{rest}" for rest in OF_A_LAYER}
    if not listed:
        stacks = (ROUTERS[1], *(f"mlp.experts.{w}" for w in AXES))
        return {"names": names | {f"{{n}}.{rest}": f"model.layers.{{n-1}}.{rest}" for rest in stacks}}
    names[f"{{n}}.{ROUTERS[0]}"] = f"model.layers.{{n-1}}.{ROUTERS[1]}"
    for w in AXES:
        one = {"to": [f"{{i+1}}.{LISTED}.{w}.weight"], "stack": {"e": "experts"}}
        names[f"model.layers.{{i}}.mlp.experts.{w}"] = one
    parameters = {f"model.layers.{{i}}.mlp.experts.{w}": f"experts {axes}" for w, axes in AXES.items()}
    return {"sizes": SIZES, "parameters": parameters, "names": names}


def out_of_stages() -> dict[str, Any]:
    """AutoEP's parameters without stages, made of a pipeline's lists."""
    names: dict[str, Any] = {theirs: ours for ours, theirs in PLAIN.items()}
    names |= {f"model.layers.{{i}}.{rest}": f"{{i+1}}.{rest}" for rest in OF_A_LAYER}
    names[f"model.layers.{{i}}.{ROUTERS[1]}"] = f"{{i+1}}.{ROUTERS[0]}"
    for w, axes in AXES.items():
        one = {"from": [f"{{i+1}}.{LISTED}.{w}.weight"], "stack": {"e": "experts"}, "as": f"experts {axes}"}
        names[f"model.layers.{{i}}.mlp.experts.{w}"] = one
    parameters = {f"{{n}}.{LISTED}.{w}.weight": axes for w, axes in AXES.items()}
    return {"sizes": SIZES, "parameters": parameters, "names": names}


def check(stacked: Tensors, found: Tensors) -> None:
    """What a pipeline's stages have, experts stacked or listed, is what AutoEP has without stages."""
    count = 0
    for name, states in found.items():
        n, _, rest = name.partition(".")
        row: Any = ...
        if "deepspeed_experts" in name:
            number, w = rest.split(".")[-3:-1]
            rest, row = f"mlp.experts.{w}", int(number)
        source = PLAIN.get(name) or f"model.layers.{int(n) - 1}.{rest.replace(*ROUTERS)}"
        assert states.keys() == stacked[source].keys()
        for state, value in states.items():
            assert torch.equal(value, stacked[source][state][row]), (name, state)
            count += value.numel()
    assert count == sum(value.numel() for states in stacked.values() for value in states.values())


def test_stacks_into_lists_in_stages_and_back(ranks: RankPool, auto_sources: MoeSources, tmp_path: Path) -> None:
    """AutoEP into DeepSpeed's own layers in stages and out of them again, live; and by a conversion."""
    run = auto_sources.get(AutoCase(TWO, ep=2))
    stacked = dict(known(run.truth).params)
    case = AutoCase(TWO.but(seed=7), ep=2)
    folder = str(tmp_path / "stages")
    found, complete, said, losses = ranks.run(
        jobs.into_stages, case, 2, False, run.folder, to_stages(listed=True), folder, **FOUR
    )[0]
    assert complete
    assert len(said) >= 1
    check(stacked, found)
    assert losses == pytest.approx(run.further, rel=0, abs=CLOSE)
    target = AutoCase(TWO.but(stage=3, seed=9), ep=1)
    back, complete, said, losses = ranks.run(
        jobs.out_of_stages, target, folder, out_of_stages(), world_size=2, preload=PRELOAD
    )[0]
    assert complete
    check(back, found)
    assert losses == pytest.approx(run.further, rel=0, abs=CLOSE)
    ucp.convert(run.folder, tmp_path / "listed", changes=to_stages(listed=True))
    with ucp.open(tmp_path / "listed") as checkpoint:
        held = {n: {s: checkpoint.read(n, s) for s in states} for n, states in found.items()}
    check(stacked, held)
    # DeepSpeed's own files know parameters by their order alone, and AutoEP's is another.
    of_autoep = make_config(target.case) | {"expert_parallel": autoep.section(target)}
    for source, changes, config, layout in (
        (folder, out_of_stages(), of_autoep, "dp=2,ep=1,zero=3"),
        (run.folder, to_stages(listed=True), make_config(case.case) | SPLIT, "dp=2,pp=2,ep=2,zero=1"),
    ):
        with pytest.raises(ucp.UcpError, match=r"trained with(out)? AutoEP.*by their order.*use --to universal"):
            ucp.convert(source, tmp_path / "no", changes=changes, to="deepspeed", layout=layout, ds_config=config)


def test_autoep_in_stages(ranks: RankPool, auto_sources: MoeSources, tmp_path: Path) -> None:
    """DeepSpeed trains it at stage 1. Its own checkpoint, put together and into the same; ours into one stage; and
    from AutoEP without stages."""
    case = AutoCase(TWO, ep=2)
    truth, further = ranks.run(jobs.trained, case, 2, True, str(tmp_path / "stock"), **FOUR)[0]
    with ucp.open(tmp_path / "stock") as checkpoint:
        assert (checkpoint.layout.pp, checkpoint.layout.ep) == (2, 2)
        held = {n for n, info in checkpoint.parameters.items() if info.kind == "parameter"}
        assert held == truth.keys()
        for name, states in truth.items():
            assert all(torch.equal(checkpoint.read(name, s), value) for s, value in states.items()), name
    run = auto_sources.get(case)
    targets = [
        (tmp_path / "stock", case.but(seed=5), 2, None, truth, further),
        (tmp_path / "ours", AutoCase(TWO.but(dp=4, seed=6), ep=4), 1, None, truth, further),
        (run.folder, AutoCase(TWO.but(seed=7), ep=1), 2, to_stages(listed=False), known(run.truth).params, run.further),
    ]
    for folder, target, stages, changes, expected, then in targets:
        save = str(tmp_path / "ours") if stages == 2 and not changes else ""
        found, complete, _, losses = ranks.run(
            jobs.into_stages, target, stages, True, str(folder), changes, save, **FOUR
        )[0]
        assert complete
        if changes:
            check(dict(expected), found)
        else:
            assert found.keys() == expected.keys()
            assert all(torch.equal(found[n][s], t) for n, states in expected.items() for s, t in states.items())
        assert losses == (then if save else pytest.approx(then, rel=0, abs=CLOSE))
    one = AutoCase(TWO.but(seed=8), ep=1)
    config = make_config(one.case) | {"expert_parallel": autoep.section(one)} | SPLIT
    ucp.convert(
        tmp_path / "stock", tmp_path / "written", to="deepspeed", layout="dp=2,pp=2,ep=1,zero=1", ds_config=config
    )
    found, losses = ranks.run(jobs.stock, one, str(tmp_path / "written"), 2, **FOUR)[0]
    assert [(n, s) for n, states in truth.items() for s, t in states.items() if not torch.equal(found[n][s], t)] == []
    assert losses == pytest.approx(further, rel=0, abs=CLOSE)
    uneven = {"to": "deepspeed", "layout": "dp=2,pp=2,ep=1,zero=1"}
    config["pipeline"] = {"partition": [0, 3, 5]}
    with pytest.raises(ucp.UcpError, match="has no parameter on pipeline stage 1"):
        ucp.convert(tmp_path / "stock", tmp_path / "uneven", ds_config=config, **uneven)


def test_autoep_into_fsdp2_and_back(ranks: RankPool, auto_sources: MoeSources, tmp_path: Path) -> None:
    run = auto_sources.get(AutoCase(TWO, ep=2))
    found, complete, losses = ranks.run(
        jobs.under_fsdp2,
        AutoCase(TWO.but(seed=7)),
        run.folder,
        {"changes": FUSED},
        str(tmp_path),
        world_size=2,
        preload=PRELOAD,
    )[0]
    assert complete
    assert losses == pytest.approx(run.further, rel=0, abs=CLOSE)
    stacked = known(run.truth).params
    for layer in ("model.layers.0.mlp", "model.layers.1.mlp"):
        for state in ("param", "exp_avg", "exp_avg_sq"):
            halves = [stacked[f"{layer}.experts.{w}"][state] for w in ("w1", "w3")]
            assert torch.equal(found[f"{layer}.experts.gate_up_proj"][state], torch.cat(halves, dim=1))
            assert torch.equal(found[f"{layer}.experts.down_proj"][state], stacked[f"{layer}.experts.w2"][state])
    back = ranks.run(
        autoep.resume,
        AutoCase(TWO.but(stage=3, seed=9), ep=2),
        str(tmp_path),
        None,
        jobs.OURS,
        {"ucp": {"enabled": True, "spec": "mixtral"}},
        last=False,
        world_size=2,
        preload=PRELOAD,
    )[0]
    assert known(back.truth).params.keys() == stacked.keys()
    for name, states in stacked.items():
        for state, value in states.items():
            assert torch.equal(known(back.truth).params[name][state], value), (name, state)
    assert back.further == pytest.approx(run.further, rel=0, abs=CLOSE)


@pytest.mark.parametrize("stages", [0, 2])
def test_autoep_without_zero(ranks: RankPool, auto_sources: MoeSources, tmp_path: Path, stages: int) -> None:
    """Stage 0, from stage 1 and into it again, without stages of a pipeline and with two."""
    run = auto_sources.get(AutoCase(TWO, ep=2))
    changes = to_stages(listed=False) if stages else None
    world = 2 * max(stages, 1)
    held = ranks.run(
        jobs.at_stage_0,
        AutoCase(TWO.but(stage=0, seed=7), ep=2),
        run.folder,
        str(tmp_path),
        stages,
        changes,
        world_size=world,
        preload=PRELOAD,
    )
    stacked = known(run.truth).params
    for mine, complete, losses in held:
        assert complete
        assert losses == pytest.approx(run.further, rel=0, abs=CLOSE)
        for name, (place, states) in mine.items():
            n, _, rest = name.partition(".")
            source = name if not stages else PLAIN.get(name) or f"model.layers.{int(n) - 1}.{rest}"
            assert states.keys() == stacked[source].keys()
            for state, value in states.items():
                whole = stacked[source][state]
                assert torch.equal(value, whole if place is None else whole.chunk(2)[place]), (name, state)
    with ucp.open(tmp_path) as checkpoint:
        total = {name for name, info in checkpoint.parameters.items() if info.kind == "parameter"}
        assert len(total) == len(stacked)
        for name in total:
            n, _, rest = name.partition(".")
            source = name if not stages else PLAIN.get(name) or f"model.layers.{int(n) - 1}.{rest}"
            assert all(torch.equal(checkpoint.read(name, s), value) for s, value in stacked[source].items()), name


def test_deepspeeds_own_files_without_zero(ranks: RankPool, tmp_path: Path) -> None:
    """AutoEP in stages at stage 0: its own files have each expert's weights apart from the stacks of its states."""
    case = AutoCase(TWO.but(stage=0), ep=2)
    trained = ranks.run(jobs.trained_without_zero, case, str(tmp_path / "stock"), 2, **FOUR)
    names = {name for mine, _ in trained for name in mine}
    with ucp.open(tmp_path / "stock") as checkpoint:
        assert (checkpoint.layout.pp, checkpoint.layout.ep, checkpoint.layout.zero) == (2, 2, 0)
        assert {n for n, info in checkpoint.parameters.items() if info.kind == "parameter"} == names
        for mine, _ in trained:
            for name, (place, states) in mine.items():
                assert states.keys() == checkpoint.parameters[name].states.keys()
                for state, value in states.items():
                    whole = checkpoint.read(name, state)
                    assert torch.equal(value, whole if place is None else whole.chunk(2)[place]), (name, state)
    held = ranks.run(
        jobs.at_stage_0, case.but(seed=7), str(tmp_path / "stock"), str(tmp_path / "ours"), 2, None, **FOUR
    )
    for (found, complete, losses), (mine, further) in zip(held, trained, strict=True):
        assert complete
        assert losses == further
        for name, (_, states) in mine.items():
            assert all(torch.equal(found[name][1][state], value) for state, value in states.items()), name
    config = make_config(case.case) | {"expert_parallel": autoep.section(case)} | SPLIT
    how: Any = {"to": "deepspeed", "layout": "dp=2,pp=2,ep=2,zero=0", "ds_config": config}
    ucp.convert(tmp_path / "ours", tmp_path / "written", **how)
    stock = ranks.run(jobs.stock_without_zero, case.but(seed=8), str(tmp_path / "written"), 2, **FOUR)
    for (found, losses), (mine, further) in zip(stock, trained, strict=True):
        assert losses == further
        for name, (_, states) in mine.items():
            assert all(torch.equal(found[name][1][state], value) for state, value in states.items()), name


def test_what_deepspeed_itself_does_not_train(ranks: RankPool) -> None:
    """AutoEP in stages and slices together, and in some of the stages only."""
    with pytest.raises(RankError, match="folding currently supports pp_size=1 only"):
        ranks.run(jobs.folded_in_stages, AutoCase(TWO.but(dp=1), ep=2), **FOUR)
    with pytest.raises(RankError, match="AutoEP: no MoE layers detected"):
        ranks.run(jobs.auto_in_some_stages, AutoCase(TWO.but(dp=1), ep=1), **FOUR)


@pytest.mark.parametrize(
    ("cut", "words"),
    [
        (True, "cuts, too (enable_expert_tensor_parallelism)"),
        (False, "own mixture-of-experts layers together with tensor and pipeline parallelism"),
    ],
)
def test_own_layers_in_slices_of_stages_are_refused(ranks: RankPool, cut: bool, words: str) -> None:
    assert all(words in text for text in ranks.run(jobs.listed_in_slices, cut, **FOUR))
