"""From shards to wholes: the laws on random expressions, and every parameter of every family in the catalogue."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given

from tests.property import generators, ids, law
from tests.spec import naive
from tests.spec.models import MODELS, config_of, names_of
from tests.spec.shards import check_shards
from ucp.errors import Mismatch
from ucp.spec import shipped
from ucp.spec.bound import bind
from ucp.spec.check import merge
from ucp.spec.evaluate import Cutting
from ucp.spec.grammar import Cut, walk


@given(generators)
@law(100)
def test_cut_then_merge_is_the_identity(rng: np.random.Generator) -> None:
    """Cut by numpy, index by index; merged by the expression."""
    case = naive.Maker(rng).case()
    tensor = ids(naive.shape(case)).astype(np.int32)
    shards = [(at, naive.taken(case, at, tensor)) for at in naive.everywhere(case)]
    cutting = Cutting(case.mesh, case.rule, case.widths)
    order = rng.permutation(len(shards))
    shuffled = [shards[k] for k in order]
    np.testing.assert_array_equal(merge(naive.expression(case.text), case.sizes, cutting, shuffled, "w"), tensor)


@given(generators)
@law(80)
def test_copies_that_differ_and_parts_that_lack_are_seen(rng: np.random.Generator) -> None:
    case = naive.Maker(rng).case()
    tree, cutting = naive.expression(case.text), Cutting(case.mesh, case.rule, case.widths)
    tensor = ids(naive.shape(case))
    shards = [(at, naive.taken(case, at, tensor).copy()) for at in naive.everywhere(case)]
    counts = np.bincount(np.concatenate([x.ravel() for _, x in shards]), minlength=tensor.size)
    chosen = int(rng.choice([k for k, (_, x) in enumerate(shards) if x.size]))
    held = shards[chosen][1].reshape(-1)
    twice = np.flatnonzero(counts[held] > 1)
    if len(twice):
        held[rng.choice(twice)] += 1
        with pytest.raises(Mismatch, match=r"says that ranks hold copies of parts of 'w', but those on .* differ"):
            merge(tree, case.sizes, cutting, shards, "w")
    if len(twice) < len(held):
        with pytest.raises(Mismatch, match=r"'w' lacks .* of its elements"):
            merge(tree, case.sizes, cutting, shards[:chosen] + shards[chosen + 1 :], "w")


@pytest.mark.parametrize(
    "mesh", [{"tp": 2}, pytest.param({"tp": 3, "ep": 2}, marks=pytest.mark.slow)], ids=["tp2", "tp3-ep2"]
)
@pytest.mark.parametrize("name", MODELS)
def test_every_familys_shards_show_their_cuts(name: str, mesh: dict[str, int]) -> None:
    """All parameters cut by numpy as AutoTP deals out heads; shapes and copies alone lead back to the wholes."""
    found = names_of(MODELS[name].make())
    bound = bind(shipped.find(MODELS[name].spec), config_of(MODELS[name].make()))
    shards, wholes = {}, {}
    for k, (parameter, shape) in enumerate(found.shapes.items()):
        line = bound.find(parameter)
        if line is None:
            assert parameter in found.buffers
            continue
        text = str(line.expression).replace("(vocab+pad)", "vocab")
        case = naive.Case(text, bound.sizes, mesh, "balanced", {})
        wholes[parameter] = ids(shape) + 100_000 * k
        shards[parameter] = [(at, naive.taken(case, at, wholes[parameter])) for at in naive.everywhere(case)]
    cuttings = check_shards(bound, mesh, shards)
    for parameter, whole in wholes.items():
        line = bound.find(parameter)
        assert line is not None
        merged = merge(line.expression, bound.sizes, cuttings[parameter], shards[parameter], parameter)
        np.testing.assert_array_equal(merged, whole)


MEGATRON = {
    "hidden_size": 24,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "kv_channels": 4,
    "ffn_hidden_size": 20,
    "max_position_embeddings": 17,
    "padded_vocab_size": 128,
}


@pytest.mark.parametrize(
    ("spec", "layer", "embedding"),
    [
        ("megatron_gpt", "3.", "tied_modules.embed."),
        ("megatron_gpt_plain", "language_model.encoder.layers.3.", "language_model.embedding."),
    ],
)
def test_megatrons_cuts_are_those_that_deepspeed_knows(spec: str, layer: str, embedding: str) -> None:
    """DeepSpeed's own tables for Megatron: what is whole on every tp rank, and where the rest is joined."""
    from deepspeed.checkpoint.deepspeed_checkpoint import LAYER_CONCAT_DIM, SEQUENTIAL_LAYERS

    bound = bind(shipped.find(spec), MEGATRON)
    columns = [
        *(f"self_attention.query_key_value.{n}" for n in ("weight", "bias")),
        *(f"mlp.dense_h_to_4h.{n}" for n in ("weight", "bias")),
        "word_embeddings.weight",
    ]
    for name in (*SEQUENTIAL_LAYERS, *LAYER_CONCAT_DIM, *columns):
        found = bound.find((embedding if "embeddings" in name else layer) + name)
        assert found is not None, name
        dims = [k for k, d in enumerate(found.expression.dims) if any(isinstance(a, Cut) for a in walk(d))]
        assert dims == ([] if name in SEQUENTIAL_LAYERS else [LAYER_CONCAT_DIM.get(name, 0)])


def test_megatrons_gated_mlp_has_two_segments() -> None:
    bound = bind(shipped.find("megatron_gpt"), {**MEGATRON, "swiglu": True})
    found = bound.find("2.mlp.dense_h_to_4h.weight")
    assert found is not None
    assert str(found.expression) == "(ffn/tp | ffn/tp) hidden"
