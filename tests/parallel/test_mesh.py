"""Layouts as text."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.property import law
from ucp.errors import BadArgument
from ucp.parallel.mesh import Layout, parse_layout

counts = st.integers(1, 4096)
layouts = st.builds(
    lambda ep, share, tp, pp, zero: Layout(dp=ep * share, tp=tp, pp=pp, ep=ep, zero=zero),
    counts,
    counts,
    counts,
    counts,
    st.integers(0, 3),
)


@given(layouts)
@law(60)
def test_a_layout_is_read_back_from_its_text(layout: Layout) -> None:
    assert parse_layout(str(layout)) == layout


def test_text_names_what_differs_from_one() -> None:
    assert str(Layout(dp=4, zero=3)) == "dp=4,zero=3"
    assert str(Layout(dp=4, tp=2, pp=3, ep=2, zero=1)) == "dp=4,tp=2,pp=3,ep=2,zero=1"


def test_what_is_not_named_is_one() -> None:
    assert parse_layout("zero=2") == Layout(dp=1, tp=1, pp=1, ep=1, zero=2)
    assert parse_layout(" tp = 2 , dp=3,") == Layout(dp=3, tp=2)


def test_experts_add_no_ranks() -> None:
    assert Layout(dp=4, tp=3, pp=2, ep=2).world_size == 24


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("dp=4,sp=2", "unknown name 'sp'"),
        ("4", "unknown name '4'"),
        ("DP=4", "unknown name 'DP'"),
        ("dp=4,dp=4", "'dp' is given twice"),
        ("dp=2,stage=3", "unknown name 'stage'; did you mean 'zero=3'?"),
        ("dp=2,zero3", "unknown name 'zero3'; did you mean 'zero=3'?"),
        ("dp2,zero=1", "unknown name 'dp2'; did you mean 'dp=2'?"),
        ("dp=2,x3", "unknown name 'x3'; use dp, tp, pp, ep, zero"),
        ("world_size=8", "did you mean 'dp=8'?"),
        ("dp=", "'dp' needs a whole number, found ''"),
        ("dp", "'dp' needs a whole number, found ''"),
        ("dp=two", "'dp' needs a whole number, found 'two'"),
        ("dp=1.5", "'dp' needs a whole number, found '1.5'"),
        ("dp=2=3", "'dp' needs a whole number, found '2=3'"),
        ("dp=1_0", "'dp' needs a whole number, found '1_0'"),
        ("dp=0", "dp=0 is out of range"),
        ("tp=-1", "tp=-1 is out of range"),
        ("dp=99999999999", "out of range"),
        ("zero=4", "zero=4 is out of range (0 to 3)"),
        ("zero=-1", "zero=-1 is out of range"),
        ("dp=4,ep=3", "ep=3 does not divide dp=4"),
        ("ep=2", "ep=2 does not divide dp=1"),
    ],
)
def test_refusals_quote_the_layout(text: str, problem: str) -> None:
    with pytest.raises(BadArgument) as refused:
        parse_layout(text)
    assert problem in str(refused.value)
    assert f"layout '{text}'" in str(refused.value)
