"""Local tensors of all ranks, lifted into logical ones: laws on random cuts, and padding and copies by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given

from tests.property import HOLE, cut, generators, ids, law, partitions
from tests.spec import naive
from tests.spec.naive import expression
from ucp.errors import Mismatch, SpecError, Unsupported
from ucp.geometry import Blocks, compose, concat, coverage_fault, restrict, whole
from ucp.parallel.mesh import Coordinate, Layout
from ucp.spec.bound import Bound, bind
from ucp.spec.evaluate import Cutting, shard
from ucp.spec.factored import kept_axes
from ucp.spec.language import loads
from ucp.spec.placement import place
from ucp.spec.places import held_first, uncut


@given(generators)
@law(100)
def test_fragments_of_a_shard_are_fragments_of_the_tensor(rng: np.random.Generator) -> None:
    """However a shard's buffer is cut further, its pieces hold just what numpy takes of the whole tensor."""
    case = naive.Maker(rng).case()
    tensor = ids(naive.shape(case))
    for at in naive.everywhere(case):
        found = shard(expression(case.text), case.sizes, Cutting(case.mesh, case.rule, case.widths), at)
        local = naive.taken(case, at, tensor)
        inner, lengths = partitions(rng, found.shape)
        blocks, index = compose(inner, found.blocks, found.shape, found.logical)
        np.testing.assert_array_equal(blocks.buffers, inner.buffers[index])
        expected = cut(inner, lengths, local) if local.size else []
        for buffer, wanted in zip(cut(blocks, lengths, tensor), expected, strict=False):
            np.testing.assert_array_equal(buffer, wanted)


@given(generators)
@law(100)
def test_fragments_of_a_tensor_are_fragments_of_its_shards(rng: np.random.Generator) -> None:
    """Restricted to a shard, a tensor's pieces hold all of the shard, as numpy takes it, where they were."""
    case = naive.Maker(rng).case()
    tensor = ids(naive.shape(case))
    whole_blocks, lengths = partitions(rng, tensor.shape)
    buffers = cut(whole_blocks, lengths, tensor)
    for at in naive.everywhere(case):
        found = shard(expression(case.text), case.sizes, Cutting(case.mesh, case.rule, case.widths), at)
        blocks, index = restrict(whole_blocks, found.blocks, found.shape)
        np.testing.assert_array_equal(blocks.buffers, whole_blocks.buffers[index])
        assert coverage_fault(found.shape, blocks) is None
        for buffer, original in zip(cut(blocks, lengths, naive.taken(case, at, tensor)), buffers, strict=True):
            np.testing.assert_array_equal(buffer[buffer != HOLE], original[buffer != HOLE])


SPEC = """
ucp: 1
model: tiny
sizes: {vocab: config.vocab_size, hidden: 4, heads: 3, width: 2}
parameters:
  embed.weight: "(vocab+pad)/tp hidden"
  q.weight: "(heads/tp width) hidden"
  norm.weight: hidden
"""


def bound(**config: int) -> Bound:
    return bind(loads(SPEC, "tiny.yaml"), {"vocab_size": 5, **config})


PARTS = {
    Coordinate(0): {"embed.weight": (4, 4), "q.weight": (4, 4), "norm.weight": (4,), "seen": (2, 2)},
    Coordinate(1): {"embed.weight": (4, 4), "q.weight": (2, 4), "norm.weight": (4,), "seen": (2, 2)},
}


def test_uneven_heads_padding_and_copies() -> None:
    placements = place(bound(), PARTS, Layout(dp=1, tp=2), buffers=["seen"])
    q = concat((placements[at, "q.weight"][0].blocks for at in PARTS), 2)
    assert q.offsets.tolist() == [[0, 0], [4, 0]]
    assert q.sizes.tolist() == [[4, 4], [2, 4]]
    first, second = placements[Coordinate(0), "embed.weight"], placements[Coordinate(1), "embed.weight"]
    assert [p.name for p in first] == [p.name for p in second] == ["embed.weight", "embed.weight[padding]"]
    assert [(p.shape, p.padding) for p in second] == [((5, 4), False), ((3, 4), True)]
    assert len(first[1].blocks) == 0
    # Row 4 of the vocabulary is the second rank's first; its other three rows are the padding, whole.
    assert second[0].blocks.offsets.tolist() == [[4, 0]]
    assert second[1].blocks.offsets.tolist() == [[0, 0]]
    assert second[1].blocks.sizes.tolist() == [[3, 4]]
    assert second[1].blocks.starts.tolist() == [4]
    for name in ("embed.weight", "embed.weight[padding]", "q.weight", "norm.weight", "seen"):
        assert held_once(placements, name) is None
    masks = held_first(placements)
    assert [masks[at, "norm.weight"][0].tolist() for at in PARTS] == [[True], [False]]


FACTORS = {
    "q.row": ("q.weight", "row_var"),
    "q.col": ("q.weight", "col_var"),
    "q.short": ("q.weight", "other"),
    "embed.row": ("embed.weight", "exp_avg_sq_row"),
    "norm.box": ("norm.weight", "matrix"),
}


def with_factors(**more: tuple[int, ...]) -> dict[Coordinate, dict[str, tuple[int, ...]]]:
    """The parts, with states that have some of their parameters' axes."""
    states = {"q.col": (1, 4), "embed.row": (4,), "norm.box": (4, 4), **more}
    return {
        at: {**held, **states, "q.row": (held["q.weight"][0], 1), "q.short": (held["q.weight"][0],)}
        for at, held in PARTS.items()
    }


