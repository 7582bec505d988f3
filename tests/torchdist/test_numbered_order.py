"""Optimizers that number their parameters: layers of one shape get their own states, however the model is built now.

The truth is the run that went on: plain torch, without a checkpoint.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed import checkpoint as dcp

import ucp
from tests.deepspeed.order_jobs import Alike
from ucp.errors import Mismatch, UcpError, Unsupported

Run = tuple[nn.Module, torch.optim.Optimizer]


def run(order: str, optimized: str, seed: int) -> Run:
    """optimized: 'module' or 'sorted', the order in which the optimizer got the parameters; 'groups': biases apart."""
    torch.manual_seed(seed)
    module = Alike(order)
    named = list(module.named_parameters())
    given: Sequence[nn.Parameter | dict[str, object]] = [p for _, p in named]
    if optimized == "sorted":
        given = [p for _, p in sorted(named)]
    elif optimized == "groups":
        given = [{"params": [p for n, p in named if n.endswith(end)]} for end in ("weight", "bias")]
    return module, torch.optim.AdamW(given, lr=0.01)


def losses(of: Run, steps: range) -> list[float]:
    module, optimizer = of
    out = []
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        x, y = (torch.randn(4, 6, generator=generator) for _ in range(2))
        loss = (module(x) - y).square().mean()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
        out.append(loss.item())
    return out


def saved(path: Path, kind: str, optimized: str, *, by_name: bool = False) -> list[float]:
    """Train, save by torch alone, and return the losses that follow. by_name: as tools write it that sort by name."""
    first = run("abc", optimized, 1)
    losses(first, range(3))
    model = first[0].state_dict()
    state = {
        "model": {name: model[name] for name in sorted(model)} if by_name else model,
        "optimizer": first[1].state_dict(),
    }
    if kind == "dcp":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dcp.save(state, checkpoint_id=path)
    else:
        torch.save(state, path)
    return losses(first, range(3, 6))


def resumed(path: Path, order: str, optimized: str, **options: object) -> list[float] | UcpError:
    new = run(order, optimized, 2)
    try:
        ucp.load_training(path, model=new[0], optimizer=new[1], **options)
    except UcpError as error:
        return error
    return losses(new, range(3, 6))


@pytest.mark.parametrize("kind", ["dcp", "pt"])
@pytest.mark.parametrize("optimized", ["module", "sorted", "groups"])
def test_states_follow_their_parameters(tmp_path: Path, kind: str, optimized: str) -> None:
    path = tmp_path / f"saved.{kind}"
    truth = saved(path, kind, optimized)
    for order in ("abc", "bac", "cab"):
        assert resumed(path, order, optimized) == truth, order


@pytest.mark.parametrize("kind", ["dcp", "pt"])
def test_another_order_than_the_module_s_is_refused(tmp_path: Path, kind: str) -> None:
    for before, now in (("module", "sorted"), ("sorted", "module")):
        path = tmp_path / f"{before}.{kind}"
        truth = saved(path, kind, before)
        for order in ("abc", "bac"):
            assert isinstance(resumed(path, order, now), (Mismatch, Unsupported))
        names = [name for name, _ in Alike("abc").named_parameters()]
        given = [names if before == "module" else sorted(names)]
        assert resumed(path, "bac", now, param_names=given) == truth


@pytest.mark.parametrize("kind", ["dcp", "pt"])
def test_names_that_a_tool_has_sorted_prove_no_order(
    tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    """By the file the biases come first, which the states' shapes contradict; of a group of biases nothing does."""
    path = tmp_path / f"one.{kind}"
    truth = saved(path, kind, "module", by_name=True)
    assert resumed(path, "abc", "module") == truth
    path = tmp_path / f"groups.{kind}"
    truth = saved(path, kind, "groups", by_name=True)
    assert resumed(path, "abc", "groups") == truth
    found = resumed(path, "bac", "groups")
    assert isinstance(found, (Mismatch, Unsupported))
    assert "alphabetical order, as tools sort them" in f"{found} {caplog.text}"
    names = [[f"{layer}.{what}" for layer in "abc"] for what in ("weight", "bias")]
    assert resumed(path, "bac", "groups", param_names=names) == truth
