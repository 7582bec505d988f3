"""A Mixtral under AutoEP, whose experts are stacked: read, resumed and saved over other numbers of ranks and stages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import ucp
from tests.deepspeed.agree import differences
from tests.deepspeed.pairs import CLOSE
from tests.engines import autoep, operators
from tests.engines.autoep import AutoCase
from tests.engines.configs import Case, make_config
from tests.engines.moe import INITIALIZE, MoeSources
from tests.engines.runs import Run
from tests.engines.truth import compare, known
from tests.formats.deepspeed.read.test_matrix import check_regions, check_tensors
from tests.formats.deepspeed.read.test_moe import edit
from ucp.errors import DamagedCheckpoint, UcpError, Unsupported

pytestmark = pytest.mark.slow(seconds=50)

PRELOAD = ("transformers.models.mixtral.modeling_mixtral", "ucp.deepspeed")
FOUR = Case(stage=1, dp=4, model="llama")
EP2 = AutoCase(FOUR, ep=2)
STAGE3 = AutoCase(FOUR.but(stage=3), ep=2)
TWO = FOUR.but(dp=2)
FROZEN = AutoCase(TWO, ep=2, frozen=True)
# Slices of tensor parallelism, too: two ranks, or four of which two have the same data.
FOLDED = AutoCase(FOUR.but(dp=1, stage=3), ep=2, tp=2)
FOLDED_4 = AutoCase(TWO, ep=2, tp=2)
FOLDED_WIDE = AutoCase(TWO.but(stage=2), ep=4, tp=2)
# Without ZeRO each expert's weights lie apart from the stacks of its states.
STAGE0 = AutoCase(FOUR.but(stage=0), ep=2)
FP16 = TWO.but(stage=0, dtype="fp16")
# whose masters lie flat, a buffer for each param group
FUSED = FP16.but(dtype="bf16", optimizer="fused_adam")
# (source, whether it is saved by this project, targets)
PAIRS: list[tuple[AutoCase, bool, AutoCase]] = [
    (EP2, False, EP2),
    (EP2, False, AutoCase(FOUR.but(stage=3), ep=4)),
    (STAGE3, False, STAGE3),
    (STAGE3, False, AutoCase(FOUR.but(stage=2, dp=2), ep=1)),
    (FROZEN, False, AutoCase(FOUR.but(stage=2), ep=4, frozen=True)),
    (AutoCase(FOUR.but(stage=3, dp=2, dtype="bf16"), ep=2), False, AutoCase(FOUR.but(dtype="bf16"), ep=4)),
    (STAGE3, True, AutoCase(FOUR, ep=4)),
    (AutoCase(FOUR.but(dp=2), ep=2), True, AutoCase(FOUR.but(stage=3), ep=2)),
    # with tensor parallelism: experts over all ranks, those of several slices, too
    (FOLDED, False, FOLDED),
    (FOLDED, True, FOLDED_4),
    (FOLDED_4, False, AutoCase(TWO.but(stage=3), ep=1)),
    (FOLDED_WIDE, False, FOLDED),
    (STAGE3, True, FOLDED),
    (STAGE0, False, STAGE0),
    (AutoCase(TWO.but(stage=0, dtype="bf16"), ep=2), False, AutoCase(TWO.but(stage=3, dtype="bf16"), ep=1)),
    (AutoCase(TWO.but(stage=0), ep=2, frozen=True), False, AutoCase(TWO.but(stage=2), ep=1, frozen=True)),
    (AutoCase(FP16, ep=2), False, AutoCase(FP16, ep=2)),
    (AutoCase(FP16, ep=2), True, AutoCase(FP16.but(stage=3), ep=1)),
    (AutoCase(FUSED, ep=2), False, AutoCase(FUSED, ep=1)),
    (AutoCase(FUSED, ep=2), True, AutoCase(FUSED.but(stage=1), ep=1)),
    (FOLDED, True, AutoCase(TWO.but(stage=0), ep=2, tp=2)),
    (AutoCase(TWO.but(stage=0), ep=2, tp=2), True, FOLDED),
]


@pytest.fixture
def made(auto_sources: MoeSources) -> MoeSources:
    return auto_sources


def label(value: Any) -> str:
    return value.label if isinstance(value, AutoCase) else "universal" * value


@pytest.mark.parametrize(("source", "universal", "target"), PAIRS, ids=label)
def test_loads_exactly(made: MoeSources, source: AutoCase, universal: bool, target: AutoCase) -> None:
    if not operators.are_built(source.case.optimizer):
        pytest.skip("DeepSpeed's operators are not built: python -m tests.engines.operators")
    run = made.get(source, universal)
    loaded: Run = made.pool.run(
        autoep.resume,
        target.but(seed=5),
        run.folder,
        run.tag,
        INITIALIZE,
        {"ucp": {"enabled": True}},
        trained=2,
        last=source == target,
        world_size=target.world_size,
        preload=PRELOAD,
    )[0]
    assert differences(known(run.truth), known(loaded.truth)) == []
    if source == target:
        assert loaded.further == run.further
        assert compare(known(run.truth_after), known(loaded.truth_after)) == []
    else:
        assert loaded.further == pytest.approx(run.further, rel=0, abs=CLOSE[target.case.dtype])


@pytest.mark.parametrize(("source", "universal"), [(s, u) for s, u, _ in PAIRS if s != EP2] + [(EP2, False)], ids=label)
def test_everything_read_is_what_the_ranks_held(made: MoeSources, source: AutoCase, universal: bool) -> None:
    if not operators.are_built(source.case.optimizer):
        pytest.skip("DeepSpeed's operators are not built: python -m tests.engines.operators")
    run = made.get(source, universal)
    truth = known(run.truth)
    with ucp.open(run.folder) as checkpoint:
        assert checkpoint.layout.ep == source.ep
        check_tensors(checkpoint, truth)
        check_regions(checkpoint, truth)
        kinds = {name: info.kind for name, info in checkpoint.parameters.items()}
        assert kinds == {**dict.fromkeys(truth.params, "parameter"), **dict.fromkeys(truth.frozen, "frozen")}
        router = checkpoint.parameters["model.layers.0.mlp.router.gate.weight"]
        assert router.aliases == ("model.layers.0.mlp.gate.gate.weight",)
        assert checkpoint.parameters["model.layers.1.mlp.experts.w2"].shape == (autoep.EXPERTS, 16, 24)


def test_stacks_that_are_no_whole_ones(made: MoeSources, tmp_path: Path) -> None:
    """At stage 0 they are put together from the experts' files."""

    def cut(held: dict) -> None:
        held["model.layers.0.mlp.experts.w1.3"] = held["model.layers.0.mlp.experts.w1.3"][1:].clone()

    def lose(held: dict) -> None:
        del held["model.layers.0.mlp.experts.w1.3"]

    def claim(held: dict) -> None:
        for layer in held["ds_autoep_layers"]:
            layer["ep_size"], layer["expert_placement"] = 4, None

    damages = (
        ("layer_0_expert_3", cut, r"row of '.*0.mlp.experts.w1' has shape \[23, 16\].* \[24, 16\]"),
        ("layer_0_expert_3", lose, "no file of expert 3 has its row of 'model.layers.0.mlp.experts.w1'"),
        ("mp_rank_00", claim, "4 ranks share .* there are files of 2 expert-parallel ranks"),
    )
    for k, (name, change, text) in enumerate(damages):
        folder = made.copy(STAGE0, tmp_path / str(k))
        (file,) = folder.glob(f"{name}*_model_states.pt")
        edit(folder, file.name, change)
        with pytest.raises(DamagedCheckpoint, match=text):
            ucp.open(folder)


