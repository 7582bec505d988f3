"""Merge files: what they say for a parameter, and refusals that point at the place."""

from __future__ import annotations

import pytest

from ucp.errors import SpecError
from ucp.merging.language import loads
from ucp.merging.operations import Combination, Differences, Drawn, Largest, Lerp, Linear, Slerp

FILE = """\
merge: 1
sources: {a: runs/x@step100, b: runs/y, base: runs/z}
parameters:
  "model.layers.{i}.*": "lerp(a, b, t=i/31)"
  "model.layers.{i}.mlp.*": "slerp(a, b, t=1 - i/4)"
  "lm_head.*": "a"
  "model.norm.weight": "ties(base, 0.5*a + b/4, density=0.4)"
  "*": "0.7*a + 0.3*b"
"""


@pytest.mark.parametrize(
    ("name", "operation"),
    [
        ("model.layers.3.self_attn.q_proj.weight", Lerp(0, 1, 3 / 31)),
        ("model.layers.1.mlp.up_proj.weight", Slerp(0, 1, 0.75)),
        ("lm_head.weight", Linear(((0, 1.0),))),
        ("model.norm.weight", Differences(2, ((0, 0.5), (1, 0.25)), 1.0, Largest(0.4), elected=True)),
        ("model.embed_tokens.weight", Linear(((0, 0.7), (1, 0.3)))),
        ("anything", Linear(((0, 0.7), (1, 0.3)))),
    ],
)
def test_the_most_specific_line_counts(name: str, operation: Combination) -> None:
    assert loads(FILE).operation(name) == operation


def of(expression: str) -> Combination:
    return loads(f'merge: 1\nsources: {{a: x, b: y}}\nparameters:\n  "*": "{expression}"\n').operation("w")


@pytest.mark.parametrize(
    ("expression", "operation"),
    [
        ("(a + 2*b) / 3", Linear(((0, 1 / 3), (1, 2 / 3)))),
        ("-a + b*(1 + 0.5)", Linear(((0, -1.0), (1, 1.5)))),
        ("a - b", Linear(((0, 1.0), (1, -1.0)))),
        (" a ", Linear(((0, 1.0),))),
        ("task(a, b - 0.5*a, scale=0.3)", Differences(0, ((1, 1.0), (0, -0.5)), 0.3)),
        ("dare(a, b, density=0.5, seed=3)", Differences(0, ((1, 1.0),), 1.0, Drawn(0.5, 3))),
    ],
)
def test_sums_and_calls(expression: str, operation: Combination) -> None:
    assert of(expression) == operation


@pytest.mark.parametrize(
    ("expression", "column", "message"),
    [
        ("0.7*a + 0.3*c", 21, r"no source 'c'; .*known are a, b"),
        ("a * b", 9, "not multiplied"),
        ("a + 1", 9, "can't be added"),
        ("a / 0", 13, "other than 0"),
        ("lerp(a, b)", 9, "needs t="),
        ("lerp(a, b, u=1)", 9, "takes t; found u"),
        ("lerp(a, t=1)", 9, "of 2 tensors, found 1"),
        ("lerp(a, 2*b, t=1)", 17, "one source alone"),
        ("blend(a, b)", 9, "no such call; known are lerp"),
        ("a + lerp(a, b, t=1)", 13, "no part of a sum"),
        ("0.5", 9, "a number is no tensor"),
        ("a +", 12, "not an expression"),
        ("a.b", 9, "has no meaning here"),
        ("__import__('os')", 9, "no such call"),
        ("a if b else a", 9, "has no meaning here"),
        ("ties(a, b, density=2)", 9, "above 0 and is at most 1"),
        ("9" * 3000, 9, "at most 2000 characters"),
    ],
)
def test_refusals_point_at_the_place(expression: str, column: int, message: str) -> None:
    with pytest.raises(SpecError, match=message) as caught:
        of(expression)
    assert str(caught.value).startswith(f"merge:4:{column}: ")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "merge:1:1: a merge file is empty"),
        ("merge: 2\nsources: {a: x}\nparameters: {w: a}", "merge:1:8: version 2"),
        ("merge: 1\nsources: {a: x}", "no 'parameters:'"),
        ("merge: 1\nsources: {a b: x}\nparameters: {w: a}", "merge:2:11: a source is called by letters"),
        ("merge: 1\nsorces: {a: x}\nparameters: {w: a}", "'sorces' is no part of a merge file; did you mean 'sources'"),
        ("merge: [", "not YAML"),
    ],
)
def test_files_that_are_none(text: str, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        loads(text)


def test_a_name_that_fits_no_line_or_two() -> None:
    head = "merge: 1\nsources: {a: x}\nparameters:\n"
    with pytest.raises(SpecError, match="no pattern fits 'v'"):
        loads(f"{head}  w: a\n").operation("v")
    with pytest.raises(SpecError, match=r"merge:4:3: 'x.w' fits '\*.w' and 'x.\*', which are equally|equally specific"):
        loads(f'{head}  "*.{{i}}": a\n  "*.{{j}}": a\n').operation("x.1")
