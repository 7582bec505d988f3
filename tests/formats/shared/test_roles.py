"""Roles of a state dict's entries, by their names."""

from __future__ import annotations

from typing import Any

import pytest

from ucp.errors import Unsupported
from ucp.formats.shared.roles import Roles, StateEntry, assign, param_groups

SHAPES = {"embed.weight": (5, 3), "head.bias": (3,), "gain": ()}


def model(prefix: str, extra: dict[str, tuple[int, ...]] | None = None) -> dict[str, StateEntry]:
    first = (prefix,) if prefix else ()
    found = {**SHAPES, **(extra or {})}
    return {".".join((*first, name)): StateEntry((*first, name), shape) for name, shape in found.items()}


def states(root: str) -> dict[str, StateEntry]:
    out = {}
    for name, shape in SHAPES.items():
        for state, size in (("exp_avg", shape), ("step", ())):
            path = (root, "state", name, state)
            out[".".join(path)] = StateEntry(path, size)
    return out


def nested(
    root: str = "optim", groups: tuple[Any, ...] = (["embed.weight"], ["gain", "head.bias"])
) -> dict[str, StateEntry]:
    out = states(root)
    for index, names in enumerate(groups):
        out[f"{root}.param_groups.{index}.params"] = StateEntry((root, "param_groups", index, "params"), None, names)
        out[f"{root}.param_groups.{index}.lr"] = StateEntry((root, "param_groups", index, "lr"), None, 0.1 * index)
    return out


def flattened(root: str = "optimizer") -> dict[str, StateEntry]:
    out = states(root)
    for name in SHAPES:
        key = f"param_groups.{name}.lr"
        out[f"{root}.{key}"] = StateEntry((root, key), None, 0.0 if name == "embed.weight" else 0.1)
    return out


def everything(roles: Roles) -> set[str]:
    return {*roles.tensors, *roles.scalars, *roles.options, *roles.members, *roles.values}


@pytest.mark.parametrize("prefix", ["model", "net", "", "module"])
@pytest.mark.parametrize("optimizer", [nested(), flattened()], ids=["nested", "flattened"])
def test_parameters_are_called_as_the_module_calls_them(prefix: str, optimizer: dict[str, StateEntry]) -> None:
    entries = {**model(prefix, {"seen": ()}), **optimizer, "epoch": StateEntry(("epoch",), None, 3)}
    roles = assign(entries)
    assert everything(roles) == set(entries)
    named = {*((name, "param") for name in (*SHAPES, "seen")), *((name, "exp_avg") for name in SHAPES)}
    assert set(roles.tensors.values()) == named
    assert set(roles.scalars.values()) == {(name, "step") for name in SHAPES}
    assert roles.values == ["epoch"]
    assert (roles.trained, roles.outside) == (set(SHAPES), [])
    assert [roles.kind(n, True) for n in ("gain", "seen")] == ["parameter", "frozen"]
    groups = param_groups(
        roles, {g: {o: entries[k].value for k, (h, o) in roles.options.items() if h == g} for g in roles.groups}, repr
    )
    assert [(set(g.names), g.options) for g in groups] == [
        ({"embed.weight"}, {"lr": 0.0}),
        ({"gain", "head.bias"}, {"lr": 0.1}),
    ]


def test_a_moving_average_beside_the_model() -> None:
    roles = assign({**model("ema"), **model("model"), **nested()})
    assert roles.tensors["model.gain"] == ("gain", "param")
    assert roles.tensors["ema.gain"] == ("ema.gain", "param")
    assert roles.outside == sorted(f"ema.{name}" for name in SHAPES)


def test_what_is_open_is_not_guessed() -> None:
    """Two that look like the model, neither called so; or an optimizer that numbers its parameters."""
    for entries in ({**model("a"), **model("b"), **nested()}, {**model("model"), **nested(groups=([0], [1, 2]))}):
        roles = assign(entries)
        assert everything(roles) == set(entries)
        assert roles.trained == set()
        assert not roles.options
    assert roles.tensors["model.gain"] == ("gain", "param")


def test_without_an_optimizer() -> None:
    assert assign(model("model")).tensors["model.gain"] == ("gain", "param")
    assert assign(model("net")).tensors["net.gain"] == ("net.gain", "param")
    # A flat name that begins so is not nested under "model": Hugging Face's, say.
    flat = assign({"model.gain": StateEntry(("model.gain",), ())})
    assert flat.tensors["model.gain"] == ("model.gain", "param")


def test_states_of_other_shapes_are_tensors_by_themselves() -> None:
    entries = {**model("model"), **nested()}
    entries["optim.state.embed.weight.row"] = StateEntry(("optim", "state", "embed.weight", "row"), (5,))
    entries["optim.state.embed.weight.mu"] = StateEntry(("optim", "state", "embed.weight", "mu"), (1,))
    roles = assign(entries)
    assert roles.tensors["optim.state.embed.weight.row"] == ("optim.state.embed.weight.row", "param")
    assert roles.scalars["optim.state.embed.weight.mu"] == ("embed.weight", "mu")


def test_what_is_nested_beside_bare_names_is_outside() -> None:
    entries = {
        **model(""),
        **flattened(),
        "train.step": StateEntry(("train", "step"), ()),
        "mean": StateEntry(("mean",), (2,)),
    }
    roles = assign(entries)
    assert roles.outside == ["train.step"]
    assert roles.model == {*SHAPES, "mean"}


def test_parts_of_a_model_or_none() -> None:
    """Entries have the same names whether or not the whole model is asked for."""
    part = {k: e for k, e in model("model").items() if "bias" in k}
    roles = assign({**part, **nested()}, complete=False)
    assert roles.tensors["model.head.bias"] == ("head.bias", "param")
    for found in (roles, assign(nested(), False), assign(flattened("optim"), False)):
        assert found.tensors["optim.state.embed.weight.exp_avg"] == ("embed.weight", "exp_avg")
        assert found.scalars["optim.state.embed.weight.step"] == ("embed.weight", "step")
    # What is saved needs the weights: the states of others are tensors by themselves.
    key = "optim.state.embed.weight.exp_avg"
    assert assign({**part, **nested()}).tensors[key] == (key, "param")


def test_two_optimizers() -> None:
    entries = {**model("model"), **nested("a", (["embed.weight"],)), **nested("b", (["gain"],))}
    roles = assign(entries)
    assert roles.trained == {"embed.weight", "gain"}
    assert everything(roles) == set(entries)
    assert list(roles.groups) == ["a.param_groups.0", "b.param_groups.0"]


def test_two_of_one_name_are_refused() -> None:
    with pytest.raises(Unsupported, match=r"'model\.gain' and 'gain' .* would both be called 'gain'"):
        assign({**model("model"), **nested(), "gain": StateEntry(("gain",), (2,))})