@pytest.mark.parametrize("family", autoep.FAMILIES)
def test_other_families(made: MoeSources, family: str) -> None:
    """Shared experts, a layer without experts, routers with groups or a bias; stage 3 both ways, with stage 1 or 0."""
    stage = int(family in ("qwen2_moe", "deepseek_v3"))
    source, target = AutoCase(TWO.but(stage=stage), 2, family=family), AutoCase(TWO.but(stage=3), 1, family=family)
    for one, other in ((source, target), (target.but(seed=3), source.but(seed=5))):
        run = made.get(one, False)
        how: Any = {"ucp": {"enabled": True}}
        loaded: Run = made.pool.run(
            autoep.resume,
            other.but(seed=7),
            run.folder,
            run.tag,
            INITIALIZE,
            how,
            0,
            False,
            world_size=2,
            preload=PRELOAD,
        )[0]
        assert differences(known(run.truth), known(loaded.truth)) == []
        assert loaded.further == pytest.approx(run.further, rel=0, abs=CLOSE["fp32"])
        with ucp.open(run.folder) as checkpoint:
            check_tensors(checkpoint, known(run.truth))


PLAIN = AutoCase(FOUR.but(stage=3, dp=2), ep=0)


@pytest.mark.parametrize(("source", "target"), [(EP2, PLAIN), (STAGE3, AutoCase(FOUR.but(dp=2), ep=0))], ids=label)
def test_into_a_module_without_autoep(made: MoeSources, source: AutoCase, target: AutoCase) -> None:
    """The spec of the family says which of its tensors are AutoEP's."""
    crossing(made, source, target)


