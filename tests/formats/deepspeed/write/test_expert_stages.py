"""AutoEP's experts in a pipeline's stages, written: where routers come among the parameters of a stage, and refusals.

What stock DeepSpeed then loads is in `tests/deepspeed/test_moe_crossing.py` and `test_moe_pipe.py`.
"""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any

import pytest

from tests.formats.raw import make
from ucp.catalog import Catalog, ParamGroup, TrainingState
from ucp.errors import Unsupported
from ucp.formats.deepspeed import DeepSpeedTarget
from ucp.formats.deepspeed.write import experts, pipeline
from ucp.formats.nouns import WriteRequest
from ucp.parallel.mesh import Layout
from ucp.spec.select import Choice

AUTO = {"expert_parallel": {"enabled": True, "autoep_size": 1}, "pipeline": {"partition": [0, 1, 2]}}
CONFIG: dict[str, Any] = {"optimizer": {"type": "AdamW", "params": {"torch_adam": True}}, **AUTO}
LAYOUT = Layout(pp=2, zero=1)
ROUTERS = [f"{n}.mlp.router.gate.weight" for n in range(2)]
NORMS = [f"{n}.norm.weight" for n in range(2)]
STACKS = [f"{n}.mlp.experts.w1" for n in range(2)]


def source(folder: Path, order: list[str]) -> Catalog:
    shapes = {**dict.fromkeys(order, (4,)), **dict.fromkeys(STACKS, (4, 3, 2))}
    groups = (ParamGroup(tuple(order), {"lr": 1.0}), ParamGroup(tuple(STACKS), {"lr": 1.0, "moe": True}))
    aliases = {name: (name.replace("router.", "gate."),) for name in ROUTERS}
    state = TrainingState(groups, config=CONFIG)
    found = make(folder, dp=2, shapes=shapes, training_state=state, aliases=aliases).catalog
    held = {name: info for name, info in found.parameters.items() if info.kind == "parameter"}
    tensors = {key: tensor for key, tensor in found.tensors.items() if key[0] in held}
    return dataclasses.replace(found, parameters=held, tensors=tensors)


def of_stages(catalog: Catalog) -> list[Catalog]:
    stages, spread = pipeline.stages(CONFIG, LAYOUT), experts.spread(catalog, LAYOUT, CONFIG)
    assert stages is not None
    assert spread is not None
    shares = [pipeline.share(catalog, stages, stage) for stage in range(2)]
    return [experts.in_stage(s, experts.of_stage(s, spread, n), catalog) for n, s in enumerate(shares)]


@pytest.mark.parametrize(
    ("order", "last"),
    [
        ([NORMS[0], *NORMS[1:], *ROUTERS], True),  # the program gave a list
        ([ROUTERS[0], NORMS[0], ROUTERS[1], NORMS[1]], False),  # a generator
    ],
)
def test_routers_come_where_the_source_has_them(tmp_path: Path, order: list[str], last: bool) -> None:
    for n, share in enumerate(of_stages(source(tmp_path / "source", order))):
        names = [NORMS[n], ROUTERS[n]][:: 1 if last else -1]
        assert list(share.training_state.param_groups[0].names) == names
        assert share.parameters[ROUTERS[n]].aliases == (f"{n}.mlp.gate.gate.weight",)


def test_an_order_that_does_not_tell_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match="does not tell where AutoEP's routers come"):
        of_stages(source(tmp_path / "source", [NORMS[0], ROUTERS[0], NORMS[1], ROUTERS[1]]))


def test_a_stage_without_experts_is_refused(tmp_path: Path) -> None:
    catalog = source(tmp_path / "source", [*NORMS, *ROUTERS])
    spread = experts.spread(catalog, LAYOUT, CONFIG)
    assert spread is not None
    without = dataclasses.replace(catalog, parameters={NORMS[0]: catalog.parameters[NORMS[0]]})
    with pytest.raises(Unsupported, match="stage 1 would have no experts, and others some"):
        experts.of_stage(without, spread, 1)


@pytest.mark.parametrize("auto", [True, False])
def test_autoep_is_written_from_autoep_alone(tmp_path: Path, auto: bool) -> None:
    """The one has its parameters in another order than the other, and the files tell them apart by that."""
    catalog = source(tmp_path / "source", [*NORMS, *ROUTERS])
    config = {**CONFIG, "expert_parallel": {"enabled": not auto}}
    other = dataclasses.replace(catalog, training_state=dataclasses.replace(catalog.training_state, config=config))
    spread = experts.spread(catalog, LAYOUT, CONFIG)
    assert spread is not None
    experts.check_order(catalog, spread)
    with pytest.raises(Unsupported, match=f"trained with{'out' * auto} AutoEP.*by their order"):
        experts.check_order(other, dataclasses.replace(spread, auto=auto))


def test_a_changed_model_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """DeepSpeed's files have no names by which its load could tell."""
    catalog = source(tmp_path / "source", [*NORMS, *ROUTERS])
    options = {"ds_config": CONFIG}
    request = WriteRequest(tmp_path, "universal", str(tmp_path / "out"), "t", LAYOUT, Choice(), options)
    with caplog.at_level(logging.WARNING):
        DeepSpeedTarget().plan(catalog, request)
        assert not caplog.records
        DeepSpeedTarget().plan(catalog, dataclasses.replace(request, changed=True))
    assert "know parameters by their order" in caplog.text
