"""Every spec in the catalogue against the real model of its family."""

from __future__ import annotations

import pytest

from tests.spec.models import MODELS, config_of, names_of
from ucp.errors import BadArgument
from ucp.spec import shipped
from ucp.spec.bound import bind
from ucp.spec.check import check_names
from ucp.spec.evaluate import shape_of


@pytest.mark.parametrize("name", MODELS)
def test_every_parameter_has_one_line_and_its_shape(name: str) -> None:
    module = MODELS[name].make()
    found = names_of(module)
    bound = bind(shipped.find(MODELS[name].spec), config_of(module))
    report = check_names(bound, found.shapes, found.buffers, found.aliases)
    assert [str(p) for p in report.problems] == []
    assert report.padding == {}
    for one in report.checked:
        if one.name not in found.buffers:
            assert one.found is not None, one.name
            assert shape_of(one.found.expression, bound.sizes) == found.shapes.get(
                one.name, found.shapes.get(found.aliases.get(one.name, ""))
            )
            assert len([a for a in bound.lines if a.pattern.match(one.name) is not None]) >= 1


@pytest.mark.parametrize("name", MODELS)
def test_tied_parameters_are_those_that_the_module_ties(name: str) -> None:
    module = MODELS[name].make()
    found = names_of(module)
    bound = bind(shipped.find(MODELS[name].spec), config_of(module))
    assert {n: bound.owner(n) for n in {**found.shapes, **found.aliases} if bound.owner(n)} == found.aliases


@pytest.mark.parametrize("name", MODELS)
def test_the_model_type_finds_the_spec(name: str) -> None:
    found = shipped.for_model(config_of(MODELS[name].make())["model_type"])
    assert found is not None
    assert found.file.endswith(f"/{MODELS[name].spec}.yaml")


def test_names_and_files() -> None:
    assert set(shipped.names()) >= {m.spec for m in MODELS.values()} | {"megatron_gpt", "megatron_gpt_plain"}
    assert shipped.for_model("falcon") is None
    with pytest.raises(BadArgument, match="no spec 'lama' in the catalogue; did you mean 'llama'"):
        shipped.find("lama")
    with pytest.raises(BadArgument, match=r"nowhere\.yaml: can't be read as a spec: No such file"):
        shipped.find("nowhere.yaml")
