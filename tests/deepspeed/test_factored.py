"""Adafactor's rows and columns where tensor parallelism cuts the model: cut along the axes that they have."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import ucp
from tests.deepspeed import factored_jobs as jobs
from tests.engines.pool import RankPool
from tests.engines.tp_models import ARGS
from ucp.errors import Mismatch

pytestmark = pytest.mark.slow(seconds=25)

NAMES = ("Adafactor", "transformers' Adafactor")
PLAIN = (Path(ucp.__file__).parent / "specs" / "megatron_gpt_plain.yaml").read_text()
LAYER = "language_model.encoder.layers.{i}."
LINES = {
    # parameter: (its axes, without the last, without the one before)
    "language_model.embedding.word_embeddings.weight": ("(vocab+pad)/tp hidden", "(vocab+pad)/tp", "hidden"),
    LAYER + "self_attention.query_key_value.weight": (
        "(kv_heads/tp (q_per_kv | 1 | 1) head_dim) hidden",
        "(kv_heads/tp (q_per_kv | 1 | 1) head_dim)",
        "hidden",
    ),
    LAYER + "self_attention.dense.weight": (
        "hidden (kv_heads/tp q_per_kv head_dim)",
        "hidden",
        "(kv_heads/tp q_per_kv head_dim)",
    ),
    LAYER + "mlp.dense_h_to_4h.weight": ("(ffn/tp | ffn/tp) hidden", "(ffn/tp | ffn/tp)", "hidden"),
    LAYER + "mlp.dense_4h_to_h.weight": ("hidden ffn/tp", "hidden", "ffn/tp"),
}


def averaging(folder: Path, name: str) -> str:
    """A spec that says of each factor what it is, and to average those that ranks have of their own parts."""
    row, col, rows, columns = ("row_var", "col_var", "{} 1", "1 {}")
    if name != "Adafactor":
        row, col, rows, columns = ("exp_avg_sq_row", "exp_avg_sq_col", "{}", "{}")

    def said(axes: str) -> str:
        return axes if "/tp" in axes else f"average({axes}, tp)"

    kept = [line for line in PLAIN.splitlines() if not line.strip().startswith(tuple(LINES))]
    at = kept.index("parameters:") + 1
    more = [
        f'  {pattern}: {{axes: "{axes}", states: {{{row}: "{said(rows.format(without_last))}", '
        f'{col}: "{said(columns.format(without_other))}"}}}}'
        for pattern, (axes, without_last, without_other) in LINES.items()
    ]
    text = "\n".join([*kept[:at], *more, *kept[at:]]) + "\n"
    (folder / "spec.yaml").write_text(text)
    return str(folder / "spec.yaml")


def whole(ranks_held: list[dict[str, torch.Tensor]], checkpoint: Any) -> None:
    """Each rank's state lies in the checkpoint as its axes say: cut ones side by side, common ones once."""
    for label in ranks_held[0]:
        name, key = label.split(":")
        parts = [held[label] for held in ranks_held]
        one = label if (name, key) not in checkpoint.catalog.tensors else (name, key)
        found = checkpoint.read(name, key) if one == (name, key) else checkpoint.read(f"optim.state.{name}.{key}")
        if not jobs.is_cut(name) or (found.dim() < 2 and not ("row" in key or "col" in key)):
            continue
        if jobs.is_common(name, key) and ("row" in key or "col" in key):
            mean = torch.stack([p.double() for p in parts]).mean(0).float()
            assert torch.equal(found, mean), label
        elif "word_embeddings" in name:
            dim = 0
            assert torch.equal(found, torch.cat(parts, dim)[: found.shape[0]]), label
        elif "mlp.dense_h_to_4h" in name:
            gate, up = zip(*(p.chunk(2) for p in parts), strict=True)
            assert torch.equal(found, torch.cat([*gate, *up])), label
        else:
            assert torch.equal(found, torch.cat(parts, dim=max(range(found.dim()), key=lambda k: found.shape[k]))), (
                label
            )


