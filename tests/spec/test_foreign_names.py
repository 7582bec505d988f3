"""Other frameworks' parameters made of a spec's own: against numpy, and against what transformers itself writes."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from numpy.typing import NDArray
from safetensors.torch import load_file

from tests.property import generators, law
from tests.spec.models import MODELS, config_of
from ucp.errors import DamagedCheckpoint, SpecError
from ucp.geometry import Blocks, whole
from ucp.spec import shipped
from ucp.spec.bound import Bound, bind
from ucp.spec.foreign_names import Assembled, Moves, assemble, moves
from ucp.spec.language import loads

SIZES = {"h": 5, "kv": 2, "q": 3, "d": 4, "f": 7, "e": 3}
HEAD = "ucp: 1\nmodel: test\nsizes: {h: config.h, kv: config.kv, q: config.q, d: config.d, f: config.f, e: config.e}\n"


def bound_of(parameters: str, names: str) -> Bound:
    return bind(loads(f"{HEAD}parameters:\n{parameters}\nnames:\n  other:\n{names}\n"), SIZES)


def moved(blocks: Blocks, buffer: NDArray, shape: tuple[int, ...]) -> NDArray:
    """The tensor of this shape whose boxes lie in the buffer as the blocks say; -1 where none does."""
    out = np.full(shape, -1, np.int64)
    for k in range(len(blocks)):
        box = tuple(slice(o, o + n) for o, n in zip(blocks.offsets[k], blocks.sizes[k], strict=True))
        steps = tuple(int(s) * 8 for s in blocks.strides[k])
        assert (out[box] == -1).all()
        out[box] = np.lib.stride_tricks.as_strided(buffer[int(blocks.starts[k]) :], tuple(blocks.sizes[k]), steps)
    return out


def made(found: Assembled | None, tensors: dict[str, NDArray]) -> NDArray:
    """The tensor from its sources, and each source from it again: both directions of every part."""
    assert found is not None
    out = np.full(found.shape, -1, np.int64)
    for part in found.parts:
        source = tensors[part.source]
        blocks, _ = part.into(whole(source.shape))
        given = moved(blocks, source.reshape(-1), found.shape)
        assert (out[given >= 0] == -1).all()
        out = np.maximum(out, given)
    assert (out >= 0).all()
    for part in found.parts:
        source = tensors[part.source]
        blocks, _ = part.back(whole(found.shape))
        np.testing.assert_array_equal(moved(blocks, out.reshape(-1), source.shape), source)
    return out


def numbered(*shapes: tuple[int, ...]) -> list[NDArray]:
    """Tensors whose elements are all different."""
    out, at = [], 0
    for shape in shapes:
        n = int(np.prod(shape))
        out.append(np.arange(at, at + n).reshape(shape))
        at += n
    return out


def test_separate_heads_to_groups() -> None:
    bound = bound_of(
        '  q: "(kv/tp q d) h"\n  k: "(kv/tp d) h"\n  v: "(kv/tp d) h"',
        '    qkv: {from: [q, k, v], as: "(kv (q | 1 | 1) d) h"}',
    )
    q, k, v = numbered((24, 5), (8, 5), (8, 5))
    expected = np.concatenate([q.reshape(2, 3, 4, 5), k.reshape(2, 1, 4, 5), v.reshape(2, 1, 4, 5)], 1).reshape(40, 5)
    np.testing.assert_array_equal(made(assemble(bound, "other", "qkv"), {"q": q, "k": k, "v": v}), expected)


def test_segments_to_interleaved_segments_and_a_transposition() -> None:
    bound = bound_of('  c: "h (q/tp d | q/tp d | q/tp d)"', '    qkv: {from: c, as: "(q (1 | 1 | 1) d) h"}')
    (c,) = numbered((5, 36))
    expected = c.reshape(5, 3, 3, 4).transpose(2, 1, 3, 0).reshape(36, 5)
    np.testing.assert_array_equal(made(assemble(bound, "other", "qkv"), {"c": c}), expected)


def test_experts_stacked() -> None:
    bound = bound_of(
        '  x.{n}.w1: "f/tp h"\n  x.{n}.w3: "f/tp h"\n  x.{n}.w2: "h f/tp"',
        '    up: {from: ["x.{n}.w1", "x.{n}.w3"], stack: {n: e}, as: "e (f | f) h"}\n'
        '    down: {from: ["x.{n}.w2"], stack: {n: e}, as: "e h f"}\n'
        '    interleaved: {from: ["x.{n}.w1", "x.{n}.w3"], stack: {n: e}, as: "e h (f (1 | 1))"}',
    )
    one = dict(zip([f"x.{n}.{w}" for n in range(3) for w in ("w1", "w3")], numbered(*[(7, 5)] * 6), strict=True))
    up = np.stack([np.concatenate([one[f"x.{n}.w1"], one[f"x.{n}.w3"]]) for n in range(3)])
    np.testing.assert_array_equal(made(assemble(bound, "other", "up"), one), up)
    mixed = np.stack([np.stack([one[f"x.{n}.w1"].T, one[f"x.{n}.w3"].T], 2).reshape(5, 14) for n in range(3)])
    np.testing.assert_array_equal(made(assemble(bound, "other", "interleaved"), one), mixed)
    down = dict(zip([f"x.{n}.w2" for n in range(3)], numbered(*[(5, 7)] * 3), strict=True))
    np.testing.assert_array_equal(made(assemble(bound, "other", "down"), down), np.stack(list(down.values())))


@given(generators)
@law(60)
def test_another_order_of_the_same_axes_is_a_transposition(rng: np.random.Generator) -> None:
    names = [str(n) for n in rng.permutation(list(SIZES))[: rng.integers(1, 6)]]

    def side() -> tuple[str, list[str], tuple[int, ...]]:
        order = [str(n) for n in rng.permutation(names)]
        borders = sorted({0, len(order), *rng.integers(0, len(order), 2).tolist()})
        groups = [order[a:b] for a, b in itertools.pairwise(borders)]
        text = " ".join(f"({' '.join(g)})" for g in groups)
        return text, order, tuple(int(np.prod([SIZES[n] for n in g])) for g in groups)

    (a, a_order, a_shape), (b, b_order, b_shape) = side(), side()
    bound = bound_of(f'  a: "{a}"', f'    b: {{from: a, as: "{b}"}}')
    (tensor,) = numbered(a_shape)
    expected = (
        tensor.reshape([SIZES[n] for n in a_order]).transpose([a_order.index(n) for n in b_order]).reshape(b_shape)
    )
    np.testing.assert_array_equal(made(assemble(bound, "other", "b"), {"a": tensor}), expected)


MIXTRAL = """
ucp: 1
model: mixtral
sizes: {hidden: config.hidden_size, experts: config.num_local_experts, ffn: config.intermediate_size}
parameters:
  model.layers.{i}.block_sparse_moe.experts.{e}.w1.weight: "ffn/tp hidden"
  model.layers.{i}.block_sparse_moe.experts.{e}.w2.weight: "hidden ffn/tp"
  model.layers.{i}.block_sparse_moe.experts.{e}.w3.weight: "ffn/tp hidden"
