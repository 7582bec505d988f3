"""The search over coefficients and the loss along a line; on a small Llama of a synthetic text they are of use."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

import ucp
from ucp.errors import BadArgument, Mismatch
from ucp.merging import barrier, search

SIZES = (3, 4)


def saved(path: Path, seed: int) -> Path:
    generator = torch.Generator().manual_seed(seed)
    weights = {"w": torch.randn(SIZES, generator=generator), "b": torch.randn(5, generator=generator)}
    ucp.save({"model": weights}, path)
    return path


def valley(weights: Any) -> float:
    """Lowest where the first weight is 2 of the first, -1.5 of the second, 0.5 of the third source."""
    wanted = sum(
        c * torch.randn(SIZES, generator=torch.Generator().manual_seed(k)) for k, c in enumerate((2.0, -1.5, 0.5))
    )
    return float(((weights["w"] - wanted) ** 2).sum())


def test_coefficients_sum_to_one_and_improve(tmp_path: Path) -> None:
    sources = [saved(tmp_path / f"{k}", k) for k in range(3)]
    few, many = (search(sources, valley, budget, log=tmp_path / f"{budget}.jsonl") for budget in (20, 600))
    assert many.objective < 0.5 * few.objective
    assert any(w < 0 for w in many.weights)
    assert sum(many.weights) == pytest.approx(1.0)
    lines = [json.loads(line) for line in (tmp_path / "600.jsonl").read_text().splitlines()]
    assert [line["evaluation"] for line in lines] == list(range(1, 601))
    assert min(line["objective"] for line in lines) == many.objective


def test_an_interrupted_search_goes_on_as_if_nothing_had_happened(tmp_path: Path) -> None:
    sources = [saved(tmp_path / f"{k}", k) for k in range(3)]
    whole = search(sources, valley, 90, seed=4, log=tmp_path / "whole.jsonl")
    calls = 0

    def failing(weights: Any) -> float:
        nonlocal calls
        calls += 1
        if calls == 41:
            raise KeyboardInterrupt
        return valley(weights)

    with pytest.raises(KeyboardInterrupt):
        search(sources, failing, 90, seed=4, log=tmp_path / "cut.jsonl")
    with (tmp_path / "cut.jsonl").open("a") as stream:
        stream.write('{"evaluation": 41, "coeff')  # as a kill leaves it
    assert search(sources, failing, 90, seed=4, log=tmp_path / "cut.jsonl") == whole
    assert calls == 41 + 50
    assert (tmp_path / "cut.jsonl").read_text() == (tmp_path / "whole.jsonl").read_text()
    with pytest.raises(BadArgument, match="evaluation 7 is of other coefficients"):
        search(sources, valley, 90, seed=5, log=tmp_path / "cut.jsonl")


def test_an_evaluation_reads_no_file_and_adds_each_difference_once(tmp_path: Path) -> None:
    sources = [saved(tmp_path / f"{k}", k) for k in range(3)]
    counts: list[Counter[str]] = []

    class Counting(TorchDispatchMode):
        def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            counts[-1][operation.__name__] += 1
            return operation(*args, **(kwargs or {}))

    def objective(weights: Any) -> float:
        for source in sources:
            shutil.rmtree(source, ignore_errors=True)
        with _disable_current_modes():
            value = valley(weights)
        counts.append(Counter())
        return value

    counts.append(Counter())
    with Counting():
        found = search(sources, objective, 25, log=tmp_path / "log.jsonl")
    assert found.evaluations == 25
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    # Since the evaluation before, for each of the two tensors: the sources with a coefficient, and a copy.
    for line, done in zip(lines[1:], counts[1:], strict=False):
        added = sum(coefficient != 0 for coefficient in line["coefficients"][1:])
        assert done == {"add.Tensor": 2 * added, "copy_.default": 2}


def test_other_models_are_refused(tmp_path: Path) -> None:
    ucp.save({"model": {"w": torch.zeros(2, 2), "b": torch.zeros(5)}}, tmp_path / "other")
    with pytest.raises(Mismatch, match=r"'w' is \[3, 4\] and \[2, 2\]"):
        search([saved(tmp_path / "0", 0), tmp_path / "other"], valley, 5)
    with pytest.raises(Mismatch, match="the model has no 'b'"):
        search([saved(tmp_path / "0", 0), saved(tmp_path / "1", 1)], valley, 5, model=torch.nn.Module())


def test_the_barrier_between_two_valleys(tmp_path: Path) -> None:
    for name, value in (("a", 0.0), ("b", 2.0)):
        ucp.save({"model": {"x": torch.tensor([value])}}, tmp_path / name)
    found = barrier(tmp_path / "a", tmp_path / "b", lambda w: float((w["x"] ** 2 - 1) ** 2 * -1 + 9), points=5)
    assert found.t == (0.0, 0.25, 0.5, 0.75, 1.0)
    assert found.objectives == pytest.approx((8.0, 8.4375, 9.0, 7.4375, 0.0))
    assert found.height == pytest.approx(max(9.0 - 4.0, 8.4375 - 6.0, 7.4375 - 2.0))
    assert barrier(tmp_path / "a", tmp_path / "b", lambda w: float(w["x"] ** 2)).height == 0.0


@pytest.mark.slow
def test_a_tails_mean_and_a_search_are_of_use(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    torch.set_num_threads(1)
    transition = np.random.default_rng(0).dirichlet(np.full(32, 0.2), 32)
    cumulative = torch.from_numpy(transition.cumsum(1))

    def text(rows: int, seed: int) -> torch.Tensor:
        draw = torch.Generator().manual_seed(seed)
        out = [torch.randint(32, (rows,), generator=draw)]
        for _ in range(31):
            u = torch.rand(rows, 1, generator=draw, dtype=torch.float64)
            out.append((cumulative[out[-1]] < u).sum(1).clamp(max=31))
        return torch.stack(out, 1)

    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        vocab_size=32,
        max_position_embeddings=64,
    )
    model = LlamaForCausalLM(config)

    def loss_on(data: torch.Tensor) -> torch.Tensor:
        logits = model(data).logits[:, :-1]
        return F.cross_entropy(logits.reshape(-1, 32), data[:, 1:].reshape(-1))

    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    tail: list[Path] = []
    for step in range(1, 501):
        loss = loss_on(text(8, step))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step > 300 and step % 20 == 0:
            tail.append(tmp_path / f"step{step}")
            ucp.save({"model": model.state_dict()}, tail[-1])
    held_out, searched = text(512, 10_001), text(128, 10_002)

    @torch.no_grad()
    def on(data: torch.Tensor) -> float:
        return float(loss_on(data))

    last = on(held_out)
    assert len(tail) == 10
    found = search(tail, lambda m: on(searched), 200, model=model, log=tmp_path / "log.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    (uniform,) = {line["objective"] for line in lines if line["coefficients"] == [0.1] * 10}
    assert found.objective <= uniform
    best_held_out = on(held_out)
    ucp.merging.merge(tail, tmp_path / "mean")
    ucp.load({"model": (state := model.state_dict())}, tmp_path / "mean")
    model.load_state_dict(state)
    mean_held_out = on(held_out)
    print(f"held out: last {last:.4f}, mean {mean_held_out:.4f}, searched {best_held_out:.4f}")
    assert mean_held_out < last
