"""A changed model under tensor, pipeline and expert parallelism, adapters at ZeRO-3: what stays is the source's, to
the bit."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import ucp
from tests.deepspeed.change_jobs import Gone
from tests.deepspeed.changed_parallel_jobs import GROWN, ROWS, goes_on, with_experts
from tests.engines import releases
from tests.engines.autoep import AutoCase
from tests.engines.configs import Case
from tests.engines.models import LLAMA_VOCABULARY
from tests.engines.moe import MoeSources
from tests.engines.parallel_runs import ParallelRun, ParallelSources, rig_of
from tests.engines.pipe_models import pipeline_name
from tests.engines.pipe_runs import PipeCase
from tests.engines.pool import RankError, RankPool
from tests.engines.runs import Run
from tests.engines.tp_runs import TpCase, config_of, spec_of
from tests.engines.truth import known
from ucp.errors import Mismatch

pytestmark = pytest.mark.slow(seconds=30)

OLD = 29
LLAMA = TpCase(case=Case(stage=1, dp=1, frozen=True))
CHANGES: dict[str, Any] = {
    "resized": ["model.embed_tokens.weight", "lm_head.weight"],
    "unfrozen": ["*.k_proj.weight"],
    "frozen": ["*norm.weight"],
}
PLAIN = PipeCase(pp=0, case=Case(stage=1, dp=2, accumulation=2))
OF_A_BLOCK = (*(f"{m}.{p}" for m in ("norm", "gate_up", "down") for p in ("weight", "bias")), "mean", "gain")
# The pipeline's names for the plain module's parameters, by declaration alone.
NAMES = {
    "tied_modules.embed.weight": "embed.weight",
    **{f"{{n}}.{name}": f"blocks.{{n-2}}.{name}" for name in OF_A_BLOCK},
    "6.weight": "norm.weight",
    "6.bias": "norm.bias",
}


def run_on(ranks: RankPool, case: Any, folder: str | Path, changes: Any, **more: Any) -> Gone:
    found: Gone = ranks.run(
        goes_on,
        case.but(seed=5),
        str(folder),
        changes,
        **more,
        world_size=case.world_size,
        preload=rig_of(case).PRELOAD,
    )[0]
    return found


def check(
    went: Gone, run: ParallelRun | Run, resized: set[str], renamed: Any = lambda name: name, old: int = OLD
) -> None:
    """Rows that were there, with their states; new ones as the model made them, with states of zero."""
    before, after, truth = known(went.before), known(went.after), known(run.truth)
    assert went.complete, went.text
    assert len(went.losses) == 3
    sources = {renamed(name): tensors for name, tensors in truth.params.items()}
    for name, tensors in after.params.items():
        source = sources.get(name) or {"param": truth.frozen[name]}
        for state, tensor in tensors.items():
            rows = old if name in resized else len(tensor)
            expected = source.get(state, torch.zeros_like(tensor[:rows]))
            assert torch.equal(tensor[:rows], expected), (name, state)
            rest = tensor[rows:]
            assert torch.equal(rest, before.params[name]["param"][rows:]) if state == "param" else not rest.any()
    for name, tensor in after.frozen.items():
        known_there = truth.params[name]["param"] if name in truth.params else truth.frozen[name]
        assert torch.equal(tensor, known_there), name


@pytest.mark.parametrize(
    ("source", "target"),
    [
        (LLAMA.but(tp=1, dp=2), LLAMA.but(frozen=False)),
        (LLAMA, LLAMA.but(stage=3, frozen=False)),
        (LLAMA, LLAMA.but(tp=1, stage=3, dp=2, frozen=False)),
    ],
    ids=["ZeRO-1 into TP", "TP into TP, stage 3", "TP into ZeRO-3"],
)
def test_under_tensor_parallelism(ranks: RankPool, sliced: ParallelSources, source: TpCase, target: TpCase) -> None:
    run = sliced.get(source)
    went = run_on(ranks, target, run.folder, CHANGES)
    assert len(went.changes) >= 4, went.text
    assert {len(t["param"]) for n, t in known(went.after).params.items() if n in CHANGES["resized"]} == {ROWS}
    check(went, run, set(CHANGES["resized"]))
    refused = run_on(ranks, target, run.folder, None)
    assert '"resized": ["' in refused.text
    assert '"unfrozen"' in refused.text


def test_files_that_do_not_say_their_cuts(sliced: ParallelSources, tmp_path: Path) -> None:
    """AutoTP's files of releases before 0.19: the spec's sizes are the checkpoint's, and the config is the model's."""
    run = sliced.get(LLAMA)
    folder, truth, grown = tmp_path / "run", known(run.truth), {**spec_of(LLAMA)["model_config"], "vocab_size": ROWS}
    shutil.copytree(run.folder, folder)
    for path in (folder / run.tag).glob("*model_states.pt"):
        found = torch.load(path, weights_only=False)
        found.pop("universal_checkpoint_info", None)
        torch.save(found, path)
    resized = {name: [ROWS, len(truth.params[name]["param"][0])] for name in CHANGES["resized"]}
    changes: dict[str, Any] = {"resized": resized, "new_rows": "zeros"}
    ucp.convert(folder, tmp_path / "grown", changes=changes, model_config=grown)
    target = {"to": "deepspeed", "layout": "tp=2,zero=1", "spec": "llama", "ds_config": config_of(LLAMA)}
    ucp.convert(folder, tmp_path / "native", changes=changes, model_config=grown, **target)
    for written in ("grown", "native"):
        with ucp.open(tmp_path / written, model_config=grown) as checkpoint:
            for name, tensors in truth.params.items():
                for state, tensor in tensors.items():
                    read = checkpoint.read(name, state)
                    assert torch.equal(read[: len(tensor)], tensor), (name, state)
                    assert len(read) == (ROWS if name in resized else len(tensor))
                    assert not read[len(tensor) :].any()
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**grown))
    before = model.lm_head.weight.detach().clone()
    with pytest.raises(Mismatch, match=r"model.embed_tokens.weight' is \[29, 24\] .*changes={.resized."):
        ucp.load_training(folder, model=model)
    ucp.load_training(folder, model=model, changes={"resized": CHANGES["resized"]}, allow_unused=["*:*"])
    for name, parameter in model.named_parameters():
        tensor = truth.params[name]["param"] if name in truth.params else truth.frozen[name]
        assert torch.equal(parameter[: len(tensor)], tensor), name
    assert torch.equal(model.lm_head.weight[OLD:], before[OLD:])


def test_renamed_and_grown_into_a_pipeline(ranks: RankPool, pipes: ParallelSources) -> None:
    run = pipes.get(PLAIN)
    changes = {"names": NAMES, "resized": ["tied_modules.embed.weight"]}
    went = run_on(ranks, PipeCase(pp=2, case=PLAIN.case.but(dp=1)), run.folder, changes)
    assert len(went.changes) >= 2, went.text
    check(went, run, {"tied_modules.embed.weight"}, pipeline_name)


def test_adapters_at_stage_3(ranks: RankPool, sliced: ParallelSources, tmp_path: Path) -> None:
    """Onto a base run; into its weights, and off again."""
    base, case = sliced.get(LLAMA.but(tp=1, dp=2)), LLAMA.but(tp=1, stage=3, dp=2, frozen=False)
    went = run_on(ranks, case, base.folder, {"adapters": "added"}, lora=True, save=str(tmp_path / "lora"))
    assert went.complete, went.text
    truth = known(base.truth)
    weights = {name: t["param"] for name, t in truth.params.items()} | dict(truth.frozen)
    check_adapted(went, weights)
    with ucp.open(tmp_path / "lora") as checkpoint:
        lora = {name: checkpoint.read(name) for name in checkpoint.parameters}
    split = run_on(ranks, case, tmp_path / "lora", {"adapters": "split", "unfrozen": ["*"]})
    merged = run_on(ranks, case, tmp_path / "lora", {"adapters": {"merged": 3.0}, "unfrozen": ["*"]})
    for found, scale in ((split, 0.0), (merged, 3.0)):
        assert found.complete, found.text
        for name, tensors in known(found.after).params.items():
            layer = f"base_model.model.{name.removesuffix('.weight')}"
            expected = weights[name]
            if f"{layer}.lora_A.default.weight" in lora:
                a, b = (lora[f"{layer}.lora_{which}.default.weight"].double() for which in "AB")
                expected = (expected.double() + scale * (b @ a)).float()
            assert torch.allclose(tensors["param"], expected, rtol=0, atol=0 if scale == 0 else 1e-7), name
            assert not any(t.any() for s, t in tensors.items() if s != "param")


TWO = Case(stage=1, dp=2, model="llama")
MIXTRAL = ("transformers.models.mixtral.modeling_mixtral", "ucp.deepspeed")
EXPERTS = "model.layers.{i}.mlp"
# AutoEP's stacks from and to the stacks of transformers, whose first two are one.
FUSED = {
    "sizes": {"experts": 4, "ffn": 24, "hidden": 16},
    "parameters": {
        f"{EXPERTS}.experts.w1": "experts ffn hidden",
        f"{EXPERTS}.experts.w3": "experts ffn hidden",
        f"{EXPERTS}.experts.w2": "experts hidden ffn",
    },
    "names": {
        f"{EXPERTS}.experts.gate_up_proj": {
            "from": [f"{EXPERTS}.experts.w1", f"{EXPERTS}.experts.w3"],
            "as": "experts (ffn | ffn) hidden",
        },
        f"{EXPERTS}.experts.down_proj": f"{EXPERTS}.experts.w2",
        f"{EXPERTS}.gate.weight": f"{EXPERTS}.router.gate.weight",
    },
}


def load_experts(ranks: RankPool, case: AutoCase, run: Run, changes: Any, how: str = "") -> Gone:
    args = case.but(seed=5), run.folder, changes, how
    found: Gone = ranks.run(with_experts, *args, world_size=case.world_size, preload=MIXTRAL)[0]
    return found


@pytest.mark.skipif(not releases.knows("autoep_folding"), reason=releases.without("has no AutoEP"))
def test_with_expert_parallelism(ranks: RankPool, auto_sources: MoeSources) -> None:
    """Grown and frozen parameters, on another number of expert-parallel ranks."""
    run = auto_sources.get(AutoCase(TWO, ep=2))
    changes = {"resized": ["model.embed_tokens.weight", "lm_head.weight"], "frozen": ["*norm.weight"]}
    target = AutoCase(TWO.but(stage=3), ep=1)
    went = load_experts(ranks, target, run, changes, "grown")
    assert len(went.changes) >= 3, went.text
    assert len(known(went.after).params["lm_head.weight"]["param"]) == GROWN
    check(went, run, set(changes["resized"]), old=LLAMA_VOCABULARY)
    assert '"resized": ["' in load_experts(ranks, target, run, None, "grown").text


@pytest.mark.skipif(not releases.knows("autoep_folding"), reason=releases.without("has no AutoEP"))
@pytest.mark.parametrize("what", ["frozen", "unfrozen"])
def test_experts_frozen_and_unfrozen(ranks: RankPool, auto_sources: MoeSources, what: str) -> None:
    """A stack of each layer, whose states are left out, or begin at zero."""
    source, target = AutoCase(TWO, ep=2), AutoCase(TWO.but(stage=3), ep=1, frozen=True)
    if what == "unfrozen":
        source, target = replace(source, frozen=True), replace(target, frozen=False)
    run = auto_sources.get(source)
    went = load_experts(ranks, target, run, {what: ["*.experts.w2"]})
    assert any(what.removeprefix("un") in line for line in went.changes), went.text
    check(went, run, set())
    assert len(known(went.after).frozen) == 2 * target.frozen
    refused = load_experts(ranks, target, run, None)
    assert f'"{what}": ["' in refused.text


@pytest.mark.skipif(not releases.is_pinned(), reason="what the pinned DeepSpeed does")
def test_autoep_finds_no_experts_below_adapters(ranks: RankPool, auto_sources: MoeSources) -> None:
    """So there is no engine of both."""
    run = auto_sources.get(AutoCase(TWO, ep=2))
    with pytest.raises(RankError, match="AutoEP: no MoE layers detected"):
        load_experts(ranks, AutoCase(TWO, ep=1), run, {"adapters": "added"}, "lora")


def check_adapted(went: Gone, weights: Mapping[str, torch.Tensor]) -> None:
    """The base has the source's weights, and is frozen; the adapters are as the model made them."""
    after, before = known(went.after), known(went.before)
    below = {n.removeprefix("base_model.model.").replace(".base_layer.", "."): t for n, t in after.frozen.items()}
    assert below.keys() == weights.keys()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in below.items())
    assert after.params
    assert all(torch.equal(t["param"], before.params[name]["param"]) for name, t in after.params.items())


@pytest.mark.skipif(not releases.knows("autoep_folding"), reason=releases.without("has no AutoEP"))
def test_experts_fused_and_split(ranks: RankPool, auto_sources: MoeSources) -> None:
    """AutoEP's three stacks into transformers' two, renamed, by declaration alone; the next losses are the source's."""
    run = auto_sources.get(AutoCase(TWO, ep=2))
    went = load_experts(ranks, AutoCase(TWO.but(stage=3), ep=0), run, FUSED)
    assert went.complete, went.text
    assert went.losses == pytest.approx(run.further[:3], abs=5e-5)
    truth, after = known(run.truth).params, known(went.after).params
    for layer in ("model.layers.0.mlp.experts", "model.layers.1.mlp.experts"):
        for state, found in after[f"{layer}.gate_up_proj"].items():
            assert torch.equal(found, torch.cat([truth[f"{layer}.w1"][state], truth[f"{layer}.w3"][state]], dim=1))
