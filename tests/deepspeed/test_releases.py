"""What a release of DeepSpeed may lack is asked of it, in one place, and refused by name before training starts."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import ucp.deepspeed
from tests.deepspeed import jobs
from tests.engines.pool import RankPool
from ucp.deepspeed.live import releases
from ucp.deepspeed.live.outputs import warn_of_outputs
from ucp.deepspeed.supported import TESTED_VERSIONS, check_version, warn_of_own_saves, warn_of_training
from ucp.errors import Unsupported

ROOM = Path(releases.__file__).parents[1]
SOURCES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in sorted(ROOM.rglob("*.py"))}

# Which attribute of an adapter is DeepSpeed's optimizer, and what that has to have.
ADAPTERS = {
    "stage12.py": ("self._zero", (*releases.STAGE12.uses, *releases.BF16.uses)),
    "stage3.py": ("self._zero", releases.STAGE3.uses),
    "stage0.py": ("self._wrapper", (*releases.FUSED.uses, *releases.UNFUSED.uses)),
    "weights.py": ("self._offload", releases.OFFLOAD.uses),
}


def attributes(tree: ast.Module, owner: str) -> set[str]:
    """What is read or called of ``owner`` by its name; what is assigned to need not have been there."""
    return {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load) and ast.unparse(node.value) == owner
    }


def test_nothing_of_deepspeed_but_its_package_is_imported_by_name() -> None:
    found = [
        f"{path.name}: {ast.unparse(node)}"
        for path, tree in SOURCES.items()
        for node in ast.walk(tree)
        if (isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "deepspeed")
        or (isinstance(node, ast.Import) and any(alias.name.startswith("deepspeed.") for alias in node.names))
    ]
    assert found == []


@pytest.mark.parametrize("file", ADAPTERS)
def test_what_an_adapter_uses_is_asked_for(file: str) -> None:
    owner, asked = ADAPTERS[file]
    assert attributes(SOURCES[ROOM / "live" / file], owner) <= set(asked)


def test_what_is_used_of_an_engine_is_asked_for() -> None:
    used = set().union(
        *(attributes(tree, owner) for tree in SOURCES.values() for owner in ("engine", "self.engine", "self._engine"))
    )
    own = {"ucp", "loaded_checkpoint_dp_world_size", "loaded_checkpoint_mp_world_size"}
    # only where there is what they belong to, or with `getattr`-like care
    guarded = {"random_ltd_scheduler", "autotp_size", "checkpoint_mp_rank"}
    assert used - own - guarded <= set(releases.ENGINE)


def test_a_mesh_of_sequences_alone_numbers_no_parts_of_the_model() -> None:
    """DeepSpeed 0.17's has no such number, 0.18's gives that of sequences."""
    for mesh in (SimpleNamespace(), SimpleNamespace(get_model_parallel_rank=lambda: 1), None):
        assert releases.model_parallel_rank(SimpleNamespace(mp_world_size=1, mpu=mesh)) == 0
    mesh = SimpleNamespace(get_model_parallel_rank=lambda: 1)
    assert releases.model_parallel_rank(SimpleNamespace(mp_world_size=2, mpu=mesh)) == 1


def test_a_missing_part_is_named() -> None:
    with pytest.raises(Unsupported, match=r"DeepSpeed .* lacks the module 'deepspeed\.no_such'"):
        releases.EngineModule("deepspeed.no_such", ()).load()
    with pytest.raises(Unsupported, match=r"lacks 'deepspeed\.utils\.groups\.no_such'"):
        releases.EngineModule("deepspeed.utils.groups", ("no_such",)).load()


def test_nothing_is_an_instance_of_a_class_that_a_release_lacks() -> None:
    assert not releases.EngineClass("deepspeed.no_such", "Optimizer").has(object())
    assert not releases.EngineClass("deepspeed", "NoSuch").has(object())


@pytest.mark.parametrize("raised", ["ImportError(\"cannot import name 'log'\")", "ValueError('needs\\nanother')"])
def test_a_release_that_does_not_import_is_told_from_one_that_is_not_there(tmp_path: Path, raised: str) -> None:
    """0.13.5 asks torch for what 2.13 has no longer, or for Intel's extension of it."""
    package = tmp_path / "deepspeed"
    package.mkdir()
    (package / "__init__.py").write_text(f"raise {raised}")
    path = os.pathsep.join([str(tmp_path), *sys.path])
    command = [sys.executable, "-c", "import ucp.deepspeed"]
    text = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True).stderr
    last = text.strip().splitlines()[-1]
    assert "does not import beside torch" in last
    assert raised.partition("(")[0] in last
    assert all(version in last for version in TESTED_VERSIONS)


