"""A checkpoint's own sizes where the config at hand is of the model as it is now: shapes by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from ucp.errors import SpecError
from ucp.geometry import Shape
from ucp.parallel.mesh import Coordinate, Layout
from ucp.spec.places import Placements
from ucp.spec.resolve import find_placements
from ucp.spec.select import Choice, choose

EMBED, HEAD, UP = "model.embed_tokens.weight", "lm_head.weight", "model.layers.0.mlp.up_proj.weight"
LIVE = {
    "model_type": "llama",
    "hidden_size": 24,
    "num_attention_heads": 8,
    "intermediate_size": 12,
    "vocab_size": 36,
}
WHOLE = {EMBED: ((29, 24), (29, 24)), HEAD: ((29, 24), (29, 24)), "model.norm.weight": ((24,), (24,))}
CUT = {**WHOLE, HEAD: ((15, 24), (14, 24))}


def placed(
    shards: dict[str, tuple[Shape, ...]], choice: Choice, section: str = "autotp", recorded: Any = None
) -> Placements:
    ranks = len(shards[EMBED])
    parts = {Coordinate(r): {name: shapes[r] for name, shapes in shards.items()} for r in range(ranks)}
    found = find_placements(choice, None, lambda: recorded, parts, Layout(tp=ranks), (), section)
    assert found is not None
    return found


def shapes_of(found: Placements) -> dict[str, Shape]:
    return {name: places[0].shape for (_, name), places in found.items()}


def of_live(**more: Any) -> Choice:
    """As a live engine asks, whose model has 36 rows."""
    return replace(choose(None, {**LIVE, **more}), resized=("*",))


def declared(old: dict[str, int] | None = None, *patterns: str, **more: Any) -> Choice:
    return Choice(live={**LIVE, **more}, old=old or {}, resized=patterns or (EMBED, HEAD), declared=True)


@pytest.mark.parametrize("shards", [WHOLE, CUT], ids=["head whole", "head cut"])
@pytest.mark.parametrize("choice", [of_live(), declared()], ids=["not declared", "declared"])
def test_the_shapes_say_the_old_vocabulary(shards: Any, choice: Choice) -> None:
    """Declared or not: what does not fit the live model is found by the load then, which names the parameter."""
    found = placed(shards, choice)
    assert shapes_of(found)[EMBED] == shapes_of(found)[HEAD] == (29, 24)
    last = found[Coordinate(1), HEAD][0].blocks
    assert (last.offsets.tolist(), last.sizes.tolist()) == (
        ([[0, 0]], [[29, 24]]) if shards is WHOLE else ([[15, 0]], [[14, 24]])
    )


def test_rows_that_the_model_no_longer_has_are_no_padding() -> None:
    shards = {**WHOLE, EMBED: ((40, 24), (40, 24)), HEAD: ((40, 24), (40, 24))}
    for choice in (of_live(), declared()):
        assert shapes_of(placed(shards, choice))[EMBED] == (40, 24)


def test_a_config_beside_the_checkpoint_goes_before_the_live_one() -> None:
    """Only where a change is declared: a width that the shapes leave open is in it."""
    shards = {**WHOLE, UP: ((8, 24), (8, 24))}
    recorded = {**LIVE, "vocab_size": 29, "intermediate_size": 16}
    assert shapes_of(placed(shards, declared(), recorded=recorded))[UP] == (16, 24)


@pytest.mark.parametrize("tied", [True, False])
def test_a_size_that_shapes_leave_open_is_asked_for(tied: bool) -> None:
    """Copies or halves: both have the same shapes."""
    name, size, old = (EMBED, "vocab", 29) if tied else (UP, "ffn", 8)
    shards = {EMBED: WHOLE[EMBED], **({} if tied else {HEAD: WHOLE[HEAD], UP: ((8, 24), (8, 24))})}
    with pytest.raises(SpecError, match=f'"old_sizes": {{"{size}": {old}}}'):
        placed(shards, declared({}, name, tie_word_embeddings=tied))
    for said in (old, 2 * old):
        found = placed(shards, declared({size: said}, EMBED, name, tie_word_embeddings=tied))
        assert shapes_of(found)[name] == (said, 24)


def test_what_autotp_has_cut_has_no_padding() -> None:
    """Two ranks' copies of 29 rows are no table of 58 of which 36 are true, as they would be in Megatron's way."""
    shards, choice = {EMBED: WHOLE[EMBED]}, choose(None, {**LIVE, "tie_word_embeddings": True})
    with pytest.raises(SpecError, match="copies of another size"):
        placed(shards, choice)
    assert shapes_of(placed(shards, choice, "megatron"))[EMBED] == (36, 24)
    wider = {EMBED: ((40, 24), (40, 24))}  # where nothing is cut, a table may be wider than the config says
    assert [one.shape for one in placed(wider, choose(None, LIVE))[Coordinate(), EMBED]] == [(36, 24), (4, 24)]
    fewer = choose(None, LIVE, {"vocab": 27})  # said by hand, of a table that the program itself has made wider
    assert [one.shape for one in placed(shards, fewer)[Coordinate(), EMBED]] == [(27, 24), (2, 24)]


def test_a_padded_width_is_no_size() -> None:
    """In Megatron's way the true number of rows is in no shape, and has to be said."""
    shards = {EMBED: ((15, 24), (15, 24)), HEAD: ((15, 24), (15, 24))}
    with pytest.raises(SpecError, match="30, padding included"):
        placed(shards, declared(), "megatron")
    assert shapes_of(placed(shards, declared({"vocab": 29}), "megatron"))[EMBED] == (29, 24)
