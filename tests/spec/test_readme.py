"""The examples in the language's reference, run."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

import ucp
from tests.property import cut, ids
from ucp.errors import Position, SpecError
from ucp.spec import arithmetic, shipped
from ucp.spec.bound import bind
from ucp.spec.evaluate import Cutting, shape_of, shard
from ucp.spec.foreign_names import assemble
from ucp.spec.grammar import parse
from ucp.spec.language import loads
from ucp.spec.positions import SpecText

README = Path(ucp.__file__).parent / "specs/README.md"
TEXT = README.read_text(encoding="utf-8")


def table(header: str) -> list[list[str]]:
    """The cells of the table with this first column, code marks taken off."""
    lines = TEXT.splitlines()
    at = next(k for k, line in enumerate(lines) if line.startswith(f"| {header} |"))
    rows = []
    for line in lines[at + 2 :]:
        if not line.startswith("|"):
            break
        rows.append([c.strip().replace("\\|", "|") for c in re.split(r"(?<!\\)\|", line)[1:-1]])
    return rows


def numbers(text: str) -> dict[str, int]:
    return {k: int(v) for k, v in (pair.split("=") for pair in text.split())}


@pytest.mark.parametrize(("expression", "sizes", "ranks", "shards"), table("expression"))
def test_what_a_rank_holds(expression: str, sizes: str, ranks: str, shards: str) -> None:
    tree = parse(SpecText(expression.strip("`"), Position("README", 1, 1)))
    known, mesh = numbers(sizes), numbers(ranks)
    padded = {"vocab": known["vocab"] + known.pop("pad")} if "pad" in known else {}
    tensor = ids(shape_of(tree, known))
    found = []
    for index in np.ndindex(*mesh.values()):
        held = shard(tree, known, Cutting(mesh, padded=padded), dict(zip(mesh, index, strict=True)))
        (buffer,) = cut(held.blocks, [int(np.prod(held.shape))], tensor)
        found.append(" ".join("pad" if n < 0 else str(n) for n in buffer.tolist()))
    assert " · ".join(found) == shards


@pytest.mark.parametrize(("name", "lines", "chosen"), table("name"))
def test_which_line_counts(name: str, lines: str, chosen: str) -> None:
    patterns = [p.strip("` ") for p in lines.split("·")]
    body = "\n".join(f'  {p}: "{k + 1}"' for k, p in enumerate(patterns))
    text = f"ucp: 1\nmodel: x\nparameters:\n{body}\n"
    if chosen == "refused":
        with pytest.raises(SpecError, match="equally specific"):
            loads(text)
    else:
        found = bind(loads(text)).find(name.strip("`"))
        assert found is not None
        assert str(found.pattern) == chosen.strip("`")


@pytest.mark.parametrize(("size", "config", "value"), table("size"))
def test_sizes(size: str, config: str, value: str) -> None:
    text = f'ucp: 1\nmodel: x\nsizes: {{n: "{size.strip("`")}"}}\nparameters: {{w: n}}\n'
    if value == "refused":
        with pytest.raises(SpecError, match="leaves a remainder"):
            bind(loads(text), numbers(config))
    else:
        assert bind(loads(text), numbers(config)).sizes == {"n": int(value)}
    assert arithmetic.parse(SpecText(size.strip("`"), Position("README", 1, 1))).references()


def test_the_spec_and_the_names_are_the_catalogues() -> None:
    first, second, third = re.findall(r"```yaml\n(.*?)```", TEXT, re.DOTALL)
    assert third.partition("huggingface:\n")[2] in (README.parent / "qwen3_moe.yaml").read_text()
    spec = loads(f"{first}{second}", str(README))
    config = {
        "hidden_size": 24,
        "num_key_value_heads": 2,
        "num_attention_heads": 6,
        "intermediate_size": 20,
        "vocab_size": 101,
        "tie_word_embeddings": True,
    }
    bound, other = bind(spec, config), bind(shipped.find("llama"), config)
    assert bound.sizes == other.sizes
    for name in ("model.embed_tokens.weight", "model.layers.3.self_attn.q_proj.weight", "lm_head.weight"):
        a, b = bound.find(name), other.find(name)
        assert a is not None
        assert b is not None
        assert (str(a.expression), a.tied_to) == (str(b.expression), b.tied_to)
    fused = assemble(bound, "megatron", "decoder.layers.0.self_attention.linear_qkv.weight")
    assert fused is not None
    assert fused.shape == (40, 24)


def test_every_command_of_the_reference_exists() -> None:
    from ucp.cli.spec import parser

    for line in re.findall(r"^ucp-spec (.*?)(?:\s+#.*)?$", TEXT, re.MULTILINE):
        parser().parse_args(line.split())