def test_a_refusal_names_what_is_tested(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(releases, "installed", lambda: "0.13.0")
    with pytest.raises(Unsupported, match=r"DeepSpeed 0\.13\.0 .*allow_untested_version") as refusal:
        check_version(allow_untested=False)
    assert all(version in str(refusal.value) for version in TESTED_VERSIONS)
    check_version(allow_untested=True)


def test_an_untested_release_that_is_tried_is_warned_of(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    config = {"train_batch_size": 1, "zero_optimization": {"stage": 1}}
    check_version(True, config)
    assert "has not been tested" not in caplog.text
    monkeypatch.setattr(releases, "installed", lambda: "0.99.1")
    check_version(True)  # before there is a config to look at
    check_version(True, config)
    assert caplog.text.count("DeepSpeed 0.99.1 has not been tested with this project; it is tried, by the conf") == 1


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_this_release_has_what_its_engines_need(stage: int) -> None:
    releases.require_package({"zero_optimization": {"stage": stage}})


@pytest.mark.parametrize("kind", ["ENGINE_CLASS", "STAGE3"])
def test_an_untested_release_that_lacks_something_is_refused_before_an_engine_is_made(
    monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """DeepSpeed's own initialize may first compile for minutes, or wait for ranks that have given up."""
    asked = getattr(releases, kind)
    wanting = replace(asked, uses=(*asked.uses, "no_such_buffer"))
    monkeypatch.setattr(releases, "installed", lambda: "0.13.0")
    if kind == "ENGINE_CLASS":
        monkeypatch.setattr(releases, "ENGINE_CLASS", wanting)
    else:
        monkeypatch.setattr(releases, "CLASSES_OF_STAGE", {3: (wanting,)})
    monkeypatch.setattr(ucp.deepspeed, "stock_initialize", never)
    config = {"zero_optimization": {"stage": 3}, "ucp": {"enabled": True, "allow_untested_version": True}}
    with pytest.raises(Unsupported, match=rf"DeepSpeed 0\.13\.0 lacks 'no_such_buffer' of its {asked.name}"):
        ucp.deepspeed.initialize(model=None, config=config)


def test_a_release_without_a_stage_is_refused_by_the_stages_name(monkeypatch: pytest.MonkeyPatch) -> None:
    gone = releases.EngineClass("deepspeed.runtime.zero.no_such", "Stage3")
    monkeypatch.setattr(releases, "CLASSES_OF_STAGE", {3: (gone,)})
    with pytest.raises(Unsupported, match=r"lacks 'Stage3' in 'deepspeed\.runtime\.zero\.no_such'"):
        releases.require_package({"zero_optimization": {"stage": 3}})


def test_a_command_that_stage_3_asks_is_missed_before_it_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    """0.14.5 and 0.15.4 count processors with numactl, in the first backward pass, unless LOCAL_SIZE says how many."""

    def count() -> int:
        raise FileNotFoundError(2, "No such file or directory", "numactl")

    monkeypatch.setattr(releases, "accelerator", lambda: SimpleNamespace(device_count=count))
    monkeypatch.setattr(ucp.deepspeed, "stock_initialize", never)
    releases.require_counted_devices({"zero_optimization": {"stage": 2}})
    with pytest.raises(Unsupported, match=r"the command 'numactl' .* LOCAL_SIZE"):
        ucp.deepspeed.initialize(model=None, config={"zero_optimization": {"stage": 3}, "ucp": {"enabled": True}})


ASKS = {"tensor_parallel": {"autotp_size": 2}, "expert_parallel": {"enabled": True}}


@pytest.mark.parametrize("section", ASKS)
def test_what_a_release_would_ignore_of_a_config_is_refused_by_name(
    monkeypatch: pytest.MonkeyPatch, section: str
) -> None:
    """0.15.4 trains whole models on all ranks where a config asks it for AutoTP, and says nothing."""
    config = {section: ASKS[section], "ucp": {"enabled": True}}
    releases.require_asked({"tensor_parallel": {"autotp_size": 1}, "expert_parallel": {"enabled": False}})
    neither = replace(releases.ENGINE_CLASS, module="types", name="SimpleNamespace")
    monkeypatch.setattr(releases, "ENGINE_CLASS", neither)
    monkeypatch.setattr(ucp.deepspeed, "stock_initialize", never)
    with pytest.raises(Unsupported, match=rf"has no Auto.*, and ignores '{section}' of its config"):
        ucp.deepspeed.initialize(model=None, config=config)


def waits_for_the_last(self: Any, launch_handles: Any) -> None:
    launch_handles[-1].wait()


def test_steps_of_a_release_that_does_not_wait_for_its_gathers_are_warned_of(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    engine = SimpleNamespace(
        zero_optimization_partition_weights=lambda: True,
        device=torch.device("cpu"),
        gradient_accumulation_steps=lambda: 1,
        has_moe_layers=False,
        optimizer=None,
    )
    init = releases.PARTITIONS.load().Init
    monkeypatch.setattr(init, "_allgather_params_coalesced", waits_for_the_last)
    warn_of_training(engine)
    assert "compute with weights that have not arrived yet" in caplog.text
    caplog.clear()
    monkeypatch.setattr(init, "_allgather_params_coalesced", never)
    warn_of_training(engine)
    assert not caplog.messages


def test_a_model_that_nothing_has_cut_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    engine = SimpleNamespace(
        zero_optimization_partition_weights=lambda: False,
        zero_optimization_stage=lambda: 1,
        gradient_accumulation_steps=lambda: 1,
        has_moe_layers=False,
        optimizer=None,
        autotp_size=lambda: 2,
        register_forward_hook=lambda hook: None,
        module=torch.nn.Linear(2, 2),
    )
    warn_of_training(engine)
    assert "Call deepspeed.tp_model_init(model, tp_size, dtype) before the engine is made" in caplog.text
    caplog.clear()
    engine.module.ds_autotp_parsed = True
    warn_of_training(engine)
    assert not caplog.messages


class Returns(torch.nn.Module):
    """An engine and its module in one: what it returns is what a function makes of a hidden state."""

    def __init__(self, returned: Callable[[torch.Tensor], Any], steps: int, partitions: bool) -> None:
        super().__init__()
        self.layer, self.returned = torch.nn.Linear(2, 2), returned
        self.gradient_accumulation_steps = lambda: steps
        self.zero_optimization_partition_weights = lambda: partitions

    def forward(self, inputs: torch.Tensor) -> Any:
        return self.returned(self.layer(inputs))


def loss_and_logits(hidden: torch.Tensor) -> Any:
    logits = hidden.float() * 2
    return {"loss": (logits + 1).exp().sum(), "more": [(logits,)], "step": 3}


def twice(hidden: torch.Tensor) -> Any:
    loss = hidden.sum()
    return loss, loss


def apart(hidden: torch.Tensor) -> Any:
    return hidden.sum(), hidden.exp().sum(), loss_and_logits(hidden.detach())


OUTPUTS = [(loss_and_logits, True), (twice, True), (apart, False), (torch.sum, False)]


@pytest.mark.parametrize(("returned", "again"), OUTPUTS)
def test_outputs_through_which_gradients_are_divided_again_are_warned_of(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, returned: Callable[..., Any], again: bool
) -> None:
    """At the first pass that trains, once; and not where such a release divides once, nor by one that always does."""
    monkeypatch.setattr(releases, "divides_gradients_once", lambda: False)
    for steps, partitions in [(2, False), (1, False), (2, True)]:
        engine = Returns(returned, steps, partitions)
        warn_of_outputs(engine)
        caplog.clear()
        with torch.no_grad():
            engine(torch.ones(2))
        assert not caplog.messages
        engine(torch.ones(2))
        engine(torch.ones(2))
        assert len(caplog.messages) == (again and steps == 2 and not partitions)
    monkeypatch.setattr(releases, "divides_gradients_once", lambda: True)
    monkeypatch.setattr(releases, "divides_in_own_backward", lambda: False)
    engine = Returns(returned, 2, False)
    warn_of_outputs(engine)
    assert not engine._forward_hooks


def logits_of(hidden: torch.Tensor) -> Any:
    return {**loss_and_logits(hidden), "loss": None}


OWN = [(loss_and_logits, "loss", True), (loss_and_logits, "more", False), (logits_of, "more", False)]


@pytest.mark.parametrize(("returned", "key", "again"), OWN)
def test_a_programs_own_backward_is_warned_of_where_gradients_are_divided_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, returned: Any, key: str, again: bool
) -> None:
    """In the backward that it happens in, once; not in the engine's, and not where gradients pass one tensor alone."""
    monkeypatch.setattr(releases, "divides_gradients_once", lambda: True)
    monkeypatch.setattr(releases, "divides_in_own_backward", lambda: True)
    engine = Returns(returned, 2, False)
    engine._backward_prologue_per_tensor = lambda grad: grad if own_backward else grad / 2
    warn_of_outputs(engine)

    def step() -> None:
        found = engine(torch.ones(2))[key]
        (found if key == "loss" else found[0][0].sum()).backward()

    for own_backward in (True, False, False):
        step()
        assert len(caplog.messages) == (again and not own_backward)
    assert all("own loss" in text for text in caplog.messages)
    assert bool(engine._forward_hooks) != again


@pytest.mark.parametrize(("stage", "saves", "warns"), [(1, True, True), (0, False, True), (0, True, False)])
def test_own_saves_that_leave_the_optimizers_state_out_are_warned_of(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, stage: int, saves: bool, warns: bool
) -> None:
    """fp16's wrapper in bf16, as 0.17.6 takes it at stage 1, too, where no release saves what it has."""
    engine = SimpleNamespace(
        optimizer=SimpleNamespace(), zero_optimization_stage=lambda: stage, bfloat16_enabled=lambda: True
    )
    monkeypatch.setattr(releases, "UNFUSED", releases.EngineClass("types", "SimpleNamespace"))
    monkeypatch.setattr(releases, "saves_bf16_at_stage0", lambda: saves)
    warn_of_own_saves(engine)
    assert ["its own checkpoints leave out" in text for text in caplog.messages] == [True] * warns


@pytest.mark.slow
def test_a_load_ends_when_all_that_stage_3_gathers_is_there(ranks: RankPool) -> None:
    """Gathers that nobody has waited for, as releases before 0.19 leave them behind."""
    assert all(ranks.run(jobs.gathers_left_behind, world_size=2))


def never(args: Any = None, config: Any = None, config_params: Any = None, model: Any = None) -> Any:
    pytest.fail("DeepSpeed's initialize was called")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("owner", "name"),
    [
        ("deepspeed.runtime.zero.stage_1_and_2:DeepSpeedZeroOptimizer", "_lazy_init_hp_params_optimizer_state"),
        ("deepspeed.runtime.engine:DeepSpeedEngine", "_checkpoint_tag_validation"),
    ],
)
def test_a_release_that_cannot_work_is_refused_when_the_engine_is_made(ranks: RankPool, owner: str, name: str) -> None:
    for text in ranks.run(jobs.lacking, owner, name, True, world_size=2):
        assert f"'{name}' of its {owner.split(':')[1]}" in text


@pytest.mark.parametrize(
    ("config", "warns"),
    [({}, True), ({"ucp": {}}, True), ({"ucp": {"metrics": True}}, True), ({"ucp": {"enabled": False}}, False)],
)
@pytest.mark.parametrize("name", ["initialize", "initialize_for_others"])
def test_an_engine_that_is_not_bound_says_so_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, name: str, config: dict[str, Any], warns: bool
) -> None:
    """As under ``import ucp.deepspeed.auto`` without the key: the resume would end in DeepSpeed's own assertion."""
    engine = SimpleNamespace(_config=SimpleNamespace(_param_dict=config))

    def initialize(config: Any = None, args: Any = None, config_params: Any = None) -> tuple[Any, ...]:
        return engine, None, None, None

    monkeypatch.setattr(ucp.deepspeed, "stock_initialize", initialize)
    assert getattr(ucp.deepspeed, name)(config=config)[0] is engine
    assert [message for message in caplog.messages if '"ucp": {"enabled": true}' in message] == (
        [ucp.deepspeed.NOT_ENABLED] if warns else []
    )