def test_from_a_module_without_autoep(made: MoeSources) -> None:
    crossing(made, PLAIN, AutoCase(FOUR, ep=4))


def crossing(made: MoeSources, source: AutoCase, target: AutoCase) -> None:
    run = made.get(source, False)
    loaded: Run = made.pool.run(
        autoep.resume,
        target.but(seed=5),
        run.folder,
        run.tag,
        INITIALIZE,
        {"ucp": {"enabled": True, "spec": "mixtral"}},
        last=False,
        world_size=target.world_size,
        preload=PRELOAD,
    )[0]
    assert loaded.further == pytest.approx(run.further, rel=0, abs=CLOSE[target.case.dtype])
    stacked, plain = (known(run.truth).params, known(loaded.truth).params)[:: 1 if source.ep else -1]
    for layer in ("model.layers.0.mlp", "model.layers.1.mlp"):
        for state in ("param", "exp_avg", "exp_avg_sq"):
            halves = [stacked[f"{layer}.experts.{w}"][state] for w in ("w1", "w3")]
            assert torch.equal(torch.cat(halves, dim=1), plain[f"{layer}.experts.gate_up_proj"][state])
            assert torch.equal(stacked[f"{layer}.experts.w2"][state], plain[f"{layer}.experts.down_proj"][state])
            assert torch.equal(stacked[f"{layer}.router.gate.weight"][state], plain[f"{layer}.gate.weight"][state])
    for name in ("lm_head.weight", "model.layers.1.self_attn.k_proj.weight"):
        assert torch.equal(stacked[name]["exp_avg"], plain[name]["exp_avg"])