def test_states_of_some_of_the_axes() -> None:
    """Cut along the axes that they have, padded as those are, and held in common along the others."""
    found = place(bound(), with_factors(), Layout(dp=1, tp=2), ["seen"], FACTORS)
    for name in ("q.row", "q.col", "q.short", "embed.row", "embed.row[padding]", "norm.box"):
        assert held_once(found, name) is None, name
    assert [found[at, "q.row"][0].shape for at in PARTS] == [(6, 1)] * 2
    assert [found[at, "q.row"][0].blocks.offsets.tolist() for at in PARTS] == [[[0, 0]], [[4, 0]]]
    assert [found[at, "q.short"][0].shape for at in PARTS] == [(6,)] * 2
    assert [found[at, "q.col"][0].shape for at in PARTS] == [(1, 4)] * 2
    assert [(p.shape, p.padding) for p in found[Coordinate(1), "embed.row"]] == [((5,), False), ((3,), True)]


def test_states_as_a_spec_says() -> None:
    line = '"(heads/tp width) hidden"'
    text = SPEC.replace(line, f"{{axes: {line}, states: %s}}")
    said = "{other: hidden, col_var: 'average(1 hidden, tp)'}"
    parts = with_factors(**{"q.short": (4,)})
    parts = {at: {**held, "q.short": (4,)} for at, held in parts.items()}
    found = place(bind(loads(text % said, "tiny.yaml"), {"vocab_size": 5}), parts, Layout(tp=2), ["seen"], FACTORS)
    assert [found[at, "q.short"][0].blocks.offsets.tolist() for at in PARTS] == [[[0]]] * 2
    assert [found[at, "q.col"][0].average for at in PARTS] == [True] * 2
    with pytest.raises(SpecError, match=r"tiny\.yaml:\d+:\d+: 'vocab' is no axis of the parameter, '\(heads"):
        loads(text % "{other: vocab}", "tiny.yaml")
    with pytest.raises(SpecError, match=r"has 'else', so 'states' could be of either; write two lines"):
        loads(text % "{other: hidden}, when: config.a, else: hidden", "tiny.yaml")


def test_states_whose_axes_are_open_or_none_of_the_parameters() -> None:
    square = {at: {"q.weight": (4, 4), "q.short": (4,), "q.row": (4, 1)} for at in (Coordinate(0), Coordinate(1))}
    sizes = bind(loads(SPEC.replace("heads: 3", "heads: 4"), "tiny.yaml"), {"vocab_size": 5})
    text = r"'other' of 'q\.weight' \(\[4\]\) may be '\(heads/tp width\)' or 'hidden'; say which"
    with pytest.raises(SpecError, match=text):
        place(sizes, square, Layout(tp=2), [], FACTORS)
    for name, column in (("exp_avg_sq_row", 0), ("exp_avg_sq_col", 1)):
        assert kept_axes(name, [(4, 4)], [(4,)]) == [(column,)]
    boxes = {at: {**held, "q.box": (3, 3)} for at, held in PARTS.items()}
    with pytest.raises(Unsupported, match=r"'matrix' of 'q\.weight' has shape \[3, 3\], whose axes are not those"):
        place(bound(), boxes, Layout(tp=2), ["seen"], {"q.box": ("q.weight", "matrix")})


def held_once(placements: object, name: str) -> str | None:
    """What is wrong with what the ranks hold first of a tensor, if anything."""
    masks = held_first(placements)  # type: ignore[arg-type]
    parts: list[Blocks] = []
    shape: tuple[int, ...] = ()
    for key, placed in placements.items():  # type: ignore[attr-defined]
        for one, mask in zip(placed, masks[key], strict=True):
            if one.name == name:
                shape = one.shape
                parts.append(one.blocks.take(mask))
    return coverage_fault(shape, concat(parts, len(shape)))


def test_stages_of_a_pipeline_hold_their_names() -> None:
    parts = {Coordinate(0, 0): {"0.w": (2, 3), "tied.w": (4,)}, Coordinate(0, 1): {"1.w": (3,), "tied.w": (4,)}}
    placements = uncut(parts)
    assert placements[Coordinate(0, 1), "1.w"][0].shape == (3,)
    masks = held_first(placements)
    assert masks[Coordinate(0, 0), "tied.w"][0].tolist() == [True]
    assert masks[Coordinate(0, 1), "tied.w"][0].tolist() == [False]
    np.testing.assert_array_equal(placements[Coordinate(0, 0), "0.w"][0].blocks.sizes, whole((2, 3)).sizes)


def test_what_does_not_fit_is_refused() -> None:
    layout = Layout(dp=1, tp=2)
    with pytest.raises(SpecError, match=r"no line under parameters: matches 'seen' \(shape \[2, 2\]\)"):
        place(bound(), PARTS, layout)
    wrong = {at: {**held, "q.weight": (3, 4)} for at, held in PARTS.items()}
    with pytest.raises(SpecError, match=r"'q.weight' has 3 in dimension 0 on tp rank 0"):
        place(bound(), wrong, layout, ["seen"])
    short = {at: {**held, "norm.weight": (2,)} for at, held in PARTS.items()}
    with pytest.raises((SpecError, Mismatch), match=r"'norm.weight' has 2 in dimension 0"):
        place(bound(), short, layout, ["seen"])
