"""A run goes on with a model that was changed on purpose: what is declared is done, all else refused as ever.

The truth is the first run's own weights and optimizer states, cut, joined and filled up by hand.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import ucp
from ucp.errors import BadArgument, Mismatch, SpecError, Unsupported

ROWS, WIDTH, HEADS = 11, 6, 2


class Layer(nn.Module):
    def __init__(self, fused: bool) -> None:
        super().__init__()
        if fused:
            self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        else:
            self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parts = self.qkv(x).chunk(3, -1) if hasattr(self, "qkv") else (self.q(x), self.k(x), self.v(x))
        return x + parts[0] * torch.sigmoid(parts[1]) + parts[2]


class Net(nn.Module):
    def __init__(self, rows: int = ROWS, fused: bool = False, head: str = "head") -> None:
        super().__init__()
        self.embed = nn.Embedding(rows, WIDTH)
        self.layers = nn.ModuleList(Layer(fused) for _ in range(2))
        self.norm = nn.LayerNorm(WIDTH)
        setattr(self, head, nn.Linear(WIDTH, rows, bias=False))
        self.head_name = head

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        return getattr(self, self.head_name)(self.norm(x))


def made(seed: int, **kind: Any) -> Net:
    torch.manual_seed(seed)
    return Net(**kind)


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 3) -> list[float]:
    losses = []
    for step in range(steps):
        tokens = torch.randint(5, (4, 7), generator=torch.Generator().manual_seed(step))
        loss = nn.functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def states(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, torch.Tensor]]:
    return {
        name: {"param": p.detach().clone(), **{k: v.clone() for k, v in optimizer.state.get(p, {}).items()}}
        for name, p in model.named_parameters()
    }


class Run:
    """A run that has saved, and what it had."""

    def __init__(self, folder: Path, model: nn.Module) -> None:
        self.folder, self.model, self.optimizer = folder, model, adam(model)
        train(self.model, self.optimizer)
        ucp.save_training(folder, model=self.model, optimizer=self.optimizer, step=3)
        self.had = states(self.model, self.optimizer)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path / "saved", made(0))


def resumed(
    run: Run, model: nn.Module, changes: Mapping[str, Any] | str | None, **more: Any
) -> tuple[dict[str, dict[str, torch.Tensor]], Any]:
    optimizer = adam(model)
    report = ucp.load_training(run.folder, model=model, optimizer=optimizer, changes=changes, prove="always", **more)
    found = states(model, optimizer)
    train(model, optimizer, 1)
    return found, report.tensors


def same(found: Mapping[str, torch.Tensor], truth: Mapping[str, torch.Tensor]) -> None:
    assert found.keys() == truth.keys()
    for state, tensor in truth.items():
        assert torch.equal(found[state], tensor), state


def test_grown_rows_keep_their_weights_and_their_states_are_zero(run: Run) -> None:
    model = made(5, rows=ROWS + 4)
    new = {n: getattr(model, n).weight.detach().clone() for n in ("embed", "head")}
    found, report = resumed(run, model, {"resized": ["embed.weight", "head.weight"]})
    for name, before in run.had.items():
        if name.split(".")[0] not in new:
            same(found[name], before)
            continue
        for state in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(found[name][state][:ROWS], before[state])
            assert not found[name][state][ROWS:].any()
        assert torch.equal(found[name]["param"][:ROWS], before["param"])
        assert torch.equal(found[name]["param"][ROWS:], new[name.split(".")[0]][ROWS:])
        assert found[name]["step"] == before["step"]
    assert len(report.changes) == 2
    assert "from [11, 6] to [15, 6], new ones as the model made them and their optimizer states zero" in str(report)
    assert report.proof is not None
    assert report.proof.complete


def test_shrunk(run: Run) -> None:
    found, report = resumed(run, made(5, rows=ROWS - 3), {"resized": ["embed.weight", "head.weight"]})
    for name, before in run.had.items():
        cut = name in ("embed.weight", "head.weight")
        same(found[name], {k: v[: ROWS - 3] if cut and v.dim() else v for k, v in before.items()})
    assert report.proof is not None
    assert report.proof.complete


def test_new_rows_of_zeros_or_of_another_checkpoint(run: Run, tmp_path: Path) -> None:
    model = made(5, rows=ROWS + 4)
    other = tmp_path / "model"
    ucp.save({"model": {n: p.detach() for n, p in made(9, rows=ROWS + 4).named_parameters()}}, other)
    found, _ = resumed(run, model, {"resized": ["*.weight"], "new_rows": "zeros"})
    assert not found["embed.weight"]["param"][ROWS:].any()
    found, _ = resumed(run, model, {"resized": ["embed.weight", "head.weight"], "new_rows": str(other)})
    assert torch.equal(found["head.weight"]["param"][ROWS:], made(9, rows=ROWS + 4).head.weight[ROWS:])
    with pytest.raises(BadArgument, match="give a checkpoint of the changed model"):
        resumed(run, made(5, rows=ROWS + 5), {"resized": ["*.weight"], "new_rows": str(other)})


FUSED = {
    "sizes": {"q": WIDTH, "k": WIDTH, "v": WIDTH, "hidden": WIDTH},
    "parameters": {f"layers.{{i}}.{x}.{{w}}": x for x in ()}
    | {f"layers.{{i}}.{x}.weight": f"{x} hidden" for x in "qkv"}
    | {f"layers.{{i}}.{x}.bias": x for x in "qkv"},
    "names": {
        f"layers.{{i}}.qkv.{w}": {"from": [f"layers.{{i}}.{x}.{w}" for x in "qkv"], "as": f"(q | k | v){rest}"}
        for w, rest in (("weight", " hidden"), ("bias", ""))
    },
}
SPLIT = {
    "sizes": FUSED["sizes"],
    "parameters": {"layers.{i}.qkv.weight": "(q | k | v) hidden", "layers.{i}.qkv.bias": "(q | k | v)"},
    "names": {f"layers.{{i}}.qkv.{w}": {"to": [f"layers.{{i}}.{x}.{w}" for x in "qkv"]} for w in ("weight", "bias")},
}


def joined(had: Mapping[str, Mapping[str, torch.Tensor]]) -> dict[str, dict[str, torch.Tensor]]:
    out = {n: dict(t) for n, t in had.items() if not n.startswith("layers")}
    for i in range(2):
        for w in ("weight", "bias"):
            parts = [had[f"layers.{i}.{x}.{w}"] for x in "qkv"]
            out[f"layers.{i}.qkv.{w}"] = {
                k: torch.cat([p[k] for p in parts]) if parts[0][k].dim() else parts[0][k] for k in parts[0]
            }
    return out


def test_projections_are_fused_and_split_again(run: Run, tmp_path: Path) -> None:
    found, report = resumed(run, made(5, fused=True), FUSED)
    truth = joined(run.had)
    assert found.keys() == truth.keys()
    for name, tensors in truth.items():
        same(found[name], tensors)
    assert report.proof is not None
    assert report.proof.complete
    fused = Run(tmp_path / "fused", made(3, fused=True))
    found, _ = resumed(fused, made(5), SPLIT)
    for name, tensors in joined(found).items():
        same(tensors, fused.had[name])


def test_a_renamed_module(run: Run) -> None:
    found, report = resumed(run, made(5, head="lm_head"), {"names": {"lm_head.weight": "head.weight"}})
    same(found["lm_head.weight"], run.had["head.weight"])
    same(found["layers.1.q.weight"], run.had["layers.1.q.weight"])
    assert report.changes == ("names: 'head.weight' became 'lm_head.weight'",)
    assert report.proof is not None
    assert report.proof.tensors == 3 * len(run.had)


class Stacked(nn.Module):
    """Two layers' weights in one parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(2, WIDTH, WIDTH))