names:
  modules:
    model.layers.{i}.mlp.experts.gate_up_proj:
      from:
        - model.layers.{i}.block_sparse_moe.experts.{e}.w1.weight
        - model.layers.{i}.block_sparse_moe.experts.{e}.w3.weight
      stack: {e: experts}
      as: "experts (ffn | ffn) hidden"
    model.layers.{i}.mlp.experts.down_proj:
      from: model.layers.{i}.block_sparse_moe.experts.{e}.w2.weight
      stack: {e: experts}
      as: "experts hidden ffn"
"""


def test_the_files_of_mixtral_make_its_modules(tmp_path: Path) -> None:
    """transformers writes an expert at a time and holds all of a layer in one parameter: the truth is its own."""
    torch.manual_seed(0)
    module = MODELS["mixtral"].make("cpu")
    module.save_pretrained(tmp_path)
    files = load_file(tmp_path / "model.safetensors")
    bound = bind(loads(MIXTRAL), config_of(module))
    used = 0
    for name, parameter in module.named_parameters():
        found = assemble(bound, "modules", name)
        if found is not None:
            used += 1
            tensors = {p.source: files[p.source].view(torch.int32).long().abs().numpy() for p in found.parts}
            expected = parameter.detach().view(torch.int32).long().abs().numpy()
            assert made(found, tensors).tolist() == expected.tolist()
    assert used == 4


def test_gpt2_in_megatrons_layout_is_heads_of_q_k_and_v() -> None:
    bound = bind(shipped.find("gpt2"), config_of(MODELS["gpt2"].make()))
    found = assemble(bound, "megatron_gpt", "3.self_attention.query_key_value.weight")
    assert found is not None
    assert [p.source for p in found.parts] == ["transformer.h.1.attn.c_attn.weight"]
    (weight,) = numbered((24, 72))
    x = np.random.default_rng(0).integers(0, 9, (2, 24))
    y = (x @ made(found, {found.parts[0].source: weight}).T).reshape(
        2, 4, 3, 6
    )  # Megatron: tokens, heads, (q k v), dim
    for j, part in enumerate(np.split(x @ weight, 3, axis=1)):  # GPT-2: q, k, v, each all heads
        np.testing.assert_array_equal(y[:, :, j], part.reshape(2, 4, 6))
    plain = assemble(bound, "megatron_gpt", "2.mlp.dense_h_to_4h.bias")
    assert plain is not None
    assert [p.source for p in plain.parts] == ["transformer.h.0.mlp.c_fc.bias"]
    assert assemble(bound, "megatron_gpt", "9.nothing") is None
    assert assemble(bound, "elsewhere", "9.nothing") is None


def test_llama_in_megatrons_layout() -> None:
    bound = bind(shipped.find("llama"), config_of(MODELS["llama"].make()))
    found = assemble(bound, "megatron", "decoder.layers.1.mlp.linear_fc1.weight")
    assert found is not None
    gate, up = numbered((20, 24), (20, 24))
    sources = [f"model.layers.1.mlp.{n}_proj.weight" for n in ("gate", "up")]
    expected = np.concatenate([gate, up])
    np.testing.assert_array_equal(made(found, dict(zip(sources, (gate, up), strict=True))), expected)


@pytest.mark.parametrize("model", ["mixtral", "qwen3_moe", "deepseek_v3", "gpt_neox", "llama", "nemotron_h"])
def test_the_catalogues_names_are_those_that_transformers_writes(model: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = MODELS[model].make("cpu")
    module.save_pretrained(tmp_path)
    files = {n: t.view(torch.int32).long().abs().numpy() for n, t in load_file(tmp_path / "model.safetensors").items()}
    own = {n: t.detach().view(torch.int32).long().abs().numpy() for n, t in module.state_dict().items()}
    bound = bind(shipped.find(MODELS[model].spec), config_of(module))
    there = moves(bound, "huggingface", own, to_framework=True)
    written = {there.plain.get(n, n): t for n, t in own.items() if n not in there.split}
    for name, found in there.split.items():
        for part in found.parts:
            blocks, _ = part.back(whole(found.shape))
            written[part.source] = moved(blocks, own[name].reshape(-1), part.shape)
    assert written.keys() == files.keys()
    for name, tensor in files.items():
        np.testing.assert_array_equal(written[name], tensor)
    back = moves(bound, "huggingface", files, to_framework=False)
    assert back.plain == {new: old for old, new in there.plain.items()}
    assert back.joined.keys() == there.split.keys()
    for name, found in back.joined.items():
        np.testing.assert_array_equal(made(found, files), own[name])


def test_a_part_is_what_its_line_says_or_what_is_left() -> None:
    bound = bound_of(
        '  qkv: "(kv/tp q d | kv/tp d | kv/tp d) h"\n  up.{i}: "e/ep (f/tp | f/tp) h"',
        '    qkv: {to: [q, k, v]}\n    "up.{i}": {to: ["{e}.up.{i+1}.a", "{e}.up.{i+1}.b"], stack: {e: e}, as: "h f"}',
    )
    there = moves(bound, "other", ["qkv", "up.4"], to_framework=True)
    q, k, v = numbered((24, 5), (8, 5), (8, 5))
    np.testing.assert_array_equal(made(there.split["qkv"], {"q": q, "k": k, "v": v}), np.concatenate([q, k, v]))
    names = [f"{n}.up.5.{w}" for n in range(3) for w in "ab"]
    assert [p.source for p in there.split["up.4"].parts] == names
    small = dict(zip(names, numbered(*[(5, 7)] * 6), strict=True))
    stacked = np.stack([np.concatenate([small[f"{n}.up.5.{w}"].T for w in "ab"]) for n in range(3)])
    np.testing.assert_array_equal(made(there.split["up.4"], small), stacked)
    assert moves(bound, "other", names, to_framework=False).joined == {"up.4": there.split["up.4"]}
    assert moves(bound, "other", ["0.up.0.a", "x"], to_framework=False) == Moves({}, {}, {})  # up.-1 is none


def test_lines_about_some_numbers_only() -> None:
    """Two names of one parameter, chosen by the layer's number; here 'kv' (2) counts the layers of the first kind."""
    bound = bound_of(
        '  "l.{i}.norm": h',
        '    "l.{i}.a": {from: "l.{i}.norm", below: {i: kv}}\n    "l.{i}.b": {from: "l.{i}.norm", from_on: {i: kv}}',
    )
    theirs = {"l.0.norm": "l.0.a", "l.1.norm": "l.1.a", "l.2.norm": "l.2.b"}
    assert moves(bound, "other", theirs, to_framework=True).plain == theirs
    assert moves(bound, "other", theirs.values(), to_framework=False).plain == {v: k for k, v in theirs.items()}
    assert moves(bound, "other", ["l.2.a", "l.1.b"], to_framework=False) == Moves({}, {}, {})
    with pytest.raises(SpecError, match=r"'l\.a' has no \{i\} whose numbers could be chosen"):
        bound_of("  w: h", '    "l.a": {from: w, below: {i: kv}}')
    with pytest.raises(SpecError, match="below: 'layers' is no size of this spec"):
        bound_of('  "l.{i}.norm": h', '    "l.{i}.a": {from: "l.{i}.norm", below: {i: layers}}')