@pytest.mark.parametrize("name", NAMES)
def test_factors_of_the_whole(ranks: RankPool, tmp_path: Path, name: str) -> None:
    """Where ranks keep them alike they are cut and put together exactly, and nobody has to say how."""
    both = ranks.run(jobs.saved_and_resumed, name, str(tmp_path / "two"), world_size=2)
    found, again = [one for one, _ in both], [other for _, other in both]
    assert not isinstance(found[0], str), found
    losses = found[0][1]
    with ucp.open(tmp_path / "two") as checkpoint:
        whole([held for held, _ in found], checkpoint)
    assert not isinstance(again[0], str), again
    for (held, further), (truth, _) in zip(again, found, strict=True):
        assert held.keys() == truth.keys()
        assert all(torch.equal(held[key], truth[key]) for key in truth)
        assert further == losses
    # on one rank, and from that on four
    _, further = ranks.run(
        jobs.resumed,
        name,
        True,
        "megatron_gpt_plain",
        "universal",
        str(tmp_path / "two"),
        str(tmp_path / "one"),
        world_size=1,
    )[0]
    assert further[0] == pytest.approx(losses[0], abs=1e-5)
    with ucp.open(tmp_path / "one") as checkpoint:
        whole([held for held, _ in found], checkpoint)
    four = ranks.run(jobs.resumed, name, True, None, "universal", str(tmp_path / "one"), world_size=4)
    assert all(isinstance(rank, tuple) for rank in four), four[0]
    # in DeepSpeed's own files for two ranks, by a spec
    ucp.convert(
        tmp_path / "one",
        tmp_path / "made",
        to="deepspeed",
        layout="dp=1,tp=2,zero=0",
        spec="megatron_gpt_plain",
        model_config=dict(ARGS),
    )
    again = ranks.run(jobs.resumed, name, True, None, "universal", str(tmp_path / "made"), world_size=2)
    for (held, further), (truth, _) in zip(again, found, strict=True):
        assert all(torch.equal(held[key], truth[key]) for key in truth)
        assert further == losses


@pytest.mark.parametrize("name", NAMES)
def test_factors_of_a_ranks_own_part(ranks: RankPool, tmp_path: Path, name: str) -> None:
    """Each rank's optimizer knows its own part alone: refused, or averaged by a spec, from DeepSpeed's own files."""
    found = ranks.run(
        jobs.saved, name, False, None, "universal", str(tmp_path / "no"), str(tmp_path / "two"), world_size=2
    )
    assert all("each tensor-parallel rank keeps it of its own part" in said for *_, said in found), found
    assert not (tmp_path / "no" / "t").exists()
    with pytest.raises(Mismatch, match=r"keeps this state of its own part of the parameter, and they differ"):
        ucp.open(tmp_path / "two")
    spec = averaging(tmp_path, name)
    with ucp.open(tmp_path / "two", spec=spec) as checkpoint:
        whole([held for held, *_ in found], checkpoint)
    _, further = ranks.run(
        jobs.resumed, name, False, spec, "deepspeed", str(tmp_path / "two"), str(tmp_path / "one"), world_size=1
    )[0]
    assert further[0] == pytest.approx(found[0][1][0], abs=1e-5)
    with ucp.open(tmp_path / "one", spec=spec) as checkpoint:
        whole([held for held, *_ in found], checkpoint)


@pytest.mark.parametrize("name", NAMES)
def test_factors_in_stages(ranks: RankPool, tmp_path: Path, name: str) -> None:
    """Two stages of a pipeline at ZeRO-0, from our files, into the same and into one stage. DeepSpeed's own files name
    no parameters there, and factors do not tell them by their shapes."""
    ours, theirs = str(tmp_path / "ours"), str(tmp_path / "theirs")
    stages = ranks.run(jobs.in_stages, name, 1, "", ours, theirs, world_size=2)
    truth = {key: value for held, _ in stages for key, value in held.items()}
    assert any("row" in key for key in truth)
    for said in ranks.run(jobs.in_stages, name, 2, theirs, world_size=2):
        assert "a pipeline without ZeRO does not name its stages' parameters" in said
    for count in (2, 1):
        found = ranks.run(jobs.in_stages, name, 2, ours, world_size=count)
        assert not isinstance(found[0], str), found
        again = {key: value for held, _ in found for key, value in held.items()}
        assert again.keys() == truth.keys()
        assert all(torch.equal(again[key], truth[key]) for key in truth)
        assert found[0][1] == (stages[0][1] if count == 2 else pytest.approx(stages[0][1], abs=1e-5))