class Listed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(2))


def stepped(folder: Path, model: nn.Module) -> dict[str, dict[str, torch.Tensor]]:
    optimizer = adam(model)
    for p in model.parameters():
        p.grad = torch.randn(p.shape)
    optimizer.step()
    ucp.save_training(folder, model=model, optimizer=optimizer, step=1)
    return states(model, optimizer)


@pytest.mark.parametrize("stacks", [True, False])
def test_layers_are_stacked_or_listed(tmp_path: Path, stacks: bool) -> None:
    sizes = {"layers": 2, "out": WIDTH, "hidden": WIDTH}
    ways = {
        True: {"w": {"from": "layers.{l}.weight", "stack": {"l": "layers"}, "as": "layers out hidden"}},
        False: {"w": {"to": "layers.{l}.weight", "stack": {"l": "layers"}}},
    }
    own = {True: {"layers.{l}.weight": "out hidden"}, False: {"w": "layers out hidden"}}
    had = stepped(tmp_path / "saved", Listed() if stacks else Stacked())
    model: nn.Module = Stacked() if stacks else Listed()
    optimizer = adam(model)
    changes = {"sizes": sizes, "parameters": own[stacks], "names": ways[stacks]}
    ucp.load_training(tmp_path / "saved", model=model, optimizer=optimizer, changes=changes)
    found = states(model, optimizer)
    one, several = (found, had) if stacks else (had, found)
    for state in ("param", "exp_avg", "exp_avg_sq"):
        assert torch.equal(one["w"][state], torch.stack([several[f"layers.{k}.weight"][state] for k in range(2)]))