def test_lines_about_what_is_there_beside_them() -> None:
    """Two names of one parameter, chosen by what else its layer has."""
    bound = bound_of(
        '  "l.{i}.norm": h\n  "l.{i}.q": h\n  "l.{i}.up": h',
        '    "l.{i}.a": {from: "l.{i}.norm", beside: "l.{i}.q"}\n'
        '    "l.{i}.b": {from: "l.{i}.norm", beside: "l.{i}.up"}',
    )
    theirs = {"l.0.norm": "l.0.a", "l.1.norm": "l.1.b"}
    assert moves(bound, "other", [*theirs, "l.0.q", "l.1.up", "l.2.norm"], to_framework=True).plain == theirs
    assert moves(bound, "other", theirs.values(), to_framework=False).plain == {v: k for k, v in theirs.items()}
    with pytest.raises(SpecError, match=r"'l\.3\.norm' matches .* as well, equally specific"):
        moves(bound, "other", ["l.3.norm", "l.3.q", "l.3.up"], to_framework=True)
    with pytest.raises(SpecError, match="nothing captures 'j'"):
        bound_of('  "l.{i}.norm": h', '    "l.{i}.a": {from: "l.{i}.norm", beside: "l.{j}.q"}')
    with pytest.raises(SpecError, match="'beside:' is for 'from:'"):
        bound_of('  "l.{i}.norm": h', '    "l.{i}.norm": {to: "l.{i}.a", beside: "l.{i}.q"}')


