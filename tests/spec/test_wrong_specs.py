"""Plausible mistakes in a spec, planted one by one: each is refused, or listed as taken on trust.

The shards are real in size and content: a model of Llama's kind (and one of Phi-3's and of Megatron's) cut by numpy as
its framework cuts it, on two tp ranks, the norms whole on both.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.spec.shards import check_shards
from ucp.errors import UcpError
from ucp.spec.bound import bind
from ucp.spec.check import merge, trusted
from ucp.spec.evaluate import Cutting
from ucp.spec.language import loads

# 2 key heads, 3 query heads for each, of 4; hidden 10, ffn 6, vocab 11 padded to 14.
CONFIG = {"hidden": 10, "kv": 2, "q": 3, "d": 4, "ffn": 6, "vocab": 11}

RIGHT = """
ucp: 1
model: test
sizes: {hidden: config.hidden, kv: config.kv, q: config.q, d: config.d, ffn: config.ffn, vocab: config.vocab}
parameters:
  embed: "(vocab+pad)/tp hidden"
  layers.{i}.q: "(kv/tp q d) hidden"
  layers.{i}.k: "(kv/tp d) hidden"
  layers.{i}.qkv: "(kv/tp q d | kv/tp d | kv/tp d) hidden"
  layers.{i}.mixed: "(kv/tp (q | 1 | 1) d) hidden"
  layers.{i}.out: "hidden (kv/tp q d)"
  layers.{i}.up: "(ffn/tp | ffn/tp) hidden"
  layers.{i}.down: "hidden ffn/tp"
  layers.{i}.norm: "hidden"
  layers.{i}.bias: "ffn/tp"