def test_unfrozen_and_frozen_parameters(tmp_path: Path) -> None:
    def frozen(name: str) -> nn.Module:
        model = made(4)
        model.get_submodule(name).requires_grad_(False)
        return model

    run = Run(tmp_path / "saved", frozen("embed"))
    model = frozen("norm")
    with pytest.raises(Mismatch, match=r'declare it: changes=\{.*"unfrozen": \["embed.weight"\]'):
        resumed(run, model, None)
    changes = {"unfrozen": ["embed.*"], "frozen": ["norm.*"]}
    found, report = resumed(run, model, changes)
    for name, before in run.had.items():
        if name.startswith("norm"):
            same(found[name], {"param": before["param"]})
        elif name == "embed.weight":
            assert torch.equal(found[name]["param"], before["param"])
            assert not any(found[name][s].any() for s in ("exp_avg", "exp_avg_sq", "step"))
        else:
            same(found[name], before)
    assert [line.split(":")[0] for line in report.changes] == ["frozen", "unfrozen"]


def test_added_and_removed_parameters(run: Run) -> None:
    model = made(5)
    model.extra = nn.Linear(WIDTH, 2)  # type: ignore[assignment]
    del model.norm
    model.norm = nn.Identity()  # type: ignore[assignment]
    fresh = model.extra.weight.detach().clone()
    with pytest.raises(Mismatch, match=r"changes=\{.*extra.weight.*norm"):
        resumed(run, model, None)
    optimizer = adam(model)
    report = ucp.load_training(
        run.folder, model=model, optimizer=optimizer, changes={"added": ["extra.*"], "removed": ["norm.*"]}
    )
    found = states(model, optimizer)
    same(found["head.weight"], run.had["head.weight"])
    assert torch.equal(found["extra.weight"]["param"], fresh)
    assert not any(found["extra.weight"][s].any() for s in ("exp_avg", "exp_avg_sq", "step"))
    assert [line.split(":")[0] for line in report.tensors.changes] == ["removed", "added"]


def test_masters_of_another_element_type(run: Run) -> None:
    model = made(5).to(torch.bfloat16)
    with pytest.raises(Mismatch, match='"dtype": '):
        resumed(run, model, None)
    found, report = resumed(run, model, {"dtype": {"*": "bfloat16"}})
    for name, before in run.had.items():
        same(found[name], {k: v.to(torch.bfloat16) if v.dim() else v for k, v in before.items()})
    assert "to bfloat16, rounded once" in str(report)


def test_what_the_checkpoint_has_already_is_no_change(run: Run) -> None:
    """A program declares its changes once, for all its restarts."""
    changes = {"resized": ["head.weight"], "unfrozen": ["embed.*"], "frozen": ["none-of.*", "embed.*"]}
    with pytest.raises(BadArgument, match=r"frozen: 'none-of\.\*' is no parameter"):
        resumed(run, made(5), changes)
    changes["frozen"].pop(0)
    found, report = resumed(run, made(5), changes)
    assert report.changes == ()
    for name, before in run.had.items():
        same(found[name], before)


