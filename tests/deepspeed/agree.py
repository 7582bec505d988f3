"""Whether an engine holds what another one held, where their layouts, dtypes and wrappers differ.

Both sides are truths read from live engines (``tests.engines.truth``); nothing here uses this project's library. What
must be equal is equal to the bit, after the one change that the target's own kind asks for: low-precision weights are
the masters rounded once, and values kept in fewer bits at the source are the same values in more bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tests.engines.truth import Truth

# How an engine computes rather than what it has learnt; and where it keeps its step count.
IMPLEMENTATION = frozenset(
    ("names", "params", "foreach", "fused", "capturable", "differentiable", "step", "use_muon", "name")
)
# Of a dynamic loss scaler: how far it has come. Stage 0 keeps no hysteresis.
PROGRESS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


def plain_name(name: str) -> str:
    """The name without the wrapper that the tests' models may have."""
    return name.removeprefix("_orig_mod.")


def holds_exactly(wide: torch.dtype, narrow: torch.dtype) -> bool:
    """Whether every value of ``narrow`` is one of ``wide``."""
    return wide == narrow or (wide == torch.float32 and narrow in (torch.bfloat16, torch.float16))


def differences(source: Truth, target: Truth, *, optimizer: bool = True, rest: bool = True) -> list[str]:
    """What of ``source`` the target does not hold, one line each; [] after an exact resume.

    optimizer: compare states, steps and hyperparameters too. rest: counters, loss scaler and lr scheduler too.
    """
    lines: list[str] = []
    _masters(source, target, optimizer, lines)
    _held("frozen", source.frozen, target.frozen, lines)
    _held("buffers", source.buffers, target.buffers, lines)
    aliases = [{plain_name(k): plain_name(v) for k, v in t.aliases.items()} for t in (source, target)]
    if aliases[0] != aliases[1]:
        lines.append(f"aliases: {aliases[0]} != {aliases[1]}")
    if optimizer:
        _groups(source, target, lines)
    if rest:
        if dict(source.counters) != dict(target.counters):
            lines.append(f"counters: {dict(source.counters)} != {dict(target.counters)}")
        _scaler(source.loss_scaler, target.loss_scaler, lines)
        if source.lr_scheduler != target.lr_scheduler:
            lines.append(f"lr_scheduler: {source.lr_scheduler} != {target.lr_scheduler}")
    return lines


def _masters(source: Truth, target: Truth, optimizer: bool, lines: list[str]) -> None:
    ours = {plain_name(n): n for n in source.params}
    theirs = {plain_name(n): n for n in target.params}
    if ours.keys() != theirs.keys():
        lines.append(f"trained parameters: {sorted(ours.keys() ^ theirs.keys())} on one side only")
        return
    for name in ours:
        a, b = source.params[ours[name]], target.params[theirs[name]]
        if not optimizer:
            a, b = {"param": a["param"]}, {"param": b["param"]}
        if a.keys() != b.keys():
            lines.append(f"{name}: states {sorted(a)} != {sorted(b)}")
        for state in a.keys() & b.keys():
            _tensors(f"{name} {state}", a[state], b[state], lines)
        module = target.module[theirs[name]]
        if not torch.equal(_bits(a["param"].to(module.dtype)), _bits(module)):
            lines.append(f"{name}: the module's weight is not the source's master, rounded")
        if optimizer:
            _steps(
                name, source.scalars.get(ours[name], {}), target.scalars.get(theirs[name], {}), source, target, lines
            )


def _steps(
    name: str, a: Mapping[str, Any], b: Mapping[str, Any], source: Truth, target: Truth, lines: list[str]
) -> None:
    """Step counts, wherever they are kept: beside the states, or in the param group."""
    values = []
    for scalars, truth in ((a, source), (b, target)):
        found = {k: float(v) for k, v in scalars.items()}
        for group in truth.groups:
            if "step" in group and name in {plain_name(n) for n in group["names"]}:
                found.setdefault("step", float(group["step"]))
        values.append(found)
    if values[0] != values[1]:
        lines.append(f"{name}: {values[0]} != {values[1]}")


def _held(what: str, ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor], lines: list[str]) -> None:
    """Tensors that the target keeps in its own precision (zero.Init, for one, makes buffers bf16, too)."""
    a = {plain_name(n): t for n, t in ours.items()}
    b = {plain_name(n): t for n, t in theirs.items()}
    if a.keys() != b.keys():
        lines.append(f"{what}: {sorted(a.keys() ^ b.keys())} on one side only")
    for name in a.keys() & b.keys():
        _tensors(
            f"{what} {name}", a[name].to(b[name].dtype) if a[name].is_floating_point() else a[name], b[name], lines
        )


def _tensors(what: str, a: Tensor, b: Tensor, lines: list[str]) -> None:
    if a.shape != b.shape or not holds_exactly(b.dtype, a.dtype):
        lines.append(f"{what}: {a.dtype} {tuple(a.shape)} != {b.dtype} {tuple(b.shape)}")
    elif not torch.equal(_bits(a.to(b.dtype)), _bits(b)):
        lines.append(f"{what}: {int((_bits(a.to(b.dtype)) != _bits(b)).sum())} of {a.numel()} elements differ")


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def _groups(source: Truth, target: Truth, lines: list[str]) -> None:
    """Each param group of the target has the hyperparameters that its parameters had at the source."""
    for group in target.groups:
        names = {plain_name(n) for n in group["names"]}
        for origin in source.groups:
            if not names & {plain_name(n) for n in origin["names"]}:
                continue
            for key in (origin.keys() & group.keys()) - IMPLEMENTATION:
                if _plain(origin[key]) != _plain(group[key]):
                    lines.append(f"group of '{min(names)}': {key} is {origin[key]!r} != {group[key]!r}")
    members = [sorted(plain_name(n) for g in t.groups for n in g["names"]) for t in (source, target)]
    if members[0] != members[1]:
        lines.append(f"param groups: {members[0]} != {members[1]}")


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value.item() if isinstance(value, Tensor) else value


def _scaler(a: Mapping[str, Any] | None, b: Mapping[str, Any] | None, lines: list[str]) -> None:
    if a is None or b is None or not (_dynamic(a) and _dynamic(b)):
        return
    for key in PROGRESS:
        if key in a and key in b and a[key] != b[key]:
            lines.append(f"loss_scaler: {key} is {a[key]} != {b[key]}")


def _dynamic(scaler: Mapping[str, Any]) -> bool:
    return bool(scaler.get("dynamic", scaler.get("dynamic_loss_scale", False)))
