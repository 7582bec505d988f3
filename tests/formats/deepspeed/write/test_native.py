"""Native files made from described tensors: every element where DeepSpeed's rules put it, and refusals by name.

The expected places are worked out here with torch, by the rules in prose (join, pad, cut), without this project's
geometry.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.formats.raw import Raw, make, write_files
from tests.slow_cases import slow_but
from ucp.catalog import Catalog, ParamGroup, TrainingState
from ucp.errors import BadArgument, Mismatch, Unsupported
from ucp.formats.deepspeed.write import native
from ucp.parallel.mesh import Layout
from ucp.storage.files import Files
from ucp.transfer.reader import Reader

SHAPES = {
    "embed.weight": (13, 7),
    "layer.0.weight": (5, 3, 11),
    "layer.0.bias": (2,),
    "scale": (1,),
    "head.weight": (17, 3),
    "head.bias": (3,),
}
GROUPS = (("embed.weight", "layer.0.weight", "head.weight"), ("layer.0.bias", "scale", "head.bias"))
ADAMW: dict[str, Any] = {"optimizer": {"type": "AdamW", "params": {"torch_adam": True}}}
BF16 = {"bf16": {"enabled": True}}
FP16 = {"fp16": {"enabled": True}}
ADAMW_ALONE = {"optimizer": {"type": "AdamW", "params": {"lr": 1e-3}}}
STATES = {"param": 0, "exp_avg": 1, "exp_avg_sq": 2}


def raw_source(folder: Path, **state: Any) -> Raw:
    """A source of six parameters in two groups with their own hyperparameters, one tied name, and the rest of a run."""
    options = ({"lr": 1e-3, "weight_decay": 0.1}, {"lr": 1e-4, "weight_decay": 0.0})
    groups = tuple(ParamGroup(names, o) for names, o in zip(GROUPS, options, strict=True))
    training_state = TrainingState(
        groups, **{"global_steps": 7, "client_state": {"epoch": 2}, "config": {**ADAMW, **BF16}, **state}
    )
    return make(folder, dp=2, shapes=SHAPES, training_state=training_state, aliases={"embed.weight": ("tied.weight",)})


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Raw:
    return raw_source(tmp_path_factory.mktemp("source"))


def write(catalog: Catalog, folder: Path, layout: Layout, config: Mapping[str, Any] | None) -> dict[str, Any]:
    """The files as torch loads them, by name; each is also a whole zip archive with right CRCs."""
    files = native.plan(catalog, layout, config)
    with Files() as source_files:
        write_files(Reader(catalog, source_files), folder, files)
    for path in folder.iterdir():
        with zipfile.ZipFile(path) as archive:
            assert archive.testzip() is None, path
    return {path.name: torch.load(path, weights_only=False) for path in folder.iterdir()}


def optimizer_files(files: Mapping[str, Any], dp: int, prefix: str) -> list[dict[str, Any]]:
    names = [f"{prefix}zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in range(dp)]
    return [files[name]["optimizer_state_dict"] for name in names]


def same(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    return found.dtype == wanted.dtype and torch.equal(found, wanted)


def round_robin(names: tuple[str, ...], dp: int) -> list[str]:
    return [name for rank in range(dp) for index, name in enumerate(names) if index % dp == rank]


@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("reordered", [False, True])
@pytest.mark.parametrize("dp", slow_but([1, 3, 40], [1, 2, 3, 7, 40]))
@pytest.mark.parametrize("stage", [1, 2])
def test_flat_partitions(source: Raw, tmp_path: Path, stage: int, dp: int, reordered: bool, aligned: bool) -> None:
    """More ranks than elements in a group leave empty partitions."""
    zero = {"parameter_alignment": aligned, "round_robin_gradients": reordered}
    config = {**ADAMW, **BF16, "zero_optimization": zero, "gradient_clipping": 0.5}
    files = write(source.catalog, tmp_path / "out", Layout(dp=dp, zero=stage), config)
    states = optimizer_files(files, dp, "bf16_")
    model = files["mp_rank_00_model_states.pt"]
    for g, names in enumerate(GROUPS):
        order = round_robin(names, dp) if reordered else list(names)
        assert list(model["param_shapes"][g]) == order
        for state in STATES:
            flat = torch.zeros(0)
            between = []
            for name in order:
                flat = torch.cat([flat, source.tensor(name, state).reshape(-1)])
                between.append(-len(flat) % 8 if aligned and name != order[-1] else 0)
                flat = torch.cat([flat, torch.zeros(between[-1])])
            total = len(flat)
            flat = torch.cat([flat, torch.zeros(-len(flat) % (2 * dp))])
            size = len(flat) // dp
            for rank, saved in enumerate(states):
                mine = flat[rank * size : (rank + 1) * size]
                lean = max(min(size, total - rank * size), 0)
                assert saved["group_paddings"][g] == size - lean
                assert saved["param_alignment_paddings"][g] == between
                if state == "param":
                    assert same(saved["single_partition_of_fp32_groups"][g], mine[:lean])
                else:
                    assert same(saved["base_optimizer_state"]["state"][g][state], mine)
    for rank, saved in enumerate(states):
        assert saved["zero_stage"] == stage
        assert saved["clip_grad"] == 0.5
        assert saved["partition_count"] == [dp, dp]
        assert same(saved["base_optimizer_state"]["state"][1]["step"], torch.tensor(7.0))
        assert saved["base_optimizer_state"]["param_groups"] == [
            {"lr": 1e-3, "weight_decay": 0.1, "params": [0]},
            {"lr": 1e-4, "weight_decay": 0.0, "params": [1]},
        ]
        for g, addresses in enumerate(saved["param_slice_mappings"]):
            partition = saved["base_optimizer_state"]["state"][g]["exp_avg"]
            for name, address in addresses.items():
                part = partition[address.start : address.start + address.numel]
                whole = source.tensor(name, "exp_avg").reshape(-1)
                assert any(same(part, whole[i : i + len(part)]) for i in range(len(whole) - len(part) + 1)), (
                    rank,
                    name,
                )


@pytest.mark.parametrize("limit", [None, 40])
@pytest.mark.parametrize("dp", [1, 2, 3, 7, 40])
def test_stage_3_pieces(source: Raw, tmp_path: Path, dp: int, limit: int | None) -> None:
    config = {**ADAMW, **BF16, "zero_optimization": {"stage": 3, **({"sub_group_size": limit} if limit else {})}}
    files = write(source.catalog, tmp_path / "out", Layout(dp=dp, zero=3), config)
    states = optimizer_files(files, dp, "bf16_")
    expected: list[tuple[int, list[str]]] = []
    for g, names in enumerate(GROUPS):
        shares = {name: -(-source.tensor(name, "param").numel() // dp) for name in names}
        if limit is None or limit >= sum(shares.values()):
            expected.append((g, list(names)))
            continue
        current: list[str] = []
        for name in names:
            current.append(name)
            if sum(shares[n] for n in current) >= limit or name == names[-1]:
                expected.append((g, current))
                current = []
    for rank, saved in enumerate(states):
        model = files[f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt"]
        assert [list(shapes) for shapes in model["param_shapes"]] == [names for _, names in expected]
        base = saved["optimizer_state_dict"]
        members = [[s for s, (g, _) in enumerate(expected) if g == group] for group in (0, 1)]
        assert [group["params"] for group in base["param_groups"]] == members
        for s, (_, names) in enumerate(expected):
            for state in STATES:
                parts = []
                for name in names:
                    flat = source.tensor(name, state).reshape(-1)
                    share = -(-len(flat) // dp)
                    padded = torch.cat([flat, torch.zeros(share * dp - len(flat))])
                    parts.append(padded[rank * share : (rank + 1) * share])
                found = saved["fp32_flat_groups"][s] if state == "param" else base["state"][s][state]
                assert same(found, torch.cat(parts))
        frozen = source.tensor("frozen.weight", "param").reshape(-1)
        share = -(-len(frozen) // dp)
        padded = torch.cat([frozen, torch.zeros(share * dp - len(frozen), dtype=torch.bfloat16)])
        assert model["frozen_param_shapes"] == {"frozen.weight": torch.Size([6, 5])}
        fragment = model["frozen_param_fragments"]["frozen.weight"]
        assert fragment.view(torch.int16).equal(padded[rank * share : (rank + 1) * share].view(torch.int16))
        assert {name for name, tensor in model["module"].items() if tensor.numel()} == {"mask", "steps"}
        assert model["shared_params"] == ({"tied.weight": "embed.weight"} if rank == 0 else {})


@pytest.mark.parametrize("stage", [0, 1, 2])
@pytest.mark.parametrize(
    ("config", "dtype"),
    [({}, torch.float32), (BF16, torch.bfloat16), (FP16, torch.float16)],
    ids=["fp32", "bf16", "fp16"],
)
def test_module_weights_are_rounded_masters(
    source: Raw, tmp_path: Path, stage: int, config: dict[str, Any], dtype: torch.dtype
) -> None:
    files = write(source.catalog, tmp_path / "out", Layout(dp=2, zero=stage), {**ADAMW, **config})
    model = files["mp_rank_00_model_states.pt"]
    for name in SHAPES:
        assert same(model["module"][name], source.tensor(name, "param").to(dtype))
    assert model["module"]["tied.weight"] is model["module"]["embed.weight"]
    assert same(model["module"]["steps"], source.tensor("steps", "param"))
    assert same(model["module"]["mask"], source.tensor("mask", "param"))
    frozen = model["module"]["frozen.weight"].view(torch.int16)
    assert frozen.equal(source.tensor("frozen.weight", "param").view(torch.int16))
    assert model["buffer_names"] == ["mask", "steps"]
    assert (model["global_steps"], model["dp_world_size"], model["mp_world_size"], model["epoch"]) == (7, 2, 1, 2)
    assert model["ds_config"]["zero_optimization"]["stage"] == stage


@pytest.mark.parametrize("wrapped", [True, False])
def test_stage_0_keeps_parameters_apart(source: Raw, tmp_path: Path, wrapped: bool) -> None:
    files = write(source.catalog, tmp_path / "out", Layout(dp=3), {**ADAMW, **(BF16 if wrapped else {})})
    assert list(files) == ["mp_rank_00_model_states.pt"]
    saved = files["mp_rank_00_model_states.pt"]["optimizer"]
    inner = saved["optimizer_state_dict"] if wrapped else saved
    assert [group["params"] for group in inner["param_groups"]] == [[0, 1, 2], [3, 4, 5]]
    names = [name for group in GROUPS for name in group]
    masters = [t for group in saved["fp32_groups"] for t in group] if wrapped else []
    for number, name in enumerate(names):
        for state in ("exp_avg", "exp_avg_sq"):
            assert same(inner["state"][number][state], source.tensor(name, state))
        assert same(inner["state"][number]["step"], torch.tensor(7.0))
        if wrapped:
            assert same(masters[number], source.tensor(name, "param"))


def test_stage_0_of_fused_adam_is_flat(source: Raw, tmp_path: Path) -> None:
    files = write(source.catalog, tmp_path / "out", Layout(), {"optimizer": {"type": "Adam"}, **FP16})
    saved = files["mp_rank_00_model_states.pt"]["optimizer"]
    for g, names in enumerate(GROUPS):
        assert same(saved["fp32_groups_flat"][g], torch.cat([source.tensor(n, "param").reshape(-1) for n in names]))
        state = saved["optimizer_state_dict"]["state"][g]
        assert same(state["exp_avg"], torch.cat([source.tensor(n, "exp_avg").reshape(-1) for n in names]))
        assert type(state["step"]) is int
        assert saved["optimizer_state_dict"]["param_groups"][g]["bias_correction"] is True
    assert (saved["dynamic_loss_scale"], saved["cur_scale"], saved["clip_grad"]) == (True, 65536.0, 1.0)


def test_loss_scaler_is_the_sources_where_it_is_of_the_same_kind(tmp_path: Path) -> None:
    saved = {"dynamic": True, "cur_scale": 128.0, "cur_iter": 40, "last_overflow_iter": 31, "cur_hysteresis": 1}
    raw = raw_source(tmp_path / "source", loss_scaler=saved)
    config = {**ADAMW, "fp16": {"enabled": True, "initial_scale_power": 4, "loss_scale_window": 9, "hysteresis": 3}}
    dynamic = optimizer_files(write(raw.catalog, tmp_path / "a", Layout(zero=2), config), 1, "")[0]["loss_scaler"]
    assert vars(dynamic) == {
        **{"scale_factor": 2.0, "scale_window": 9, "min_scale": 1, "delayed_shift": 3, "dtype": torch.float16},
        **{"consecutive_hysteresis": False, "raise_error_at_min_scale": True},
        **saved,
    }
    config["fp16"] = {"enabled": True, "loss_scale": 512}
    static = optimizer_files(write(raw.catalog, tmp_path / "b", Layout(zero=3), config), 1, "")[0]
    assert vars(static["loss_scaler"]) == {"cur_scale": 512.0, "dynamic": False}
    assert static["dynamic_loss_scale"] is False
    plain = optimizer_files(write(raw.catalog, tmp_path / "c", Layout(zero=1), {**ADAMW, **BF16}), 1, "bf16_")[0]
    assert vars(plain["loss_scaler"]) == {"cur_scale": 1.0, "dynamic": False}


def test_bf16_optimizer_has_whole_partitions_and_no_scaler(source: Raw, tmp_path: Path) -> None:
    config = {**ADAMW, **BF16, "data_types": {"grad_accum_dtype": "fp32"}}
    saved = optimizer_files(write(source.catalog, tmp_path / "out", Layout(dp=7, zero=1), config), 7, "bf16_")
    assert not {"zero_stage", "loss_scaler", "param_alignment_paddings"} & set(saved[0])
    sizes = {len(state["single_partition_of_fp32_groups"][1]) for state in saved}
    assert sizes == {2}  # 6 elements, aligned to 14
    assert [state["group_paddings"][1] for state in saved] == [0, 0, 0, 0, 0, 0, 8]


def test_before_the_first_step_there_are_no_states(source: Raw, tmp_path: Path) -> None:
    tensors = {key: tensor for key, tensor in source.catalog.tensors.items() if key[1] == "param"}
    parameters = {
        name: dataclasses.replace(info, states={"param": info.states["param"]}, scalars={})
        for name, info in source.catalog.parameters.items()
    }
    catalog = dataclasses.replace(source.catalog, tensors=tensors, parameters=parameters)
    for stage in (1, 3):
        saved = optimizer_files(write(catalog, tmp_path / str(stage), Layout(zero=stage), None), 1, "bf16_")[0]
        assert saved["base_optimizer_state" if stage == 1 else "optimizer_state_dict"]["state"] == {}


def test_tensors_in_the_client_state_are_copied(tmp_path: Path) -> None:
    from ucp.storage.torch_pt.values import TensorRef

    raw = raw_source(tmp_path / "source")
    rank0 = raw.catalog.files[0].path
    ref = TensorRef(rank0, 24, "float32", (2, 3), (3, 1), "cpu", ("0", 6))
    state = dataclasses.replace(
        raw.catalog.training_state,
        client_state={"rng": [ref, {"again": ref}], "plain": np.arange(3), "args": argparse.Namespace(lr=1, t=(ref,))},
    )
    catalog = dataclasses.replace(raw.catalog, training_state=state)
    model = write(catalog, tmp_path / "out", Layout(zero=1), None)["mp_rank_00_model_states.pt"]
    wanted = torch.from_numpy(np.fromfile(rank0, "<f4", 6, offset=24).reshape(2, 3))
    assert same(model["rng"][0], wanted)
    assert model["rng"][1]["again"] is model["rng"][0]
    assert model["args"].t[0] is model["rng"][0]
    assert model["args"].lr == 1
    assert model["plain"].tolist() == [0, 1, 2]


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layout", "config", "error", "words"),
    [
        (Layout(dp=2, tp=2, zero=1), None, Unsupported, "nothing says how 2 tensor-parallel ranks cut the model"),
        (Layout(pp=2), None, BadArgument, "which layers each stage has"),
        (Layout(dp=2, ep=2, zero=1), None, Unsupported, "no experts"),
        (Layout(zero=2), {"zero_optimization": {"stage": 3}}, BadArgument, "stage 3, the layout for stage 2"),
        (Layout(zero=1), {"bf16": {"enabled": "auto"}}, BadArgument, "'enabled' is 'auto'"),
        (Layout(zero=3), {"zero_optimization": {"sub_group_size": "auto"}}, BadArgument, "'sub_group_size' is 'auto'"),
        (Layout(zero=1), {"bf16": True}, BadArgument, "'bf16' is True"),
        (Layout(zero=1), {**BF16, **FP16}, BadArgument, "both bf16 and fp16"),
        (
            Layout(zero=2),
            {"zero_optimization": {"offload_optimizer": {"device": "nvme"}}},
            Unsupported,
            "offloads the optimizer to NVMe",
        ),
        (
            Layout(zero=3),
            {"zero_optimization": {"offload_optimizer": {"device": "cpu", "ratio": 0.5}}},
            Unsupported,
            "leaves the second optimizer.* without moments",
        ),
        (
            Layout(zero=3),
            {"zero_optimization": {"offload_optimizer": {"device": "cpu", "super_offload": True}}},
            Unsupported,
            "asks for SuperOffload",
        ),
        (Layout(zero=3), {"zero_optimization": {"elastic_checkpoint": True}}, Unsupported, "elastic_checkpoint"),
        (Layout(zero=3), {"zero_optimization": {"mics_shard_size": 2}}, Unsupported, "mics_shard_size"),
        (Layout(zero=2), {"zero_optimization": {"zenflow": {"topk_ratio": 0.1}}}, Unsupported, "asks for ZenFlow"),
        (Layout(zero=1), {"tensor_parallel": {"autotp_size": 2}}, BadArgument, "autotp_size"),
        (Layout(zero=3), {"optimizer": {"type": "Adagrad"}}, Unsupported, "Adagrad at stage 3"),
        (
            Layout(zero=1),
            {"bf16": {"enabled": True, "bf16_master_weights_and_grads": True}},
            Mismatch,
            "float32 in the checkpoint and bfloat16 in the target",
        ),
    ],
)
def test_refused_targets(
    source: Raw, layout: Layout, config: Mapping[str, Any] | None, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        native.plan(source.catalog, layout, config)


def changed(raw: Raw, **changes: Any) -> Catalog:
    return dataclasses.replace(raw.catalog, training_state=dataclasses.replace(raw.catalog.training_state, **changes))


def test_a_source_without_a_config_needs_one(source: Raw) -> None:
    with pytest.raises(BadArgument, match="--ds-config"):
        native.plan(changed(source, config={}), Layout(zero=1))
    assert native.plan(changed(source, config={}), Layout(zero=1), ADAMW)


def test_a_source_without_hyperparameters_is_refused(source: Raw) -> None:
    groups = tuple(ParamGroup(names, None) for names in GROUPS)
    with pytest.raises(Unsupported, match="hyperparameters of param group 0"):
        native.plan(changed(source, param_groups=groups), Layout(zero=1))


@pytest.mark.parametrize(
    ("groups", "words"),
    [
        ((), "no optimizer param groups"),
        ((ParamGroup(GROUPS[0], {}),), "'head.bias' lies in no param group"),
        ((ParamGroup((*GROUPS[0], *GROUPS[1], "mask"), {}),), "'mask' is in a param group, but"),
        ((ParamGroup((*GROUPS[0], *GROUPS[1], "scale"), {}),), "'scale' lies in two param groups"),
    ],
)
def test_groups_that_do_not_hold_every_parameter_once(source: Raw, groups: Any, words: str) -> None:
    with pytest.raises(Unsupported, match=words):
        native.plan(changed(source, param_groups=groups), Layout(zero=1))


def with_info(raw: Raw, name: str, **changes: Any) -> Catalog:
    parameters = {**raw.catalog.parameters, name: dataclasses.replace(raw.catalog.parameters[name], **changes)}
    return dataclasses.replace(raw.catalog, parameters=parameters)


def test_steps_that_differ_inside_a_flat_buffer(source: Raw) -> None:
    catalog = with_info(source, "scale", scalars={"step": 6.0})
    for stage in (1, 2, 3):
        with pytest.raises(Unsupported, match=r"'layer.0.bias' and 'scale' differ in 'step' \(7.0 and 6.0\)"):
            native.plan(catalog, Layout(zero=stage))
    # A subgroup of its own keeps a parameter apart, and so does stage 0.
    alone = {**ADAMW, **BF16, "zero_optimization": {"sub_group_size": 1}}
    assert native.plan(catalog, Layout(zero=3), alone)
    assert native.plan(catalog, Layout(zero=0))


def test_states_that_differ_inside_a_flat_buffer(source: Raw) -> None:
    catalog = with_info(source, "scale", states={"param": "float32", "exp_avg": "float32"})
    with pytest.raises(Unsupported, match=r"'scale', which shares a flat buffer with it .* has \['exp_avg'\]"):
        native.plan(catalog, Layout(zero=2))
    assert native.plan(catalog, Layout(zero=0))


def test_another_gradient_clipping_is_said(source: Raw, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        native.plan(changed(source, clip_grad=0.25), Layout(zero=1), {**ADAMW, "gradient_clipping": 1.0})
    assert "gradient clipping was 0.25 in the source and is 1.0" in caplog.text


def test_gradient_clipping_stays_where_the_config_does_not_say(source: Raw, tmp_path: Path) -> None:
    """Before 0.19.3 nothing was clipped then; DeepSpeed takes what stages 1 and 2 have in their files."""
    files = write(changed(source, clip_grad=0.0), tmp_path / "out", Layout(dp=2, zero=1), {**ADAMW, **BF16})
    assert [state["clip_grad"] for state in optimizer_files(files, 2, "bf16_")] == [0.0, 0.0]


def test_a_recorded_config_does_not_say_whose_adam_it_was(source: Raw, tmp_path: Path) -> None:
    """Before 0.19 DeepSpeed takes 'torch_adam' out of the config that it saves. The count's own form is kept."""
    for steps, kind in ((7.0, torch.Tensor), (7, int)):
        infos = {
            n: dataclasses.replace(info, scalars={"step": steps}) if info.scalars else info
            for n, info in source.catalog.parameters.items()
        }
        catalog = dataclasses.replace(changed(source, config={**ADAMW_ALONE, **BF16}), parameters=infos)
        files = write(catalog, tmp_path / kind.__name__, Layout(dp=2, zero=1), None)
        state = optimizer_files(files, 2, "bf16_")[0]["base_optimizer_state"]
        assert isinstance(state["state"][0]["step"], kind)