REFUSED: dict[str, tuple[Any, type[Exception], str]] = {
    "an unknown part": ({"resize": ["x"]}, SpecError, "did you mean 'resized'"),
    "no pattern": ({"resized": [""]}, SpecError, "empty pattern"),
    "no shape": ({"resized": {"embed.weight": [-1, 6]}}, SpecError, "whole numbers"),
    "no element type": ({"dtype": {"*": "int8"}}, SpecError, "floating"),
    "an unknown element type": ({"dtype": {"*": "bf17"}}, SpecError, "not supported"),
    "adapters": ({"adapters": "joined"}, SpecError, "merged with their scale"),
    "no way": ({"adapters": {}}, SpecError, "says nothing"),
    "a way for states": ({"states": "shrunk"}, SpecError, "can be 'dequantised' or 'requantised'"),
    "a scale": ({"adapters": {"merged": "big"}}, SpecError, "alpha / r"),
    "sizes for nothing": ({"sizes": {"a": 1}}, SpecError, "there are none"),
    "another version": ({"changes": 2}, SpecError, "this program reads 1"),
    "two of a name": ({"names": {"head.weight": "embed.weight"}}, Mismatch, "both be called"),
    "other dimensions": ({"resized": {"embed.weight": [5]}}, Mismatch, "not the number of dimensions"),
    "no plain values": ({"resized": [Path("x")]}, BadArgument, "plain values"),
    "no file": ("nothing/there.yaml", BadArgument, "cannot be read"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(run: Run, case: str) -> None:
    changes, error, text = REFUSED[case]
    model = made(5)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    with pytest.raises(error, match=text):
        resumed(run, model, changes)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_a_file_of_changes(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "changes.yaml"
    file.write_text("resized: [embed.weight]\n", encoding="utf-8")
    with pytest.raises(SpecError, match="begins with changes: 1"):
        resumed(run, made(5), str(file))
    file.write_text("changes: 1\nabout: rows\nresized: [embed.weight, head.weight]\n", encoding="utf-8")
    found, _ = resumed(run, made(5, rows=ROWS + 1), str(file))
    assert torch.equal(found["embed.weight"]["param"][:ROWS], run.had["embed.weight"]["param"])


def test_another_undeclared_change_beside_a_declared_one_is_refused(run: Run) -> None:
    with pytest.raises(Mismatch, match=r"head.weight' is \[11, 6\] in the checkpoint and \[15, 6\] here"):
        resumed(run, made(5, rows=ROWS + 4), {"resized": ["embed.weight"]})


class TestConversion:
    def test_grown_with_zeros_and_shrunk(self, run: Run, tmp_path: Path) -> None:
        changes = {
            "resized": {"embed.weight": [ROWS + 2, WIDTH], "head.weight": [ROWS - 2, WIDTH]},
            "new_rows": "zeros",
        }
        report = ucp.convert(run.folder, tmp_path / "out", changes=changes)
        assert len(report.changes) == 2
        with ucp.open(tmp_path / "out") as out:
            for state in ("param", "exp_avg", "exp_avg_sq"):
                grown = out.read("embed.weight", state)
                assert torch.equal(grown[:ROWS], run.had["embed.weight"][state])
                assert not grown[ROWS:].any()
                assert torch.equal(out.read("head.weight", state), run.had["head.weight"][state][: ROWS - 2])

    def test_what_is_computed_is_not_virtual(self, run: Run, tmp_path: Path) -> None:
        with pytest.raises(Unsupported, match="is computed as it is read"):
            ucp.convert(run.folder, tmp_path / "out", changes={"dtype": {"*": "bfloat16"}}, virtual=True)

    def test_fused_renamed_frozen_and_in_bf16(self, run: Run, tmp_path: Path) -> None:
        names = {**FUSED["names"], "lm_head.weight": "head.weight"}
        changes = {**FUSED, "names": names, "frozen": ["norm.*"], "dtype": {"*:param": "bfloat16"}}
        ucp.convert(run.folder, tmp_path / "out", changes=changes)
        truth = joined(run.had)
        truth["lm_head.weight"] = truth.pop("head.weight")
        with ucp.open(tmp_path / "out") as out:
            assert set(out.parameters) == set(truth)
            for name, tensors in truth.items():
                assert torch.equal(out.read(name), tensors["param"].to(torch.bfloat16))
                if name.startswith("norm"):
                    assert set(out.parameters[name].states) == {"param"}
                else:
                    assert torch.equal(out.read(name, "exp_avg_sq"), tensors["exp_avg_sq"])
            assert all(not n.startswith("norm") for g in out.training_state.param_groups for n in g.names)

    @pytest.mark.parametrize(
        ("changes", "text"),
        [
            ({"unfrozen": ["embed.*"]}, "needs the model"),
            ({"added": ["embed.*"]}, "needs the model"),
            ({"adapters": "added"}, "needs the model"),
            ({"resized": ["embed.weight"]}, "needs the model"),
            ({"resized": {"embed.weight": [20, WIDTH]}}, "what its new rows are"),
        ],
    )
    def test_what_only_the_model_knows_is_refused(
        self, run: Run, tmp_path: Path, changes: Mapping[str, Any], text: str
    ) -> None:
        with pytest.raises(BadArgument, match=text):
            ucp.convert(run.folder, tmp_path / "out", changes=changes)
        assert not (tmp_path / "out").exists()


# --- adapters --------------------------------------------------------------------------------------------------------


def with_lora(model: nn.Module) -> nn.Module:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, lora_alpha=6, target_modules=["q", "v"], init_lora_weights=False)
    found: nn.Module = peft.get_peft_model(model, config)
    return found


@pytest.mark.slow
def test_lora_on_a_base_run(run: Run) -> None:
    model = with_lora(made(5))
    fresh = {n: p.detach().clone() for n, p in model.named_parameters() if "lora_" in n}
    with pytest.raises(Mismatch, match="changes="):
        resumed(run, model, None)
    found, report = resumed(run, model, {"adapters": "added"})
    for name, tensors in found.items():
        if "lora_" in name:
            assert torch.equal(tensors["param"], fresh[name])
            assert not any(t.any() for s, t in tensors.items() if s != "param")
        else:
            old = name.removeprefix("base_model.model.").replace(".base_layer", "")
            same(tensors, {"param": run.had[old]["param"]})
    assert "are below adapters now" in str(report)


@pytest.mark.slow
def test_adapters_are_merged_and_split_off(tmp_path: Path) -> None:
    run = Run(tmp_path / "saved", with_lora(made(4)))
    found, _ = resumed(run, made(5), {"adapters": {"merged": 3.0}, "unfrozen": ["*"]})
    with torch.no_grad():
        truth = run.model.double().merge_and_unload().float()  # type: ignore[operator]
    for name, p in truth.named_parameters():
        assert torch.equal(found[name]["param"], p), name
        assert not found[name]["exp_avg"].any()
    found, _ = resumed(run, made(5), {"adapters": "split", "unfrozen": ["*"]})
    same_base = run.had["base_model.model.layers.0.q.base_layer.weight"]["param"]
    assert torch.equal(found["layers.0.q.weight"]["param"], same_base)
    ucp.convert(run.folder, tmp_path / "merged", changes={"adapters": {"merged": 3}})
    with ucp.open(tmp_path / "merged") as out:
        for name, p in truth.named_parameters():
            assert torch.equal(out.read(name), p)


@pytest.mark.slow
def test_several_adapters_are_not_merged(tmp_path: Path) -> None:
    model = with_lora(made(4))
    model.add_adapter("second", model.peft_config["default"])  # type: ignore[operator, union-attr, index]
    run = Run(tmp_path / "saved", model)
    with pytest.raises(Unsupported, match="has several adapters"):
        resumed(run, made(5), {"adapters": {"merged": 3.0}})