def test_parts_that_are_missing_or_too_many_are_refused() -> None:
    bound = bound_of('  up: "e (f | f) h"', '    up: {to: ["{e}.a", "{e}.b"], stack: {e: e}}')
    names = [f"{n}.{w}" for n in range(3) for w in "ab"]
    with pytest.raises(DamagedCheckpoint, match=r"'up' is made of 6 parameters .* 1 of them are not there.*'2\.b'"):
        moves(bound, "other", names[:-1], to_framework=False)
    with pytest.raises(SpecError, match=r"'3\.a' is none of the 6 that make 'up'"):
        moves(bound, "other", [*names, "3.a"], to_framework=False)


def test_what_can_not_be_written_is_refused() -> None:
    bound = bound_of("  w: h\n  v: h", '    "{n}.weight": w\n    a: v\n    b: v\n    "*.c": w')
    assert moves(bound, "other", ["7.weight"], to_framework=False).plain == {"7.weight": "w"}
    with pytest.raises(SpecError, match=r"matches 'v' .* as well, equally specific"):
        moves(bound, "other", ["v"], to_framework=True)
    bound = bound_of("  w: h", '    "{n}.weight": w')
    with pytest.raises(SpecError, match="nothing tells the number 'n'"):
        moves(bound, "other", ["w"], to_framework=True)
    bound = bound_of("  w: h", '    "*.weight": w')
    with pytest.raises(SpecError, match=r"'\*' can't be filled in"):
        moves(bound, "other", ["w"], to_framework=True)
    with pytest.raises(SpecError, match=r"needs either 'from:'.*or 'to:'"):
        bound_of("  w: h", "    a: {from: w, to: w}")
    bound = bound_of('  q: "(d | d) h"', "    q: {to: [a, b, c]}")
    with pytest.raises(SpecError, match="has 2 segments, and its sources 3"):
        moves(bound, "other", ["q"], to_framework=True)


@pytest.mark.parametrize(
    ("parameters", "names", "message"),
    [
        ('  q: "(kv d) h"', '    t: {from: q, as: "(kv q) h"}', "don't match by name: only here q, only there d"),
        ('  q: "d h"\n  k: "d h"', '    t: {from: [q, k], as: "d h"}', "has 1 segments, and its sources 2"),
        ('  q: "d h"', '    t: {from: q, as: "(d | d) h"}', "has 2 segments, and its sources 1"),
        ('  q: "(3 d) h"', '    t: {from: q, as: "(d 3) h"}', "the number 3 can't be matched by name"),
        ('  q: "d d"', '    t: {from: q, as: "d d"}', "'d' stands twice, so it can't be matched by name"),
        ('  q: "d h"', '    t: {from: p, as: "d h"}', "'t' is made of 'p', which no line names"),
        ('  q: "(d | d) (f | f)"', '    t: {from: q, as: "(d | d) (f | f)"}', "only one '\\( | \\)' can be filled"),
    ],
)
def test_renamings_that_are_refused(parameters: str, names: str, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        assemble(bound_of(parameters, names), "other", "t")
