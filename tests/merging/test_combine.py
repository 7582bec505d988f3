"""Whole merges: sources of different formats and layouts, any target; the truth is the formula over the arrays."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch

import ucp
from ucp.errors import BadArgument, DestinationError, Mismatch, UcpError, Unsupported
from ucp.inspection.digests import digests_of
from ucp.merging import merge
from ucp.merging.language import loads

SHAPES = {
    "model.embed_tokens.weight": (48, 16),
    "model.layers.0.w.weight": (33, 16),
    "model.layers.1.w.weight": (33, 16),
    "model.norm.weight": (16,),
}
Weights = dict[str, torch.Tensor]


def weights(seed: int, dtype: torch.dtype = torch.float32) -> Weights:
    draw = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=draw).to(dtype) for name, shape in SHAPES.items()}


def saved(path: Path, seed: int, *, steps: int = 3, extra: Mapping[str, object] | None = None) -> Path:
    """A training state of these weights with Adam's states, by `ucp.save_training`."""
    model = torch.nn.Module()
    model.model = torch.nn.Module()  # type: ignore[assignment]
    for name, tensor in weights(seed).items():
        at = model
        *parents, last = name.split(".")
        for part in parents:
            if not hasattr(at, part):
                at.add_module(part, torch.nn.Module())
            at = getattr(at, part)
        at.register_parameter(last, torch.nn.Parameter(tensor.clone()))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.0)
    draw = torch.Generator().manual_seed(seed + 100)
    for _ in range(steps):
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=draw)
        optimizer.step()
    ucp.save_training(path, model=model, optimizer=optimizer, step=steps, extra=extra)
    return path


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("sources")
    return [saved(folder / f"{k}", k) for k in range(3)]


def read(path: Path, state: str = "param") -> dict[str, np.ndarray]:
    with ucp.open(path) as checkpoint:
        return {name: checkpoint.read(name, state).float().numpy() for name in checkpoint.parameters}


