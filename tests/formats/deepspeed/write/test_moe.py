"""Native checkpoints of models with experts, for any number of expert-parallel ranks: stock DeepSpeed loads them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import ucp
from tests.deepspeed.agree import differences
from tests.engines import moe
from tests.engines.configs import Case, make_config
from tests.engines.moe import MoeCase, MoeSources
from tests.engines.runs import Run
from tests.engines.truth import known
from ucp.errors import BadArgument, UcpError, Unsupported

pytestmark = pytest.mark.slow

FOUR = Case(stage=1, dp=4)
EP2 = MoeCase(FOUR, ep=2)
BF16 = FOUR.but(dtype="bf16", groups=2)
PAIRS = [
    (EP2, EP2),
    (EP2, MoeCase(FOUR, ep=4)),
    (EP2, MoeCase(FOUR, ep=1)),
    (EP2, MoeCase(FOUR.but(stage=2, dp=2), ep=1)),
    (EP2, MoeCase(FOUR.but(stage=0), ep=2)),
    (MoeCase(FOUR.but(stage=0), ep=2), MoeCase(FOUR.but(stage=2, dp=2), ep=2)),
    (MoeCase(BF16.but(stage=2), ep=4, frozen=True), MoeCase(BF16.but(dtype="bf16_optimizer"), ep=2, frozen=True)),
    (MoeCase(BF16.but(stage=2), ep=4, frozen=True), MoeCase(BF16.but(stage=0), ep=4, frozen=True)),
    (
        MoeCase(BF16.but(dtype="bf16_optimizer"), ep=2, frozen=True),
        MoeCase(BF16.but(stage=2, round_robin=True), ep=2, frozen=True, data_first=True),
    ),
]


def layout(case: MoeCase) -> str:
    return f"dp={case.case.dp},ep={case.ep},zero={case.case.stage}"


def config(case: MoeCase) -> dict[str, Any]:
    return make_config(case.case) | {"use_data_before_expert_parallelism": case.data_first}


@pytest.mark.parametrize(("source", "target"), PAIRS, ids=lambda case: case.label)
def test_stock_deepspeed_loads_it(moe_sources: MoeSources, tmp_path: Path, source: MoeCase, target: MoeCase) -> None:
    run = moe_sources.get(source)
    ucp.convert(run.folder, tmp_path / "out", to="deepspeed", layout=layout(target), ds_config=config(target))
    loaded: Run = moe_sources.pool.run(
        moe.resume, target.but(seed=5), str(tmp_path / "out"), None, "deepspeed:initialize", world_size=target.case.dp
    )[0]
    assert differences(known(run.truth), known(loaded.truth)) == []


def test_the_same_layout_gives_the_same_files(moe_sources: MoeSources, tmp_path: Path) -> None:
    """Every file that DeepSpeed wrote, its keys and its tensors."""
    run = moe_sources.get(EP2)
    ucp.convert(run.folder, tmp_path / "out", to="deepspeed", layout=layout(EP2), ds_config=config(EP2))
    theirs, ours = Path(run.folder) / run.tag, tmp_path / "out" / run.tag
    assert {p.name for p in ours.iterdir()} == {p.name for p in theirs.iterdir()}
    for path in sorted(theirs.iterdir()):
        a, b = (torch.load(folder / path.name, weights_only=False) for folder in (theirs, ours))
        for held in (a, b):
            held.pop("ds_config", None)
            if "buffer_names" in held:
                held["buffer_names"] = sorted(held["buffer_names"])
        assert flat(a) == flat(b), path.name


def flat(value: Any, at: str = "") -> dict[str, Any]:
    """Everything in nested containers by its place; tensors as their bytes. Neither zeros that pad nor the order of
    keys count."""
    if isinstance(value, dict):
        return {k: v for key in value for k, v in flat(value[key], f"{at}/{key}").items()}
    if isinstance(value, list | tuple):
        return {k: v for i, item in enumerate(value) for k, v in flat(item, f"{at}/{i}").items()}
    if isinstance(value, torch.Tensor):
        return {at: (value.dtype, tuple(value.shape), value.contiguous().reshape(-1).view(torch.uint8).tolist())}
    return {at: str(value) if hasattr(value, "__dict__") else value}


@pytest.mark.parametrize(
    ("where", "kind", "text"),
    [
        ("dp=4,ep=4,zero=3", Unsupported, "do not train at ZeRO stage 3"),
        ("dp=3,ep=3,zero=1", BadArgument, "the 4 experts of 'first.*' cannot be spread over 3 ranks"),
        ("dp=2,ep=2,tp=2,zero=1", Unsupported, "tp"),
    ],
)
def test_refused(moe_sources: MoeSources, tmp_path: Path, where: str, kind: type[UcpError], text: str) -> None:
    with pytest.raises(kind, match=text):
        ucp.convert(moe_sources.get(EP2).folder, tmp_path / "out", to="deepspeed", layout=where)
    assert not (tmp_path / "out").exists()


def test_other_forms(moe_sources: MoeSources, tmp_path: Path) -> None:
    run = moe_sources.get(EP2)
    with pytest.raises(Unsupported, match="no place for experts"):
        ucp.convert(run.folder, tmp_path / "out", to="deepspeed-universal")
    ucp.convert(run.folder, tmp_path / "universal")
    case = MoeCase(FOUR, ep=4)
    ucp.convert(tmp_path / "universal", tmp_path / "back", to="deepspeed", layout=layout(case), ds_config=config(case))
    with ucp.open(tmp_path / "back") as checkpoint:
        assert checkpoint.layout.ep == 4
        for name, states in known(run.truth).params.items():
            for state, tensor in states.items():
                assert torch.equal(checkpoint.read(name, state), tensor)


def test_groups_that_deepspeed_would_split(moe_sources: MoeSources, tmp_path: Path, monkeypatch: Any) -> None:
    from ucp.formats.deepspeed.write import experts

    run = moe_sources.get(EP2)
    several = moe_sources.get(MoeCase(FOUR, ep=2, later_ep=4))
    with pytest.raises(Unsupported, match="has the hyperparameters of another one"):
        ucp.convert(several.folder, tmp_path / "out", to="deepspeed", layout="dp=4,ep=4,zero=1")
    monkeypatch.setattr(experts, "GROUP_LIMIT", 600)
    with pytest.raises(Unsupported, match=r"param group 1 would hold .* on a rank"):
        ucp.convert(run.folder, tmp_path / "out", to="deepspeed", layout="dp=4,ep=2,zero=1")