"""


def halves(x: NDArray, axis: int = 0) -> list[NDArray]:
    return np.split(x, 2, axis)


def shards() -> tuple[dict[str, NDArray], dict[str, list[tuple[dict[str, int], NDArray]]]]:
    """Every parameter whole, and its two shards by numpy alone."""
    rng = np.random.default_rng(0)
    whole: dict[str, NDArray] = {}
    cut: dict[str, list[NDArray]] = {}

    def put(name: str, tensor: NDArray, parts: list[NDArray]) -> None:
        whole[name], cut[name] = tensor, parts

    embed = rng.standard_normal((11, 10)).astype(np.float32)
    padded = np.concatenate([embed, np.zeros((3, 10), np.float32)])
    put("embed", embed, halves(padded))
    for i in range(2):
        q, k, v = (rng.standard_normal((n, 10)).astype(np.float32) for n in (24, 8, 8))
        put(f"layers.{i}.q", q, halves(q))
        put(f"layers.{i}.k", k, halves(k))
        parts = [np.concatenate(p) for p in zip(halves(q), halves(k), halves(v), strict=True)]
        put(f"layers.{i}.qkv", np.concatenate([q, k, v]), parts)
        mixed = rng.standard_normal((40, 10)).astype(np.float32)
        put(f"layers.{i}.mixed", mixed, halves(mixed))
        out = rng.standard_normal((10, 24)).astype(np.float32)
        put(f"layers.{i}.out", out, halves(out, 1))
        gate, up = rng.standard_normal((2, 6, 10)).astype(np.float32)
        fused = [np.concatenate(p) for p in zip(halves(gate), halves(up), strict=True)]
        put(f"layers.{i}.up", np.concatenate([gate, up]), fused)
        down = rng.standard_normal((10, 6)).astype(np.float32)
        put(f"layers.{i}.down", down, halves(down, 1))
        norm, bias = rng.standard_normal(10).astype(np.float32), rng.standard_normal(6).astype(np.float32)
        put(f"layers.{i}.norm", norm, [norm, norm])
        put(f"layers.{i}.bias", bias, halves(bias))
    return whole, {name: [({"tp": r}, part) for r, part in enumerate(parts)] for name, parts in cut.items()}


WHOLE, SHARDS = shards()


def checked(text: str, config: dict[str, int] | None = None) -> dict[str, Cutting]:
    return check_shards(bind(loads(text, "wrong.yaml"), config or CONFIG), {"tp": 2}, SHARDS)


def merged(text: str) -> dict[str, NDArray]:
    bound = bind(loads(text, "wrong.yaml"), CONFIG)
    cuttings = checked(text)
    out = {}
    for name, held in SHARDS.items():
        found = bound.find(name)
        assert found is not None
        out[name] = merge(found.expression, bound.sizes, cuttings[name], held, name)
    return out


def test_the_right_spec_merges_to_the_whole() -> None:
    for name, tensor in merged(RIGHT).items():
        np.testing.assert_array_equal(tensor, WHOLE[name])
    assert checked(RIGHT)["embed"].padded == {"vocab": 14}


@dataclass(frozen=True)
class Mistake:
    line: str
    becomes: str
    message: str


def change(pattern: str, axes: str, message: str) -> Mistake:
    """Another expression for one parameter."""
    return Mistake(pattern, axes, message)


REFUSED = {
    "swapped query and key widths": change("q", "(kv/tp d) hidden", "hold 3 \\+ 3 = 6 of it"),
    "fused segments of equal width": change("qkv", "(kv/tp d | kv/tp d | kv/tp d) hidden", "no multiple of 12"),
    "grouped queries forgotten": change("qkv", "(kv/tp q d | kv/tp q d | kv/tp q d) hidden", "no multiple of 36"),
    "a segment forgotten": change("qkv", "(kv/tp q d | kv/tp d) hidden", "no multiple of 16"),
    "column for row": change("out", "(kv/tp q d) hidden", "has 10 in dimension 0"),
    "row for column": change("q", "hidden (kv/tp q d)", "'hidden' is 10 .* but 'layers.0.q' has 12 in dimension 0"),
    "transposed": change("down", "ffn/tp hidden", "has 10 in dimension 0|hold 10 \\+ 10 = 20"),
    "padding forgotten": change("embed", "vocab/tp hidden", "hold 7 \\+ 7 = 14 of it"),
    "replicated where shards differ": change("bias", "ffn", "'ffn' is 6 .* but 'layers.0.bias' has 3"),
    "average where it is a fragment": change("bias", "average(ffn, tp)", "'ffn' is 6 .* but 'layers.0.bias' has 3"),
    "fragment where it is replicated": change("norm", "hidden/tp", ""),  # as wide as the axis: a replica, and right
    "a fused segment that is whole": change("up", "(ffn/tp | ffn) hidden", "which is no multiple|hold"),
    "gate without up": change("up", "ffn/tp hidden", "copies of parts of 'layers.0.up', but those on tp rank 1 differ"),
    "another axis of the right total": change("k", "(ffn/tp d) hidden", "'ffn' is 6, but the shards .* hold 1 \\+ 1"),
    "repeat where parts differ": change("k", "(repeat(kv)/tp q d) hidden", "no multiple of 12"),
    "a dimension too many": change("bias", "ffn/tp hidden", "has 2 dimensions, but 'layers.0.bias' has \\[3\\]"),
    "a dimension forgotten": change("down", "ffn/tp", "has 1 dimensions"),
    "straight through groups": change("mixed", "(kv (q | 1 | 1))/tp hidden", "hold 20 \\+ 20 = 40 of it"),
    "a typing error": change("q", "(kv/tp q dd) hidden", "'dd' is no size of this spec; did you mean 'd'"),
    "a mesh dimension of its own": change("q", "(kv/tpp q d) hidden", "'tpp' is no mesh dimension; did you mean 'tp'"),
    "both dimensions cut": change("q", "(kv/tp q d) hidden/tp", "tp cuts another axis of this product already"),
    "cut over another dimension": change("q", "(kv/ep q d) hidden", "but 'layers.0.q' has 12 in dimension 0"),
}


def planted(mistake: Mistake) -> str:
    pattern = mistake.line if mistake.line == "embed" else f"layers.{{i}}.{mistake.line}"
    lines = RIGHT.splitlines()
    at = next(k for k, line in enumerate(lines) if line.strip().startswith(f"{pattern}:"))
    lines[at] = f'  {pattern}: "{mistake.becomes}"'
    return "\n".join(lines)


@pytest.mark.parametrize("name", [n for n, m in REFUSED.items() if m.message])
def test_refused(name: str) -> None:
    mistake = REFUSED[name]
    with pytest.raises(UcpError, match=mistake.message) as caught:
        checked(planted(mistake))
    line = next(
        k + 1 for k, t in enumerate(planted(mistake).splitlines()) if mistake.becomes in t and f"{mistake.line}:" in t
    )
    assert str(caught.value).startswith("wrong.yaml:")
    # The mistake itself is named, or another line that it contradicts.
    assert f"wrong.yaml:{line}:" in str(caught.value) or "one axis has one cut" in str(caught.value)


def test_a_shard_as_wide_as_the_axis_is_a_replica() -> None:
    text = planted(REFUSED["fragment where it is replicated"])
    np.testing.assert_array_equal(merged(text)["layers.1.norm"], WHOLE["layers.1.norm"])
    for wrong in ("hidden/tp", "hidden"):
        shards = {**SHARDS, "layers.0.norm": [(at, x + at["tp"]) for at, x in SHARDS["layers.0.norm"]]}
        bound = bind(loads(planted(change("norm", wrong, "")), "wrong.yaml"), CONFIG)
        with pytest.raises(
            UcpError, match=r"says that ranks hold copies of parts of 'layers.0.norm', but those on tp rank 1"
        ):
            check_shards(bound, {"tp": 2}, shards)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            lambda t: t.replace("kv: config.kv", "kv: config.q"),
            "'kv' is 3, but the shards of 'layers.0.q' over tp hold",
        ),
        (lambda t: t.replace("d: config.d", "d: config.hidden / config.q"), "10 / 3 leaves a remainder of 1"),
        (lambda t: t.replace("d: config.d", "d: config.dim"), "the model's config has no 'dim'"),
        (lambda t: t.replace("vocab: config.vocab", "vocab: 15"), "'vocab' is 15, but 'embed' has only 14 of it"),
        (
            lambda t: t.replace("  layers.{i}.norm:", "  layers.{i}.nrom:"),
            "no line under parameters: matches 'layers.0.norm'",
        ),
        (
            lambda t: t + '  layers.*.norm: "ffn"\n  layers.{k}.norm: "ffn"\n',
            "'layers.{k}.norm' and 'layers.{i}.norm' .* are equally specific, and both match 'layers.7.norm'",
        ),
    ],
)
def test_refused_in_other_places(edit: Callable[[str], str], message: str) -> None:
    with pytest.raises(UcpError, match=message):
        checked(edit(RIGHT))


# What neither shapes nor copies reveal: shapes fit, the merged tensor is another, and the check says what it trusts.
TRUSTED = {
    "key and value for query and key": ("qkv", "(kv/tp d | kv/tp q d | kv/tp d) hidden", "the segments of"),
    "contiguous for interleaved": ("mixed", "((q | 1 | 1) kv/tp d) hidden", "not cut straight through"),
    "interleaved for contiguous": (
        "qkv",
        "(kv/tp (q | 1 | 1) d) hidden",
        "is in this order: heads or groups outermost",
    ),
    "gate and up interleaved": ("up", "(ffn/tp 2) hidden", "is in this order: heads or groups outermost"),
    "heads innermost": ("q", "(q d kv/tp) hidden", "not cut straight through"),
}


@pytest.mark.parametrize("name", TRUSTED)
def test_taken_on_trust(name: str) -> None:
    line, axes, statement = TRUSTED[name]
    text = planted(change(line, axes, ""))
    tensors = merged(text)
    assert any((tensors[n] != WHOLE[n]).any() for n in tensors if n.endswith(f".{line}"))
    bound = bind(loads(text), CONFIG)
    found = bound.find(f"layers.0.{line}")
    assert found is not None
    assert any(statement in s for s in trusted(found.expression, bound.sizes))


def test_copies_averaged() -> None:
    """Averaging is inexact, so it is listed even where the copies are equal."""
    text = planted(change("norm", "average(hidden, tp)", ""))
    np.testing.assert_array_equal(merged(text)["layers.0.norm"], WHOLE["layers.0.norm"])
    bound = bind(loads(text), CONFIG)
    found = bound.find("layers.0.norm")
    assert found is not None
    assert trusted(found.expression, bound.sizes) == ["that the copies over tp may be averaged"]
    shards = {**SHARDS, "layers.0.norm": [(at, x + at["tp"]) for at, x in SHARDS["layers.0.norm"]]}
    cuttings = check_shards(bound, {"tp": 2}, shards)
    mean = merge(found.expression, bound.sizes, cuttings["layers.0.norm"], shards["layers.0.norm"], "layers.0.norm")
    np.testing.assert_allclose(mean, WHOLE["layers.0.norm"] + 0.5)


def test_a_missing_shard() -> None:
    with pytest.raises(UcpError, match=r"'kv' is 2, but the shards of 'layers\.0\.k' over tp hold 1 \+ 0 = 1 of it"):
        check_shards(bind(loads(RIGHT), CONFIG), {"tp": 2}, {"layers.0.k": SHARDS["layers.0.k"][:1]})
