"""Pipelines whose files name nothing: the one split of the layers that the optimizers' states allow, or a refusal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ucp.errors import Unsupported
from ucp.formats.deepspeed.read.model_files import ModelFile
from ucp.formats.deepspeed.read.unnamed_pipeline import split, with_names
from ucp.geometry import row_major
from ucp.storage.torch_pt.values import TensorRef

PATH = Path("run")
WEIGHT, BIAS, NORM, EMBED = (4, 6), (6,), (4,), (9, 4)


def ref(shape: tuple[int, ...]) -> TensorRef:
    return TensorRef("file", 0, "float32", shape, row_major(shape), "cpu", ("0", 1))


def model(*shapes: tuple[int, ...], groups: tuple[int, ...] = (), buffers: tuple[str, ...] = ()) -> ModelFile:
    """A stage's model file whose optimizer keeps states of these shapes; groups: how many of them in each group."""
    state = {i: {"step": 3, "exp_avg": ref(shape)} for i, shape in enumerate(shapes)}
    numbers = iter(range(len(shapes)))
    counts = groups or (len(shapes),)
    optimizer = {"state": state, "param_groups": [{"params": [next(numbers) for _ in range(n)]} for n in counts]}
    return ModelFile(PATH / "mp_rank_00_model_states.pt", {"optimizer": optimizer, "buffer_names": list(buffers)})


def block(index: int) -> dict[str, Any]:
    return {f"{index}.weight": ref(WEIGHT), f"{index}.bias": ref(BIAS)}


TIE = {"tied_modules.embed.weight": ref(EMBED)}
LAYERS = [TIE, block(1), block(2), block(3), {"4.norm": ref(NORM)}]
NAMES = [[name for layer in LAYERS for name in layer]]


def names_of(*layers: dict[str, Any]) -> list[str]:
    return [name for layer in layers for name in layer]


def test_a_run_of_layers_for_each_stage() -> None:
    models = [model(EMBED, WEIGHT, BIAS), model(WEIGHT, BIAS, WEIGHT, BIAS, NORM)]
    found = split(PATH, models, LAYERS, None)
    assert found == [names_of(TIE, block(1)), names_of(block(2), block(3), {"4.norm": 0})]


def test_a_tied_module_that_a_later_stage_uses_as_a_function() -> None:
    models = [model(EMBED, WEIGHT, BIAS), model(EMBED, WEIGHT, BIAS, WEIGHT, BIAS, NORM)]
    found = split(PATH, models, LAYERS, NAMES)
    assert found == [names_of(TIE, block(1)), names_of(TIE, block(2), block(3), {"4.norm": 0})]


def test_a_tied_module_with_two_files() -> None:
    models = [model(EMBED, WEIGHT, BIAS), model(EMBED, WEIGHT, BIAS, WEIGHT, BIAS, NORM)]
    assert split(PATH, models, [*LAYERS, TIE], NAMES)[1][0] == "tied_modules.embed.weight"


def test_frozen_parameters_and_buffers_are_left_out() -> None:
    layers = [{"0.weight": ref(WEIGHT), "0.seen": ref((2,)), "0.frozen": ref((5,))}, block(1)]
    models = [model(WEIGHT, buffers=("0.seen",)), model(WEIGHT, BIAS)]
    assert split(PATH, models, layers, [["0.weight", "1.weight", "1.bias"]]) == [["0.weight"], ["1.weight", "1.bias"]]
    with pytest.raises(Unsupported, match="no splits"):
        split(PATH, models, layers, None)


def test_equal_sizes_in_another_shape_are_no_split() -> None:
    layers = [{"0.a": ref((2, 6))}, {"1.b": ref((3, 4))}]
    assert split(PATH, [model((2, 6)), model((3, 4))], layers, None) == [["0.a"], ["1.b"]]
    with pytest.raises(Unsupported, match="no splits"):
        split(PATH, [model((3, 4)), model((2, 6))], layers, None)


def test_what_more_than_one_split_would_make_is_refused() -> None:
    """Either stage may have the second use of one of two tied modules that look alike."""
    ties = [{f"tied_modules.{tie}.weight": ref(EMBED)} for tie in ("a", "b")]
    names = [[*names_of(*ties), *names_of(block(2))]]
    models = [model(EMBED, EMBED), model(EMBED, WEIGHT, BIAS)]
    with pytest.raises(Unsupported, match="2 splits"):
        split(PATH, models, [*ties, block(2)], names)


def test_no_states_tell_nothing() -> None:
    empty = ModelFile(
        PATH / "mp_rank_00_model_states.pt", {"optimizer": {"state": {}, "param_groups": [{"params": [0]}]}}
    )
    with pytest.raises(Unsupported, match="no states"):
        split(PATH, [empty], [block(0)], None)


def test_names_are_recorded_in_the_groups() -> None:
    own = names_of(block(1), block(2))
    groups = [["1.weight", "2.weight", "3.weight"], ["1.bias", "2.bias", "3.bias"]]
    found = with_names(model(WEIGHT, WEIGHT, BIAS, BIAS, groups=(2, 2)), own, groups)
    assert [g["param_names"] for g in found["param_groups"]] == [["1.weight", "2.weight"], ["1.bias", "2.bias"]]


@pytest.mark.parametrize(
    "groups",
    [
        None,
        [["1.weight", "2.weight", "1.bias", "2.bias"]],  # another number of groups
        [["2.weight", "1.weight"], ["1.bias", "2.bias"]],  # not in the module's order
        [["1.weight"], ["1.bias", "2.bias", "2.weight"]],
    ],
)
def test_groups_that_are_not_the_files_say_nothing(groups: list[list[str]] | None) -> None:
    saved = model(WEIGHT, WEIGHT, BIAS, BIAS, groups=(2, 2))
    assert with_names(saved, names_of(block(1), block(2)), groups) is saved.raw["optimizer"]