def config(stage: int) -> dict[str, object]:
    return {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": stage}}


def files(path: Path) -> dict[str, bytes]:
    """All files but the records, which name the sources' paths and formats."""
    return {p.name: p.read_bytes() for p in path.rglob("*") if p.is_file() and p.name not in ("merge.json", "ucp.json")}


def test_the_mean_in_every_format(three: list[Path], tmp_path: Path) -> None:
    report = merge(three, tmp_path / "mean", weights=(1, 2, 3))
    assert report.weights == (1 / 6, 2 / 6, 3 / 6)
    x = [{n: t.double().numpy() for n, t in weights(k).items()} for k in range(3)]
    expected = {n: ((x[0][n] + 2 * x[1][n] + 3 * x[2][n]) / 6).astype(np.float32) for n in SHAPES}
    found = read(tmp_path / "mean")
    assert set(found) == set(SHAPES)
    for name, array in found.items():
        assert array.tobytes() == expected[name].tobytes()
    for to in ("dcp", "huggingface"):
        merge(three, tmp_path / to, weights=(1, 2, 3), to=to)
        with ucp.open(tmp_path / to) as checkpoint:
            for name in SHAPES:
                assert checkpoint.read(name).numpy().tobytes() == expected[name].tobytes()
    with ucp.open(tmp_path / "mean") as checkpoint:
        assert all(set(info.states) == {"param"} for info in checkpoint.parameters.values())
        assert checkpoint.training_state.global_steps == 0
        checkpoint.verify()


def test_layouts_formats_workers_and_memory_do_not_count(three: list[Path], tmp_path: Path) -> None:
    sources = [tmp_path / "zero1", tmp_path / "zero3", tmp_path / "hf"]
    ucp.convert(three[0], sources[0], to="deepspeed", layout="dp=4,zero=1", ds_config=config(1))
    ucp.convert(three[1], sources[1], to="deepspeed", layout="dp=2,zero=3", ds_config=config(3))
    ucp.convert(three[2], sources[2], to="huggingface")
    folders = []
    for k, source in enumerate(three):
        folders.append(tmp_path / f"folder{k}")
        ucp.convert(source, folders[-1], to="huggingface")
    merge(folders, tmp_path / "plain", to="huggingface", weights=(0.2, 0.3, 0.6))
    plain = files(tmp_path / "plain")
    for name, settings in {
        "mixed": {},
        "one worker": {"workers": 1},
        "little memory": {"max_memory": 64 << 20},
        "two workers": {"workers": 2},
    }.items():
        merge(sources, tmp_path / name, to="huggingface", weights=(0.2, 0.3, 0.6), **settings)
        assert files(tmp_path / name) == plain, name


def test_one_source_whole_is_a_conversion(three: list[Path], tmp_path: Path) -> None:
    merge(three, tmp_path / "merged", weights=(1, 0, 0), to="huggingface")
    ucp.convert(three[0], tmp_path / "converted", to="huggingface")
    assert files(tmp_path / "merged") == files(tmp_path / "converted")


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_half_precision_is_rounded_once(dtype: str, tmp_path: Path) -> None:
    kind = {"bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    sources = []
    for k in range(3):
        sources.append(tmp_path / f"{k}")
        ucp.save({"model": weights(k, kind)}, sources[-1])
    merge(sources, tmp_path / "out", weights=(0.5, 0.3, 0.2), normalize=False)
    x = [{n: t.double() for n, t in weights(k, kind).items()} for k in range(3)]
    with ucp.open(tmp_path / "out") as checkpoint:
        for name in SHAPES:
            wide = 0.5 * x[0][name] + 0.3 * x[1][name] + 0.2 * x[2][name]
            found = checkpoint.read(name)
            assert found.dtype == kind
            # float64 to a half type in torch goes by float32; what is nearest is told by the neighbours
            assert ((found.double() - wide).abs() <= (wide.to(kind).double() - wide).abs()).all()


def test_ties_and_a_merge_file(three: list[Path], tmp_path: Path) -> None:
    x = [{n: t.double().numpy() for n, t in weights(k).items()} for k in range(3)]
    text = f"""merge: 1
sources: {{a: '{three[0]}', b: '{three[1]}', c: '{three[2]}'}}
parameters:
  "model.layers.{{i}}.*": "lerp(a, b, t=(i+1)/4)"
  "model.norm.weight": "c"
  "*": "0.7*a + 0.3*c"
"""
    report = merge([], tmp_path / "out", recipe=loads(text))
    found = read(tmp_path / "out")
    for i in (0, 1):
        name = f"model.layers.{i}.w.weight"
        wide = x[0][name] + (i + 1) / 4 * (x[1][name] - x[0][name])
        assert np.array_equal(found[name], wide.astype(np.float32))
    assert np.array_equal(found["model.norm.weight"], x[2]["model.norm.weight"].astype(np.float32))
    name = "model.embed_tokens.weight"
    assert np.array_equal(found[name], (0.7 * x[0][name] + 0.3 * x[2][name]).astype(np.float32))
    assert sum(report.lines.values()) == len(SHAPES)
    merge(three[1:], tmp_path / "ties", "ties", base=three[0], density=0.5)
    for name, array in read(tmp_path / "ties").items():
        deltas = []
        for k in (1, 2):
            d = x[k][name] - x[0][name]
            flat = np.abs(d).reshape(-1)
            kept = np.zeros(flat.size, bool)
            kept[np.argsort(-flat, kind="stable")[: flat.size // 2]] = True
            deltas.append(np.where(kept.reshape(d.shape), d, 0))
        sign = np.where(deltas[0] + deltas[1] >= 0, 1, -1)
        agree = [np.sign(d) == sign for d in deltas]
        count = np.maximum(agree[0].astype(float) + agree[1], 1)
        wide = x[0][name] + (np.where(agree[0], deltas[0], 0) + np.where(agree[1], deltas[1], 0)) / count
        assert np.array_equal(array, wide.astype(np.float32))


def test_optimizer_states(three: list[Path], tmp_path: Path) -> None:
    merge(three, tmp_path / "average", optimizer="average", weights=(1, 1, 2))
    for state in ("exp_avg", "exp_avg_sq"):
        x = [read(source, state) for source in three]
        for name, array in read(tmp_path / "average", state).items():
            wide = (x[0][name].astype(float) + x[1][name] + 2 * x[2][name].astype(float)) / 4
            assert np.array_equal(array, wide.astype(np.float32))
    merge(three, tmp_path / "from", optimizer=1)
    assert read(tmp_path / "from", "exp_avg").keys() == SHAPES.keys()
    for name, array in read(tmp_path / "from", "exp_avg").items():
        assert np.array_equal(array, read(three[1], "exp_avg")[name])
    with ucp.open(tmp_path / "from") as checkpoint:
        assert checkpoint.training_state.global_steps == 3
    merge(three, tmp_path / "native", optimizer=1, to="deepspeed", layout="dp=2,zero=1", ds_config=config(1))
    assert np.array_equal(
        read(tmp_path / "native", "exp_avg")["model.norm.weight"], read(three[1], "exp_avg")["model.norm.weight"]
    )
    later = saved(tmp_path / "later", 5, steps=4)
    with pytest.raises(Mismatch, match=r"has step \[.*3.*4.*\] in the sources"):
        merge([three[0], later], tmp_path / "no", optimizer="average")
    merge([three[0], later], tmp_path / "max", optimizer="average", step="max")
    with pytest.raises(BadArgument, match="second moments"):
        merge(three, tmp_path / "no", weights=(2, 0.5, -1), optimizer="average")


def test_metrics_from_the_checkpoints(tmp_path: Path) -> None:
    sources = [saved(tmp_path / f"{k}", k, extra={"ucp_metrics": {"loss": loss}}) for k, loss in enumerate((2.0, 0.5))]
    assert merge(sources, tmp_path / "out", "mwa", penalty=1.0).weights == pytest.approx((0.2, 0.8))
    steps = [saved(tmp_path / f"s{k}", k, steps=k) for k in (1, 3)]
    assert merge(steps, tmp_path / "steps", "mwa", penalty=1.0, form="step").weights == pytest.approx((0.25, 0.75))
    with pytest.raises(BadArgument, match="says no loss"):
        merge(steps, tmp_path / "no", "mwa", penalty=1.0)
    (steps[0] / "trainer_state.json").write_text(
        json.dumps({"log_history": [{"step": 1, "loss": 1.5}, {"step": 2, "loss": 0.1}]})
    )
    (steps[1] / "trainer_state.json").write_text(json.dumps({"log_history": [{"step": 3, "loss": 0.5}]}))
    assert merge(steps, tmp_path / "hf", "mwa", penalty=1.0).weights == pytest.approx((0.25, 0.75))


def test_the_record(three: list[Path], tmp_path: Path) -> None:
    merge(three, tmp_path / "out", "ema", beta=0.5)
    said = json.loads((tmp_path / "out" / "merge.json").read_text())
    assert (said["method"], said["options"], said["weights"]) == ("ema", {"beta": 0.5}, [0.25, 0.25, 0.5])
    assert [source["path"] for source in said["sources"]] == [str(path) for path in three]
    assert len({source["digest"] for source in said["sources"]}) == 3
    for source, path in zip(said["sources"], three, strict=True):
        with ucp.open(path) as checkpoint:
            assert source["digest"] == digests_of(checkpoint, compute=True).all
    ucp.convert(three[0], tmp_path / "same")
    merge([tmp_path / "same"], tmp_path / "copy")
    assert (
        json.loads((tmp_path / "copy/merge.json").read_text())["sources"][0]["digest"] == said["sources"][0]["digest"]
    )


def test_interrupted_and_continued(three: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge(three, tmp_path / "out", progress=stop)
    assert not (tmp_path / "out").exists()
    merge(three, tmp_path / "out")
    merge(three, tmp_path / "again")
    assert files(tmp_path / "out") == files(tmp_path / "again")


def damaged(path: Path, name: str, value: float) -> Path:
    state = weights(0)
    state[name].view(-1)[7] = value
    ucp.save({"model": state}, path)
    return path


def test_refusals_leave_nothing(three: list[Path], tmp_path: Path) -> None:
    other = tmp_path / "other"
    ucp.save({"model": {**weights(0), "more.weight": torch.zeros(3)}}, other)
    wide = tmp_path / "wide"
    ucp.save({"model": {**weights(0), "model.norm.weight": torch.zeros(17)}}, wide)
    counted = []
    for k in range(2):
        counted.append(tmp_path / f"counted{k}")
        ucp.save({"model": {**weights(k), "count": torch.tensor([k])}}, counted[-1])
    nan = damaged(tmp_path / "nan", "model.layers.1.w.weight", float("nan"))
    before = sorted(tmp_path.iterdir())
    for sources, settings, message in (
        ([three[0], other], {}, "lacks 'more.weight'"),
        ([three[0], wide], {}, r"\[16\] .* \[17\]"),
        ([three[0], nan], {}, "'model.layers.1.w.weight' .* nan at element 7"),
        (counted, {}, r"'count' \(int64\) differs"),
        (three, {"weights": (1, 1, -2)}, "sum to 0"),
        (three, {"weights": (0, 0, 0), "normalize": False}, "not all 0"),
        (three, {"method": "slerp", "t": (0.5,)}, "between 2 checkpoints, found 3"),
        (three, {"method": "task"}, "needs a base"),
        (three, {"optimizer": "sum"}, "'none', 'average' or the number"),
        ([tmp_path / "gone"], {"dtype": "int32"}, "floating type, found 'int32'"),
        (three, {"colour": "red"}, "takes no option 'colour'"),
        ([tmp_path / "gone"], {}, "no such file or folder"),
        ([f"{three[0]}@step9"], {}, "no checkpoint|not the name|no such"),
    ):
        with pytest.raises(UcpError, match=message):
            merge(sources, tmp_path / "out", **settings)
        assert sorted(tmp_path.iterdir()) == before, message
    with pytest.raises(DestinationError):
        merge(three, three[0])
    merge(counted, tmp_path / "out", buffers=1)
    with ucp.open(tmp_path / "out") as checkpoint:
        assert checkpoint.read("count").tolist() == [1]
    merge([three[0], nan], tmp_path / "allowed", allow_nonfinite=True)
    assert np.isnan(read(tmp_path / "allowed")["model.layers.1.w.weight"]).sum() == 1


def test_quantised_and_tied_otherwise(tmp_path: Path) -> None:
    for k in range(2):
        ucp.save({"model": {"w": torch.randn(4, 4).to(torch.float8_e4m3fn)}}, tmp_path / f"f8-{k}")
    with pytest.raises(Unsupported, match="'w' is float8_e4m3fn, quantised"):
        merge([tmp_path / "f8-0", tmp_path / "f8-1"], tmp_path / "out")
    for name, is_tied in (("tied", True), ("apart", False)):
        model = torch.nn.ModuleDict({"embed": torch.nn.Linear(4, 4, False), "head": torch.nn.Linear(4, 4, False)})
        if is_tied:
            model["head"].weight = model["embed"].weight
        ucp.save_training(tmp_path / name, model=model)
    with pytest.raises(Mismatch, match=r"is a parameter of its own in .*apart.* and tied to another in"):
        merge([tmp_path / "apart", tmp_path / "tied"], tmp_path / "out")
    with pytest.raises(Mismatch, match=r"is a parameter of its own in .*apart.* and tied to another in"):
        merge([tmp_path / "tied", tmp_path / "apart"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("fails", [False, True])
def test_a_command_shares_its_work_with_processes_of_its_own(three: list[Path], tmp_path: Path, fails: bool) -> None:
    merge(three, tmp_path / "alone", "ties", base=three[0], density=0.4)
    command = [sys.executable, "-m", "ucp.cli.main", "merge", *three, tmp_path / "shared", "--method", "ties"]
    command += ["--base", tmp_path / "nothing" if fails else three[0], "--density", "0.4", "--processes", "3"]
    done = subprocess.run(
        list(map(str, command)),
        cwd=Path(__file__).resolve().parents[2],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    if fails:
        assert done.returncode == 2
        assert len(done.stderr.splitlines()) == 1
        assert not (tmp_path / "shared").exists()
    else:
        assert done.returncode == 0, done.stderr
        assert files(tmp_path / "shared") == files(tmp_path / "alone")


@pytest.mark.slow
def test_two_processes_share_a_merge(three: list[Path], tmp_path: Path) -> None:
    merge(three, tmp_path / "alone", "ties", base=three[0], density=0.4)
    command = [sys.executable, "-m", "ucp.cli.main", "merge", *three, tmp_path / "shared"]
    started = [
        subprocess.Popen(
            [*map(str, command), "--method", "ties", "--base", str(three[0]), "--density", "0.4"],
            cwd=Path(__file__).resolve().parents[2],
            env={**os.environ, "RANK": str(k), "WORLD_SIZE": "2"},
            stderr=subprocess.PIPE,
        )
        for k in (0, 1)
    ]
    said = [process.communicate(timeout=120)[1] for process in started]
    assert [process.returncode for process in started] == [0, 0], said
    assert files(tmp_path / "shared") == files(tmp_path / "alone")
