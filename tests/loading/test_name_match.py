"""Which name of a checkpoint is which of a model: equal ones first, then those that wrappers made different."""

from __future__ import annotations

import pytest

from tests.saving.parts import Saved, catalog
from ucp.catalog import bare
from ucp.loading.name_match import match


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a.weight", "a.weight"),
        ("module.a.weight", "a.weight"),
        ("module.module.a.weight", "a.weight"),
        ("module._orig_mod.a.weight", "a.weight"),
        ("_orig_mod.a._orig_mod.weight", "a.weight"),
        ("a.module.weight", "a.module.weight"),  # a submodule that the model itself calls so
        ("module", "module"),
        ("_orig_mod", "_orig_mod"),
    ],
)
def test_bare_takes_off_what_wrappers_put_on(name: str, expected: str) -> None:
    assert bare(name) == expected


def test_equal_names_match() -> None:
    assert match(catalog({"a": Saved(), "b": Saved()}), ["b", "a"]) == {"a": "a", "b": "b"}


def test_a_name_that_the_checkpoint_lacks_is_left_out() -> None:
    assert match(catalog({"a": Saved()}), ["a", "c"]) == {"a": "a"}


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_wrappers_on_either_side_are_looked_through(prefix: str) -> None:
    names = ["a.weight", "b.module.weight"]
    wrapped = [prefix + n for n in names]
    assert match(catalog({n: Saved() for n in wrapped}), names) == dict(zip(names, wrapped, strict=True))
    assert match(catalog({n: Saved() for n in names}), wrapped) == dict(zip(wrapped, names, strict=True))


def test_equal_names_go_before_names_that_only_wrappers_make_equal() -> None:
    found = match(catalog({"module.a": Saved(), "a": Saved()}), ["module.a", "a"])
    assert found == {"module.a": "module.a", "a": "a"}


def test_two_candidates_without_their_wrappers_are_no_match() -> None:
    assert match(catalog({"module.a": Saved(), "_orig_mod.a": Saved()}), ["a"]) == {}
    assert match(catalog({"a": Saved()}), ["module.a", "_orig_mod.a"]) == {}


def test_a_tied_name_is_its_owners() -> None:
    tied = catalog({"embed": Saved(aliases=("head",))})
    assert match(tied, ["head"]) == {"head": "embed"}
    assert match(tied, ["_orig_mod.head"]) == {"_orig_mod.head": "embed"}


def test_one_tensor_is_not_given_to_two_parameters() -> None:
    assert match(catalog({"embed": Saved(aliases=("head",))}), ["embed", "head"]) == {"embed": "embed"}
