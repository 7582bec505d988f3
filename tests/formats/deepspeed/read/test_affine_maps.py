"""Checkpoints whose affine maps no axes say: other blocks, and weights that ranks keep multiplied by a number.

No engine of DeepSpeed 0.19 writes a scale yet. So two tensor-parallel ranks are trained here with plain torch, and
their files are written as its engines write them. The truth is DeepSpeed's own ``rebuild``, and how training goes on.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ucp
from ucp.errors import DamagedCheckpoint, Mismatch, SpecError, Unsupported
from ucp.formats.deepspeed.read.scaled import POWERS
from ucp.inspection.verify import verify

D, H, OUT = 6, 8, 5
NAMES = ("fc1.weight", "fc2.weight", "fc2.bias")


@dataclass
class Ranks:
    """Two ranks of a row-parallel layer, in float64. ``bias`` makes the layer's bias of what both keep."""

    scale: float
    bias: Callable[[list[Tensor]], Tensor]
    weights: list[dict[str, nn.Parameter]] = field(default_factory=list)
    optimizers: list[torch.optim.Optimizer] = field(default_factory=list)

    def __post_init__(self) -> None:
        torch.manual_seed(0)
        fc1, fc2, bias = (torch.randn(*s, dtype=torch.float64) for s in ((H, D), (OUT, H), (OUT,)))
        for a, b in zip(fc1.chunk(2, 0), fc2.chunk(2, 1), strict=True):
            own = zip(NAMES, (a.clone(), b.clone(), bias * self.scale), strict=True)
            self.weights.append({name: nn.Parameter(tensor) for name, tensor in own})
            self.optimizers.append(torch.optim.AdamW(self.weights[-1].values(), lr=0.01, weight_decay=0.0))

    def __call__(self, x: Tensor) -> Tensor:
        parts = [torch.relu(x @ w["fc1.weight"].T) @ w["fc2.weight"].T for w in self.weights]
        return parts[0] + parts[1] + self.bias([w["fc2.bias"] for w in self.weights])

    def affine_map(self) -> dict[str, Any]:
        from deepspeed.checkpoint import affine

        return {
            "^fc1\\.weight$": affine.contiguous_split_map((H, D), [H // 2] * 2, 0).to_dict(),
            "^fc2\\.weight$": affine.contiguous_split_map((OUT, H), [H // 2] * 2, 1).to_dict(),
            "^fc2\\.bias$": affine.replicated_map((OUT,), 2, self.scale).to_dict(),
        }


def summed() -> Ranks:
    """Each rank keeps half of the bias, and the ranks' outputs are added up, as AutoTP does it."""
    return Ranks(0.5, lambda kept: kept[0] + kept[1])


def divided_out() -> Ranks:
    """Each rank keeps a quarter of the bias, and multiplies it by four before it is used once."""
    return Ranks(0.25, lambda kept: kept[0] * 4)


def train(model: Any, optimizers: list[torch.optim.Optimizer], first: int, steps: int) -> list[float]:
    """The losses of these steps, each on data of its own."""
    out = []
    for step in range(first, first + steps):
        data = torch.Generator().manual_seed(step)
        x, y = (torch.randn(16, n, generator=data, dtype=torch.float64) for n in (D, OUT))
        loss = ((model(x) - y) ** 2).mean()
        loss.backward()
        if isinstance(model, Ranks) and model.weights[1]["fc2.bias"].grad is None:  # every rank's backward is its own
            model.weights[1]["fc2.bias"].grad = model.weights[0]["fc2.bias"].grad.clone()  # type: ignore[union-attr]
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        out.append(loss.item())
    return out


def save(folder: Path, ranks: Ranks, maps: Mapping[str, Any]) -> Path:
    """A stage-0 checkpoint of two tensor-parallel ranks, as DeepSpeed's engine lays it out."""
    tag = folder / "global_step3"
    tag.mkdir(parents=True)
    for rank, (weights, optimizer) in enumerate(zip(ranks.weights, ranks.optimizers, strict=True)):
        state = {
            "module": {name: w.detach() for name, w in weights.items()},
            "buffer_names": [],
            "optimizer": optimizer.state_dict(),
            "param_shapes": None,
            "frozen_param_shapes": None,
            "shared_params": {},
            "frozen_param_fragments": None,
            "lr_scheduler": None,
            "data_sampler": None,
            "random_ltd": None,
            "sparse_tensor_module_names": [],
            "skipped_steps": 0,
            "global_steps": 3,
            "global_samples": 48,
            "dp_world_size": 1,
            "mp_world_size": 2,
            "ds_config": {},
            "ds_version": "0.19.8",
            "universal_checkpoint_info": {
                "universal_checkpoint_version": 0.4,
                "affine_map": {"version": 1, "params": dict(maps)},
            },
        }
        torch.save(state, tag / f"mp_rank_{rank:02d}_model_states.pt")
    (folder / "latest").write_text(tag.name)
    return folder


class Whole(nn.Module):
    """The same layer on one rank."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(D, H, bias=False, dtype=torch.float64)
        self.fc2 = nn.Linear(H, OUT, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(torch.relu(self.fc1(x)))


def resumed(path: Path, lr_of_bias: float, eps_of_bias: float, factor: float = 1.0) -> tuple[Whole, Any]:
    """A whole model with what the checkpoint holds, each state of the bias times ``factor`` to a power."""
    model = Whole()
    optimizer = torch.optim.AdamW(
        [
            {"params": [model.fc1.weight, model.fc2.weight]},
            {"params": [model.fc2.bias], "lr": lr_of_bias, "eps": eps_of_bias},
        ],
        lr=0.01,
        weight_decay=0.0,
    )
    with ucp.open(path) as checkpoint, torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(checkpoint.read(name))
            powers = {"exp_avg": 1, "exp_avg_sq": 2} if name == "fc2.bias" else {"exp_avg": 0, "exp_avg_sq": 0}
            moments = {state: checkpoint.read(name, state) * factor**power for state, power in powers.items()}
            step = torch.tensor(float(checkpoint.parameters[name].scalars["step"]))
            optimizer.state[parameter] = {"step": step, **moments}
    return model, optimizer


@pytest.mark.parametrize(("make", "lr", "eps"), [(summed, 0.02, 1e-8), (divided_out, 0.04, 0.25e-8)])
def test_training_goes_on_from_weights_and_moments_that_were_scaled(
    make: Callable[[], Ranks], lr: float, eps: float, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The learning rate and eps are those that make an update of the whole bias the ranks' own update of it."""
    from deepspeed.checkpoint.affine import ParamAffineMap

    ranks = make()
    train(ranks, ranks.optimizers, 0, 3)
    folder = save(tmp_path / "run", ranks, ranks.affine_map())
    with caplog.at_level(logging.WARNING), ucp.open(folder) as checkpoint:
        for pattern, name in zip(ranks.affine_map(), NAMES, strict=True):
            shards = {rank: w[name].detach() for rank, w in enumerate(ranks.weights)}
            truth = ParamAffineMap.from_dict(ranks.affine_map()[pattern]).rebuild(shards)
            assert torch.equal(checkpoint.read(name), truth), name
    assert f"kept multiplied by {ranks.scale}" in caplog.text
    assert "rounds" not in caplog.text
    model, optimizer = resumed(folder, lr, eps)
    wrong = resumed(folder, lr, eps, ranks.scale if make is divided_out else 1 / ranks.scale)
    going_on = train(ranks, ranks.optimizers, 3, 3)
    torch.testing.assert_close(train(model, [optimizer], 3, 3), going_on, rtol=0, atol=1e-12)
    other = train(wrong[0], [wrong[1]], 3, 3)
    assert abs(other[-1] - going_on[-1]) > 1e-6, "moments by the other rule train as well: the test shows nothing"


def test_scaled_tensors_are_converted_and_verified_like_others(tmp_path: Path) -> None:
    ranks = summed()
    train(ranks, ranks.optimizers, 0, 2)
    folder = save(tmp_path / "run", ranks, ranks.affine_map())
    ucp.convert(folder, tmp_path / "out")
    with ucp.open(folder) as source, ucp.open(tmp_path / "out") as copy:
        for name, info in source.parameters.items():
            for state in info.states:
                assert torch.equal(source.read(name, state), copy.read(name, state))
        assert torch.equal(copy.read("fc2.bias", region=(slice(1, 3),)), source.read("fc2.bias")[1:3])
    assert verify(folder).whole


@pytest.mark.parametrize("which", ["weight", "exp_avg"])
def test_copies_at_a_scale_are_compared(which: str, tmp_path: Path) -> None:
    ranks = summed()
    train(ranks, ranks.optimizers, 0, 2)
    bias = ranks.weights[1]["fc2.bias"]
    (bias.data if which == "weight" else ranks.optimizers[1].state[bias]["exp_avg"])[0] += 1
    with pytest.raises(Mismatch, match="drifted apart"):
        ucp.open(save(tmp_path / "run", ranks, ranks.affine_map()))


def test_a_state_without_a_rule_is_refused_and_a_scale_that_rounds_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ranks = Ranks(1 / 3, lambda kept: kept[0] * 3)
    train(ranks, ranks.optimizers, 0, 1)
    folder = save(tmp_path / "run", ranks, ranks.affine_map())
    with caplog.at_level(logging.WARNING), ucp.open(folder) as checkpoint:
        torch.testing.assert_close(checkpoint.read("fc2.bias"), ranks.weights[0]["fc2.bias"].detach() * 3)
    assert "which rounds them" in caplog.text
    for optimizer in ranks.optimizers:
        for state in optimizer.state.values():
            state["curvature"] = state.pop("exp_avg_sq")
    with pytest.raises(Unsupported, match="nothing says what that makes of its state 'curvature'"):
        ucp.open(save(tmp_path / "other", ranks, ranks.affine_map()))
    assert POWERS["param"] == 1


def as_checkpoint(folder: Path, shards: list[Tensor], entry: Mapping[str, Any]) -> Path:
    """Two ranks' shards of one tensor."""
    ranks = summed()
    ranks.weights = [{"w": nn.Parameter(shard.clone())} for shard in shards]
    ranks.optimizers = [torch.optim.SGD(w.values(), lr=0.1) for w in ranks.weights]
    return save(folder, ranks, {"^w$": entry})


def odd_maps() -> dict[str, Any]:
    """Maps of DeepSpeed's own that no axes say."""
    from deepspeed.checkpoint.affine import AffinePiece, ParamAffineMap, block_gather_map, sub_param_map

    def piece(shape: tuple[int, ...], source: int, dest: int, ranks: list[int], inner: tuple[int, ...]) -> AffinePiece:
        return AffinePiece(shape, source, (6, 1), dest, inner, ranks)

    # Ranks cut a 4 x 6 tensor along both dimensions, hold two rows in common, and divide these differently.
    grid = ParamAffineMap(
        (4, 6),
        {0: (4, 4), 1: (4, 4)},
        {
            0: [piece((4, 2), 0, 0, [0], (4, 1)), piece((4, 2), 2, 2, [0, 1], (4, 1))],
            1: [
                piece((1, 2), 2, 0, [0, 1], (4, 1)),
                piece((3, 2), 8, 4, [0, 1], (4, 1)),
                piece((4, 2), 4, 2, [1], (4, 1)),
            ],
        },
    )
    return {
        "blocks out of order": block_gather_map((8, 3), {0: [3, 0], 1: [1, 2]}, 2, 0),
        "uneven parts that are unlike": sub_param_map((12, 2), [7, 5], [[4, 3], [3, 2]], 0),
        "two dimensions, and parts in common": grid,
    }


@pytest.mark.parametrize(
    "name", ["blocks out of order", "uneven parts that are unlike", "two dimensions, and parts in common"]
)
def test_maps_that_no_axes_say_are_read_as_deepspeed_rebuilds_them(name: str, tmp_path: Path) -> None:
    found = odd_maps()[name]
    truth = torch.randn(found.logical_shape)
    shards = [found.extract(truth, rank) for rank in range(2)]
    folder = as_checkpoint(tmp_path / "run", shards, found.to_dict())
    with ucp.open(folder) as checkpoint:
        assert torch.equal(checkpoint.read("w"), truth)
        assert torch.equal(checkpoint.read("w", region=(slice(1, 3), slice(1, 2))), truth[1:3, 1:2])
    ucp.convert(folder, tmp_path / "out")
    with ucp.open(tmp_path / "out") as copy:
        assert torch.equal(copy.read("w"), truth)


def test_parts_in_common_that_differ_are_refused(tmp_path: Path) -> None:
    found = odd_maps()["two dimensions, and parts in common"]
    shards = [found.extract(torch.randn(4, 6), rank) for rank in range(2)]
    shards[1].view(-1)[4] += 1
    with pytest.raises(Mismatch, match="drifted apart"):
        ucp.open(as_checkpoint(tmp_path / "run", shards, found.to_dict()))


def pieces(entry: dict[str, Any], rank: int) -> list[dict[str, Any]]:
    return entry["ranks"][rank]["pieces"]  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda e: pieces(e, 0)[0].update(scale=0.0), DamagedCheckpoint, "multiplied by 0.0"),
        (lambda e: pieces(e, 0)[0].update(scale=float("nan")), DamagedCheckpoint, "multiplied by nan"),
        (lambda e: pieces(e, 0)[0].update(source=[10**30, [6, 1]]), DamagedCheckpoint, "outside of"),
        (lambda e: pieces(e, 0)[0].update(source=[0, [1, 6]]), SpecError, "another order of dimensions"),
        (lambda e: pieces(e, 0)[1].update(dest=[0, [4, 1]]), DamagedCheckpoint, "are not its shard"),
        (lambda e: pieces(e, 0)[0].update(locations=[0, 1]), DamagedCheckpoint, "are said to hold"),
        (lambda e: pieces(e, 0)[0].update(source=[2, [6, 1]]), DamagedCheckpoint, "not the whole tensor"),
        (lambda e: pieces(e, 0)[1].update(scale=0.5), SpecError, "multiplied by different numbers"),
        (lambda e: e.update(logical_shape=[1 << 40, 1 << 40]), DamagedCheckpoint, "is no shape"),
        (lambda e: pieces(e, 0)[0].update(shape=[4]), SpecError, "another number of dimensions"),
    ],
)  # fmt: skip
def test_maps_that_contradict_themselves_are_refused(
    change: Callable[[dict[str, Any]], Any], error: type[Exception], message: str, tmp_path: Path
) -> None:
    found = odd_maps()["two dimensions, and parts in common"]
    shards = [found.extract(torch.randn(4, 6), rank) for rank in range(2)]
    entry = found.to_dict()
    change(entry)
    with pytest.raises(error, match=message):
        ucp.open(as_checkpoint(tmp_path / "run", shards, entry))


SPEC = """
ucp: 1
model: two-layers
sizes: {h: 8, d: 6, o: 5}
parameters:
  fc1.weight: "h/tp d"
  fc2.weight: "o h/tp"
  fc2.bias: "o"
"""


@pytest.fixture
def spec(tmp_path: Path) -> Path:
    path = tmp_path / "two.yaml"
    path.write_text(SPEC)
    return path


ADAMW = {"optimizer": {"type": "AdamW", "params": {"torch_adam": True}}, "train_micro_batch_size_per_gpu": 1}


def unscaled(folder: Path) -> Path:
    """A checkpoint in float32, with nothing multiplied."""
    ranks = Ranks(1.0, lambda kept: kept[0])
    train(ranks, ranks.optimizers, 0, 2)
    for weights, optimizer in zip(ranks.weights, ranks.optimizers, strict=True):
        for weight in weights.values():
            optimizer.state[weight] = {key: value.float() for key, value in optimizer.state[weight].items()}
            weight.data = weight.data.float()
    return save(folder, ranks, ranks.affine_map())


@pytest.mark.parametrize("zero", [0, 1, 3])
def test_what_is_written_for_tensor_parallel_ranks_says_how_it_is_cut(zero: int, tmp_path: Path, spec: Path) -> None:
    """No spec is needed to read it, and each rank's part is what DeepSpeed's ``extract`` takes from the whole."""
    from deepspeed.checkpoint.affine import ParamAffineMap

    source = unscaled(tmp_path / "run")
    config = {**ADAMW, "zero_optimization": {"stage": zero}}
    ucp.convert(source, tmp_path / "out", "deepspeed", f"dp=2,tp=4,zero={zero}", spec=spec, ds_config=config)
    with ucp.open(source) as before, ucp.open(tmp_path / "out") as after:
        assert after.layout.tp == 4
        for name, info in before.parameters.items():
            for state in info.states:
                assert torch.equal(after.read(name, state), before.read(name, state)), (name, state)
        whole = {name: before.read(name) for name in before.parameters}
    if zero == 3:
        return  # the module's tensors are empty there
    for rank in range(4):
        path = next((tmp_path / "out").glob(f"*/mp_rank_{rank:02d}_model_states.pt"))
        found = torch.load(path, weights_only=False)
        maps = found["universal_checkpoint_info"]["affine_map"]["params"]
        for pattern, name in zip(ranks_patterns(), NAMES, strict=True):
            read = ParamAffineMap.from_dict(maps[pattern])
            read.validate_coverage()
            assert torch.equal(found["module"][name], read.extract(whole[name], rank))


def ranks_patterns() -> list[str]:
    return [f"^{name}$".replace(".", "\\.") for name in NAMES]


@pytest.mark.slow
def test_deepspeeds_converter_puts_together_what_is_written_for_tensor_parallel_ranks(
    tmp_path: Path, spec: Path
) -> None:
    import argparse

    from deepspeed.checkpoint.ds_to_universal import main

    source = unscaled(tmp_path / "run")
    ucp.convert(source, tmp_path / "out", "deepspeed", "dp=2,tp=2,zero=1", spec=spec, ds_config=ADAMW)
    tag = (tmp_path / "out" / "latest").read_text()
    arguments = {"input_folder": str(tmp_path / "out" / tag), "output_folder": str(tmp_path / "theirs")}
    options = {"num_extract_workers": 1, "num_merge_workers": 1, "keep_temp_folder": False, "strict": True}
    (tmp_path / "theirs").mkdir()
    main(argparse.Namespace(**arguments, **options, inject_missing_state=True))
    with ucp.open(source) as checkpoint:
        for name, info in checkpoint.parameters.items():
            for state in info.states:
                file = tmp_path / "theirs" / "zero" / name / f"{'fp32' if state == 'param' else state}.pt"
                found = torch.load(file, weights_only=False)["param"]
                assert torch.equal(found, checkpoint.read(name, state)), (name, state)