WRITTEN = [
    (EP2, AutoCase(FOUR, ep=4)),
    (EP2, STAGE3),
    (STAGE3, AutoCase(FOUR.but(stage=2, dp=2), ep=1)),
    (STAGE3, AutoCase(FOUR.but(stage=3, sub_group_size=900, dtype="bf16"), ep=4)),
    (FROZEN, AutoCase(FOUR.but(stage=2), ep=4, frozen=True)),
    (EP2, FOLDED_4),
    (FOLDED, FOLDED_4.but(stage=3)),
    (EP2, STAGE0),
    (STAGE0, AutoCase(TWO.but(stage=0, dtype="bf16"), ep=1)),
    (STAGE0, AutoCase(FUSED, ep=2)),
]
# Where a source does not say it of so many ranks: how tensor parallelism cuts the attention, and nothing else.
SLICES = """\
ucp: 1
model: slices
sizes: {hidden: 16, kv_heads: 2, q_per_kv: 2, head_dim: 4, vocab: 101, experts: 4}
parameters:
  model.embed_tokens.weight: vocab hidden
  lm_head.weight: vocab hidden
  model.layers.{i}.self_attn.q_proj.weight: "(kv_heads/tp q_per_kv head_dim) hidden"
  model.layers.{i}.self_attn.k_proj.weight: "(kv_heads/tp head_dim) hidden"
  model.layers.{i}.self_attn.v_proj.weight: "(kv_heads/tp head_dim) hidden"
  model.layers.{i}.self_attn.o_proj.weight: "hidden (kv_heads/tp q_per_kv head_dim)"
  model.layers.{i}.mlp.router.gate.weight: experts hidden
  model.layers.{i}.*norm.weight: hidden
  model.norm.weight: hidden
"""


def config(case: AutoCase) -> dict[str, Any]:
    sliced = {"tensor_parallel": {"autotp_size": case.tp, "partition_config": autoep.SLICES}} if case.tp > 1 else {}
    return make_config(case.case) | {"expert_parallel": autoep.section(case)} | sliced


@pytest.mark.parametrize(("source", "target"), WRITTEN, ids=label)
def test_stock_deepspeed_loads_what_is_written(
    made: MoeSources, tmp_path: Path, source: AutoCase, target: AutoCase
) -> None:
    run = made.get(source, False)
    layout = f"dp={target.case.dp},tp={target.tp},ep={target.ep},zero={target.case.stage}"
    (tmp_path / "slices.yaml").write_text(SLICES)
    spec = tmp_path / "slices.yaml" if target.tp > 1 else None
    ucp.convert(run.folder, tmp_path / "out", to="deepspeed", layout=layout, ds_config=config(target), spec=spec)
    loaded: Run = made.pool.run(
        autoep.resume,
        target.but(seed=5),
        str(tmp_path / "out"),
        None,
        "deepspeed:initialize",
        last=False,
        world_size=target.world_size,
        preload=PRELOAD,
    )[0]
    assert differences(known(run.truth), known(loaded.truth)) == []


@pytest.mark.parametrize(
    ("where", "options", "text"),
    [
        ("dp=2,tp=2,ep=2,zero=0", {}, "AutoEP's experts at ZeRO stage 0 under tensor parallelism"),
        ("dp=3,ep=3,zero=1", {}, "the 4 experts of 'model.layers.0.mlp.experts' cannot be spread over 3 ranks"),
        ("dp=4,ep=4,zero=1", {"ds_config": config(EP2)}, "spreads experts over 2 ranks .* the layout over 4"),
        ("dp=4,zero=1", {"ds_config": make_config(FOUR)}, "config doesn't ask for AutoEP"),
    ],
)
def test_what_cannot_be_written(made: MoeSources, tmp_path: Path, where: str, options: Any, text: str) -> None:
    with pytest.raises(UcpError, match=text):
        ucp.convert(made.get(EP2, False).folder, tmp_path / "out", to="deepspeed", layout=where, **options)
    assert not (tmp_path / "out").exists()


def test_not_in_deepspeeds_universal_form(made: MoeSources, tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match="trained with AutoEP"):
        ucp.convert(made.get(EP2, False).folder, tmp_path / "out", to="deepspeed-universal")


def test_slices_of_experts_are_refused(made: MoeSources, tmp_path: Path) -> None:
    """DeepSpeed 0.19.8 trains none; its files have a place to say it."""
    folder = made.copy(FOLDED, tmp_path / "cut")
    path = next(folder.glob("*mp_rank_00_model_states.pt"))
    found = torch.load(path, weights_only=False)
    found["folding"]["etp_size"] = 2
    torch.save(found, path)
    with pytest.raises(Unsupported, match=r"tensor parallelism cuts its experts, too \(over 2 ranks\)"):
        ucp.open(tmp_path / "cut")
